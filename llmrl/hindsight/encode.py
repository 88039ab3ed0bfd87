"""Dialogues as rows of token ids with what each token of the agent learns from; rows for several dialogues at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from tqdm import tqdm

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import AGENT, BadDialogue, Dialogue, ReadDialogues
from llmrl.hindsight.targets import Backup, Span, backup, turn_steps, turns_to_go
from llmrl.rollout.logged import encode_messages
from llmrl.types import Turn


@dataclass(frozen=True)
class Encoded:
    """One dialogue by its token ids, or, where the agent reads a window, a part of one.

    A part holds one turn of the agent, or several that read one growing context, and behind it what the agent reads before its
    next turn: a context of its own, whose last state is bootstrapped from.

    Attributes:
        id: of the dialogue.
        input_ids: all of it; of a part both contexts, one after the other.
        spans: the agent's turns in it, the token that ends each included.
        done: nothing comes after; see `Dialogue`.
        total: sum of the dialogue's rewards.
        lengths: of the contexts, each read apart; one of a whole dialogue.
        turns: all turns of the dialogue, where it is a part: their rewards and lengths are what is to go.
        first: number of the first span in `turns`.
    """

    id: str
    input_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    done: bool
    total: float
    lengths: tuple[int, ...] = ()
    turns: tuple[Span, ...] = ()
    first: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", self.lengths or (len(self.input_ids),))

    def backup(self, kind: str, discount: float, unit: str) -> Backup:
        """Return what its actions learn from, see `llmrl.hindsight.targets.backup`."""
        last, later = len(self.input_ids) - 1, 0.0
        if rest := self.turns[self.first + len(self.spans) :]:
            later = discount ** turn_steps(rest[0], unit) * turns_to_go(rest, discount, unit)[0]
        return backup(self.spans, last=last, done=self.done, kind=kind, discount=discount, unit=unit, later=later)


def encode_dialogue(tokenizer: Any, dialogue: Dialogue) -> Encoded:
    """Return a dialogue by its token ids; where it was cut off, the prompt for the agent's next turn stands at its end.

    Raises:
        DataError: the tokenizer or its template cannot write it, see `llmrl.rollout.logged`.
        ModelError: there is no template, or one without an end of turns.
    """
    ids, spans = _segment(_turns(tokenizer, dialogue, None))
    return Encoded(dialogue.id, ids, spans, dialogue.done, dialogue.total)


def encode_parts(tokenizer: Any, dialogue: Dialogue, window: int) -> list[Encoded]:
    """Return a dialogue as the parts that an agent reads whose window holds so many exchanges, see `Conversation`.

    Raises:
        DataError, ModelError: see `encode_dialogue`.
    """
    segments = [list(turns) for _, turns in groupby(_turns(tokenizer, dialogue, window), lambda pair: pair[0].segment)]
    read = [_segment(turns) for turns in segments]
    turns = tuple(span for _, spans in read for span in spans)
    parts, first = [], 0
    for (ids, spans), after in zip(read, [*read[1:], ((), ())], strict=True):
        if not spans:  # what the world said last, behind the last turn of all
            continue
        ahead = after[0][: after[1][0].start] if after[1] else () if dialogue.done else after[0]
        lengths = (len(ids), len(ahead)) if ahead else (len(ids),)
        ends = dialogue.done and first + len(spans) == len(turns)
        parts.append(Encoded(dialogue.id, ids + ahead, spans, ends, dialogue.total, lengths, turns, first))
        first += len(spans)
    return parts


def without_copies(rows: Sequence[Encoded], dialogues: Sequence[Dialogue]) -> tuple[list[Encoded], int]:
    """Take turns out of what is learnt that are copies of another dialogue's; they are still read. Return also their number.

    A regenerated dialogue is its parent's up to the edited turn. Learnt in both, faults would be learnt as often as they were
    mended later on; and because only a dialogue that went on can be edited late, copies favour what happened to go well.

    Args:
        rows: of the dialogues.
        dialogues: where the parent of one is not among them, all of it is learnt.
    """
    known = {dialogue.id for dialogue in dialogues}
    copied = {}
    for dialogue in dialogues:
        made = dialogue.provenance.get("regenerated")
        if made and made["parent"] in known:
            copied[dialogue.id] = sum(turn < made["turn"] for turn in dialogue.agent_turns)
    kept, left_out = list[Encoded](), 0
    for row in rows:
        skip = min(len(row.spans), max(0, copied.get(row.id, 0) - row.first))
        left_out += skip
        if skip < len(row.spans):
            kept.append(replace(row, spans=row.spans[skip:], first=row.first + skip))
    return kept, left_out


_Logged = tuple[Turn, float]


def _turns(tokenizer: Any, dialogue: Dialogue, window: int | None) -> list[_Logged]:
    try:
        turns = encode_messages(tokenizer, dialogue.messages, open_end=dialogue.truncated, window=window)
    except DataError as error:
        raise DataError(f"dialogue {dialogue.id}: {error}") from None
    return list(zip(turns, dialogue.rewards, strict=True))


def _segment(turns: Sequence[_Logged]) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """Return the ids that the turns of one segment make together, and the agent's turns in them."""
    ids: tuple[int, ...] = ()
    spans = []
    for turn, reward in turns:
        start, ids = len(ids), ids + turn.token_ids
        if turn.message.role == AGENT:
            spans.append(Span(start, len(ids), reward))
    return ids, tuple(spans)


def encode_dialogues(
    tokenizer: Any, read: ReadDialogues, max_length: int, window: int | None = None, *, progress: bool = False
) -> tuple[list[Encoded], ReadDialogues]:
    """Return the dialogues that a model can read as rows, and them and all those that are kept aside; none is cut.

    Args:
        tokenizer: with a chat template.
        read: what the files hold.
        max_length: the longest row in tokens.
        window: exchanges that the agent reads; None is the whole dialogue, one row each, else see `encode_parts`.
        progress: show a bar.

    Raises:
        DataError: none is left.
        ModelError: see `encode_dialogue`.
    """
    rows: list[Encoded] = []
    kept, refused = [], list(read.refused)
    for one in tqdm(read.dialogues, desc="dialogues", unit="dialogue", disable=not progress, dynamic_ncols=True):
        try:
            parts = encode_parts(tokenizer, one, window) if window else [encode_dialogue(tokenizer, one)]
            longest = max(length for part in parts for length in part.lengths)
            if longest > max_length:
                raise BadDialogue("too long", f"dialogue {one.id}: {longest} tokens, expected at most {max_length}")
        except DataError as error:
            reason = error.reason if isinstance(error, BadDialogue) else "cannot be written by this model"
            refused.append((one.id, reason, str(error), one.to_json()))
            continue
        kept.append(one)
        rows += parts
    found = ReadDialogues(kept, refused)
    if not rows:
        words = "".join(f"\n{message}" for _, _, message, _ in refused[:1])
        raise DataError(f"no dialogue can be read by this model: {found.summary()}{words}")
    return rows, found

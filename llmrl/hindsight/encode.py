"""Dialogues as rows of token ids with what each token of the agent learns from; rows for several dialogues at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.targets import Backup, Span, backup
from llmrl.rollout.logged import encode_messages
from llmrl.types import Turn


@dataclass(frozen=True)
class Encoded:
    """One dialogue by its token ids.

    Attributes:
        id: of the dialogue.
        input_ids: all of it.
        spans: the agent's turns in it, the token that ends each included.
        done: see `Dialogue`.
        total: sum of the rewards.
    """

    id: str
    input_ids: tuple[int, ...]
    spans: tuple[Span, ...]
    done: bool
    total: float

    def backup(self, kind: str, discount: float, unit: str) -> Backup:
        """Return what its actions learn from, see `llmrl.hindsight.targets.backup`."""
        return backup(self.spans, last=len(self.input_ids) - 1, done=self.done, kind=kind, discount=discount, unit=unit)

    def scaled(self, factor: float) -> Encoded:
        """Return it with all rewards times a number."""
        spans = tuple(replace(span, reward=factor * span.reward) for span in self.spans)
        return replace(self, spans=spans, total=factor * self.total)


def encode_dialogue(tokenizer: Any, dialogue: Dialogue) -> Encoded:
    """Return a dialogue by its token ids; where it was cut off, the prompt for the agent's next turn stands at its end.

    Raises:
        DataError: the tokenizer or its template cannot write it, see `llmrl.rollout.logged`.
        ModelError: there is no template, or one without an end of turns.
    """
    try:
        turns = encode_messages(tokenizer, dialogue.messages, open_end=dialogue.truncated)
    except DataError as error:
        raise DataError(f"dialogue {dialogue.id}: {error}") from None
    spans, start = [], 0
    for turn, reward in zip(turns, dialogue.rewards, strict=True):
        stop = start + len(turn.token_ids)
        if turn.message.role == AGENT:
            spans.append(Span(start, stop, reward))
        start = stop
    return Encoded(dialogue.id, _ids(turns), tuple(spans), dialogue.done, dialogue.total)


def _ids(turns: Sequence[Turn]) -> tuple[int, ...]:
    return tuple(token for turn in turns for token in turn.token_ids)


def encode_dialogues(
    tokenizer: Any, dialogues: Sequence[Dialogue], max_length: int
) -> tuple[list[Encoded], list[tuple[str, str]]]:
    """Return the dialogues that a model can read, and (id, why) of those it cannot; none is cut.

    Args:
        tokenizer: with a chat template.
        dialogues: as read.
        max_length: the longest row in tokens.

    Raises:
        DataError: none is left.
        ModelError: see `encode_dialogue`.
    """
    kept, refused = [], []
    for dialogue in dialogues:
        try:
            row = encode_dialogue(tokenizer, dialogue)
        except DataError as error:
            refused.append((dialogue.id, str(error)))
            continue
        if len(row.input_ids) > max_length:
            refused.append((row.id, f"longer than {max_length} tokens"))
        else:
            kept.append(row)
    if not kept:
        raise DataError(f"no dialogue can be read by this model: {refusals(refused)}")
    return kept, refused


def refusals(refused: Sequence[tuple[str, str]]) -> str:
    """Return one line: how many dialogues were kept aside, by reason, with the first of each."""
    reasons = Counter(why.removeprefix(f"dialogue {name}: ") for name, why in refused)
    first = {why.removeprefix(f"dialogue {name}: "): name for name, why in reversed(refused)}
    return "; ".join(f"{count} {why} (first {first[why]})" for why, count in reasons.most_common(3))

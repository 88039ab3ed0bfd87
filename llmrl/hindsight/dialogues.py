"""A logged dialogue: what was said, what each of the agent's turns earned, how it ended, and where it comes from.

The agent is the `assistant`; everybody else (system, user, tool) is its world. A reward stands at the turn of the agent that
earned it: what came in between that turn and the agent's next one, or the end.

A file of dialogues is JSON lines of `Dialogue.to_json()`, of `Episode`s that an engine recorded, or of chat rows:

    {"messages": [{"role": "user", "content": "..."}, ...], "rewards": [0.0, 1.0, ...], "done": true}
    {"messages": [...], "reward": 1.0}          # one number for the whole dialogue: the agent's last turn gets it

Rows that cannot be learnt from are never dropped in silence: `read_dialogues` counts them and says why, `write_aside` keeps
them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.jsonl import read_objects, write_objects
from llmrl.types import ROLES, Episode, Message, Record, Turn

AGENT = "assistant"
_MOST_REWARD = 1e30  # squares of it still fit float64


class BadDialogue(DataError):
    """A dialogue that cannot be learnt from; `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Dialogue(Record):
    """One dialogue.

    Attributes:
        id: unique in its file.
        messages: in order; no two of the agent's in a row, none empty, at least one of the agent's.
        rewards: one a message; other than 0 only at the agent's.
        done: it came to its end; nothing is left to earn.
        truncated: a limit cut it; its last state still has a value.
        task: data set or environment.
        provenance: JSON: source row, seed, what was rewritten by whom.
    """

    id: str
    messages: tuple[Message, ...]
    rewards: tuple[float, ...]
    done: bool = True
    truncated: bool = False
    task: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._need(isinstance(self.id, str) and bool(self.id), "id", "non-empty text")
        self._need(isinstance(self.messages, list | tuple), "messages", "a list of messages")
        self._set(messages=tuple(m if isinstance(m, Message) else _message(self.id, m) for m in self.messages))
        self._need(isinstance(self.rewards, list | tuple), "rewards", "a list of numbers")
        self._need(isinstance(self.task, str), "task", "text")
        self._need(isinstance(self.provenance, Mapping), "provenance", "an object")
        try:
            json.dumps(dict(self.provenance), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"dialogue {self.id}: expected what JSON can hold in 'provenance' ({error})") from None
        for name in ("done", "truncated"):
            self._need(isinstance(getattr(self, name), bool), name, "true or false")
        _check(self)
        self._set(rewards=tuple(float(r) for r in self.rewards), provenance=dict(self.provenance))

    @property
    def agent_turns(self) -> tuple[int, ...]:
        """Indices of the agent's messages."""
        return tuple(i for i, message in enumerate(self.messages) if message.role == AGENT)

    @property
    def total(self) -> float:
        """Sum of the rewards."""
        return sum(self.rewards)

    def returns(self, discount: float = 1.0) -> tuple[float, ...]:
        """Return, for each turn of the agent, what was earned from it on; `discount` a turn of the agent."""
        found, after = [], 0.0
        for i in reversed(self.agent_turns):
            after = self.rewards[i] + discount * after
            found.append(after)
        return tuple(reversed(found))

    def to_episode(self) -> Episode:
        """Return it as an episode without token ids."""
        turns = [
            Turn(message, rewards={"reward": reward} if message.role == AGENT else {})
            for message, reward in zip(self.messages, self.rewards, strict=True)
        ]
        metadata = {"dialogue": self.id, "provenance": self.provenance}
        return Episode(
            self.id, 0, tuple(turns), done=self.done, truncated=self.truncated, source=self.task, metadata=metadata
        )

    @classmethod
    def from_episode(cls, episode: Episode) -> Dialogue:
        """Take the messages of an episode; the rewards of a turn are added up.

        Raises:
            BadDialogue: the episode failed, or see `Dialogue`.
        """
        metadata = dict(episode.metadata)
        name = str(metadata.pop("dialogue", f"{episode.row_id}/{episode.sample}"))
        inner = metadata.pop("provenance", {})
        if episode.error is not None:
            raise BadDialogue("failed episode", f"episode {name} failed: {episode.error}")
        return cls(
            id=name,
            messages=tuple(turn.message for turn in episode.turns),
            rewards=tuple(sum(turn.rewards.values()) for turn in episode.turns),
            done=episode.done,
            truncated=episode.truncated,
            task=episode.source,
            provenance={**inner, **metadata, **({} if episode.seed is None else {"seed": episode.seed})},
        )


def _message(name: str, value: Any) -> Message:
    role = value.get("role") if isinstance(value, Mapping) else None
    if isinstance(role, str) and role not in ROLES:
        raise BadDialogue("unknown role", f"dialogue {name}: role {role!r:.40}, expected one of {', '.join(ROLES)}")
    try:
        return Message.from_json(value)
    except DataError as error:
        raise BadDialogue("broken message", f"dialogue {name}: {error}") from None


def _check(dialogue: Dialogue) -> None:
    """Refuse what cannot be learnt from; the first of these that holds is the reason."""
    name, messages, rewards = dialogue.id, dialogue.messages, dialogue.rewards
    if dialogue.done == dialogue.truncated:
        raise BadDialogue("no end", f"dialogue {name}: expected exactly one of done and truncated to be true")
    agent = [message.role == AGENT for message in messages]
    if not any(agent):
        raise BadDialogue("no agent turn", f"dialogue {name}: no turn of the agent (role {AGENT!r})")
    for i, message in enumerate(messages):
        if any("\ud800" <= character <= "\udfff" for character in message.content):
            raise BadDialogue("broken text", f"dialogue {name}: half of a surrogate pair in turn {i} ({message.role})")
        if not message.content.strip() and not message.tool_calls:
            raise BadDialogue("empty turn", f"dialogue {name}: turn {i} ({message.role}) is empty")
        if i and agent[i] and agent[i - 1]:
            raise BadDialogue(
                "two agent turns in a row", f"dialogue {name}: turns {i - 1} and {i} are both the agent's"
            )
    if len(rewards) != len(messages):
        raise BadDialogue(
            "rewards of another length",
            f"dialogue {name}: {len(rewards)} rewards for {len(messages)} messages, expected one each",
        )
    for i, reward in enumerate(rewards):
        if not isinstance(reward, int | float) or isinstance(reward, bool) or not abs(reward) <= _MOST_REWARD:
            raise BadDialogue(
                "broken reward",
                f"dialogue {name}: reward {i} is {reward!r:.40}, expected a finite number below {_MOST_REWARD:g} in size",
            )
        if reward and not agent[i]:
            raise BadDialogue(
                "reward at another's turn",
                f"dialogue {name}: reward {reward:g} at turn {i} ({messages[i].role}), expected 0",
            )


@dataclass(frozen=True)
class ReadDialogues:
    """What was read, and what was not.

    Attributes:
        dialogues: in the order of the files.
        refused: (where, reason, message, row) of each row that cannot be learnt from.
    """

    dialogues: list[Dialogue]
    refused: list[tuple[str, str, str, Mapping[str, Any]]]

    def summary(self) -> str:
        """Return one line: how many were read and, by reason, kept aside, each with its first place."""
        reasons = Counter(reason for _, reason, _, _ in self.refused)
        first = {reason: where for where, reason, _, _ in reversed(self.refused)}
        aside = "; ".join(f"{count} {reason} (first at {first[reason]})" for reason, count in reasons.most_common())
        return f"{len(self.dialogues)} dialogues" + (f", {len(self.refused)} kept aside: {aside}" if aside else "")

    def write_aside(self, path: Path | str) -> None:
        """Write the rows that cannot be learnt from, with the reason; a file of an earlier run goes where there are none."""
        Path(path).unlink(missing_ok=True)
        if self.refused:
            rows = [{"where": w, "reason": r, "message": m, "row": _writable(row)} for w, r, m, row in self.refused]
            write_objects(path, rows)


def read_dialogues(paths: Sequence[Path | str]) -> ReadDialogues:
    """Read files of dialogues, in any of the three forms above.

    Args:
        paths: JSON lines, plain or gzipped.

    Raises:
        UsageError: a file is not there.
        DataError: a line is not a JSON object, two dialogues have one id, or no dialogue is left.
    """
    found: list[Dialogue] = []
    refused: list[tuple[str, str, str, Mapping[str, Any]]] = []
    seen: dict[str, str] = {}
    for path in paths:
        for where, row in read_objects(path):
            try:
                dialogue = dialogue_of(row, where)
            except BadDialogue as error:
                refused.append((where, error.reason, str(error), row))
                continue
            except DataError as error:
                refused.append((where, "broken row", str(error), row))
                continue
            if dialogue.id in seen:
                raise DataError(
                    f"{where}: the id {dialogue.id!r} was at {seen[dialogue.id]} already; ids must be unique"
                )
            seen[dialogue.id] = where
            found.append(dialogue)
    read = ReadDialogues(found, refused)
    if not found:
        raise DataError(f"no dialogue to learn from in {', '.join(map(str, paths))}: {read.summary()}")
    return read


def dialogue_of(row: Mapping[str, Any], where: str) -> Dialogue:
    """Return the dialogue in a row of any of the three forms.

    Args:
        row: the JSON object.
        where: "FILE:LINE", the id of a row without one.

    Raises:
        BadDialogue: it cannot be learnt from.
        DataError: it is in none of the forms.
    """
    row = {key: value for key, value in row.items() if value is not None}  # tables fill columns with null
    if "turns" in row:
        return Dialogue.from_episode(Episode.from_json(row))
    if "messages" not in row:
        raise DataError(
            f"{where}: expected 'messages' (a chat) or 'turns' (an episode), got {', '.join(row) or 'no keys'}"
        )
    known = {"id", "messages", "rewards", "reward", "done", "truncated", "task", "provenance"}
    messages, given = row["messages"], row.get("provenance", {})
    if not isinstance(messages, list | tuple):
        raise BadDialogue("broken message", f"{where}: expected a list of messages, got {type(messages).__name__}")
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: expected an object in 'provenance', got {given!r:.40}")
    if ("rewards" in row) == ("reward" in row):
        raise BadDialogue("no rewards", f"{where}: expected 'rewards' (one a message) or 'reward' (one for all)")
    rewards = row["rewards"] if "rewards" in row else _at_the_end(messages, row["reward"])
    truncated = row.get("truncated", False)
    kept = {key: value for key, value in row.items() if key not in known}
    return Dialogue(
        id=str(row.get("id", where)),
        messages=tuple(messages),
        rewards=rewards,
        done=row.get("done", not truncated),
        truncated=truncated,
        task=row.get("task", ""),
        provenance={**given, **({"columns": kept} if kept else {})},
    )


def _at_the_end(messages: Sequence[Any], reward: Any) -> tuple[Any, ...]:
    """Return rewards of which the agent's last turn has all; it is checked later."""
    agent = [i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == AGENT]
    return tuple(reward if i == (agent[-1] if agent else -1) else 0.0 for i in range(len(messages)))


def _writable(value: Any) -> Any:
    """Return a JSON value with numbers that JSON cannot hold as text, and halves of surrogate pairs spelled out."""
    if isinstance(value, Mapping):
        return {_writable(key): _writable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

"""What the loaders of published dialogues share: the rows of a JSON file, and turns joined into a `Dialogue`."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmrl.errors import DataError, UsageError
from llmrl.hindsight.dialogues import AGENT, BadDialogue, Dialogue, ReadDialogues
from llmrl.types import Message

_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")


class Said(NamedTuple):
    """One turn as a data set has it."""

    by_agent: bool
    text: str
    reward: float = 0.0


def read_rows(path: Path | str, dialogue_of: Callable[[Any, str], Dialogue], *, lists: bool = False) -> ReadDialogues:
    """Read a file of rows, one dialogue each.

    Args:
        path: JSON lines, or one JSON array of the rows; plain or gzipped, told apart by the suffix.
        dialogue_of: makes the dialogue of a row; "NAME:LINE" (of an array: its index from 1) says where it stands.
        lists: a row may be a list too, not only an object.

    Raises:
        UsageError: the file is not there.
        DataError: the file is not JSON, a row is no object, two dialogues have one id, or no dialogue is left.
    """
    found: list[Dialogue] = []
    refused: list[tuple[str, str, str, Mapping[str, Any]]] = []
    seen: dict[str, str] = {}
    for where, row in _rows(Path(path).expanduser()):
        if not isinstance(row, dict) and not (lists and isinstance(row, list)):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        try:
            dialogue = dialogue_of(row, where)
        except DataError as error:
            reason = error.reason if isinstance(error, BadDialogue) else "broken row"
            refused.append((where, reason, str(error), row if isinstance(row, dict) else {"row": row}))
            continue
        if dialogue.id in seen:
            raise DataError(f"{where}: the id {dialogue.id!r} was at {seen[dialogue.id]} already; ids must be unique")
        seen[dialogue.id] = where
        found.append(dialogue)
    read = ReadDialogues(found, refused)
    if not found:
        raise DataError(f"no dialogue to learn from in {path}: {read.summary()}")
    return read


def dialogue_from(
    where: str,
    turns: Sequence[Said],
    *,
    id: str,
    task: str,
    done: bool = True,
    system: str = "",
    provenance: Mapping[str, Any],
) -> Dialogue:
    """Return the dialogue of these turns; a turn that follows one of the same side is joined to it by a line break.

    Texts lose the white space around them. The provenance tells where the row stood and how many turns were joined.

    Args:
        where: "NAME:LINE", for refusals.
        turns: in order, all sides but the agent's being one.
        id: of the dialogue.
        task: the data set.
        done: it came to its end; else a limit cut it.
        system: what the agent knew beforehand; "" for nothing.
        provenance: what else to keep of the row.

    Raises:
        BadDialogue: no turns, an empty one, a reward at another's turn, or see `Dialogue`.
    """
    if not turns:
        raise BadDialogue("no turns", f"{where}: a dialogue without turns")
    messages = [Message("system", system)] if system else []
    rewards = [0.0] * len(messages)
    before: bool | None = None
    for i, turn in enumerate(turns):
        text = turn.text.strip()
        if not text:  # joined to its neighbour it would be gone without a word
            raise BadDialogue("empty turn", f"{where}: turn {i} is empty")
        if turn.reward and not turn.by_agent:  # two of them could add up to nothing
            raise BadDialogue(
                "reward at another's turn", f"{where}: reward {turn.reward:g} at turn {i}, which is not the agent's"
            )
        if turn.by_agent == before:
            messages[-1] = Message(messages[-1].role, f"{messages[-1].content}\n{text}")
            rewards[-1] += turn.reward
        else:
            messages.append(Message(AGENT if turn.by_agent else "user", text))
            rewards.append(turn.reward)
        before = turn.by_agent
    joined = len(turns) + bool(system) - len(messages)
    return Dialogue(
        id=id,
        messages=tuple(messages),
        rewards=tuple(rewards),
        done=done,
        truncated=not done,
        task=task,
        provenance={"row": where, "joined": joined, **provenance},
    )


def paid(turns: Sequence[Said], reward: float) -> list[Said]:
    """Return the turns with the reward at the agent's last one."""
    last = max((i for i, turn in enumerate(turns) if turn.by_agent), default=-1)
    return [turn._replace(reward=reward) if i == last else turn for i, turn in enumerate(turns)]


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def value_of(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a value of a row that is there and of this kind; true and false are no numbers, nor are NaN and infinity.

    Raises:
        DataError: it is not.
    """
    value = row.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds or (isinstance(value, int | float) and bool not in kinds and not is_number(value)):
        names = " or ".join(k.__name__ for k in kinds)
        raise DataError(f"{where}: expected '{key}' ({names}), got {value!r:.60}")
    return value


def turns_of(row: Mapping[str, Any], agent: str, others: Sequence[str], where: str) -> list[Said]:
    """Return the turns of a row whose `turns` are objects with `role` and `text`.

    Raises:
        BadDialogue: a role that is neither the agent's nor one of the others'.
        DataError: a turn is no such object.
    """
    said = []
    for i, turn in enumerate(value_of(row, "turns", list, where)):
        place = f"{where}, turn {i}"
        if not isinstance(turn, dict):
            raise DataError(f"{place}: expected an object, got {turn!r:.60}")
        role = value_of(turn, "role", str, place)
        if role != agent and role not in others:
            raise BadDialogue(
                "unknown role", f"{place}: expected the role {' or '.join([agent, *others])}, got {role!r}"
            )
        said.append(Said(role == agent, value_of(turn, "text", str, place)))
    return said


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("NAME:LINE", row): the place without the folder, so that it is the same wherever the file lies."""
    if not path.exists():
        raise UsageError(f"not found: {path}")
    if path.is_dir() or not path.name.endswith(_SUFFIXES):
        what = "a folder" if path.is_dir() else "another kind of file"
        raise DataError(f"{path} is {what}: expected a file that ends in {', '.join(_SUFFIXES)}")
    raw = path.read_bytes()
    try:
        text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}; make or fetch it again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); convert the file") from error
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path.name}:{number}", _parsed(line, f"{path}:{number}")
        return
    rows = _parsed(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected one array of dialogues, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{path.name}:{number}", row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise DataError(f"{where}: not JSON that can be read ({str(error).splitlines()[0]})") from error

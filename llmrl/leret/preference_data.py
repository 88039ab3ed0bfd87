"""Training rows of both stages: token ids as the engine gave them, read from sft.jsonl and pairs.jsonl.

    sft.jsonl      prompt_ids, completion_ids; beside them question_id, hop, query, reward
    pairs.jsonl    prompt_ids, chosen_ids, rejected_ids; beside them question_id, hop, both queries, both rewards

The loss covers the completions and nothing else: which ids those are stands in the file, and no text is encoded again. The
columns `prompt`, `chosen`, `rejected` and `completion` hold the same as messages, for people and for trl; they are not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmrl.errors import DataError, UsageError
from llmrl.jsonl import read_objects

LONG_ROWS = ("refuse", "drop")
_SHOWN = 3


@dataclass(frozen=True)
class SftRow:
    """A prompt and the completion to imitate, as token ids; `where` is FILE:LINE, for messages."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    where: str = ""

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class PairRow:
    """A prompt, a better and a worse completion, as token ids; `where` is FILE:LINE, for messages."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    where: str = ""

    @property
    def length(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


Row = TypeVar("Row", SftRow, PairRow)


def read_sft_rows(path: Path | str) -> list[SftRow]:
    """Read sft.jsonl.

    Raises:
        UsageError: the file is not there.
        DataError: no rows, or a row whose ids are missing, empty or not whole numbers; the message names file and line.
    """
    return _not_empty([sft_row(row, where) for where, row in read_objects(path)], path)


def read_pairs(path: Path | str) -> list[PairRow]:
    """Read pairs.jsonl.

    Raises:
        UsageError: the file is not there.
        DataError: as `read_sft_rows`, or a pair whose two completions are the same.
    """
    return _not_empty([pair_row(row, where) for where, row in read_objects(path)], path)


def sft_row(row: Mapping[str, Any], where: str = "row") -> SftRow:
    """Return the ids of one row of sft.jsonl; see `read_sft_rows` for errors."""
    return SftRow(_ids(row, "prompt_ids", where), _ids(row, "completion_ids", where), where)


def pair_row(row: Mapping[str, Any], where: str = "row") -> PairRow:
    """Return the ids of one row of pairs.jsonl; see `read_pairs` for errors."""
    chosen, rejected = _ids(row, "chosen_ids", where), _ids(row, "rejected_ids", where)
    if chosen == rejected:
        raise DataError(
            f"{where}: chosen_ids and rejected_ids are the same, so there is nothing to prefer; drop the pair"
        )
    return PairRow(_ids(row, "prompt_ids", where), chosen, rejected, where)


def check_vocabulary(rows: Sequence[SftRow] | Sequence[PairRow], size: int) -> None:
    """Refuse ids that the model has no embedding for: the rows were sampled with another tokenizer.

    Raises:
        DataError: names the first row.
    """
    for row in rows:
        largest = max(max(ids) for ids in _sequences(row))
        if largest >= size:
            raise DataError(
                f"{row.where}: token id {largest}, but the model has {size}: the rows were sampled from another model; "
                "explore with the model that is trained"
            )


def fit_to_length(rows: Sequence[Row], max_length: int, long_rows: str = "refuse") -> tuple[list[Row], str]:
    """Refuse or leave out rows longer than `max_length`; nothing is ever cut.

    Args:
        rows: to check.
        max_length: most tokens of prompt and completion together.
        long_rows: "refuse", or "drop".

    Returns:
        The rows that fit, and one line about those left out ("" when there are none).

    Raises:
        DataError: there are long rows and `long_rows` is "refuse", or no row is left.
        UsageError: `long_rows` is something else.
    """
    if long_rows not in LONG_ROWS:
        raise UsageError(f"long_rows: expected {' or '.join(LONG_ROWS)}, got {long_rows!r}")
    kept = [row for row in rows if row.length <= max_length]
    long = [row for row in rows if row.length > max_length]
    if not long:
        return kept, ""
    named = ", ".join(f"{row.where} ({row.length})" for row in long[:_SHOWN]) + (" ..." if len(long) > _SHOWN else "")
    found = f"{len(long)} of {len(rows)} rows are longer than {max_length} tokens: {named}"
    if long_rows == "refuse" or not kept:
        raise DataError(
            f"{found}\nraise max_length (the model's context is the limit), or leave them out: long_rows=drop"
        )
    return kept, f"left out, {found}"


def fingerprint_rows(rows: Sequence[SftRow] | Sequence[PairRow]) -> str:
    """Return a hash of the ids of all rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(_sequences(row)).encode())
    return "sha256:" + digest.hexdigest()[:32]


def _sequences(row: SftRow | PairRow) -> tuple[tuple[int, ...], ...]:
    return astuple(row)[:-1]


def _ids(row: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    value = row.get(key)
    if not isinstance(value, list | tuple) or not value:
        text = value is None and ("chosen" in row or "completion" in row)
        hint = "; rows of text alone, as --policy rules writes them, are for trl's trainers" if text else ""
        raise DataError(f"{where}: expected token ids in {key!r}, got {value!r:.60}{hint}")
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise DataError(f"{where}: expected token ids (whole numbers from 0) in {key!r}, one is {item!r:.40}")
    return tuple(value)


def _not_empty(rows: list[Row], path: Path | str) -> list[Row]:
    if not rows:
        raise DataError(f"{path} has no rows: there is nothing to train on")
    return rows

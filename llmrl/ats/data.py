"""Rows from files, and the windows of token ids that `llmrl.ats.windows` and `llmrl.ats.on_policy` make of them.

A row's columns are those of `llmrl.ats.forms`. Every refusal names FILE:LINE.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.ats.forms import FORMS, is_multiple_choice, known_form
from llmrl.errors import DataError
from llmrl.files import resolve_reference
from llmrl.jsonl import parse_object

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")


@dataclass(frozen=True)
class Row:
    """The columns of one row that count; `where` is "FILE:LINE" for error messages, `id` the file's own name for it."""

    fields: dict[str, Any]
    where: str
    source: str
    id: str | None = None


@dataclass(frozen=True)
class Window:
    """Token ids the model reads at once. `scored[i]` says that token i counts (as a prediction from the ones before).

    `choices`: of a multiple-choice question, the ids of its answer letters in order. The one scored token is the right
    letter, and its logits are meant to be restricted to these ids.
    `grade`: of an answer the model sampled itself, whether it is right. The scored tokens are the answer's.
    """

    token_ids: list[int]
    scored: list[bool]
    row: int
    source: str
    where: str
    choices: tuple[int, ...] | None = None
    grade: bool | None = None

    @property
    def prompt(self) -> tuple[int, ...]:
        """The ids before the first scored one: of a graded answer, the question as the model read it."""
        return tuple(self.token_ids[: self.scored.index(True)])


@dataclass
class Windows:
    """All windows of a data set, and what was left out of it by reason."""

    windows: list[Window]
    rows: int
    excluded: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return sum(sum(window.scored) for window in self.windows)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rows(data: list[str]) -> list[Row]:
    """Read files (JSONL, JSONL.gz, parquet, .txt, .txt.gz) or data sets by hub name (`NAME` or `NAME:SPLIT`).

    Raises:
        UsageError: a path that does not exist.
        DataError: an empty file, a broken line, a row without a known form, multiple choice beside other forms; FILE:LINE
            is named.
    """
    rows: list[Row] = []
    for name in data:
        path, local = resolve_reference(name, "--data")
        found = list(_read_file(Path(path)) if local else _read_hub(name))
        if not found:
            raise DataError(f"{name} is empty: expected rows with {FORMS}")
        rows.extend(found)
    level_of(rows)
    return rows


def level_of(rows: list[Row]) -> str:
    """Return what a report on these rows is about: "answer" for multiple choice, else "token".

    Raises:
        DataError: multiple choice and other forms side by side.
    """
    choice = next((row for row in rows if is_multiple_choice(row.fields)), None)
    other = next((row for row in rows if not is_multiple_choice(row.fields)), None)
    if choice is not None and other is not None:
        raise DataError(
            f"{choice.where} is multiple choice and {other.where} is not: a report is of answers or of tokens; calibrate on "
            "one of them at a time"
        )
    return "token" if choice is None else "answer"


def _read_file(path: Path) -> Iterator[Row]:
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the files in it ({', '.join(_SUFFIXES)})")
    if path.name.endswith((".txt", ".txt.gz")):
        text = _decode(path)
        if text.strip():
            yield Row({"text": text}, str(path), str(path))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, line in enumerate(_decode(path).split("\n"), start=1):
            if line.strip():
                yield _check_row(
                    parse_object(line, f"{path}:{number}", f"an object with {FORMS}"), f"{path}:{number}", str(path)
                )
    elif path.name.endswith(".parquet"):
        for number, fields in enumerate(_read_parquet(path), start=1):
            yield _check_row(fields, f"{path}:{number}", str(path))
    else:
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}")


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file") from error


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from error


def _read_hub(name: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} is no file here; a data set by name needs: pip install datasets") from error
    path, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(path, split=split or "train")
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name} is neither a file here nor a data set that can be loaded: {first}") from error
    for number, fields in enumerate(found, start=1):
        yield _check_row(dict(fields), f"{name}:{number}", name)


def _check_row(fields: dict[str, Any], where: str, source: str) -> Row:
    known = known_form(fields, where)
    try:
        json.dumps(known, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair in the text (character {error.start})") from error
    name = fields.get("id")
    named = isinstance(name, str | int) and not isinstance(name, bool) and str(name) != ""
    return Row(known, where, source, str(name) if named else None)

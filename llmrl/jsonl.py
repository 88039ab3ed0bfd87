"""JSON lines, plain or gzipped: one object a line, and every refusal names FILE:LINE."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from llmrl.errors import DataError, UsageError

_SUFFIXES = (".jsonl", ".jsonl.gz")


def read_objects(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE:LINE", object) for every line of a file that is not blank.

    Raises:
        UsageError: the file is not there.
        DataError: a folder, another suffix, a broken gzip file, a line that is not a JSON object in UTF-8.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"not found: {path}")
    if path.is_dir() or not path.name.endswith(_SUFFIXES):
        what = "a folder" if path.is_dir() else "another kind of file"
        raise DataError(f"{path} is {what}: expected a file that ends in {' or '.join(_SUFFIXES)}")
    with _open(path) as lines:
        for number in itertools.count(1):
            try:
                raw = lines.readline()
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataError(f"{path} is not a whole gzip file: {error}; make or fetch it again") from error
            if not raw:
                return
            where = f"{path}:{number}"
            text = _decode(raw, where, first=number == 1)
            if text.strip():
                yield where, parse_object(text, where)


def write_objects(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically; a name that ends in .gz is compressed, without a time stamp in it.

    Raises:
        UsageError: the name ends in neither .jsonl nor .jsonl.gz.
    """
    path = Path(path).expanduser()
    if not path.name.endswith(_SUFFIXES):
        raise UsageError(f"{path}: expected a name that ends in {' or '.join(_SUFFIXES)}")
    data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def text_field(row: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text of a row; "" when it is absent or null.

    Raises:
        DataError: it is not a text, or holds half of a surrogate pair, which nothing downstream can encode.
    """
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text in {key!r}, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair in {key!r} (character {error.start})") from error
    return value


def id_field(row: Mapping[str, Any], where: str) -> str:
    """Return the id of a row as a text; a whole number is one too.

    Raises:
        DataError: there is none, it is empty, or it is something else.
    """
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: expected an 'id' (a text or a whole number), got {value!r:.60}")
    return text_field(row, "id", where)


def text_list(row: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """Return a list of texts of a row; () when it is absent or null. Whole numbers become texts.

    Raises:
        DataError: it is not a list of texts.
    """
    value = row.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(
        isinstance(v, str | int) and not isinstance(v, bool) and v != "" for v in value
    ):
        raise DataError(f"{where}: expected a list of texts in {key!r}, got {value!r:.60}")
    return tuple(text_field({key: str(v)}, key, where) for v in value)


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb"))


def _decode(raw: bytes, where: str, *, first: bool) -> str:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start} of the line); convert the file") from error


def parse_object(text: str, where: str, expected: str = "an object") -> dict[str, Any]:
    """Return the JSON object in a line.

    Args:
        text: the line.
        where: "FILE:LINE".
        expected: what an object of this file is, for the refusal.

    Raises:
        DataError: it is not JSON that can be read, or not an object.
    """
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise DataError(f"{where}: not JSON that can be read ({str(error).splitlines()[0]})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected {expected}, got {type(row).__name__}")
    return row

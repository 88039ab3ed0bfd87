"""Append-only shards of records, and the one sorted file that is exported from them.

A run's folder holds `run.json`, what the run is, and `shards/RANK-NUMBER.jsonl`, one record a line in order of
completion. Each line begins with a checksum of the rest: a line that a killed process or a full disk tore is known
for what it is, is cut off when its process comes back, and its record is made again. Only the owner of a rank writes
its files, so several processes share a folder. What differs from run to run (times, attempts) stands beside the record
and never in the exported file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from llmrl.errors import DataError, OutputError
from llmrl.files import staging_folder, to_json, write_json

Key = tuple[str, int]  # row id, sample

_HEAD = b'{"crc32":"00000000",'
_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Stored:
    """Where the newest record of a pair lies. `position` is the row's place in the input."""

    path: Path
    offset: int
    position: int
    attempt: int
    failed: bool

    def load(self) -> dict[str, Any]:
        """Read the record."""
        with self.path.open("rb") as f:
            f.seek(self.offset)
            entry = _parse(f.readline())
        if entry is None:
            raise DataError(f"{self.path}: the record at byte {self.offset} changed while it was read; run again")
        return entry["record"]


class ShardWriter:
    """Appends records to the shards of one process. Use it as a context manager, from one thread.

    A record is with the operating system when `write` returns, so killing the process does not lose it, and on the disk
    a second later if `write` or `sync` is called by then, as well as after a file is full and after `close`.

    Args:
        folder: The run's folder.
        rank: The number of this process; no other process may write under it.
        roll_bytes: A new file is begun once one is this long.

    Raises:
        OutputError: Another process writes this rank's shards, or the disk is full.
    """

    def __init__(self, folder: Path | str, rank: int = 0, *, roll_bytes: int = 64 << 20) -> None:
        self.folder = Path(folder) / "shards"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.roll_bytes = roll_bytes
        self.written = 0
        self._fd, self._size, self._synced, self._synced_size = -1, 0, 0.0, 0
        numbers = [int(path.stem.split("-")[1]) for path in self.folder.glob(f"{rank:05d}-*.jsonl")]
        self._open(max(numbers, default=0))

    def write(
        self,
        key: Key,
        record: Mapping[str, Any],
        *,
        position: int,
        failed: bool = False,
        attempt: int = 0,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one record.

        Args:
            key: Row id and sample.
            record: JSON without NaN.
            position: The row's place in the input, which the export is sorted by.
            failed: Whether a later run should try the pair again.
            attempt: One more than that of the record this one takes the place of.
            notes: What is not exported: times.

        Raises:
            DataError: The record is not JSON.
            OutputError: The disk is full; what was written before is whole.
        """
        head = {"row_id": key[0], "sample": key[1], "position": position, "attempt": attempt, "failed": failed}
        try:
            # ASCII: one record stays one line for readers that split at U+2028, and lone surrogates cannot stop a run
            body = json.dumps({**head, "notes": notes or {}, "record": record}, allow_nan=False).encode()[1:]
        except (TypeError, ValueError) as error:
            raise DataError(f"record {key[0]}/{key[1]}: expected what JSON can hold (no NaN): {error}") from None
        line = b'{"crc32":"%08x",%s\n' % (zlib.crc32(body), body)
        if self._size and self._size + len(line) > self.roll_bytes:
            self.close()
            self._open(self._number + 1)
        try:
            self._append(line)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._fd, self._size)
            raise self._refusal(error) from error
        except BaseException:  # Ctrl-C in the middle of a line: it must not run into the next one
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)
        self.written += 1
        self.sync()

    def sync(self, *, now: bool = False) -> None:
        """Force what was written onto the disk if the last time is a second ago, or at once."""
        due = now or time.monotonic() - self._synced >= _SYNC_SECONDS
        if due and self._size != self._synced_size:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise self._refusal(error) from error
            self._synced, self._synced_size = time.monotonic(), self._size

    def close(self) -> None:
        """Force everything onto the disk and let go of the file."""
        if self._fd < 0:
            return
        try:
            self.sync(now=True)
        finally:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _open(self, number: int) -> None:
        self._number = number
        self.path = self.folder / f"{self.rank:05d}-{number:05d}.jsonl"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            self._fd = -1
            raise OutputError(
                f"{self.path} is being written by another process: wait for it, or give each process its own rank"
            ) from None
        except OSError:  # some network file systems have no locks: a run there is worth more than the check
            pass
        self._size = _cut_torn_end(self.path, self._fd)
        self._synced, self._synced_size = time.monotonic(), self._size

    def _append(self, line: bytes) -> None:
        left = memoryview(line)
        while left:  # a disk that is nearly full takes a part, and refuses the next one
            left = left[os.write(self._fd, left) :]

    def _refusal(self, error: OSError) -> OutputError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        mend = "free some space and run" if full else "run"
        return OutputError(
            f"cannot write {self.path}: {error.strerror}; {mend} the same command again. "
            f"The {self.written} records before it are kept"
        )


def scan_shards(folder: Path | str) -> dict[Key, Stored]:
    """Return where the newest record of each pair lies, over the shards of all processes.

    The newest is the one with the highest attempt; of two with the same, one that did not fail. A broken line is left
    out, with a notice on stderr.
    """
    found: dict[Key, Stored] = {}
    for path in sorted((Path(folder) / "shards").glob("*.jsonl")):
        broken = 0
        for offset, _, entry in _entries(path):
            if entry is None:
                broken += 1
                continue
            key = (entry["row_id"], entry["sample"])
            one = Stored(path, offset, entry["position"], entry["attempt"], entry["failed"])
            before = found.get(key)
            if before is None or (one.attempt, not one.failed) >= (before.attempt, not before.failed):
                found[key] = one
        if broken:
            _notice(f"{path}: left out {_count(broken, 'broken line')}; what stood there is made again")
    return found


def read_shards(folder: Path | str) -> dict[Key, dict[str, Any]]:
    """Return the newest record of each pair, in memory."""
    return {key: stored.load() for key, stored in scan_shards(folder).items()}


def export_records(folder: Path | str, path: Path | str, *, partial: bool = False) -> int:
    """Write the newest record of each pair as JSONL, sorted by the row's place in the input, then by sample.

    Args:
        folder: The run's folder; no process should be writing there any more.
        path: The file, which is whole or absent.
        partial: Accept that pairs are missing.

    Returns:
        The number of records.

    Raises:
        OutputError: Pairs are missing.
    """
    folder, path = Path(folder), Path(path)
    identity = _read_identity(folder)
    found = scan_shards(folder)
    expected = identity["rows"]["count"] * identity["samples"]
    if len(found) != expected and not partial:
        raise OutputError(
            f"{folder} holds {len(found)} of {expected} records, {expected - len(found)} are missing: "
            "run the same command again to make them, or export with partial=True"
        )
    with staging_folder(path) as staging:
        with (staging / path.name).open("w", encoding="ascii") as f:
            for key in sorted(found, key=lambda key: (found[key].position, key[1])):
                f.write(json.dumps(found[key].load(), allow_nan=False) + "\n")
            f.flush()
            os.fsync(f.fileno())
        os.replace(staging / path.name, path)
    return len(found)


def claim_run(folder: Path | str, rows: Sequence[Mapping[str, Any]], samples: int, **identity: Any) -> list[str]:
    """Make `folder` the folder of this run, or go on with the same run in it; return the row ids.

    Args:
        folder: The run's folder.
        rows: The input; its hash is part of what the run is.
        samples: Records a row.
        **identity: Whatever else changes the records: seed, sampling, model.

    Raises:
        DataError: A row is not JSON, or two have one id.
        OutputError: The folder holds another run; the message names what differs.
    """
    ids, mine = describe_run(rows, samples, **identity)
    path = Path(folder) / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # looked for in this order: another process writes run.json first and its shards after it
    holds_shards = any((path.parent / "shards").glob("*.jsonl"))
    if not path.exists():
        if holds_shards:
            raise OutputError(f"{path.parent} holds shards and no run.json to say of which run: choose another output")
        write_json(path, mine)
    theirs = _flat(_read_identity(path.parent))  # another process may have written it in between
    own = _flat(mine)
    differs = sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key))
    if differs:
        words = ", ".join(f"{key} was {theirs.get(key)!r:.60}, is {own.get(key)!r:.60}" for key in differs[:5])
        raise OutputError(f"{path.parent} holds another run: {words}; give the old values, or choose another output")
    return ids


def describe_run(rows: Sequence[Mapping[str, Any]], samples: int, **identity: Any) -> tuple[list[str], dict[str, Any]]:
    """Return the row ids, and what `run.json` says of a run; the arguments and errors are those of `claim_run`."""
    ids, digest = _row_ids(rows)
    mine = {**identity, "samples": samples, "rows": {"count": len(ids), "hash": digest}}
    return ids, json.loads(json.dumps(to_json(mine), allow_nan=False))


def _row_ids(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Return each row's id, its `id` or else its number, and a hash of all rows in order."""
    digest = hashlib.blake2b(digest_size=16)
    ids: dict[str, int] = {}
    for number, row in enumerate(rows):
        row_id = row.get("id", str(number))
        if not isinstance(row_id, str) or not row_id:
            raise DataError(f"row {number}: expected an id that is text, got {row_id!r:.60}; write it in quotes")
        if row_id in ids:
            raise DataError(f"rows {ids[row_id]} and {number} have the same id {row_id!r:.60}: give each its own")
        ids[row_id] = number
        try:
            text = json.dumps(to_json(dict(row)), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"row {number} ({row_id}): expected what JSON can hold: {error}") from None
        digest.update(text.encode() + b"\n")
    if not ids:
        raise DataError("expected at least one row, got none")
    return list(ids), digest.hexdigest()


def _read_identity(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(f"not found: {path}; expected the folder of a run") from None
    except ValueError as error:
        raise OutputError(f"{path} is not JSON ({error}): choose another output") from None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner})
    return flat


def _entries(path: Path) -> Iterator[tuple[int, int, dict[str, Any] | None]]:
    """Yield (start, end, entry) of each line; the entry of a broken one is None."""
    start = 0
    with path.open("rb") as f:
        for line in f:
            yield start, start + len(line), _parse(line)
            start += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    body = line[len(_HEAD) : -1]
    if line[-1:] != b"\n" or line[: len(_HEAD)] != b'{"crc32":"%08x",' % zlib.crc32(body):
        return None
    return json.loads(b"{" + body)


def _cut_torn_end(path: Path, fd: int) -> int:
    """Cut off what follows the last whole line and return the length that is left."""
    good = max((end for _, end, entry in _entries(path) if entry is not None), default=0)
    torn = os.fstat(fd).st_size - good
    if torn:
        os.ftruncate(fd, good)
        _notice(f"{path}: cut off a torn line of {torn} bytes; its record is made again")
    return good


def _notice(text: str) -> None:
    print(f"llmrl: {text}", file=sys.stderr, flush=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"

"""Files that are either whole or absent: JSON without NaN, atomic writes, staged output folders.

A folder is written under a hidden sibling name and renamed when it is whole, so a reader never meets half of one and a
killed run leaves nothing that looks finished.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmrl.errors import OutputError, UsageError

_FILE_SUFFIXES = (
    ".json", ".jsonl", ".gz", ".txt", ".parquet", ".csv", ".tsv", ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".md",
)  # fmt: skip


def to_json(value: Any) -> Any:
    """Return `value` with every NaN and infinity replaced by None and every tensor-like scalar by a number."""
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist") and not isinstance(value, str):  # torch and numpy
        return to_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    write_text(path, json.dumps(to_json(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def staging_folder(path: Path | str) -> Iterator[Path]:
    """Yield a hidden folder beside `path` for `publish_folder`; whatever is left of it when the block ends is removed.

    Its name is a function of `path`, so what a killed run left behind is found and removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_folder(staging: Path, path: Path, *, stale: tuple[str, ...] | None = None) -> None:
    """Give `staging` the name `path`; an existing `path` is moved out of the way first and put back if that fails.

    Args:
        staging: a whole folder on the same file system.
        path: its final name. An empty folder there is filled instead (it may be a mount point).
        stale: None: nothing of an existing `path` survives. Otherwise files that the new folder does not have are carried
            over, but for those that match one of these patterns.
    """
    if path.is_dir() and not any(path.iterdir()):
        for entry in sorted(
            staging.iterdir(), key=lambda entry: entry.name == "report.json"
        ):  # the last one says "whole"
            shutil.move(entry, path / entry.name)
        return
    old = None
    if path.exists():
        old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-")) / path.name
    try:
        if old is not None:
            os.rename(path, old)
        os.rename(staging, path)
    except BaseException:
        if old is not None:
            if old.exists():
                os.rename(old, path)
            old.parent.rmdir()
        raise
    if old is None:
        return
    # after the new folder is in place: what belongs to somebody else never lies in a folder that a failure removes
    if stale is not None:
        _carry_over(old, path, stale)
    shutil.rmtree(old.parent, ignore_errors=True)


def _carry_over(old: Path, new: Path, stale: tuple[str, ...]) -> None:
    for entry in old.iterdir():
        target = new / entry.name
        if entry.is_dir() and target.is_dir():
            _carry_over(entry, target, stale)
        elif not target.exists() and not any(fnmatch.fnmatch(entry.name, pattern) for pattern in stale):
            os.rename(entry, target)


def check_output_dir(path: Path | str, *, overwrite: bool) -> Path:
    """Refuse an output folder that holds something, unless the caller said to replace it; return its resolved path.

    Raises:
        OutputError: `path` is a file, lies in one, cannot be written, or is not empty and `overwrite` was not given.
    """
    path = Path(path).expanduser().resolve()
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        lies_in = "" if parent == path else f" lies in {parent}, which"
        raise OutputError(f"--output_dir {path}{lies_in} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise OutputError(f"--output_dir {path} is not empty; --overwrite replaces what llmrl writes in it")
        if Path.cwd().is_relative_to(path):
            raise OutputError(f"--output_dir {path} holds the working directory; name a folder in it")
        if os.path.ismount(path):
            raise OutputError(f"--output_dir {path} is a mount point that is not empty; name a folder in it")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write to {parent}: choose another --output_dir")
    return path


def looks_like_file(value: str) -> bool:
    """Tell a path from a hub name: `org/name` is a hub name unless a folder `org` lies here; a suffix makes a file."""
    if value.lower().endswith(_FILE_SUFFIXES) or value.startswith(("/", ".", "~")) or "\\" in value:
        return True
    head, _, tail = value.partition("/")
    return "/" in tail or value.endswith("/") or (bool(tail) and Path(head).is_dir())


def resolve_reference(value: str, what: str) -> tuple[str, bool]:
    """Return (`value` or its expanded path, whether it is local).

    Raises:
        UsageError: `value` reads as a path and nothing is there; it is never tried as a hub name.
    """
    path = Path(value).expanduser()
    if path.exists():
        return str(path), True
    if looks_like_file(value):
        raise UsageError(f"not found: {value} ({what})")
    return value, False

"""Files that are either whole or absent: JSON without NaN, atomic writes, staged output folders.

A folder is written under a hidden sibling name and renamed when it is whole, so a reader never meets half of one and a
killed run leaves nothing that looks finished.
"""

from __future__ import annotations

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
    """Yield a hidden folder beside `path` for `publish_folder`; whatever is left of it when the block ends is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-"))
    os.chmod(staging, 0o755)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a staging folder that becomes `path` when the block ends without an error; else `path` is untouched."""
    with staging_folder(path) as staging:
        yield staging
        publish_folder(staging, Path(path))


def publish_folder(staging: Path, path: Path, *, keep_foreign: bool = False) -> None:
    """Rename `staging` to `path`, moving an existing `path` out of the way first and deleting it last.

    Args:
        staging: a whole folder on the same file system.
        path: its final name.
        keep_foreign: carry files over that the old folder holds and no run of llmrl wrote (no config.resolved.yaml there).
    """
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
    if keep_foreign and not (old / "config.resolved.yaml").is_file():
        for entry in old.iterdir():
            if not (path / entry.name).exists():
                os.rename(entry, path / entry.name)
    shutil.rmtree(old.parent, ignore_errors=True)


def check_output_dir(path: Path | str, *, overwrite: bool, resume: bool = False) -> Path:
    """Refuse an output folder that holds something, unless the caller said what to do with it.

    Raises:
        OutputError: `path` is a file or lies in one, or a folder that is not empty and neither `overwrite` nor `resume`
            was given.
    """
    path = Path(path).expanduser()
    parent = path
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        lies_in = "" if parent == path else f" lies in {parent}, which"
        raise OutputError(f"--output_dir {path}{lies_in} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (overwrite or resume):
        raise OutputError(
            f"--output_dir {path} is not empty; --overwrite replaces what is in it, "
            "--resume_from_checkpoint goes on with a run that was cut off"
        )
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

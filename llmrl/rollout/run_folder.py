"""The folder beside the output of `llmrl rollout` that unfinished work lies in: one run at a time, and only its own files.

`.NAME.run.lock` is locked for as long as a run is at work. It lies beside the folder, not in it, so that nothing that
happens to the folder frees it, and it is removed at the end by the run that holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmrl.errors import OutputError

_SHARDS = "[0-9]*-[0-9]*.jsonl"
_TORN = ".run.json."  # how `write_json` begins the name of a file that is not whole yet


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold the lock of the run in `folder`, which need not be there.

    Raises:
        OutputError: Another process holds it.
    """
    path = folder.with_name(f"{folder.name}.lock")
    fd = _lock(path, folder)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked: whoever has opened it looks whether it is still there
        os.close(fd)


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that holds something and is not a run's.

    Raises:
        OutputError: It is; the message names what lies there.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder, and unfinished work would lie there: move it, or change --output")
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(_TORN))
    if names and not _is_run(folder / "run.json"):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise OutputError(
            f"{folder} is not the folder of a run and holds {', '.join(names[:3])}{more}: "
            "unfinished work would lie there; move it, or choose another --output"
        )


def remove_run(folder: Path) -> None:
    """Remove what a run has written into its folder, and the folder unless it holds something else."""
    for path in (*(folder / "shards").glob(_SHARDS), *folder.glob(f"{_TORN}*")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        (folder / "shards").rmdir()
    (folder / "run.json").unlink(missing_ok=True)  # last: with it the rest is known to be a run's
    with suppress(OSError):
        folder.rmdir()
    if folder.is_dir() and (left := sorted(path.name for path in folder.iterdir())):
        print(f"llmrl: left {folder}, which holds {', '.join(left[:3])}: not of the run", file=sys.stderr, flush=True)


def _lock(path: Path, folder: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 200).decode(errors="replace").strip()
            os.close(fd)
            raise OutputError(
                f"{folder} is being written by another process{f' ({holder})' if holder else ''}, which holds {path}: "
                "wait for it, or choose another --output"
            ) from None
        except OSError:  # some network file systems have no locks: a run there is worth more than the check
            return fd
        if _is_there(path, fd):
            with suppress(OSError):  # only words
                os.ftruncate(fd, 0)
                os.write(fd, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return fd
        os.close(fd)  # its holder ended and removed it in between: a lock on nothing


def _is_there(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _is_run(path: Path) -> bool:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return isinstance(rows["hash"], str)
    except (OSError, ValueError, KeyError, TypeError):
        return False

"""The folder through which weights pass: in memory where they fit, private, and removed at the end."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

from llmrl.errors import OutputError

_MEMORY = Path("/dev/shm")
_SPARE = 1.2


class TransferFolder:
    """A place for the weights of each version; made when first needed.

    Args:
        parent: Where to make it; a folder that all machines share when the engines run on several. None takes a memory
            file system where the weights fit, else the system's folder for temporary files.
    """

    def __init__(self, parent: Path | str | None = None) -> None:
        self._parent = Path(parent).expanduser() if parent else None
        self._root: Path | None = None

    def folder(self, number: int, size: int) -> Path:
        """Return a path for version `number` of `size` bytes; nothing is there yet."""
        if self._root is None:
            try:
                self._root = Path(tempfile.mkdtemp(prefix="llmrl-weights-", dir=self._parent or _roomy(size)))
            except OSError as error:
                raise OutputError(
                    f"no folder can be made in {self._parent or error.filename}: set transfer_dir"
                ) from error
            # a program that ends without closing its engine must not leave a model in memory
            self._at_exit = weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)
        path = self._root / f"version-{number}"
        shutil.rmtree(path, ignore_errors=True)  # of an update that failed
        free = shutil.disk_usage(self._root).free
        if free < size * _SPARE:
            raise OutputError(
                f"{self._root} has {free >> 20} MiB free, the weights take {size >> 20}: set transfer_dir"
            )
        return path

    def keep_only(self, *folders: Path) -> None:
        """Remove the versions that are not needed any more."""
        for path in self._root.iterdir() if self._root else []:
            if path not in folders:
                shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Remove everything."""
        if self._root is not None:
            self._at_exit()
            self._root = None


def _roomy(size: int) -> Path | None:
    try:
        free = shutil.disk_usage(_MEMORY).free
    except OSError:
        return None
    # two versions lie there for a moment, and whoever else uses it needs some
    return _MEMORY if free > 3 * size * _SPARE else None

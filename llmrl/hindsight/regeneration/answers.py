"""Answers of models, kept by what was asked: a run that is cut off, or begins again, asks nothing twice.

The key is a hash of all that decides an answer: the model, the messages, how it is sampled, the schema, the seed. The shards
are those of the rollout engine: append-only, each line with its checksum, whole after `kill -9`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any, Self

from llmrl.rollout.shards import ShardWriter, read_shards


class Answers:
    """Answers in a folder, which is made with the first of them; can be used from many threads of one process.

    Raises:
        OutputError: another process is writing there, or the disk is full.
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._writer: ShardWriter | None = None
        self._known = {key: record for (key, _), record in read_shards(folder).items()}

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return what was answered, or None."""
        return self._known.get(key)

    def all(self) -> list[dict[str, Any]]:
        """Return every answer."""
        return list(self._known.values())

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer; with the operating system when this returns."""
        with self._lock:
            if self._writer is None:
                self._writer = ShardWriter(self._folder)
            self._writer.write((key, 0), answer, position=0)
            self._known[key] = answer

    def close(self) -> None:
        """Force everything onto the disk."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def key_of(*parts: Any) -> str:
    """Return a hash of JSON values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

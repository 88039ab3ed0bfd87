"""Seeds that depend on what is sampled and never on when: the same row has the same seed in any order of requests."""

from __future__ import annotations

import hashlib
import json

_BITS = 53  # JSON readers that keep numbers as doubles hold it exactly


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^53) that is a hash of `parts`: run seed, row id, sample, turn."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _BITS)

"""Tile sizes of the kernels that switch LoRA experts: a table per GPU, measured beforehand, and defaults where none is.

A call never tunes: what it launches is settled before, so a CUDA graph captures the same kernel that ran without one. The
table of a GPU is `tuned/<name of the device>.json` beside this file, written by `kernels/bench/tune_lora_switch.py`:

    {"device": "...", "date": "...", "versions": {...}, "entries": {"routed_expand/16/128/4096/bfloat16": {"BLOCK_T": 16, ...}}}

None is shipped: numbers of a card are taken on that card. SPLIT, in how many parts `routed_shrink` takes the sum over the
inputs, is 0 where `split_of` chooses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

TUNED_FOLDER = Path(__file__).parent / "tuned"

# What they are measured against, by op and by the number of tokens up to which they hold (None: any).
DEFAULTS: dict[str, tuple[tuple[int | None, dict[str, int]], ...]] = {
    "routed_shrink": (
        (16, {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 256, "SPLIT": 0, "num_warps": 4, "num_stages": 3}),
        (None, {"BLOCK_T": 64, "BLOCK_R": 64, "BLOCK_K": 64, "SPLIT": 0, "num_warps": 4, "num_stages": 3}),
    ),
    "routed_expand": (
        (16, {"BLOCK_T": 16, "BLOCK_O": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 2}),
        (None, {"BLOCK_T": 64, "BLOCK_O": 128, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3}),
    ),
    "gathered_shrink": (
        (16, {"BLOCK_T": 1, "BLOCK_R": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": 2}),
        (None, {"BLOCK_T": 32, "BLOCK_R": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}),
    ),
    "gathered_expand": (
        (16, {"BLOCK_T": 1, "BLOCK_O": 128, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}),
        (None, {"BLOCK_T": 32, "BLOCK_O": 128, "BLOCK_R": 32, "num_warps": 4, "num_stages": 3}),
    ),
    "merge_all": ((None, {"BLOCK_M": 128, "BLOCK_N": 128, "OCCUPANCY": 2, "num_warps": 8, "num_stages": 2}),),
    "switch_linear": ((16, {"BLOCK_R": 16, "BLOCK_O": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 3}),),
}
# In the interpreter a tile costs what a line of Python costs; small ones leave several to a test's small tensors.
INTERPRETER: dict[str, dict[str, int]] = {
    "routed_shrink": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 64, "SPLIT": 0},
    "routed_expand": {"BLOCK_T": 16, "BLOCK_O": 64, "BLOCK_R": 32},
    "gathered_shrink": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 64},
    "gathered_expand": {"BLOCK_T": 16, "BLOCK_O": 64, "BLOCK_R": 16},
    "merge_all": {"BLOCK_M": 32, "BLOCK_N": 32, "OCCUPANCY": 3},
    "switch_linear": {"BLOCK_R": 16, "BLOCK_O": 32, "BLOCK_K": 64},
}


LEAST_PART = 256  # inputs that a part of a split sum has at least
MOST_PARTS = 256  # rows of parts, tokens times parts, that every program of the expand reads

_forced: dict[str, dict[str, int]] = {}


@contextlib.contextmanager
def force_sizes(op: str, sizes: dict[str, int]) -> Iterator[None]:
    """Have `block_sizes` return `sizes` for an op while the block runs: for the command that measures, and for tests."""
    before = _forced.get(op)
    _forced[op] = dict(sizes)
    try:
        yield
    finally:
        _forced.pop(op)
        if before is not None:
            _forced[op] = before


def entry_key(op: str, *key: object) -> str:
    """Return the name of an entry of the table: the op and what its tiles depend on, joined by slashes."""
    return "/".join([op, *(str(part).removeprefix("torch.") for part in key)])


def token_bucket(tokens: int) -> int:
    """Return the power of two, 16 to 4096, under which the tiles for so many tokens are kept."""
    return min(4096, max(16, 1 << max(0, tokens - 1).bit_length()))


def device_file(name: str) -> Path:
    """Return where the table of the GPU called `name` lies."""
    return TUNED_FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def block_sizes(op: str, *key: object, tokens: int = 1, device: torch.device | None = None) -> dict[str, int]:
    """Return the tile sizes with which to launch an op: measured ones of this GPU, or else defaults.

    Args:
        op: a key of `DEFAULTS`.
        key: what else the tiles depend on (sizes, a dtype), as in the table; the bucket of `tokens` comes first.
        tokens: how many there are; for the bucket, and for the default.
        device: where the op runs; None is the current GPU where there is one. On a CPU the interpreter's tiles come back.

    Returns:
        A new dict of constants of the kernel with `num_warps` and `num_stages` (neither on a CPU).

    Raises:
        ValueError: op is unknown, or the table of this GPU is broken.
    """
    if op not in DEFAULTS:
        raise ValueError(f"op: expected one of {', '.join(DEFAULTS)}, got {op!r}")
    if op in _forced:
        return dict(_forced[op])
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return dict(INTERPRETER[op])
    measured = _table(_device_name(device)).get(entry_key(op, token_bucket(tokens), *key))
    return dict(measured or default_sizes(op, tokens))


def split_of(blocks: int, width: int, tokens: int, block: int, processors: int) -> int:
    """Return into how many parts to split sums over `width` inputs, so that a step of few tokens fills a GPU.

    The same for all numbers of tokens of a bucket: a token's bits do not depend on how many others are in the batch.

    Args:
        blocks: of columns of the output, a program each.
        width: inputs.
        tokens: how many there are; where their bucket is more than one tile of `block`, sums stay whole.
        block: tokens a tile.
        processors: of the GPU.

    Returns:
        A power of two.
    """
    bucket = token_bucket(tokens)
    if tokens > bucket or bucket > block:
        return 1
    wanted = 1 << max(0, -(-processors // blocks) - 1).bit_length()
    most = max(1, min(width // LEAST_PART, MOST_PARTS // bucket))
    return min(wanted, 1 << (most.bit_length() - 1))


@functools.cache
def processors(device: torch.device) -> int:
    """Return how many processors a GPU has; 1 for a CPU, where the interpreter runs program after program."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def default_sizes(op: str, tokens: int) -> dict[str, int]:
    """Return the tiles for a GPU that nobody has measured."""
    fitting = [sizes for most, sizes in DEFAULTS[op] if most is None or tokens <= most]
    return dict(fitting[0] if fitting else DEFAULTS[op][-1][1])


@functools.cache
def _device_name(device: torch.device) -> str:
    return str(torch.cuda.get_device_name(device))


@functools.cache
def _table(name: str) -> dict[str, dict[str, int]]:
    file = device_file(name)
    return read_table(file) if file.exists() else {}


def read_table(file: Path) -> dict[str, dict[str, int]]:
    """Return the entries of a table.

    Raises:
        ValueError: it is not the JSON that the head of this file shows, or an entry lacks a size of its op.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
        for key, sizes in entries.items():
            expected = DEFAULTS[key.partition("/")[0]][0][1].keys()
            if sizes.keys() != expected or not all(
                type(size) is int and size >= (name != "SPLIT") for name, size in sizes.items()
            ):
                raise ValueError(f"{key}: expected positive integers {', '.join(expected)}, got {sizes}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected a table of tile sizes, got {type(error).__name__}: {error}; write it anew with "
            "kernels/bench/tune_lora_switch.py"
        ) from error
    return entries

"""One layout for layers that share an input: q, k and v as one, gate and up as one. Used in transformers and in vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# layers that read the same tensor, by the last parts of their names, and what vLLM calls them together
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def pack(parts: Sequence[tuple[Tensor, Tensor] | None], outs: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return A `[E, n r, in]` and B `[sum out, E n r]` that compute all parts at once.

    Expert e's rows of A are those of its n parts one after the other; B is block-diagonal within an expert. One shrink then
    reads the input once for all parts.

    Args:
        parts: A `[E, r, in]` and B `[out, E r]` of each part in order; None for a part without experts.
        outs: rows of each part; needed where a part is None.

    Raises:
        ValueError: no part, or parts of different experts, ranks or inputs.
    """
    given = [part for part in parts if part is not None]
    if not given:
        raise ValueError("expected at least one part with experts")
    experts, rank, width = given[0][0].shape
    for a, b in given:
        if a.shape != (experts, rank, width) or b.shape[1] != experts * rank:
            raise ValueError(
                f"expected parts with A [{experts}, {rank}, {width}] and B [out, {experts * rank}], got "
                f"{list(a.shape)} and {list(b.shape)}"
            )
    sizes = list(outs) if outs is not None else [part[1].shape[0] for part in given]
    packed_a = torch.cat([a for a, _ in given], 1)
    packed_b = given[0][1].new_zeros(sum(sizes), experts, len(given), rank)
    row, number = 0, 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            packed_b[row : row + size, :, number] = part[1].reshape(size, experts, rank)
            number += 1
        row += size
    return packed_a, packed_b.reshape(sum(sizes), experts * len(given) * rank)


def pad_rank(a: Tensor, b: Tensor, multiple: int = 16) -> tuple[Tensor, Tensor]:
    """Return A and B with ranks of zeros behind each expert's own, up to the next multiple: the same function."""
    experts, rank, width = a.shape
    padded = -(-rank // multiple) * multiple
    if padded == rank:
        return a, b
    wide_a = a.new_zeros(experts, padded, width)
    wide_a[:, :rank] = a
    wide_b = b.new_zeros(b.shape[0], experts, padded)
    wide_b[:, :, :rank] = b.reshape(-1, experts, rank)
    return wide_a, wide_b.reshape(b.shape[0], experts * padded)

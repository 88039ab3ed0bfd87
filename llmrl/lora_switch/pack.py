"""One layout for layers that share an input: q, k and v as one, gate and up as one. Used in transformers and in vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# layers that read the same tensor, by the last parts of their names, and what vLLM calls them together
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def pack(parts: Sequence[tuple[Tensor, Tensor] | None], outs: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return A `[n E, r, in]` and B `[sum out, n E r]` that compute all parts at once, as n E experts of one layer.

    The experts of the n parts stand one after the other, and B is block-diagonal over the parts: one product with A reads the
    input once for all, and each part's own products are a view of its result. Gates are repeated n times.

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
    total = experts * rank
    for a, b in given:
        if a.shape != (experts, rank, width) or b.shape[1] != total:
            raise ValueError(
                f"expected parts with A [{experts}, {rank}, {width}] and B [out, {total}], got "
                f"{list(a.shape)} and {list(b.shape)}"
            )
    sizes = list(outs) if outs is not None else [part[1].shape[0] for part in given]
    packed_b = given[0][1].new_zeros(sum(sizes), len(given) * total)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            packed_b[row : row + size, column : column + total] = part[1]
            column += total
        row += size
    return torch.cat([a for a, _ in given]), packed_b

"""One layout for layers that share an input: q, k and v as one, gate and up as one. Used in transformers and in vLLM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# layers that read the same tensor, by the last parts of their names, and what vLLM calls them together
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def pack(
    parts: Sequence[tuple[Tensor, Tensor] | None], outs: Sequence[int] | None = None
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Return A `[n E, r, in]`, B `[sum out, E r]` and its slices: all parts as one layer for `routed_lora(slices=...)`.

    The experts of the n parts stand one after the other, so that one product with A reads the input once for all, and each
    part's own products are a view of its result. B has the rows of one part after another. Gates are repeated n times.

    Args:
        parts: A `[E, r, in]` and B `[out, E r]` of each part in order; None for a part without experts, whose rows are 0.
        outs: rows of each part; needed where a part is None.

    Raises:
        ValueError: no part, or parts of different experts, ranks or inputs, or of other rows than `outs`.
    """
    given = [part for part in parts if part is not None]
    if not given:
        raise ValueError("expected at least one part with experts")
    experts, rank, width = given[0][0].shape
    total = experts * rank
    sizes = list(outs) if outs is not None else [part[1].shape[0] for part in given]
    for a, b in given:
        if a.shape != (experts, rank, width) or b.shape[1] != total:
            raise ValueError(
                f"expected parts with A [{experts}, {rank}, {width}] and B [out, {total}], got "
                f"{list(a.shape)} and {list(b.shape)}"
            )
    rows = []
    for part, size in zip(parts, sizes, strict=True):
        if part is not None and len(part[1]) != size:
            raise ValueError(f"expected B [{size}, {total}], got {list(part[1].shape)}")
        rows.append(given[0][1].new_zeros(size, total) if part is None else part[1])
    return torch.cat([a for a, _ in given]), torch.cat(rows), slice_rows(sizes, [part is not None for part in parts])


def slice_rows(outs: Sequence[int], adapted: Sequence[bool]) -> tuple[int, ...]:
    """Return the rows of B a slice: one a part with experts. A part without goes to the one before it, or to the first."""
    rows: list[int] = []
    begun = False
    for size, has_experts in zip(outs, adapted, strict=True):
        if rows and not (has_experts and begun):
            rows[-1] += size
        else:
            rows.append(size)
        begun = begun or has_experts
    return tuple(rows)

"""`routed_shrink` and `routed_expand` for GPUs: two dense products, with the gate in the first one's epilogue.

A step of few tokens has too few columns of rank to fill a GPU. Its shrink splits the sum over the inputs into parts, a program
each, which leave gated partial sums in float32; the expand adds them in their order when it reads them, so that there are
two launches either way. No atomics: a call gives the same bits every time.

B of layers packed as one holds a slice of rows a layer, `[sum out, E*r]`: a block of rows of one slice reads the columns of u
of its own layer.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmrl_kernels.triton_parts import INTERPRETED, dot, inner_block, rounded
from llmrl_kernels.tuning import block_sizes, processors, split_of

REDUCE_BLOCK = 256


@triton.jit(do_not_specialize=["T", "steps"])
def _shrink_kernel(
    x: tl.tensor,
    a: tl.tensor,
    gates: tl.tensor,
    u: tl.tensor,
    h: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    R: tl.tensor,
    rank: tl.tensor,
    steps: tl.tensor,
    part_stride: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    gate_row: tl.tensor,
    gate_column: tl.tensor,
    STORE_H: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    first, last = 0, K
    if SPLIT:
        first = tl.program_id(2) * steps * BLOCK_K
        last = tl.minimum(first + steps * BLOCK_K, K)
        u += tl.program_id(2).to(tl.int64) * part_stride
        h += tl.program_id(2).to(tl.int64) * part_stride
    k = first + tl.arange(0, BLOCK_K)
    row = tl.minimum(t, T - 1).to(tl.int64)  # past the end: read what is there, do not store it
    column = tl.minimum(c, R - 1).to(tl.int64)
    left = x + row[:, None] * x_row + k[None, :] * x_column
    right = a + column[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN_K:
            acc = dot(tl.load(left), tl.load(right), acc, INTERPRET)
        else:
            live_k = tl.arange(0, BLOCK_K) < K - start
            part = tl.load(left, mask=live_k[None, :], other=0.0)
            acc = dot(part, tl.load(right, mask=live_k[:, None], other=0.0), acc, INTERPRET)
        left += BLOCK_K * x_column
        right += BLOCK_K
    gate = tl.load(gates + row[:, None] * gate_row + (column // rank)[None, :] * gate_column)
    out = row[:, None] * R + c[None, :]
    live = (t < T)[:, None] & (c < R)[None, :]
    gated = tl.where(gate == 0.0, 0.0, acc * gate)  # not 0 times h: an expert that is not chosen may hold anything
    if SPLIT:
        tl.store(u + out, gated, mask=live)
        if STORE_H:
            tl.store(h + out, acc, mask=live)
    else:
        tl.store(u + out, rounded(gated, dtype, INTERPRET), mask=live)
        if STORE_H:
            tl.store(h + out, rounded(acc, dtype, INTERPRET), mask=live)


@triton.jit
def _sum_of_parts(
    place: tl.tensor,
    live: tl.tensor,
    part_stride: tl.tensor,
    dtype: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRET: tl.constexpr,
) -> tl.tensor:
    """Return the parts at `place` added in their order and rounded to `dtype`; 0 where not `live`."""
    acc = tl.load(place, mask=live, other=0.0)
    for part in tl.static_range(1, PARTS):
        acc += tl.load(place + part * part_stride, mask=live, other=0.0)
    return rounded(acc, dtype, INTERPRET)


@triton.jit
def _reduce_kernel(
    parts: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    PARTS: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = _sum_of_parts(parts + i, i < N, N, out.dtype.element_ty, PARTS, INTERPRET)
    tl.store(out + i, total, mask=i < N)


@triton.jit(do_not_specialize=["T"])
def _expand_kernel(
    u: tl.tensor,
    b: tl.tensor,
    base: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    T: tl.tensor,
    O: tl.tensor,  # noqa: E741 - the letter of the outputs
    R: tl.tensor,
    u_part: tl.tensor,
    u_row: tl.tensor,
    u_column: tl.tensor,
    b_row: tl.tensor,
    b_column: tl.tensor,
    base_row: tl.tensor,
    base_column: tl.tensor,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    EVEN_R: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    block = tl.program_id(1)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    begin, end, layer = block * BLOCK_O, O, 0
    blocks, rows = 0, 0
    for i in tl.static_range(len(SLICES)):  # the last slice that begins at this block or before it is the block's
        if i > 0:
            begin = tl.where(block >= blocks, rows + (block - blocks) * BLOCK_O, begin)
            layer = tl.where(block >= blocks, i, layer)
            end = tl.where(block >= blocks, rows + SLICES[i], end)
        else:
            end = SLICES[0]
        blocks += (SLICES[i] + BLOCK_O - 1) // BLOCK_O
        rows += SLICES[i]
    o = begin + tl.arange(0, BLOCK_O)
    row = tl.minimum(t, T - 1).to(tl.int64)
    column = tl.minimum(o, O - 1).to(tl.int64)
    left = u + row[:, None] * u_row + (layer * R + r)[None, :] * u_column
    right = b + column[None, :] * b_row + r[:, None] * b_column
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, R, BLOCK_R):
        live_r = r < R - start
        if PARTS > 1:
            part = _sum_of_parts(left, live_r[None, :], u_part, b.dtype.element_ty, PARTS, INTERPRET)
        elif EVEN_R:
            part = tl.load(left)
        else:
            part = tl.load(left, mask=live_r[None, :], other=0.0)
        if EVEN_R:
            acc = dot(part, tl.load(right), acc, INTERPRET)
        else:
            acc = dot(part, tl.load(right, mask=live_r[:, None], other=0.0), acc, INTERPRET)
        left += BLOCK_R * u_column
        right += BLOCK_R * b_column
    acc *= scale
    live = (t < T)[:, None] & (o < end)[None, :]
    if HAS_BASE:
        acc += tl.load(base + row[:, None] * base_row + o[None, :] * base_column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * O + o[None, :], rounded(acc, y.dtype.element_ty, INTERPRET), mask=live)


def shrink(x: Tensor, A: Tensor, gates: Tensor, keep_h: bool, partial: bool = False) -> tuple[Tensor, Tensor | None]:
    """Launch the shrink, and after a split one what adds its parts, but for `partial`.

    Args:
        x: `[T, in]`, any strides, T >= 1.
        A: `[E, r, in]`, contiguous, in x's dtype.
        gates: `[T, E]` float32, any strides.
        keep_h: whether the ungated h is wanted.
        partial: leave the adding to `expand`.

    Returns:
        u and h (or None), both `[T, E*r]` in x's dtype; if `partial` and split, their parts `[S, T, E*r]` in float32.
    """
    (tokens, width), (experts, rank, _) = x.shape, A.shape
    total = experts * rank
    sizes = block_sizes("routed_shrink", total, width, x.dtype, tokens=tokens, device=x.device)
    sizes["BLOCK_K"] = inner_block(width, sizes["BLOCK_K"])
    split, steps = _split(sizes.pop("SPLIT"), sizes, tokens, width, total, x.device)
    kind = {"dtype": torch.float32 if split > 1 else x.dtype, "device": x.device}
    u = torch.empty(split, tokens, total, **kind)
    h = torch.empty(split, tokens, total, **kind) if keep_h else None
    flags = {"STORE_H": keep_h, "SPLIT": split > 1, "EVEN_K": width % sizes["BLOCK_K"] == 0, "INTERPRET": INTERPRETED}
    numbers = (tokens, width, total, rank, steps, u.stride(0), *x.stride(), *gates.stride())
    grid = (triton.cdiv(tokens, sizes["BLOCK_T"]), triton.cdiv(total, sizes["BLOCK_R"]), split)
    with torch.cuda.device(x.device if x.is_cuda else -1):  # Triton launches on the current one
        _shrink_kernel[grid](x, A, gates, u, u if h is None else h, *numbers, **flags, **sizes)
        if partial and split > 1:
            return u, h
        return _whole(u, x.dtype), None if h is None else _whole(h, x.dtype)


def _whole(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of parts `[S, T, R]`, rounded to `dtype`."""
    if len(parts) == 1:
        return parts[0]
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    constants = {"PARTS": len(parts), "INTERPRET": INTERPRETED, "BLOCK": REDUCE_BLOCK}
    _reduce_kernel[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](parts, out, out.numel(), **constants)
    return out


def _split(
    wanted: int, sizes: dict[str, int], tokens: int, width: int, total: int, device: torch.device
) -> tuple[int, int]:
    """Return the parts of the sum over the inputs and the blocks of each; none is empty, and 0 `wanted` ones are a choice."""
    if not wanted:
        wanted = split_of(triton.cdiv(total, sizes["BLOCK_R"]), width, tokens, sizes["BLOCK_T"], processors(device))
    blocks = triton.cdiv(width, sizes["BLOCK_K"])
    steps = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, steps), steps


def expand(u: Tensor, B: Tensor, scale: float, base: Tensor | None, slices: Sequence[int] = ()) -> Tensor:
    """Launch the expand.

    Args:
        u: `[T, n*R]` in B's dtype or parts `[S, T, n*R]` float32 of `shrink`, any strides, T >= 1.
        B: `[out, R]`, any strides.
        scale: factor of the product.
        base: `[T, out]`, any strides, in B's dtype, or None for 0.
        slices: rows of B of each of n layers, of which the i-th reads columns [i*R, (i+1)*R) of u; none is one layer.

    Returns:
        `[T, out]` in B's dtype.
    """
    tokens, (width, total) = u.shape[-2], B.shape
    y = torch.empty(tokens, width, dtype=B.dtype, device=u.device)
    sizes = block_sizes("routed_expand", total, width, B.dtype, tokens=tokens, device=u.device)
    sizes["BLOCK_R"] = inner_block(total, sizes["BLOCK_R"])
    slices = tuple(slices) if len(slices) > 1 else (width,)
    flags = {"HAS_BASE": base is not None, "EVEN_R": total % sizes["BLOCK_R"] == 0, "INTERPRET": INTERPRETED}
    flags |= {"SLICES": slices, "PARTS": len(u) if u.dim() == 3 else 1}
    base = y if base is None else base
    parts = u if u.dim() == 3 else u[None]
    numbers = (scale, tokens, width, total, *parts.stride(), *B.stride(), *base.stride())
    blocks = sum(triton.cdiv(rows, sizes["BLOCK_O"]) for rows in slices)
    with torch.cuda.device(u.device if u.is_cuda else -1):
        _expand_kernel[(triton.cdiv(tokens, sizes["BLOCK_T"]), blocks)](u, B, base, y, *numbers, **flags, **sizes)
    return y

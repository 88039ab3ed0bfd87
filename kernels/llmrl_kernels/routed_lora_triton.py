"""`routed_shrink` and `routed_expand` for GPUs: two dense products, with the gate in the first one's epilogue.

No split of the inner dimension and no atomics: an output has one program, so a call gives the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmrl_kernels.triton_parts import INTERPRETED, dot, inner_block, rounded
from llmrl_kernels.tuning import block_sizes


@triton.jit(do_not_specialize=["T"])
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
    x_row: tl.tensor,
    x_column: tl.tensor,
    gate_row: tl.tensor,
    gate_column: tl.tensor,
    STORE_H: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    dtype: tl.constexpr = x.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(t, T - 1).to(tl.int64)  # past the end: read what is there, do not store it
    column = tl.minimum(c, R - 1).to(tl.int64)
    left = x + row[:, None] * x_row + k[None, :] * x_column
    right = a + column[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            acc = dot(tl.load(left), tl.load(right), acc, INTERPRET)
        else:
            part = tl.load(left, mask=k[None, :] < K - start, other=0.0)
            acc = dot(part, tl.load(right, mask=k[:, None] < K - start, other=0.0), acc, INTERPRET)
        left += BLOCK_K * x_column
        right += BLOCK_K
    gate = tl.load(gates + row[:, None] * gate_row + (column // rank)[None, :] * gate_column)
    out = row[:, None] * R + c[None, :]
    live = (t < T)[:, None] & (c < R)[None, :]
    # not 0 times h: an expert that is not chosen may hold anything
    tl.store(u + out, rounded(tl.where(gate == 0.0, 0.0, acc * gate), dtype, INTERPRET), mask=live)
    if STORE_H:
        tl.store(h + out, rounded(acc, dtype, INTERPRET), mask=live)


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
    u_row: tl.tensor,
    u_column: tl.tensor,
    b_row: tl.tensor,
    b_column: tl.tensor,
    base_row: tl.tensor,
    base_column: tl.tensor,
    HAS_BASE: tl.constexpr,
    EVEN_R: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    row = tl.minimum(t, T - 1).to(tl.int64)
    column = tl.minimum(o, O - 1).to(tl.int64)
    left = u + row[:, None] * u_row + r[None, :] * u_column
    right = b + column[None, :] * b_row + r[:, None] * b_column
    acc = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for start in range(0, R, BLOCK_R):
        if EVEN_R:
            acc = dot(tl.load(left), tl.load(right), acc, INTERPRET)
        else:
            part = tl.load(left, mask=r[None, :] < R - start, other=0.0)
            acc = dot(part, tl.load(right, mask=r[:, None] < R - start, other=0.0), acc, INTERPRET)
        left += BLOCK_R * u_column
        right += BLOCK_R * b_column
    acc *= scale
    live = (t < T)[:, None] & (o < O)[None, :]
    if HAS_BASE:
        acc += tl.load(base + row[:, None] * base_row + o[None, :] * base_column, mask=live, other=0.0).to(tl.float32)
    tl.store(y + row[:, None] * O + o[None, :], rounded(acc, y.dtype.element_ty, INTERPRET), mask=live)


def shrink(x: Tensor, A: Tensor, gates: Tensor, keep_h: bool) -> tuple[Tensor, Tensor | None]:
    """Launch the shrink.

    Args:
        x: `[T, in]`, any strides, T >= 1.
        A: `[E, r, in]`, contiguous, in x's dtype.
        gates: `[T, E]` float32, any strides.
        keep_h: whether the ungated h is wanted.

    Returns:
        u and h (or None), both `[T, E*r]` in x's dtype.
    """
    (tokens, width), (experts, rank, _) = x.shape, A.shape
    total = experts * rank
    u = torch.empty(tokens, total, dtype=x.dtype, device=x.device)
    h = torch.empty_like(u) if keep_h else None
    sizes = block_sizes("routed_shrink", total, width, x.dtype, tokens=tokens, device=x.device)
    sizes["BLOCK_K"] = inner_block(width, sizes["BLOCK_K"])
    flags = {"STORE_H": keep_h, "EVEN_K": width % sizes["BLOCK_K"] == 0, "INTERPRET": INTERPRETED}
    numbers = (tokens, width, total, rank, *x.stride(), *gates.stride())
    grid = (triton.cdiv(tokens, sizes["BLOCK_T"]), triton.cdiv(total, sizes["BLOCK_R"]))
    with torch.cuda.device(x.device if x.is_cuda else -1):  # Triton launches on the current one
        _shrink_kernel[grid](x, A, gates, u, u if h is None else h, *numbers, **flags, **sizes)
    return u, h


def expand(u: Tensor, B: Tensor, scale: float, base: Tensor | None) -> Tensor:
    """Launch the expand.

    Args:
        u: `[T, R]`, any strides, T >= 1.
        B: `[out, R]`, any strides, in u's dtype.
        scale: factor of the product.
        base: `[T, out]`, any strides, in u's dtype, or None for 0.

    Returns:
        `[T, out]` in u's dtype.
    """
    (tokens, total), width = u.shape, len(B)
    y = torch.empty(tokens, width, dtype=u.dtype, device=u.device)
    sizes = block_sizes("routed_expand", total, width, u.dtype, tokens=tokens, device=u.device)
    sizes["BLOCK_R"] = inner_block(total, sizes["BLOCK_R"])
    flags = {"HAS_BASE": base is not None, "EVEN_R": total % sizes["BLOCK_R"] == 0, "INTERPRET": INTERPRETED}
    base = y if base is None else base
    numbers = (scale, tokens, width, total, *u.stride(), *B.stride(), *base.stride())
    grid = (triton.cdiv(tokens, sizes["BLOCK_T"]), triton.cdiv(width, sizes["BLOCK_O"]))
    with torch.cuda.device(u.device if u.is_cuda else -1):
        _expand_kernel[grid](u, B, base, y, *numbers, **flags, **sizes)
    return y

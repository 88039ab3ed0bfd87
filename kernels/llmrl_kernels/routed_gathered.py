"""The mixture of `routed_lora.py` over the chosen experts alone: k of E a token, named by ids.

    u_s = w_s A[ids_s] x,   y = base + scale * sum_s B[ids_s] u_s       for the slots s = 1..k of a token

For ranks where reading, or multiplying with, all E experts costs: beyond E*r of about 256. What an expert holds that a token
did not choose, NaN included, never reaches that token. Deterministic; launches depend on sizes, never on routes. The
backward pass of `routed_lora_gathered` takes the dense products of `routed_lora`, whose shapes are fixed too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmrl_kernels.backends import (
    expect_alike,
    expect_device,
    expect_no_gradient,
    expect_rank,
    expect_shape,
    sum_dtype,
    use_triton,
)
from llmrl_kernels.routed_lora import check_weights, gradients
from llmrl_kernels.routed_ops import operators


def routed_lora_gathered(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    ids: Tensor,
    weights: Tensor,
    scale: float,
    *,
    base: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return base + scale * sum_s w_s B[ids_s] A[ids_s] x, with gradients to x, A, B, weights and base.

    Under `torch.autocast` x, A, B and base are cast to autocast's dtype, but for float64, as in `routed_lora`.

    Args:
        x: `[T, in]`.
        A: `[E, r, in]` in x's dtype.
        B: `[out, E*r]` in x's dtype.
        ids: `[T, k]` int32; an expert that a token names twice has the sum of both weights.
        weights: `[T, k]` float32 (or float64 beside a float64 x).
        scale: factor of the whole mixture.
        base: `[T, out]` in x's dtype; None is 0.
        backend: as in `routed_shrink_gathered`.

    Returns:
        `[T, out]` in x's dtype.

    Raises:
        ValueError: shapes, devices or ids do not fit, or the backend cannot run.
        TypeError: dtypes do not fit.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, A, B, weights = x.to(dtype), A.to(dtype), B.to(dtype), weights.float()
        base = None if base is None else base.to(dtype)
    return _Gathered.apply(x, A, B, weights, base, ids, float(scale), backend)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        weights: Tensor,
        base: Tensor | None,
        ids: Tensor,
        scale: float,
        backend: str,
    ) -> Tensor:
        u, h = routed_shrink_gathered(x, A, ids, weights, backend=backend)
        ctx.save_for_backward(x, A, B, weights, ids, h)
        ctx.scale = scale
        return routed_expand_gathered(u, B, ids, scale=scale, base=base, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weights, ids, h = ctx.saved_tensors
        at = ids.long()
        named = at[:, :, None] == torch.arange(len(A), device=at.device)
        gates = torch.where(named, weights[:, :, None], 0).sum(
            1
        )  # not scattered: adding in any order is not repeatable
        dense = h.new_zeros(len(x), *A.shape[:2]).scatter_(1, at[:, :, None].expand_as(h), h).flatten(1)
        dx, da, db, dgates = gradients(x, A, B, gates, dense, ctx.scale, dy, ctx.needs_input_grad[:4])
        chosen = None if dgates is None else dgates.gather(1, at)
        return dx, da, db, chosen, dy if ctx.needs_input_grad[4] else None, None, None, None


def routed_shrink_gathered(
    x: Tensor, A: Tensor, ids: Tensor, weights: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Project down to the chosen experts.

    Args:
        x: `[T, in]`, any strides.
        A: `[E, r, in]` in x's dtype.
        ids: `[T, k]` int32, experts in [0, E). On the GPU they are not looked at before the launch, which would stop it: an
            id out of range makes NaN of its row. The torch path refuses it.
        weights: `[T, k]` float32 (or float64 beside a float64 x), the gates of the chosen.
        backend: "auto" is the Triton kernel on a GPU and plain torch elsewhere; "torch" or "triton" insists.

    Returns:
        u and the ungated h, both `[T, k, r]` in x's dtype; u is 0 where the weight is.

    Raises:
        ValueError: shapes, devices or ids do not fit, a gradient is asked for, or the backend cannot run.
        TypeError: dtypes do not fit.
    """
    expect_rank("x", x, 2, "[T, in]")
    if A.dim() != 3 or 0 in A.shape or A.shape[2] != x.shape[1]:
        raise ValueError(f"A: expected [E, r, in] with in = {x.shape[1]} as in x, got {list(A.shape)}")
    expect_alike("x", x, A=A)
    _check_ids(ids, "x", x)
    expect_shape("weights", weights, tuple(ids.shape), "[T, k] as of ids")
    check_weights("weights", weights, x)
    expect_no_gradient("routed_shrink_gathered", "use routed_lora_gathered", x, A, weights)
    if use_triton(backend, x):
        if torch.compiler.is_compiling():
            return operators.routed_shrink_gathered(x, A, ids, weights)  # type: ignore[no-any-return]
        if len(x):
            from llmrl_kernels.routed_gathered_triton import FEW_TOKENS, shrink_gathered

            weights = weights.to(torch.float32).contiguous()
            return shrink_gathered(x, A.contiguous(), ids.contiguous(), weights, len(x) <= FEW_TOKENS)
    check_range(ids, len(A))
    h = x.new_zeros(*ids.shape, A.shape[1], dtype=sum_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        for expert, down in enumerate(A):
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            h[tokens, slots] = x[tokens].to(h.dtype) @ down.to(h.dtype).T
    gate = weights.to(h.dtype)[:, :, None]
    return torch.where(gate == 0, 0, h * gate).to(x.dtype), h.to(x.dtype)


def routed_expand_gathered(
    u: Tensor, B: Tensor, ids: Tensor, *, scale: float, base: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Project back up from the chosen experts and add: base + scale * sum_s B[ids_s] u_s, rounded once.

    Args:
        u: `[T, k, r]`, of `routed_shrink_gathered`.
        B: `[out, E*r]` in u's dtype.
        ids: `[T, k]` int32, as there.
        scale: factor of the sum.
        base: `[T, out]` in u's dtype; None is 0.
        backend: as there.

    Returns:
        `[T, out]` in u's dtype.

    Raises:
        ValueError: shapes, devices or ids do not fit, a gradient is asked for, or the backend cannot run.
        TypeError: dtypes do not fit.
    """
    expect_rank("u", u, 3, "[T, k, r]")
    rank = u.shape[2]
    if B.dim() != 2 or 0 in B.shape or B.shape[1] % rank:
        raise ValueError(f"B: expected [out, E*r] with r = {rank} as in u, got {list(B.shape)}")
    expect_alike("u", u, B=B, base=base)
    _check_ids(ids, "u", u)
    expect_shape("ids", ids, tuple(u.shape[:2]), "[T, k] as of u")
    if base is not None:
        expect_shape("base", base, (len(u), len(B)), "[T, out]")
    expect_no_gradient("routed_expand_gathered", "use routed_lora_gathered", u, B, base)
    if use_triton(backend, u):
        if torch.compiler.is_compiling():
            return operators.routed_expand_gathered(u, B, ids, base, float(scale))  # type: ignore[no-any-return]
        if len(u):
            from llmrl_kernels.routed_gathered_triton import FEW_TOKENS, expand_gathered

            few = len(u) <= FEW_TOKENS
            return expand_gathered(u.contiguous(), B.contiguous(), ids.contiguous(), float(scale), base, few)
    check_range(ids, B.shape[1] // rank)
    y = u.new_zeros(len(u), len(B), dtype=sum_dtype(u))
    with torch.autocast(u.device.type, enabled=False):
        for slot in range(ids.shape[1]):  # one at a time: a token meets no row twice
            for expert in range(B.shape[1] // rank):
                tokens = (ids[:, slot] == expert).nonzero()[:, 0]
                up = B[:, expert * rank : (expert + 1) * rank].to(y.dtype)
                y[tokens] += u[tokens, slot].to(y.dtype) @ up.T
    y.mul_(scale)
    return (y if base is None else y.add_(base)).to(u.dtype)


def _check_ids(ids: Tensor, like: str, first: Tensor) -> None:
    if ids.dim() != 2 or ids.shape[0] != len(first) or ids.shape[1] == 0:
        raise ValueError(f"ids: expected [T, k] with T = {len(first)} as in {like} and k >= 1, got {list(ids.shape)}")
    if ids.dtype != torch.int32:
        raise TypeError(f"ids: expected int32, got {ids.dtype}; cast them with ids.int()")
    expect_device("ids", ids, like, first)


def check_range(ids: Tensor, experts: int) -> None:
    """Refuse ids of experts that there are not; waits for the device.

    Raises:
        ValueError: one is outside [0, experts).
    """
    wrong = ids[(ids < 0) | (ids >= experts)]
    if len(wrong):
        raise ValueError(f"ids: expected 0 to {experts - 1}, one of {experts} experts, got {int(wrong[0])}")


def routed_shrink_gathered_reference(x: Tensor, A: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`routed_shrink_gathered` from its definition, in float64, with a copy of A for every token."""
    h = torch.einsum("ti,tkri->tkr", x.double(), A[ids.long()].double())
    gate = weights.double()[:, :, None]
    return torch.where(gate == 0, 0, h * gate).to(x.dtype), h.to(x.dtype)


def routed_expand_gathered_reference(
    u: Tensor, B: Tensor, ids: Tensor, *, scale: float, base: Tensor | None = None
) -> Tensor:
    """`routed_expand_gathered` from its definition, in float64, with a copy of B for every token."""
    up = B.unflatten(1, (-1, u.shape[2])).permute(1, 0, 2)[ids.long()]  # [T, k, out, r]
    y = scale * torch.einsum("tkr,tkor->to", u.double(), up.double())
    return (y if base is None else y + base.double()).to(u.dtype)

"""A mixture of E low-rank experts over one linear layer, as ONE adapter of rank E*r with a gate in its middle.

    h = x A^T,   u_e = g_e h_e,   y = base + scale * u B^T        A [E, r, in],  B [out, E*r],  gates g [T, E]

Column e*r + j of B, of h and of u belongs to rank j of expert e. Every token meets every expert, and a gate of zero leaves one
out: no sort, no gather, fixed shapes, so that it trains and is captured in a CUDA graph. Above E*r of about 256 the
forms in `routed_gathered.py`, which read the chosen experts alone, have less to compute.

Sums are taken in float32 (float64 for float64), the gate is applied there, and u and y are rounded once, to the dtype of x.

Layers that share an input may be packed as one (`slices`): A holds the experts of all, `[n*E, r, in]`, B their rows one layer
after the other, `[sum out, E*r]`, and the rows of a layer meet its own columns of u alone. Not in training.

On a GPU a call asks nothing of the device and waits for nothing. It allocates its output and, of few tokens, the partial sums
of u: within a CUDA graph these come from the graph's own memory, at the same addresses in every replay. Under `torch.compile`
the kernels are the operators of `routed_ops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from llmrl_kernels.routed_ops import operators


def routed_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    scale: float,
    *,
    base: Tensor | None = None,
    slices: Sequence[int] = (),
    backend: str = "auto",
) -> Tensor:
    """Return base + scale * sum_e g_e B_e A_e x, with gradients to x, A, B, gates and base.

    The backward pass keeps x and h `[T, E*r]`, never a product of B and A; its products are plain matrix products of
    fixed shapes, left to torch (cuBLAS), which a kernel would not beat. Under `torch.autocast` x, A, B and base are cast
    to autocast's dtype, but for float64. A gate of zero keeps a NaN in A of its expert out of the output; not one in B.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64 (float64 in plain torch only).
        A: `[E, r, in]` in x's dtype.
        B: `[out, E*r]` in x's dtype.
        gates: `[..., E]` float32 (or float64 beside a float64 x), zero where an expert is not chosen.
        scale: factor of the whole mixture.
        base: `[..., out]` in x's dtype, the output of the linear layer; None is 0.
        slices: rows of B of each of n layers packed as one, whose A is `[n*E, r, in]` and gates `[..., n*E]`; no gradient.
        backend: "auto" is the Triton kernel on a GPU and plain torch elsewhere; "torch" or "triton" insists.

    Returns:
        `[..., out]` in x's dtype.

    Raises:
        ValueError: shapes or devices do not fit, slices and a gradient are asked for, or the backend cannot run.
        TypeError: dtypes do not fit.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, A, B, gates = x.to(dtype), A.to(dtype), B.to(dtype), gates.float()
        base = None if base is None else base.to(dtype)
    _check_down(x, A, gates)
    expect_alike("x", x, B=B, base=base)
    _check_up(x.shape[:-1], A.shape[0] * A.shape[1], B, base, slices)
    flat_base = None if base is None else base.flatten(0, -2) if base.dim() != 1 else base[None]
    flat_x, flat_gates = x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])
    parts, scale = (flat_x, A, B, flat_gates, flat_base), float(scale)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        if slices:
            raise ValueError("slices: expected tensors that ask for no gradient: train the layers that are packed")
        y = _RoutedLora.apply(*parts, scale, backend)
    else:
        y = _mixture(*parts, scale, slices, backend)
    return y.reshape(*x.shape[:-1], len(B))


def _mixture(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    base: Tensor | None,
    scale: float,
    slices: Sequence[int],
    backend: str,
) -> Tensor:
    """Return what `routed_lora` does, of checked tensors, without a gradient."""
    if torch.compiler.is_compiling() and use_triton(backend, x):
        return operators.routed_lora(x, A, B, gates, base, scale, slices)
    u, _ = _shrink(x, A, gates, backend, keep_h=False, partial=True)
    return _expand(u, B, scale, base, backend, slices)


class _RoutedLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, gates: Tensor, base: Tensor | None, scale: float, backend: str
    ) -> Tensor:
        keep_h = any(ctx.needs_input_grad[2:4])  # of B and of the gates; the rest needs none
        u, h = _shrink(x, A, gates, backend, keep_h)
        ctx.save_for_backward(x, A, B, gates, h)
        ctx.scale = scale
        return _expand(u, B, scale, base, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, gates, h = ctx.saved_tensors
        dx, da, db, dgates = gradients(x, A, B, gates, h, ctx.scale, dy, ctx.needs_input_grad[:4])
        return dx, da, db, dgates, dy if ctx.needs_input_grad[4] else None, None, None


def gradients(
    x: Tensor, A: Tensor, B: Tensor, gates: Tensor, h: Tensor | None, scale: float, dy: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, A, B and gates, each where it is needed, for dy `[T, out]`; h `[T, E*r]` is ungated."""
    for_x, for_a, for_b, for_gates = needed
    dx = da = db = dgates = None
    with torch.autocast(dy.device.type, enabled=False):
        gate = gates[:, :, None]
        if for_b:
            assert h is not None
            gated = torch.where(gate == 0, 0, _by_expert(h, A) * (gate * scale)).to(x.dtype)
            db = dy.T @ gated.flatten(1)
        if for_x or for_a or for_gates:
            du = _by_expert(dy @ B, A) * scale
            if for_gates:
                assert h is not None
                dgates = (du * _by_expert(h, A)).sum(-1).to(gates.dtype)
            dh = torch.where(gate == 0, 0, du * gate).to(x.dtype).flatten(1)
            dx = dh @ A.flatten(0, 1) if for_x else None
            da = (dh.T @ x).view_as(A) if for_a else None
    return dx, da, db, dgates


def _by_expert(h: Tensor, A: Tensor) -> Tensor:
    """Return `[T, E*r]` as `[T, E, r]` in the dtype of sums."""
    return h.to(sum_dtype(h)).unflatten(1, A.shape[:2])


def routed_shrink(
    x: Tensor, A: Tensor, gates: Tensor, *, partial: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Project down to all experts: h = x A^T and u = h * gate. No gradient; that is `routed_lora`.

    Where a step has too few tokens to fill a GPU, the sums are split over programs, and a second launch adds their parts.
    `routed_expand` does it in passing: give it the u of `partial`.

    Args:
        x: `[T, in]`, any strides.
        A: `[E, r, in]` in x's dtype.
        gates: `[T, E]` float32 (or float64 beside a float64 x).
        partial: for `routed_expand` alone: no h, and u may be S parts `[S, T, E*r]` of it in float32.
        backend: as in `routed_lora`.

    Returns:
        u and the ungated h (None if `partial`), both `[T, E*r]` in x's dtype. u is 0 where the gate is, whatever h is there;
        the gate is applied before h is rounded.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is asked for, or the backend cannot run.
        TypeError: dtypes do not fit.
    """
    expect_rank("x", x, 2, "[T, in]")
    _check_down(x, A, gates)
    expect_no_gradient("routed_shrink", "use routed_lora", x, A, gates)
    return _shrink(x, A, gates, backend, keep_h=not partial, partial=partial)


def routed_expand(
    u: Tensor,
    B: Tensor,
    *,
    scale: float,
    base: Tensor | None = None,
    slices: Sequence[int] = (),
    backend: str = "auto",
) -> Tensor:
    """Project back up: base + scale * u B^T, rounded once. No gradient; that is `routed_lora`.

    Args:
        u: `[T, E*r]` in B's dtype, the gated output of `routed_shrink`, or its parts `[S, T, E*r]` in float32; of n layers
            packed as one `[T, n*E*r]`.
        B: `[out, E*r]`.
        scale: factor of the product.
        base: `[T, out]` in B's dtype; None is 0.
        slices: as in `routed_lora`.
        backend: as in `routed_lora`.

    Returns:
        `[T, out]` in B's dtype.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is asked for, or the backend cannot run.
        TypeError: dtypes do not fit.
    """
    if u.dim() == 3 and len(u):
        if u.dtype != torch.float32:
            raise TypeError(f"u: expected parts [S, T, E*r] in float32, got {u.dtype}")
        expect_device("u", u, "B", B)
        expect_alike("B", B, base=base)
    else:
        expect_rank("u", u, 2, "[T, E*r]")
        expect_alike("u", u, B=B, base=base)
    _check_up(u.shape[-2:-1], u.shape[-1], B, base, slices)
    expect_no_gradient("routed_expand", "use routed_lora", u, B, base)
    return _expand(u, B, float(scale), base, backend, slices)


def _check_down(x: Tensor, A: Tensor, gates: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., in] with at least one feature, got {list(x.shape)}")
    if A.dim() != 3 or 0 in A.shape or A.shape[2] != x.shape[-1]:
        raise ValueError(f"A: expected [E, r, in] with in = {x.shape[-1]} as in x, got {list(A.shape)}")
    expect_alike("x", x, A=A)
    expect_shape("gates", gates, (*x.shape[:-1], A.shape[0]), "[..., E], one a token of x and expert of A")
    check_weights("gates", gates, x)


def check_weights(name: str, weights: Tensor, x: Tensor) -> None:
    """Refuse gates that are not float32 (or float64 beside a float64 x) on x's device.

    Raises:
        TypeError: their dtype is another.
        ValueError: their device is another.
    """
    if weights.dtype not in (torch.float32, sum_dtype(x)):
        raise TypeError(f"{name}: expected float32, got {weights.dtype}; cast it with {name}.float()")
    expect_device(name, weights, "x", x)


def _check_up(tokens: torch.Size, total: int, B: Tensor, base: Tensor | None, slices: Sequence[int]) -> None:
    layers = len(slices) or 1
    if B.dim() != 2 or len(B) == 0 or B.shape[1] * layers != total:
        words = f"E*r = {total}" if layers == 1 else f"{layers}*E*r = {total}"
        raise ValueError(f"B: expected [out, E*r] with {words}, got {list(B.shape)}")
    if slices and (min(slices) < 1 or sum(slices) != len(B)):
        raise ValueError(f"slices: expected positive rows of B that add up to {len(B)}, got {list(slices)}")
    if base is not None:
        expect_shape("base", base, (*tokens, len(B)), "[..., out]")


def _shrink(
    x: Tensor, A: Tensor, gates: Tensor, backend: str, keep_h: bool, partial: bool = False
) -> tuple[Tensor, Tensor | None]:
    if use_triton(backend, x):
        if torch.compiler.is_compiling():
            u, h = operators.routed_shrink(x, A, gates, keep_h)
            return u, h if keep_h else None
        if len(x):
            from llmrl_kernels.routed_lora_triton import shrink

            return shrink(x, A.contiguous(), gates.to(torch.float32), keep_h, partial)
    with torch.autocast(x.device.type, enabled=False):
        h = _product(x, A.flatten(0, 1)).unflatten(1, A.shape[:2])
        gate = gates.to(h.dtype)[:, :, None]
        u = torch.where(gate == 0, 0, h * gate).flatten(1)
        return u.to(x.dtype), h.flatten(1).to(x.dtype) if keep_h else None


def _expand(
    u: Tensor, B: Tensor, scale: float, base: Tensor | None, backend: str, slices: Sequence[int] = ()
) -> Tensor:
    if use_triton(backend, B):
        if torch.compiler.is_compiling():
            return operators.routed_expand(u, B, base, scale, slices)
        if u.shape[-2]:
            from llmrl_kernels.routed_lora_triton import expand

            return expand(u, B, scale, base, slices)
    with torch.autocast(u.device.type, enabled=False):
        u = u.sum(0).to(B.dtype) if u.dim() == 3 else u
        if len(slices) > 1:
            pairs = zip(u.split(B.shape[1], 1), B.split(list(slices)), strict=True)
            y = torch.cat([_product(own, rows) for own, rows in pairs], 1).mul_(scale)
        else:
            y = _product(u, B).mul_(scale)
        return (y if base is None else y.add_(base)).to(u.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left right^T in the dtype of sums, not rounded to a shorter one as `torch.mm` would."""
    return left.to(sum_dtype(left)) @ right.to(sum_dtype(left)).T


def routed_shrink_reference(x: Tensor, A: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """`routed_shrink` from its definition, expert by expert in float64; autograd goes through it."""
    h = torch.stack([x.double() @ down.double().T for down in A], 1)
    gate = gates.double()[:, :, None]
    u = torch.where((gate == 0) & ~h.isfinite(), 0, h) * gate  # the gradient of a gate of 0 is h, as of any other
    return u.flatten(1).to(x.dtype), h.flatten(1).to(x.dtype)


def routed_expand_reference(u: Tensor, B: Tensor, *, scale: float, base: Tensor | None = None) -> Tensor:
    """`routed_expand` from its definition, in float64; autograd goes through it."""
    y = scale * (u.double() @ B.double().T)
    return (y if base is None else y + base.double()).to(u.dtype)


def routed_lora_reference(
    x: Tensor, A: Tensor, B: Tensor, gates: Tensor, scale: float, *, base: Tensor | None = None
) -> Tensor:
    """`routed_lora` for `x [T, in]`, by the two references; autograd goes through it."""
    return routed_expand_reference(routed_shrink_reference(x, A, gates)[0], B, scale=scale, base=base)

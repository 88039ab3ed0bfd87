"""The linear layer of a decoding step and its mixture of experts, at the cost of the linear layer's launches alone.

    y = W x + bias + scale * B (g * (A x))        W [out, in],  A [E, r, in],  B [out, E*r],  gates g [T, E],  T <= 16

In a step of a few tokens the bytes of A and B are a few per cent of those of W; what costs is two more launches a layer. One
launch that does all of it saves them (see `switch_linear_triton.py`). That has not run on a GPU yet: it is unmeasured, the
choice of a caller who asks for it, and the default is two launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmrl_kernels.backends import (
    expect_alike,
    expect_device,
    expect_no_gradient,
    expect_rank,
    expect_shape,
    sum_dtype,
    use_triton,
)
from llmrl_kernels.routed_lora import check_weights
from llmrl_kernels.routed_ops import operators

MAX_TOKENS = 16


class SwitchWorkspace:
    """Scratch of `switch_linear` at fixed addresses, for CUDA graphs. Calls that may run at the same time need one each.

    Layers may share one in turn.

    Args:
        total: E*r, or the largest of the layers that share it.
        device: where they are.
    """

    def __init__(self, total: int, device: torch.device | str) -> None:
        self.u = torch.empty(MAX_TOKENS * total, dtype=torch.float32, device=device)
        self.counters = torch.zeros(3, dtype=torch.int32, device=device)

    def reset(self) -> None:
        """Begin to count anew, after a fused launch that was broken off."""
        self.counters.zero_()


def switch_linear(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    workspace: SwitchWorkspace | None = None,
    fused: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Return W x + bias + scale * B (g * (A x)) for at most 16 tokens. No gradient.

    g * (A x) is summed and gated in float32 and rounded to x's dtype once, as in `routed_shrink`; so is y.

    Args:
        x: `[T, in]`, T <= 16, any strides; float32, bfloat16, float16 or float64 (float64 in plain torch only).
        W: `[out, in]` in x's dtype, contiguous for the kernel as A, B and bias.
        A: `[E, r, in]` in x's dtype.
        B: `[out, E*r]` in x's dtype.
        gates: `[T, E]` float32 (or float64 beside a float64 x), zero where an expert is not chosen.
        scale: factor of the mixture.
        bias: `[out]` in x's dtype; None is 0.
        workspace: scratch for the kernel; None allocates some.
        fused: one launch instead of two; on a GPU only, and not yet run on one.
        backend: "auto" is the Triton kernel on a GPU and plain torch elsewhere; "torch" or "triton" insists.

    Returns:
        `[T, out]` in x's dtype.

    Raises:
        ValueError: shapes or devices do not fit, a gradient is asked for, or the backend cannot run.
        TypeError: dtypes do not fit.
    """
    _check(x, W, A, B, gates, bias)
    expect_no_gradient(
        "switch_linear", "use routed_lora with base = the linear layer's output", x, W, A, B, gates, bias
    )
    triton = use_triton(backend, x)
    if fused and not triton:
        raise ValueError(f"fused: expected the Triton kernel, got plain torch on {x.device}; leave fused out")
    compiling = torch.compiler.is_compiling()
    if not triton or (len(x) == 0 and not compiling):
        return _torch(x, W, A, B, gates, float(scale), bias)
    for name, tensor in (("W", W), ("A", A), ("B", B), ("bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}; copy it once")
    total = A.shape[0] * A.shape[1]
    workspace = SwitchWorkspace(total, x.device) if workspace is None else workspace
    expect_device("workspace", workspace.u, "x", x)
    if len(workspace.u) < len(x) * total:
        raise ValueError(f"workspace: expected one for E*r = {total}, got one for {len(workspace.u) // MAX_TOKENS}")
    u, counters = workspace.u, workspace.counters
    if compiling:
        return operators.switch_linear(x, W, A, B, gates, bias, u, counters, float(scale), fused)  # type: ignore[no-any-return]
    from llmrl_kernels.switch_linear_triton import launch

    return launch(x, W, A, B, gates.to(torch.float32), float(scale), bias, u, counters, fused)


def _check(x: Tensor, W: Tensor, A: Tensor, B: Tensor, gates: Tensor, bias: Tensor | None) -> None:
    expect_rank("x", x, 2, "[T, in]")
    if len(x) > MAX_TOKENS:
        raise ValueError(
            f"x: expected at most {MAX_TOKENS} tokens, got {len(x)}; take a matrix product and routed_lora"
        )
    expect_rank("W", W, 2, "[out, in]")
    expect_shape("W", W, (len(W), x.shape[1]), "[out, in] with in as in x")
    if A.dim() != 3 or 0 in A.shape or A.shape[2] != x.shape[1]:
        raise ValueError(f"A: expected [E, r, in] with in = {x.shape[1]} as in x, got {list(A.shape)}")
    expect_shape("B", B, (len(W), A.shape[0] * A.shape[1]), "[out, E*r]")
    if bias is not None:
        expect_shape("bias", bias, (len(W),), "[out]")
    expect_alike("x", x, W=W, A=A, B=B, bias=bias)
    expect_shape("gates", gates, (len(x), A.shape[0]), "[T, E]")
    check_weights("gates", gates, x)


def _torch(x: Tensor, W: Tensor, A: Tensor, B: Tensor, gates: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    long = sum_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        h = (x.to(long) @ A.flatten(0, 1).to(long).T).unflatten(1, A.shape[:2])
        gate = gates.to(long)[:, :, None]
        u = torch.where(gate == 0, 0, h * gate).flatten(1).to(x.dtype)
        y = x.to(long) @ W.to(long).T + scale * (u.to(long) @ B.to(long).T)
        return (y if bias is None else y + bias).to(x.dtype)


def switch_linear_reference(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, gates: Tensor, scale: float, *, bias: Tensor | None = None
) -> Tensor:
    """`switch_linear` from its definition, token by token and expert by expert in float64; autograd goes through it."""
    up = B.double().unflatten(1, A.shape[:2])
    rows = []
    for token, gate in zip(x.double(), gates.double(), strict=True):
        y = W.double() @ token if bias is None else W.double() @ token + bias.double()
        for expert, weight in enumerate(gate):
            if weight != 0:
                u = (weight * (A[expert].double() @ token)).to(x.dtype).double()
                y = y + scale * (up[:, expert] @ u)
        rows.append(y)
    return torch.stack(rows).to(x.dtype)

"""The ops that switch LoRA experts as operators of torch, `torch.ops.llmrl.*`: what `torch.compile` sees of their kernels.

Dynamo cannot trace the choice of tiles, which reads a file once, and need not: what an operator launches depends on sizes
alone, nothing in it waits for the device, and a compiler that keeps the number of tokens open adds no guard for it. Outside
of `torch.compile` the ops launch directly, without a dispatcher's cost. No gradient is registered: where there is one,
`routed_lora` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

operators: Any = torch.ops.llmrl
_library = torch.library.Library("llmrl", "FRAGMENT")  # operators live as long as this


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmrl::{name}", fake, lib=_library)


def _shrink(x: Tensor, A: Tensor, gates: Tensor, keep_h: bool) -> tuple[Tensor, Tensor]:
    """Return u and h, an empty tensor where it is not kept."""
    if not len(x):
        return _shrink_fake(x, A, gates, keep_h)
    from llmrl_kernels.routed_lora_triton import shrink

    u, h = shrink(x, A.contiguous(), gates.to(torch.float32), keep_h)
    return u, x.new_empty(0) if h is None else h


def _shrink_fake(x: Tensor, A: Tensor, gates: Tensor, keep_h: bool) -> tuple[Tensor, Tensor]:
    u = x.new_empty(x.shape[0], A.shape[0] * A.shape[1])
    return u, torch.empty_like(u) if keep_h else x.new_empty(0)


def _expand(u: Tensor, B: Tensor, base: Tensor | None, scale: float, slices: list[int]) -> Tensor:
    if not u.shape[-2]:
        return _expand_fake(u, B, base, scale, slices)
    from llmrl_kernels.routed_lora_triton import expand

    return expand(u, B, scale, base, slices)


def _expand_fake(u: Tensor, B: Tensor, base: Tensor | None, scale: float, slices: list[int]) -> Tensor:
    return B.new_empty(u.shape[-2], B.shape[0])


def _mixture(
    x: Tensor, A: Tensor, B: Tensor, gates: Tensor, base: Tensor | None, scale: float, slices: list[int]
) -> Tensor:
    if not len(x):
        return _mixture_fake(x, A, B, gates, base, scale, slices)
    from llmrl_kernels.routed_lora_triton import expand, shrink

    u, _ = shrink(x, A.contiguous(), gates.to(torch.float32), keep_h=False, partial=True)
    return expand(u, B, scale, base, slices)


def _mixture_fake(
    x: Tensor, A: Tensor, B: Tensor, gates: Tensor, base: Tensor | None, scale: float, slices: list[int]
) -> Tensor:
    return x.new_empty(x.shape[0], B.shape[0])


def _switch_linear(
    x: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    u: Tensor,
    counters: Tensor,
    scale: float,
    fused: bool,
) -> Tensor:
    if not len(x):
        return x.new_empty(0, len(W))
    from llmrl_kernels.switch_linear_triton import launch

    return launch(x, W, A, B, gates.to(torch.float32), scale, bias, u, counters, fused)


def _switch_linear_fake(x: Tensor, W: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[0])


def _shrink_gathered(x: Tensor, A: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if not len(x):
        return _shrink_gathered_fake(x, A, ids, weights)
    from llmrl_kernels.routed_gathered_triton import FEW_TOKENS, shrink_gathered

    weights = weights.to(torch.float32).contiguous()
    return shrink_gathered(x, A.contiguous(), ids.contiguous(), weights, len(x) <= FEW_TOKENS)


def _shrink_gathered_fake(x: Tensor, A: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    u = x.new_empty(x.shape[0], ids.shape[1], A.shape[1])
    return u, torch.empty_like(u)


def _expand_gathered(u: Tensor, B: Tensor, ids: Tensor, base: Tensor | None, scale: float) -> Tensor:
    if not len(u):
        return _expand_gathered_fake(u, B, ids, base, scale)
    from llmrl_kernels.routed_gathered_triton import FEW_TOKENS, expand_gathered

    return expand_gathered(u.contiguous(), B.contiguous(), ids.contiguous(), scale, base, len(u) <= FEW_TOKENS)


def _expand_gathered_fake(u: Tensor, B: Tensor, ids: Tensor, base: Tensor | None, scale: float) -> Tensor:
    return u.new_empty(u.shape[0], B.shape[0])


_register("routed_shrink(Tensor x, Tensor A, Tensor gates, bool keep_h) -> (Tensor, Tensor)", _shrink, _shrink_fake)
_register("routed_expand(Tensor u, Tensor B, Tensor? base, float scale, int[] slices) -> Tensor", _expand, _expand_fake)
_register(
    "routed_lora(Tensor x, Tensor A, Tensor B, Tensor gates, Tensor? base, float scale, int[] slices) -> Tensor",
    _mixture,
    _mixture_fake,
)
_register(
    "switch_linear(Tensor x, Tensor W, Tensor A, Tensor B, Tensor gates, Tensor? bias, Tensor(a!) u, "
    "Tensor(b!) counters, float scale, bool fused) -> Tensor",
    _switch_linear,
    _switch_linear_fake,
)
_register(
    "routed_shrink_gathered(Tensor x, Tensor A, Tensor ids, Tensor weights) -> (Tensor, Tensor)",
    _shrink_gathered,
    _shrink_gathered_fake,
)
_register(
    "routed_expand_gathered(Tensor u, Tensor B, Tensor ids, Tensor? base, float scale) -> Tensor",
    _expand_gathered,
    _expand_gathered_fake,
)

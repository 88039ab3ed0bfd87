"""A linear layer with experts, and the route that all layers of one forward pass share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrl.errors import ModelError
from llmrl.lora_switch.pack import pack
from llmrl.lora_switch.routing import Route
from llmrl_kernels.routed_lora import routed_expand, routed_lora, routed_shrink


class ForwardRoute:
    """The route of one forward pass: made at its start, filled by the router, read by every layer behind it.

    It travels with the arguments of the decoder layers, so that a layer that is computed again for gradient checkpointing
    finds the route of its own pass and not of a later one.
    """

    def __init__(self, *, off: bool = False, prompt_mask: Tensor | None = None, cache: Any = None) -> None:
        self.off, self.prompt_mask, self.cache = off, prompt_mask, cache
        self.route: Route | None = None
        self.gates: Tensor | None = None  # [B, T, E] float32, or [B, 1, E] and [1, 1, E] where tokens share them
        self.merged = False  # the layers' merged weights are those of this route
        self.resident: int | None = None  # the one expert whose merged copies are used

    def gates_for(self, x: Tensor) -> Tensor:
        """Return the gates of the rows of x `[..., in]`, `[..., E]`."""
        if self.gates is None:
            raise ModelError("a layer with experts ran before the router: call the model, not its parts")
        gates = self.gates.to(x.device)  # another one where a device map splits the model
        if gates.dim() == x.dim() and gates.shape[:-1] == x.shape[:-1]:
            return gates
        if gates.dim() == x.dim():
            return gates.expand(*x.shape[:-1], gates.shape[-1])
        if x.dim() == 2 and len(x) % gates.shape[:-1].numel() == 0:  # rows laid end to end, one gate a token or a row
            return gates.reshape(-1, gates.shape[-1]).repeat_interleave(len(x) // gates.shape[:-1].numel(), 0)
        raise ModelError(
            f"a layer got an input {list(x.shape)}, the router saw tokens {list(gates.shape[:-1])}: not a layer to adapt"
        )


class RouteSlot:
    """Where the layers within one decoder layer look for the route."""

    def __init__(self) -> None:
        self.now: ForwardRoute | None = None


class SharedInput:
    """Layers that read one tensor (q, k, v): the first that runs takes the products with A of all of them, in one launch.

    For inference alone: it holds a copy of the layers' A, taken when it was made.
    """

    def __init__(self, layers: list[SwitchLinear]) -> None:
        self._layers = layers
        self._stamp = stamp(layers)
        self._a = pack([(layer.switch_A.detach(), layer.switch_B.detach()) for layer in layers])[0]
        self._input: Tensor | None = None
        self._products: Tensor | None = None
        self._left = 0

    def products(self, layer: SwitchLinear, x: Tensor, gates: Tensor) -> Tensor:
        """Return the gated products `[T, E r]` of `layer` on the rows of x `[..., in]`, or parts of them to be added."""
        experts, rank, width = layer.switch_A.shape
        if self._input is not x:
            if self._stamp != stamp(self._layers):  # trained, loaded or cast since
                self.__init__(self._layers)  # type: ignore[misc]
            rows = x.reshape(-1, width).to(self._a.dtype)
            flat = gates.reshape(-1, experts).repeat(1, len(self._layers))
            self._products, _ = routed_shrink(rows, self._a, flat, partial=True)
            self._input, self._left = x, len(self._layers)
        assert self._products is not None
        size = experts * rank
        own = self._products.narrow(-1, self._layers.index(layer) * size, size)
        self._left -= 1
        if not self._left:
            self._input = self._products = None
        return own


def stamp(layers: Iterable[SwitchLinear]) -> list[tuple[int, int]]:
    """Return what changes when a tensor of the layers is written in place or replaced; not so a write through `.data`."""
    return stamp_of(p for layer in layers for p in (layer.weight, layer.switch_A, layer.switch_B))


def stamp_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Return a version and an address a tensor; tensors made under `torch.inference_mode` count no versions."""
    return [(0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors]


class SwitchLinear(nn.Module):
    """`W x + b + scale sum_e g_e B_e A_e x`, with the names of the linear layer it takes the place of.

    Args:
        base: the linear layer; its parameters are taken over as `weight` and `bias`.
        num_experts, r: E and the rank of an expert.
        scale: factor of the experts' sum.
        slot: where the route is found.
        dropout: on the experts' input in training.
        dtype: of the experts; None is the base's.
    """

    def __init__(
        self,
        base: nn.Linear,
        num_experts: int,
        r: int,
        scale: float,
        slot: RouteSlot,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        kind = {"device": base.weight.device, "dtype": dtype or base.weight.dtype}
        # A [E, r, in], B [out, E r]: column e r + j of B belongs to rank j of expert e
        self.switch_A = nn.Parameter(torch.empty(num_experts, r, base.in_features, **kind))
        self.switch_B = nn.Parameter(torch.zeros(base.out_features, num_experts * r, **kind))
        self.scale, self.slot, self.dropout = scale, slot, dropout
        self.shared: SharedInput | None = None
        self.merged_weight: Tensor | None = None  # W + the experts of one route, for the run modes that merge
        self.resident_weights: list[Tensor] | None = None  # W + expert e for every e
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as LoRA does: A uniform with variance 1 / (3 in), B zero, so that the layer is the base's."""
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.switch_A.uniform_(-bound, bound)
            self.switch_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]` for x `[..., in]`."""
        now = self.slot.now
        if now is not None and now.merged:
            assert self.merged_weight is not None
            return F.linear(x, self.merged_weight, self.bias)
        if now is not None and now.resident is not None:
            assert self.resident_weights is not None
            return F.linear(x, self.resident_weights[now.resident], self.bias)
        out = F.linear(x, self.weight, self.bias)
        if now is None:
            raise ModelError("a layer with experts ran outside of its model: call the model, not its parts")
        if now.off:
            return out
        gates = now.gates_for(x)
        if self.shared is not None and not torch.is_grad_enabled() and not self.training:
            return self._expanded(self.shared.products(self, x, gates), out)
        own, autocast = self.switch_A.dtype, torch.is_autocast_enabled(x.device.type)
        inner = x if x.dtype == own or autocast else x.to(own)
        if self.dropout and self.training:
            inner = F.dropout(inner, self.dropout)
        if inner.dtype == out.dtype == own:
            return routed_lora(inner, self.switch_A, self.switch_B, gates, self.scale, base=out)
        return out + routed_lora(inner, self.switch_A, self.switch_B, gates, self.scale).to(out.dtype)

    def _expanded(self, gated: Tensor, out: Tensor) -> Tensor:
        if self.switch_B.dtype == out.dtype:
            base = out.reshape(-1, self.out_features)
            return routed_expand(gated, self.switch_B, scale=self.scale, base=base).view_as(out)
        return out + routed_expand(gated, self.switch_B, scale=self.scale).view_as(out).to(out.dtype)

    def extra_repr(self) -> str:
        """Sizes, for printing a model."""
        experts, rank, _ = self.switch_A.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, experts={experts}, r={rank}"

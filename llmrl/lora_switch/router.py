"""The router: one linear map, shared by every layer with experts, and where in the model it reads.

Embeddings are the same bits in every engine, normed ones are not (in bfloat16 a quarter of the elements differ between
transformers and vLLM), so a router of embeddings takes them raw and norms them itself, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrl.errors import ModelError
from llmrl.lora_switch.config import SwitchConfig
from llmrl.lora_switch.routing import Route, choose, pooled, rms_normed


class Router(nn.Module):
    """`[..., hidden]` -> `Route`. Stays in float32 whatever the model is cast to, so that trainer and server choose alike.

    Args:
        config: number of experts, top_k, gate, noise.
        hidden_size: width of what it reads.
    """

    def __init__(self, config: SwitchConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        # normed states have a mean square of 1: logits of variance 1
        self.weight = nn.Parameter(
            torch.randn(config.num_experts, hidden_size, dtype=torch.float32) * hidden_size**-0.5
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the model, but do not follow it to 16 bits."""
        kept, grad = self.weight.data, None if self.weight.grad is None else self.weight.grad.data
        super()._apply(fn, recurse)
        if self.weight.dtype in (torch.bfloat16, torch.float16):
            self.weight.data = kept.to(self.weight.device)
            self.weight.grad = None if grad is None else grad.to(self.weight.device)
        return self

    def forward(self, states: Tensor) -> Route:
        """Return the route of each row of `[..., hidden]`: embeddings as they are looked up, or normed states."""
        return self._choose(rms_normed(states) if self.config.router_input == "embedding" else states)

    def pooled(self, embedded: Tensor, mask: Tensor) -> Route:
        """Return one route a row `[B, 1]` from embeddings `[B, T, hidden]` and the prompt's mask `[B, T]`."""
        return self._choose(pooled(rms_normed(embedded), mask).unsqueeze(1))

    def _choose(self, states: Tensor) -> Route:
        config = self.config
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(states.float(), self.weight.float())
        if self.training and config.router_noise:
            logits = logits + torch.randn_like(logits) * config.router_noise
        return choose(logits, config.top_k, config.gate)


def router_site(layers: nn.ModuleList, config: SwitchConfig) -> tuple[nn.Module, bool]:
    """Return the module the router watches, and whether it reads what enters it instead of what it gives.

    Raises:
        ModelError: no such layer, or one without the part that is watched.
    """
    number = config.router_layer
    if number >= len(layers):
        raise ModelError(f"router_layer: the model has decoder layers 0 to {len(layers) - 1}, got {number}")
    wanted = "mlp" if config.router_input == "layer0_mlp" else "input_layernorm"
    found: Any = getattr(layers[number], wanted, None)
    if found is None:
        raise ModelError(
            f"the decoder layers of this model ({type(layers[number]).__name__}) have no {wanted}, which the router "
            f"reads for router_input '{config.router_input}': choose another"
        )
    return found, config.router_input != "layer_k"

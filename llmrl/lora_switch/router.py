"""The router: one linear map, shared by every layer with experts, and where in the model it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmrl.errors import ModelError
from llmrl.lora_switch.config import SwitchConfig
from llmrl.lora_switch.routing import Route, choose, pooled


class Router(nn.Module):
    """`[..., hidden]` -> `Route`. Computes in float32 whatever the model's dtype, so that trainer and server choose alike.

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

    def forward(self, states: Tensor) -> Route:
        """Return the route of each row of `[..., hidden]`."""
        config = self.config
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(states.float(), self.weight.float())
        if self.training and config.router_noise:
            logits = logits + torch.randn_like(logits) * config.router_noise
        return choose(logits, config.top_k, config.gate)

    def pooled(self, states: Tensor, mask: Tensor) -> Route:
        """Return one route a row `[B, 1]` from states `[B, T, hidden]` and the prompt's mask `[B, T]`."""
        return self(pooled(states, mask).unsqueeze(1))


def router_site(layers: nn.ModuleList, config: SwitchConfig) -> tuple[nn.Module, bool]:
    """Return the module the router watches, and whether it reads what enters it instead of what it gives.

    Raises:
        ConfigError, ModelError: no such layer, or one without the part that is watched.
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
    return found, wanted == "mlp"

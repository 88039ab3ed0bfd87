"""What causal LMs do to the product with their output embedding: constant scales and soft-caps, under many names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def scale_and_cap(config: Any) -> tuple[float, float | None]:
    """Return the constant that logits are multiplied by, and their soft-cap or None, of a text configuration.

    Scales are those of Cohere and Falcon-H1 (multiplied) and Granite (divided), caps those of Gemma, RecurrentGemma and xLSTM.
    """
    scale = 1.0
    for name in _SCALES:
        scale *= _number(config, name) or 1.0
    scaling = _number(config, "logits_scaling") or 1.0  # HyperCLOVA X multiplies by it, Granite divides
    scale *= scaling if config.model_type == "hyperclovax" else 1 / scaling
    return scale, next((found for name in _CAPS if (found := _number(config, name))), None)


def finish_logits(z: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """Return logits of the product `z` with the output embedding: `cap * tanh(scale * z / cap)`."""
    if scale != 1.0:
        z = z * scale
    if soft_cap:
        z = torch.tanh(z / soft_cap) * soft_cap
    return z


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None

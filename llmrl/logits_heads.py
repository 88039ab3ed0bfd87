"""Heads that change the logits of a causal LM: adaptive temperatures (ATS) and vector scaling.

A temperature head gives each position one number tau and multiplies its logits by exp(tau) > 0 (arXiv 2409.19817, sec. 3).
Four shapes: `scalar` (one learned number), `linear`, `mlp` (a gated MLP with a residual, then linear) and `transformer` (a
causal decoder block, then linear). The last one reads earlier positions too, so its attention is handed in: it lies in the
KV cache of transformers, of vLLM, or in a whole sequence at once.

All of them start at tau = 0, hence as exactly the base model. They compute in float32 whatever the base's dtype; keys and
values are rounded to the base's dtype, because that is what a KV cache holds. This file needs torch alone, so that a
checkpoint can carry it.

The matrices are plain parameters, not `nn.Linear`: programs that quantise a model or put LoRA into it go by its linear layers,
and a head belongs to neither the weights they shrink nor those they train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llmrl.value_heads import ValueHead

# The multiplier exp(tau) stays in this range. The upper end is the reference implementation's clip (head.py of the paper's
# code); the lower end keeps a runaway head from flattening a distribution to uniform.
MIN_LOG_SCALE = -3.0
MAX_LOG_SCALE = math.log(10.0)
_NORM_EPS = 1e-6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class TemperatureHead(nn.Module):
    """Per-token log inverse temperature tau; logits are multiplied by exp(tau).

    Args:
        spec: a `llmrl.heads.HeadSpec`, or anything with its fields.
    """

    reads_sequence = False
    weight: nn.Parameter | None

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        if spec.architecture == "scalar":
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.zeros(1, spec.hidden_size, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return tau, clipped, `[..., 1]` float32, for hidden states `[..., H]` of any dtype."""
        return self.read_out(hidden.to(self.bias.device).float())

    def read_out(self, features: Tensor) -> Tensor:
        """Return tau, clipped, `[..., 1]`, for the float32 features `[..., H]` that the last layer reads."""
        if self.weight is None:
            tau = self.bias.float().expand(*features.shape[:-1], 1)
        else:
            tau = functional.linear(features, self.weight.float(), self.bias.float())
        return tau.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)


class _Standardised(TemperatureHead):
    """A head that sees `hidden * scale + shift`: the features with mean 0 and deviation 1 once fitted."""

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(spec.hidden_size, dtype=torch.float32))
        self.shift = nn.Parameter(torch.zeros(spec.hidden_size, dtype=torch.float32))

    def add_mlp(self) -> None:
        """Make the parameters of the gated MLP, `[outputs, inputs]` each."""
        width, inner = self.spec.hidden_size, self.spec.intermediate_size
        self.gate_weight, self.gate_bias = _zeros(inner, width), _zeros(inner)
        self.up_weight, self.up_bias = _zeros(inner, width), _zeros(inner)
        self.down_weight = _zeros(width, inner)

    def mlp(self, x: Tensor) -> Tensor:
        """Return down(silu(gate(x)) * up(x)), `[..., H]`."""
        gate = _linear(x, self.gate_weight, self.gate_bias)
        return _linear(functional.silu(gate) * _linear(x, self.up_weight, self.up_bias), self.down_weight)

    def standardise(self, hidden: Tensor) -> Tensor:
        """Return float32 features on the head's device."""
        return hidden.to(self.bias.device).float() * self.scale.float() + self.shift.float()


class MLPTemperatureHead(_Standardised):
    """tau = w . (x + MLP(x)) + b of the standardised hidden state x."""

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        self.add_mlp()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return tau, clipped, `[..., 1]` float32, for hidden states `[..., H]`."""
        x = self.standardise(hidden)
        return self.read_out(x + self.mlp(x))


class TransformerTemperatureHead(_Standardised):
    """tau = w . y + b, y the output of one pre-norm causal decoder block on the standardised hidden states."""

    reads_sequence = True

    def __init__(self, spec: Any) -> None:
        super().__init__(spec)
        width, size = spec.hidden_size, spec.head_dim
        self.attention_norm = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self.mlp_norm = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self.add_mlp()
        self.q_weight = _zeros(spec.num_heads * size, width)
        self.k_weight = _zeros(spec.num_kv_heads * size, width)
        self.v_weight = _zeros(spec.num_kv_heads * size, width)
        self.o_weight = _zeros(width, spec.num_heads * size)

    def forward(self, hidden: Tensor, positions: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """Return tau, clipped, `[..., T, 1]` float32.

        Args:
            hidden: `[..., T, H]`, in the base's dtype.
            positions: `[..., T]` of the tokens in their sequence; None counts from 0.
            attend: attention over q `[..., T, heads, D]` and k, v `[..., T, kv_heads, D]`, rotated, in the base's dtype,
                giving `[..., T, heads, D]`; None is causal attention within `hidden` `[B, T, H]`.
        """
        x = self.standardise(hidden)
        if positions is None:
            positions = torch.arange(x.shape[-2], device=x.device)
        size = self.spec.head_dim
        normed = rms_norm(x, self.attention_norm)
        weights = (self.q_weight, self.k_weight, self.v_weight)
        q, k, v = (_linear(normed, weight).unflatten(-1, (-1, size)) for weight in weights)
        turn = rotation(positions.to(x.device), size, self.spec.rope_theta)
        q, k = rotate(q, turn), rotate(k, turn)
        q, k, v = (part.to(hidden.dtype) for part in (q, k, v))
        mixed = (attend or causal_attention)(q, k, v).to(x.device).float()
        x = x + _linear(mixed.flatten(-2), self.o_weight)
        return self.read_out(x + self.mlp(rms_norm(x, self.mlp_norm)))


class VectorHead(nn.Module):
    """Vector scaling (Guo et al., 2017): `logits * scale + bias`, one pair of numbers a vocabulary entry.

    Not a temperature: it can change which token is the most likely.
    """

    reads_sequence = False

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec
        self.scale = nn.Parameter(torch.ones(spec.outputs, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(spec.outputs, dtype=torch.float32))

    def forward(self, logits: Tensor) -> Tensor:
        """Return scaled logits `[..., V]` in float32."""
        return logits.float() * self.scale.to(logits.device).float() + self.bias.to(logits.device).float()


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))


def initialise(head: nn.Module, generator: torch.Generator) -> None:
    """Draw the inner matrices of a fresh head, normal with variance 1 / inputs; tau stays 0, as the last layer is zero."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim == 2 and name != "weight":
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # .float(): a model cast to bfloat16 as a whole casts its heads too
    return functional.linear(x, weight.float(), None if bias is None else bias.float())


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return x over its root mean square, times `weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _NORM_EPS) * weight.float()


def rotation(positions: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of rotary positions, each `[..., T, 1, size / 2]` float32."""
    speed = theta ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angle = (positions.double()[..., None] * speed)[..., None, :]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of `[..., T, heads, size]` (the half-split form of Llama)."""
    first, second = x.chunk(2, -1)
    cosine, sine = turn
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return attention `[B, T, heads, D]` of q over k, v `[B, S, kv_heads, D]`.

    Args:
        mask: `[B, 1, T, S]` bool, True where a query sees a key; None lets position t see keys 0 to t (T = S).
    """
    q, k, v = (part.transpose(-3, -2) for part in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(-3, -2)


_CLASSES: dict[str, type[TemperatureHead]] = {
    "scalar": TemperatureHead,
    "linear": TemperatureHead,
    "mlp": MLPTemperatureHead,
    "transformer": TransformerTemperatureHead,
}


def build_logits_head(spec: Any) -> nn.Module:
    """Return a fresh head of kind "temperature", "vector" or "value" that leaves the logits as they are."""
    if spec.kind == "value":
        return ValueHead(spec)
    return VectorHead(spec) if spec.kind == "vector" else _CLASSES[spec.architecture](spec)


def reads_sequence(heads: nn.ModuleDict) -> bool:
    """Tell whether a head looks at earlier positions, so that it needs every hidden state and a place in the KV cache."""
    return any(getattr(head, "reads_sequence", False) for head in heads.values())


def apply_logits_heads(
    heads: nn.ModuleDict, logits: Tensor, hidden: Tensor, taus: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Run every head that changes logits, in the order of the folder; used by transformers and by vLLM alike.

    The product is taken in float32: a bfloat16 product can round two different logits to one and so move the argmax.

    Args:
        logits: `[..., V]`.
        hidden: `[..., H]`, of the same positions.
        taus: name -> `[..., 1]` of the heads that read sequences, computed where all positions are known.
    """
    for name, head in heads.items():
        if isinstance(head, VectorHead):
            logits = head(logits)
        elif isinstance(head, TemperatureHead):
            tau = taus[name] if taus is not None and name in taus else head(hidden)
            logits = logits.float() * tau.to(logits.device).exp()
        elif isinstance(head, ValueHead):
            logits = head.steer(logits, hidden)
    return logits

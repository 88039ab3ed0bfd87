"""What a switch model is: experts, where they sit, and what chooses them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llmrl.errors import ConfigError, did_you_mean

ROUTER_INPUTS = ("embedding", "layer0_mlp", "layer_k", "prompt_pooled")
GATES = ("softmax", "hard")
ALL_LINEAR = "all-linear"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class SwitchConfig:
    """Experts of low rank on chosen linear layers, and one router whose choice holds for all of them.

    A layer computes `y = W x + (alpha / r) sum_e g_e B_e A_e x`; at most `top_k` of the gates g are not zero.

    Args:
        num_experts: E. With one expert the model is plain LoRA.
        r: rank of an expert.
        alpha: numerator of the factor `alpha / r`; 0 stands for 2 r top_k: gates sum to 1, so that the chosen experts move the
            output as far as one LoRA of their ranks together does with an alpha of twice its rank.
        target_modules: last parts of the names of the layers that get experts, or "all-linear" (every linear layer within a
            decoder layer).
        router_input: what the router reads. "embedding": the embedding of the token, normed, so that a route is a function of
            the token id alone. "layer0_mlp": what enters the MLP of the first decoder layer; the attention before it has no
            experts. "layer_k": what enters the attention of decoder layer `router_layer`, normed; layers before it have no
            experts. "prompt_pooled": the mean of the normed embeddings of the prompt, one route a sequence.
        router_layer: k of "layer_k".
        top_k: experts a token.
        gate: "softmax" (over the chosen experts' logits) or "hard" (1 / top_k each; gradients pass straight through).
        balance_coef: weight of the load-balancing loss; 0 for none.
        router_noise: standard deviation of noise on the router's logits in training.
        dropout: on the experts' input in training.
        dtype: of the experts: "auto" is that of each base layer.
    """

    num_experts: int = 8
    r: int = 16
    alpha: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    router_input: str = "embedding"
    router_layer: int = 0
    top_k: int = 2
    gate: str = "softmax"
    balance_coef: float = 0.01
    router_noise: float = 0.0
    dropout: float = 0.0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, (list, set, frozenset)):
            object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules)))
        for name in ("num_experts", "r", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}: expected a whole number from 1, got {value!r}")
        if self.top_k > self.num_experts:
            raise ConfigError(f"top_k: expected at most num_experts = {self.num_experts}, got {self.top_k}")
        for name, choices in (("router_input", ROUTER_INPUTS), ("gate", GATES), ("dtype", _DTYPES)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")
        if self.top_k == 1 < self.num_experts and self.gate == "softmax":
            raise ConfigError(
                "top_k 1 with gate 'softmax' weighs every choice 1, so the router would learn nothing: use gate 'hard'"
            )
        if not isinstance(self.router_layer, int) or self.router_layer < 0:
            raise ConfigError(f"router_layer: expected the number of a decoder layer, got {self.router_layer!r}")
        if self.router_layer and self.router_input != "layer_k":
            raise ConfigError(f"router_layer belongs to router_input 'layer_k', got '{self.router_input}'")
        for name in ("alpha", "balance_coef", "router_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)!r}")
        if not self.alpha:  # written down, so that a folder does not depend on what the default is
            object.__setattr__(self, "alpha", 2.0 * self.r * self.top_k)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: expected 0 up to below 1, got {self.dropout!r}")
        if not self.target_modules:
            raise ConfigError("target_modules: name at least one layer, such as q_proj, or 'all-linear'")

    @property
    def scale(self) -> float:
        """The factor of the experts' sum."""
        return self.alpha / self.r

    def targets(self, name: str) -> bool:
        """Tell whether the linear layer with this dotted name is asked for."""
        if self.target_modules == ALL_LINEAR:
            return True
        wanted = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        return any(name == one or name.endswith("." + one) for one in wanted)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the targets that name no linear layer among `names`."""
        if self.target_modules == ALL_LINEAR:
            return []
        names = list(names)
        wanted = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        return [one for one in wanted if not any(name == one or name.endswith("." + one) for name in names)]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        fields = asdict(self)
        if not isinstance(self.target_modules, str):
            fields["target_modules"] = list(self.target_modules)
        return fields

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SwitchConfig:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: an unknown key or a value out of range.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"expected an object with the fields of a SwitchConfig, got {value!r:.60}")
        known = cls.__dataclass_fields__
        for key in value:
            if key not in known:
                raise ConfigError(f"unknown key '{key}' in the switch configuration{did_you_mean(key, known)}")
        fields = dict(value)
        if isinstance(fields.get("target_modules"), list):
            fields["target_modules"] = tuple(fields["target_modules"])
        return cls(**fields)


_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def layer_number(name: str) -> int | None:
    """Return the decoder layer a module's dotted name lies in, None outside of all."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def is_routed(config: SwitchConfig, name: str) -> bool:
    """Tell whether the router has decided before the module `name` runs, so that it may have experts."""
    number = layer_number(name)
    if number is None:
        return False
    if config.router_input == "layer_k":
        return number >= config.router_layer
    if config.router_input == "layer0_mlp":
        return number > 0 or ".mlp." in name
    return True

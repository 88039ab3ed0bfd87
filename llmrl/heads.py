"""One format for everything llmrl attaches to a frozen model: what a head is, what it was fitted on, how it is stored.

A head reads the hidden states that enter the output embedding (after the final norm) and either changes the logits
(`kind="temperature"`, "vector" or "value") or produces scores of its own (`kind="reward"`). It is described by a `HeadSpec`,
lives in float32 whatever the base's dtype, and is stored as tensors `llmrl_heads.<name>.<parameter>` in
`llmrl_heads.safetensors`. The folder's `config.json` holds the base's configuration with `model_type: "llmrl"` and the
`HeadsConfig` under the key `llmrl`; a program without llmrl therefore refuses the folder instead of silently serving the base.

A head belongs to one base: `BaseReference` records fingerprints of weights, tokenizer and chat template
(`llmrl.fingerprints`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import ModelError, did_you_mean
from llmrl.logits_heads import build_logits_head
from llmrl.reward_heads import build_reward_head

FORMAT_VERSION = 1
HEADS_FILE = "llmrl_heads.safetensors"
PREFIX = "llmrl_heads."
CONFIG_KEY = "llmrl"
VALUES = "values"  # the folder of a second trunk
MODEL_TYPE = "llmrl"
MODELING_MODULE = "modeling_llmrl"  # the file that `llmrl.portable` writes

_ARCHITECTURES = {
    "temperature": ("scalar", "linear", "mlp", "transformer"),
    "vector": ("vector",),
    "reward": ("linear", "mlp"),
    "value": ("linear", "low_rank", "mlp"),
}
_SIZES = {
    "low_rank": ("intermediate_size",),
    "mlp": ("intermediate_size",),
    "transformer": ("intermediate_size", "num_heads", "num_kv_heads", "head_dim"),
}
POOLING_KINDS = ("reward",)


@dataclass(frozen=True)
class HeadSpec:
    """Shape and kind of one head.

    Args:
        kind: "temperature" (logits are multiplied by exp(tau)), "vector" (logits times and plus a vector), "value" (Q and V of
            offline RL; logits plus beta Q) or "reward" (K scores a sequence).
        architecture: "scalar" (one learned number, reads nothing), "linear" (hidden_size -> outputs, with bias), "mlp" or
            "transformer" (see `llmrl.logits_heads`); "vector" for a vector; "low_rank" (see `llmrl.value_heads`).
        hidden_size: width of the hidden states it reads.
        outputs: K for a reward head, the size of the vocabulary for a vector or a value, 1 for a temperature head.
        intermediate_size: inner width of the MLP, for "mlp" and "transformer"; of a reward head, hidden units of each score.
        num_heads, num_kv_heads, head_dim, rope_theta: attention of "transformer".
        shared_size: of a reward head, hidden units that all scores share (`llmrl.reward_heads`).
        beta: of a value head, how far Q moves the policy where nothing else is said; 0 is the base's own.
        support: of a value head, see `llmrl.value_heads.steer`.
    """

    kind: str
    architecture: str
    hidden_size: int
    outputs: int = 1
    intermediate_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    rope_theta: float = 10000.0
    shared_size: int = 0
    beta: float = 0.0
    support: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _ARCHITECTURES:
            raise ModelError(f"unknown head kind '{self.kind}'{did_you_mean(self.kind, _ARCHITECTURES)}")
        if self.architecture not in _ARCHITECTURES[self.kind]:
            valid = _ARCHITECTURES[self.kind]
            raise ModelError(
                f"unknown architecture '{self.architecture}' for a {self.kind} head"
                f"{did_you_mean(self.architecture, valid)}"
            )
        sizes = () if self.kind == "reward" else _SIZES.get(self.architecture, ())
        for name in ("hidden_size", "outputs", *sizes):
            if getattr(self, name) < 1:
                raise ModelError(f"a {self.architecture} head needs {name} >= 1, got {getattr(self, name)}")
        units = (self.intermediate_size, self.shared_size)
        if (self.kind, self.architecture) == ("reward", "mlp") and (min(units) < 0 or max(units) < 1):
            raise ModelError(
                f"an mlp reward head needs intermediate_size or shared_size >= 1, got {units[0]} and {units[1]}"
            )
        if self.kind == "temperature" and self.outputs != 1:
            raise ModelError(f"a temperature head has 1 output, got {self.outputs}")
        if not self.beta >= 0 or not 0 <= self.support <= 1:
            raise ModelError(f"a head has beta >= 0 and support from 0 to 1, got {self.beta} and {self.support}")
        if self.architecture == "transformer" and (self.num_heads % self.num_kv_heads or self.head_dim % 2):
            raise ModelError(
                f"a transformer head needs num_heads a multiple of num_kv_heads and an even head_dim, got {self.num_heads}, "
                f"{self.num_kv_heads} and {self.head_dim}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON without the sizes that such a head does not have."""
        needed = {"kind", "architecture", "hidden_size", "outputs", *_SIZES.get(self.architecture, ())}
        needed |= {"rope_theta"} if self.architecture == "transformer" else set()
        needed |= {"beta", "support"} if self.kind == "value" else set()
        needed |= {"shared_size"} if (self.kind, self.architecture) == ("reward", "mlp") else set()
        return {name: value for name, value in asdict(self).items() if name in needed}


@dataclass(frozen=True)
class BaseReference:
    """What a head was fitted on: where the base lies, and fingerprints of the three things that must not change."""

    model: str
    weights: str
    tokenizer: str
    template: str
    revision: str | None = None


@dataclass(frozen=True)
class HeadsConfig:
    """The value of `config.json["llmrl"]`: heads by name, the base they belong to, and whether its weights lie beside.

    `level` says what a temperature or vector was fitted on: "token", or "answer" for the letters of multiple choice and for
    answers the model gave itself. Of the latter `answer_confidence` is how the probabilities of an answer's tokens become its
    confidence. Both are None in folders that do not say.
    """

    heads: dict[str, HeadSpec]
    base: BaseReference
    base_model_type: str
    base_architecture: str
    merged: bool = False
    method: str | None = None
    level: str | None = None
    answer_confidence: str | None = None
    format: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; sizes that a head does not have are left out."""
        fields = asdict(self)
        fields["heads"] = {name: spec.to_json() for name, spec in self.heads.items()}
        return fields

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HeadsConfig:
        """Read what `to_json` wrote.

        Raises:
            ModelError: another format version, a key that this version does not know, or a missing or broken part.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT_VERSION:
            found = value.get("format") if isinstance(value, Mapping) else value
            raise ModelError(f"head format {found!r} is not {FORMAT_VERSION}: install the llmrl that wrote it")
        known = set(cls.__dataclass_fields__)
        for key in value:
            if key not in known:
                raise ModelError(f"unknown key '{key}' in the head configuration{did_you_mean(key, known)}")
        fields = dict(value)
        try:
            fields["heads"] = {name: HeadSpec(**spec) for name, spec in value["heads"].items()}
            fields["base"] = BaseReference(**value["base"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"the head configuration is damaged ({error}): save the folder again") from error


def build_head(spec: HeadSpec) -> nn.Module:
    """Return a fresh, zero-initialised head."""
    return build_reward_head(spec) if spec.kind == "reward" else build_logits_head(spec)


def build_heads(config: HeadsConfig) -> nn.ModuleDict:
    """Return the heads of a folder, by name, in float32 and without gradients."""
    heads = nn.ModuleDict({name: build_head(spec) for name, spec in config.heads.items()})
    return heads.requires_grad_(False)


def has_value_trunk(folder: Path | str) -> bool:
    """Tell whether a policy's values lie beside it, on a trunk of their own (`llmrl.hindsight.policy_folder`)."""
    return (Path(folder) / VALUES / "config.json").is_file()


def asked_steering(spec: HeadSpec, given: Mapping[str, Any]) -> tuple[float, float]:
    """Return beta and support of a value head: each as given, else as the environment says, else as stored.

    Args:
        spec: of the head.
        given: `beta` and `support`, None or missing where nothing was asked for; then LLMRL_BETA and LLMRL_SUPPORT count.

    Raises:
        ModelError: one is no number or out of range.
    """
    found = {"beta": spec.beta, "support": spec.support}
    for name in found:
        asked = given.get(name)
        asked = os.environ.get(f"LLMRL_{name.upper()}") if asked is None else asked
        if asked is not None:
            try:
                found[name] = float(asked)
            except (TypeError, ValueError):
                raise ModelError(f"expected a number for llmrl_{name}, got {asked!r:.40}") from None
    spec = replace(spec, beta=found["beta"], support=found["support"])
    return spec.beta, spec.support


def head_tensors(heads: nn.ModuleDict) -> dict[str, Tensor]:
    """Return `llmrl_heads.<name>.<parameter>` -> contiguous CPU tensor."""
    return {PREFIX + name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}


def save_head_tensors(folder: Path | str, heads: nn.ModuleDict) -> None:
    """Write `llmrl_heads.safetensors` into `folder`."""
    from safetensors.torch import save_file

    path = Path(folder) / HEADS_FILE
    save_file(head_tensors(heads), str(path), metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it readable by its owner only


def load_head_tensors(heads: nn.ModuleDict, tensors: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into `heads`; names and shapes must be exactly those of the specification.

    Raises:
        ModelError: a tensor is missing, unknown, of another shape, or not finite.
    """
    own = heads.state_dict()
    given = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    for name in sorted(own.keys() | given.keys()):
        if name not in given or name not in own:
            state = "missing from" if name not in given else "not expected in"
            raise ModelError(
                f"head tensor {PREFIX}{name} is {state} {HEADS_FILE}: the folder is damaged, save it again"
            )
        if own[name].shape != given[name].shape:
            raise ModelError(
                f"head tensor {PREFIX}{name} has shape {list(given[name].shape)}, config.json says "
                f"{list(own[name].shape)}: the folder is damaged, save it again"
            )
        if not torch.isfinite(given[name]).all():
            raise ModelError(f"head tensor {PREFIX}{name} holds NaN or infinity: fit the head again")
        own[name].copy_(given[name])

"""One format for everything llmrl attaches to a frozen model: what a head is, what it was fitted on, how it is stored.

A head reads the hidden states that enter the output embedding (after the final norm) and either changes the logits
(`kind="temperature"`) or produces scores of its own (`kind="reward"`). It is described by a `HeadSpec`, lives in float32
whatever the base's dtype, and is stored as tensors `llmrl_heads.<name>.<parameter>` in `llmrl_heads.safetensors`. The
folder's `config.json` holds the base's configuration with `model_type: "llmrl"` and the `HeadsConfig` under the key
`llmrl`; a program without llmrl therefore refuses the folder instead of silently serving the base.

A head belongs to one base: `BaseReference` records fingerprints of weights, tokenizer and chat template.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import HeadMismatchError, ModelError, did_you_mean

FORMAT_VERSION = 1
HEADS_FILE = "llmrl_heads.safetensors"
PREFIX = "llmrl_heads."
CONFIG_KEY = "llmrl"
MODEL_TYPE = "llmrl"

# The multiplier exp(tau) of a temperature head stays in this range. The upper end is the reference implementation's clip
# (arXiv 2409.19817, head.py); the lower end keeps a runaway head from flattening a distribution to uniform.
MIN_LOG_SCALE = -3.0
MAX_LOG_SCALE = math.log(10.0)

_ARCHITECTURES = {"temperature": ("scalar", "linear"), "reward": ("linear",)}
POOLING_KINDS = ("reward",)


@dataclass(frozen=True)
class HeadSpec:
    """Shape and kind of one head.

    Args:
        kind: "temperature" (logits are multiplied by exp(tau)) or "reward" (K scores a sequence).
        architecture: "scalar" (one learned number, reads nothing) or "linear" (hidden_size -> outputs, with bias).
        hidden_size: width of the hidden states it reads.
        outputs: K for a reward head, 1 for a temperature head.
    """

    kind: str
    architecture: str
    hidden_size: int
    outputs: int = 1

    def __post_init__(self) -> None:
        if self.kind not in _ARCHITECTURES:
            raise ModelError(f"unknown head kind '{self.kind}'{did_you_mean(self.kind, _ARCHITECTURES)}")
        if self.architecture not in _ARCHITECTURES[self.kind]:
            valid = _ARCHITECTURES[self.kind]
            raise ModelError(
                f"unknown architecture '{self.architecture}' for a {self.kind} head"
                f"{did_you_mean(self.architecture, valid)}"
            )
        if self.hidden_size < 1 or self.outputs < 1:
            raise ModelError(f"a head needs hidden_size and outputs >= 1, got {self.hidden_size} and {self.outputs}")
        if self.kind == "temperature" and self.outputs != 1:
            raise ModelError(f"a temperature head has 1 output, got {self.outputs}")


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
    """The value of `config.json["llmrl"]`: heads by name, the base they belong to, and whether its weights lie beside."""

    heads: dict[str, HeadSpec]
    base: BaseReference
    base_model_type: str
    base_architecture: str
    merged: bool = False
    method: str | None = None
    format: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)

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


class TemperatureHead(nn.Module):
    """Per-token inverse temperature: logits are multiplied by exp(tau(h)), tau = w.h + b (ATS, arXiv 2409.19817, sec. 3).

    Zero-initialised, so that an unfitted head multiplies by exactly 1.
    """

    weight: nn.Parameter | None

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.bias = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        if spec.architecture == "linear":
            self.weight = nn.Parameter(torch.zeros(1, spec.hidden_size, dtype=torch.float32))
        else:
            self.register_parameter("weight", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return tau, clipped, `[..., 1]` float32, for hidden states `[..., H]` of any dtype."""
        bias = self.bias.to(hidden.device, torch.float32)
        if self.weight is None:
            tau = bias.expand(*hidden.shape[:-1], 1)
        else:
            tau = nn.functional.linear(hidden.float(), self.weight.to(hidden.device, torch.float32), bias)
        return tau.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)

    def apply_to_logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Return calibrated logits `[..., V]` in float32.

        The product is taken in float32: a bfloat16 product can round two different logits to one and so move the argmax.
        """
        return logits.float() * self(hidden).exp()


class RewardHead(nn.Module):
    """K linear scores of a pooled hidden state, `[..., H] -> [..., K]`."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(spec.outputs, spec.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(spec.outputs, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return scores `[..., K]` in float32."""
        weight = self.weight.to(hidden.device, torch.float32)
        return nn.functional.linear(hidden.float(), weight, self.bias.to(hidden.device, torch.float32))


def build_head(spec: HeadSpec) -> nn.Module:
    """Return a fresh, zero-initialised head."""
    return TemperatureHead(spec) if spec.kind == "temperature" else RewardHead(spec)


def build_heads(config: HeadsConfig) -> nn.ModuleDict:
    """Return the heads of a folder, by name, in float32 and without gradients."""
    heads = nn.ModuleDict({name: build_head(spec) for name, spec in config.heads.items()})
    return heads.requires_grad_(False)


def apply_logits_heads(heads: nn.ModuleDict, logits: Tensor, hidden: Tensor) -> Tensor:
    """Run every head that changes logits, in the order of the folder; used by transformers and by vLLM alike."""
    for head in heads.values():
        if isinstance(head, TemperatureHead):
            logits = head.apply_to_logits(logits, hidden)
    return logits


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


# --- fingerprints -----------------------------------------------------------------------------------------------------


# of config.json: what may differ without the model computing anything else
_COSMETIC = frozenset(
    ("transformers_version", "_name_or_path", "architectures", "model_type", "llmrl", "dtype", "torch_dtype", "use_cache",
     "id2label", "label2id", "problem_type", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id",
     "_attn_implementation", "return_dict", "output_hidden_states", "output_attentions")
)  # fmt: skip
_ROWS = 256
_VOCABULARY_TENSORS = ("embed", "wte", "lm_head")


def fingerprint_weights(folder: Path | str) -> str:
    """Return a hash of what a checkpoint computes: its tensors (names, shapes, dtypes, values) and its config.json.

    How the tensors are sharded does not matter, nor do fields of config.json that change no number. Tensors up to 4 MiB
    and everything with a row a vocabulary entry count whole; of a larger matrix 256 evenly spaced rows are read, so that a
    70B model takes seconds. A fine-tuned, merged or requantised model differs in all rows of a matrix, hence in these; an
    edit of single rows of a large inner matrix can go unnoticed.

    Raises:
        ModelError: the folder holds no safetensors file.
    """
    from safetensors import safe_open

    digests: dict[str, str] = {}
    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if not name.startswith(PREFIX):
                    digests[name] = _digest_slice(tensors.get_slice(name), tensors, name)
    config = Path(folder) / "config.json"
    if config.is_file():
        fields = json.loads(config.read_text(encoding="utf-8"))
        digests["config.json"] = json.dumps({k: v for k, v in fields.items() if k not in _COSMETIC}, sort_keys=True)
    return _sha(json.dumps(sorted(digests.items())).encode())


def weight_files(folder: Path | str) -> list[Path]:
    """Return the safetensors files a loader reads: those of the index, else model.safetensors, else all but heads.

    Raises:
        ModelError: there are none.
    """
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    else:
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    files = [file for file in files if file.name != HEADS_FILE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]}, which its index names: download the checkpoint again")
    if not files:
        raise ModelError(f"no weights in {folder}: expected *.safetensors")
    return files


def _digest_slice(part: Any, tensors: Any, name: str) -> str:
    shape, dtype = part.get_shape(), part.get_dtype()
    rows = shape[0] if shape else 1
    per_row = math.prod(shape[1:]) if shape else 1
    digest = hashlib.sha256(f"{dtype}{shape}".encode())
    whole = len(shape) < 2 or rows * per_row * 4 <= 4 << 20 or rows <= _ROWS
    if whole or any(word in name for word in _VOCABULARY_TENSORS):
        digest.update(_raw(tensors.get_tensor(name)))
    else:
        for i in range(_ROWS):
            row = i * (rows - 1) // (_ROWS - 1)
            digest.update(_raw(part[row : row + 1]))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


_PROBES = ("Hello, world! 12345", " a  b\n\tc", "naïve café — “x” ∑ 漢字 🙂", "<s></s><|im_end|>")


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return a hash of how a tokenizer turns text into ids: its whole pipeline, special ids, and four encoded probe texts.

    Padding and truncation are left out: they belong to a call, and a pad token set later changes no text's ids.
    """
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key != "pad_token"}
    state: dict[str, Any] = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": sorted(special.items()),
        "probes": [tokenizer(text)["input_ids"] for text in _PROBES],
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        pipeline = json.loads(backend.to_str())
        state["pipeline"] = {k: v for k, v in pipeline.items() if k not in ("padding", "truncation", "version")}
    return _sha(json.dumps(state, ensure_ascii=True, sort_keys=True).encode())


def fingerprint_template(tokenizer: Any) -> str:
    """Return a hash of the chat template ("" when there is none)."""
    template = getattr(tokenizer, "chat_template", None)
    return _sha(json.dumps(template or "").encode())


def check_same_base(found: BaseReference, expected: BaseReference, folder: Path | str) -> None:
    """Refuse a base that is not the one a head was fitted on.

    Raises:
        HeadMismatchError: weights, tokenizer or chat template differ; the message names which.
    """
    names = {
        "weights": "the base model's weights or configuration",
        "tokenizer": "the tokenizer",
        "template": "the chat template",
    }
    differing = [name for key, name in names.items() if getattr(found, key) != getattr(expected, key)]
    if differing:
        raise HeadMismatchError(
            f"the head in {folder} was fitted on another base: {' and '.join(differing)} of {found.model} differ\n"
            "use the base it was fitted on, or calibrate this one"
        )


def check_weights(folder: Path | str, expected: BaseReference, head_folder: Path | str) -> None:
    """Like `check_same_base` for the weights alone, where no tokenizer is at hand."""
    if fingerprint_weights(folder) != expected.weights:
        raise HeadMismatchError(
            f"the head in {head_folder} was fitted on another base: the weights or the configuration in {folder} differ\n"
            "use the base it was fitted on, or calibrate this one"
        )


def _sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()[:32]

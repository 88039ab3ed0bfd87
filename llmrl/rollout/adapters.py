"""Which PEFT adapters vLLM serves, said before anything is loaded and in words that name what to change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.errors import ModelError, RequestError, UsageError

# the ranks vLLM keeps buffers for; an adapter takes the next larger one
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
WEIGHTS = "adapter_model.safetensors"
# settings under which PEFT computes something else than W + BA, or changes what no A and B holds
_VARIANTS = (
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # values of A and B alone


@dataclass(frozen=True)
class AdapterFacts:
    """A LoRA adapter on disk; `rank` is the largest of its modules, `fingerprint` a hash of weights and settings."""

    folder: Path
    rank: int
    fingerprint: str


def check_adapter(folder: Path | str, base: Path | str | None = None) -> AdapterFacts:
    """Refuse an adapter that vLLM would refuse, or would serve as something else than PEFT.

    Args:
        folder: What PEFT's `save_pretrained` wrote.
        base: Folder of the model it will be used with; its width is compared.

    Raises:
        UsageError: No such folder.
        ModelError: Not a LoRA adapter in safetensors, or a variant that vLLM does not serve; the message names it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UsageError(f"not found: {folder} (--adapter: a folder that PEFT wrote)")
    config = _read_config(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}: save the adapter with safe_serialization=True (PEFT's default)")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder} is a {config.get('peft_type')} adapter, expected LORA: vLLM serves no other kind")
    refused = _refused(config)
    if refused:
        raise ModelError(f"vLLM does not serve the adapter {folder}: {'; '.join(refused)}")
    ranks = [config.get("r", 8), *(config.get("rank_pattern") or {}).values()]
    rank = max(ranks)
    if rank > VLLM_RANKS[-1]:
        raise ModelError(
            f"the adapter {folder} has rank {rank}, vLLM serves at most {VLLM_RANKS[-1]}: train a smaller r"
        )
    _check_shapes(weights, folder, base)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode() + weights.read_bytes()).hexdigest()
    return AdapterFacts(folder, rank, digest[:32])


def served_rank(rank: int) -> int:
    """Return the smallest rank vLLM keeps buffers for that holds `rank`."""
    if rank > VLLM_RANKS[-1]:
        raise RequestError(f"max_lora_rank: expected at most {VLLM_RANKS[-1]}, got {rank}")
    return next(size for size in VLLM_RANKS if size >= rank)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no adapter_config.json: name a folder that PEFT's save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise ModelError(f"{folder}/adapter_config.json is not JSON ({error}): save the adapter again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/adapter_config.json holds no object: save the adapter again")
    return config


def _refused(config: dict[str, Any]) -> list[str]:
    found = []
    modules = config.get("modules_to_save")
    if modules:
        names = ", ".join(modules)
        found.append(f"modules_to_save={names} (whole copies of layers); train without it, or merge the adapter")
    if config.get("use_dora"):
        found.append("use_dora; train plain LoRA, or merge the adapter")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        found.append("a bias; train with bias='none' and lora_bias=False")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        found.append(f"init_lora_weights={start}, which changes the base; convert it to plain LoRA as PEFT documents")
    found += [f"{key}; train plain LoRA, or merge the adapter" for key in _VARIANTS if config.get(key)]
    return found


def _check_shapes(weights: Path, folder: Path, base: Path | str | None) -> None:
    """Compare the layers an adapter changes with the checkpoint: another model's adapter may load and mean nothing."""
    from safetensors import safe_open

    from llmrl.fingerprints import weight_files

    try:
        with safe_open(str(weights), framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except Exception as error:
        raise ModelError(
            f"{weights} cannot be read ({type(error).__name__}: {error}): save the adapter again"
        ) from error
    if not shapes:
        raise ModelError(f"{weights} holds no tensor: save the adapter again")
    for name in shapes:
        here, other = ("lora_A", "lora_B") if ".lora_A." in name else ("lora_B", "lora_A")
        if f".{here}." in name and name.replace(here, other) not in shapes:
            raise ModelError(f"the layer of {name} has no {other} in {weights}: save the adapter again")
    if base is None:
        return
    of_base: dict[str, tuple[int, ...]] = {}
    try:
        files = weight_files(base)
    except ModelError:  # a folder that holds only heads: its base lies elsewhere
        return
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            of_base |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        layer, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        weight = of_base.get(f"{layer}.weight")
        if weight is None or len(weight) != 2 or len(shape) != 2 or kind[:1] not in "AB":
            continue
        got, expected = (shape[1], weight[1]) if kind.startswith("A") else (shape[0], weight[0])
        if got != expected and got != weight[0 if kind.startswith("A") else 1]:  # Conv1D layers are stored transposed
            raise ModelError(f"the adapter {folder} is for another model: {name} has width {got}, the model {expected}")

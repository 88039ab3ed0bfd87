"""Trained peft adapters as experts, and a fixed mixture of experts as one plain peft adapter, which any vLLM serves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.errors import ConfigError, ModelError, UsageError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.fingerprints import fingerprint_weights
from llmrl.lora_switch.base_identity import base_of
from llmrl.lora_switch.config import SwitchConfig, is_routed
from llmrl.lora_switch.model import check_plain, get_switch_model
from llmrl.lora_switch.options import ExportConfig
from llmrl.modeling import read_tensors
from llmrl.rollout.adapters import check_adapter

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def import_experts(model: Any, folders: Sequence[Path | str], **options: Any) -> Any:
    """Make a switch model whose experts are trained LoRA adapters; the router starts anew and is what is left to train.

    An adapter's own factor (lora_alpha / r, or rslora's) goes into its B.

    Args:
        model: the base, a causal LM.
        folders: E folders that peft wrote, of one rank and one set of layers.
        options: fields of `SwitchConfig`, but for num_experts, r and target_modules.

    Raises:
        UsageError: no such folder, or none given.
        ModelError: no plain LoRA, or adapters of different ranks or layers, or for another model.
    """
    if not folders:
        raise UsageError("expected at least one folder of a peft adapter")
    check_plain(model)
    read = [_read_adapter(Path(folder)) for folder in folders]
    first = read[0]
    for folder, (tensors, rank, _) in zip(folders[1:], read[1:], strict=True):
        if rank != first[1]:
            raise ModelError(
                f"experts of different ranks: {folders[0]} has r = {first[1]}, {folder} r = {rank}; train them alike"
            )
        if tensors.keys() != first[0].keys():
            odd = sorted(tensors.keys() ^ first[0].keys())[0]
            raise ModelError(f"experts on different layers: only one of {folders[0]} and {folder} adapts {odd}")
    names = sorted(first[0])
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for folder, (tensors, _, _) in zip(folders, read, strict=True):
        _check_fits(Path(folder), tensors, linear, model)
    for key in ("num_experts", "r", "target_modules", "alpha"):
        if key in options:
            raise ConfigError(f"{key} is what the adapters say: leave it out")
    rank = first[1]
    fields: dict[str, Any] = {"num_experts": len(read), "r": rank, "alpha": float(rank), "target_modules": tuple(names)}
    fields["top_k"] = options.pop("top_k", min(2, len(read)))
    config = SwitchConfig(**fields, **options)
    left = [name for name in names if not is_routed(config, name)]
    if left:
        raise ModelError(
            f"{left[0]} runs before router_input '{config.router_input}' is known, so its experts would be lost: "
            "choose router_input='embedding'"
        )
    made = get_switch_model(model, config)
    with torch.no_grad():
        for name, layer in made.switch_layers().items():
            pairs = [(tensors[name], scale) for tensors, _, scale in read]
            layer.switch_A.copy_(torch.stack([a for (a, _), _ in pairs]))
            layer.switch_B.copy_(torch.cat([b.float() * scale for (_, b), scale in pairs], 1))
    return made


def export_mixture(model: Any, weights: Sequence[float] | Mapping[int, float], folder: Path | str) -> Path:
    """Write experts in a fixed mixture as one plain peft adapter: of rank n r for n experts with a weight.

    Args:
        model: a switch model.
        weights: one weight an expert, or weights by expert.
        folder: written anew.

    Raises:
        ConfigError: an expert that there is not, another number of weights, or none that is not 0.
        ModelError: the model came from no folder, so that the adapter would belong to none.
    """
    config, folder = model.switch_config, Path(folder)
    chosen = mixture_weights(weights, config.num_experts)
    used = [(e, w) for e, w in enumerate(chosen) if w != 0]
    if not used:
        raise ConfigError("a mixture needs an expert with a weight that is not 0")
    reference = model.switch_base
    tensors, rank = {}, len(used) * config.r
    for name, layer in model.switch_layers().items():
        a = layer.switch_A.detach().float()
        b = layer.switch_B.detach().float().view(layer.out_features, config.num_experts, config.r)
        parts = {
            "lora_A": torch.cat([a[e] for e, _ in used]),
            "lora_B": torch.cat([b[:, e] * (w * config.scale) for e, w in used], 1),
        }
        for part, tensor in parts.items():
            tensors[f"{_PREFIX}{name}.{part}.weight"] = tensor.to(layer.switch_A.dtype).cpu().contiguous()
    _write_adapter(folder, tensors, rank, list(model.switch_layers()), reference.model, reference.revision)
    return folder


def export(config: ExportConfig) -> None:
    """Write the mixture the options name as an adapter."""
    from llmrl.lora_switch.folder import load_switch_model

    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    model = load_switch_model(config.model)
    with staging_folder(folder) as staging:
        export_mixture(model, config.weights, staging)
        publish_folder(staging, folder, stale=(_CONFIG, _WEIGHTS))
    if not config.quiet:
        print(folder, flush=True)


def mixture_weights(weights: Sequence[float] | Mapping[int, float], num_experts: int) -> list[float]:
    """Return one weight an expert.

    Raises:
        ConfigError: an expert that there is not, another number of weights, or a weight that is not finite.
    """
    if isinstance(weights, Mapping):
        outside = [e for e in weights if not (isinstance(e, int) and 0 <= e < num_experts)]
        if outside:
            raise ConfigError(f"a route out of range: expert {outside[0]!r}, the model has 0 to {num_experts - 1}")
        found = [float(weights.get(e, 0.0)) for e in range(num_experts)]
    else:
        found = [float(w) for w in weights]
        if len(found) != num_experts:
            raise ConfigError(f"expected {num_experts} weights, one an expert, got {len(found)}")
    if not torch.isfinite(torch.tensor(found)).all():
        raise ConfigError(f"expected finite weights, got {found}")
    return found


def _check_fits(folder: Path, tensors: dict[str, tuple[Tensor, Tensor]], linear: dict[str, Any], model: Any) -> None:
    """Refuse an adapter of another base: by names, by sizes, and by the base it names where that lies on this machine."""
    for name, (a, b) in tensors.items():
        if name not in linear:
            raise ModelError(f"{folder} adapts {name}, which this model does not have: it belongs to another base")
        if a.shape[1] != linear[name].in_features or b.shape[0] != linear[name].out_features:
            raise ModelError(f"{folder} adapts {name} of another size: it belongs to another base")
    named = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    own = base_of(model)
    if own.weights and named and Path(named).is_dir() and fingerprint_weights(named) != own.weights:
        raise ModelError(f"{folder} was trained on {named}, whose weights are not those of this model ({own.model})")


def _read_adapter(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], int, float]:
    """Return (layer -> (A [r, in], B [out, r]), rank, factor) of a plain LoRA adapter."""
    if not folder.is_dir():
        raise UsageError(f"not found: {folder} (expected the folder of a peft adapter)")
    if not (folder / _CONFIG).is_file():
        raise ModelError(f"{folder} has no {_CONFIG}: name a folder that peft's save_pretrained wrote")
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    odd = [
        key for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias") if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        what = odd[0] if odd else config.get("peft_type")
        raise ModelError(f"{folder}: expected plain LoRA of one rank, this adapter has {what}")
    check_adapter(folder)  # variants that are not W + BA on the base as it is
    rank = int(config["r"])
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    tensors = read_tensors(folder / _WEIGHTS)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part = key.removeprefix(_PREFIX).removesuffix(".weight").rsplit(".", 1)
        pairs.setdefault(name, {})[part] = tensor
    whole = {
        name: (found["lora_A"], found["lora_B"])
        for name, found in pairs.items()
        if found.keys() == {"lora_A", "lora_B"}
    }
    if len(whole) != len(pairs) or not whole:
        raise ModelError(f"{folder}: expected lora_A and lora_B of linear layers, found other tensors")
    return whole, rank, float(scale)


def _write_adapter(
    folder: Path, tensors: dict[str, Tensor], rank: int, layers: list[str], base: str, revision: str | None
) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    if not base:
        raise ModelError("the base came from no folder: save it, load it from there, and export again")
    leaves = {name.rpartition(".")[2] for name in layers}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(leaves), task_type="CAUSAL_LM")
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    numbers = sorted({int(part) for name in layers for part in name.split(".") if part.isdigit()})
    config.layers_to_transform = numbers if len(numbers) > 0 else None
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    write_json(folder / _CONFIG, fields)
    save_file(tensors, str(folder / _WEIGHTS), metadata={"format": "pt"})
    (folder / _WEIGHTS).chmod(0o644)

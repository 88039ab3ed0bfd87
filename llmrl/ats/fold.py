"""One temperature folded into the weights of a checkpoint, so that any program serves it calibrated with no class of ours.

Logits are linear in what the final norm gives out, z = W n(x) + b, so multiplying the norm's weight (and bias) and b by
exp(tau) multiplies every logit. Tied embeddings stay as they are: the embedding is not touched. A final soft-cap comes after,
and cannot be folded through. What is multiplied is read from the checkpoint and written in the dtype it has there, whatever
dtype the base was loaded in.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.ats.output_layer import OutputLayer
from llmrl.base_model import BaseModel
from llmrl.errors import ModelError
from llmrl.files import write_json
from llmrl.fingerprints import weight_files
from llmrl.heads_forward import decoder_of

_TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}  # of the largest logit: rounding of the norm
_PROBE = 32


def check_foldable(model: Any) -> None:
    """Refuse a model that a temperature cannot be folded into.

    Raises:
        ModelError: with the reason.
    """
    reason = foldable(model)
    if reason:
        raise ModelError(f"--fold: {reason}; leave --fold out, the head then multiplies the logits")


def is_folded(folder: Path) -> bool:
    """Tell whether `llmrl calibrate --fold` wrote this folder, by its report."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and "llmrl_version" in report and isinstance(report.get("fold_error"), float)


def foldable(model: Any) -> str | None:
    """Return why a temperature cannot be folded into this model, or None."""
    cap = OutputLayer.of(model).soft_cap
    if cap:
        return f"{type(model).__name__} caps its logits after the output layer (at {cap:g})"
    if final_norm(model) is None:
        return f"{type(model).__name__} has no norm before its output layer"
    return None


def final_norm(model: Any) -> tuple[str, nn.Module] | None:
    """Return name and module of the last norm of the decoder: the one no block contains."""
    blocks = {module for module in model.modules() if isinstance(module, nn.ModuleList)}
    inside = {id(child) for block in blocks for child in block.modules()}
    decoder = decoder_of(model)
    found = None
    for name, module in model.named_modules():
        own = getattr(module, "weight", None)
        is_norm = isinstance(own, Tensor) and own.ndim == 1 and "norm" in type(module).__name__.lower()
        if is_norm and id(module) not in inside and any(module is part for part in decoder.modules()):
            found = (name, module)  # an embedding norm stands before the blocks, the final one behind them
    return found


def fold_temperature(base: BaseModel, log_scale: float, folder: Path) -> float:
    """Write the base with `log_scale` folded in as a plain checkpoint; return the largest relative error of its logits.

    Args:
        base: the loaded base; its weights are changed and put back.
        log_scale: tau; logits are multiplied by exp(tau).
        folder: an existing folder.

    Raises:
        ModelError: this architecture cannot be folded, or the result does not have the logits it should have.
    """
    check_foldable(base.model)
    ids = _probe_ids(base)
    with torch.inference_mode():
        wanted = base.model(input_ids=ids).logits.float() * math.exp(log_scale)
    changed = _scaled(base, math.exp(log_scale), ids, wanted)
    error = _relative(_logits_with(base.model, changed, ids), wanted)
    if not error <= _TOLERANCE.get(base.model.dtype, 2e-2):
        raise ModelError(
            f"--fold: {type(base.model).__name__} with a scaled final norm has other logits (relative error {error:.1e}): "
            "leave --fold out, and please report the architecture"
        )
    _write(base, changed, folder)
    return error


def _probe_ids(base: BaseModel) -> Tensor:
    device = base.model.get_input_embeddings().weight.device
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    return torch.arange(1, 1 + _PROBE, device=device)[None] * (vocabulary // (_PROBE + 2) or 1) % vocabulary


def _scaled(base: BaseModel, factor: float, ids: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Return the changed tensors by name: of the two ways norms use their weight (w and 1 + w) the one that fits."""
    found = final_norm(base.model)
    assert found is not None
    name, norm = found
    output = base.model.get_output_embeddings()
    head = next((n for n, module in base.model.named_modules() if module is output), "")
    biases = [
        f"{owner}.bias"
        for owner, module in ((name, norm), (head, output))
        if isinstance(getattr(module, "bias", None), Tensor)
    ]
    weight = f"{name}.weight"
    stored = _read_stored(base.folder, [weight, *biases])
    w = stored[weight].double()
    scaled = {bias: (stored[bias].double() * factor).to(stored[bias].dtype) for bias in biases}
    ways = [{weight: value.to(stored[weight].dtype)} | scaled for value in (w * factor, (1 + w) * factor - 1)]
    return min(ways, key=lambda changed: _relative(_logits_with(base.model, changed, ids), wanted))


def _read_stored(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """Return tensors as the checkpoint has them, by the model's names for them."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            pairs = [(_stored_as(stored, names), stored) for stored in list(tensors.keys())]
            found |= {name: tensors.get_tensor(stored) for name, stored in pairs if name is not None}
    missing = [name for name in names if name not in found]
    if missing:
        raise ModelError(
            f"--fold: {', '.join(missing)} is not stored in {folder}: leave --fold out, and please report it"
        )
    return found


def _logits_with(model: Any, changed: dict[str, Tensor], ids: Tensor) -> Tensor:
    own = {name: model.get_parameter(name) for name in changed}
    here = {name: value.to(own[name].device, own[name].dtype) for name, value in changed.items()}
    with torch.inference_mode():
        found: Tensor = torch.func.functional_call(model, here, kwargs={"input_ids": ids}).logits
    return found.float()


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)).item()


def _write(base: BaseModel, changed: dict[str, Tensor], folder: Path) -> None:
    """Copy the checkpoint and replace the changed tensors in the files they stand in."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file in weight_files(base.folder):
        with safe_open(str(file), framework="pt") as tensors:
            names, metadata = list(tensors.keys()), tensors.metadata()
            mine = {stored: name for stored in names if (name := _stored_as(stored, changed)) is not None}
            state = {stored: tensors.get_tensor(stored) for stored in names} if mine else {}
        if mine:
            state |= {stored: changed[name].contiguous() for stored, name in mine.items()}
            save_file(state, str(folder / file.name), metadata=metadata)
            (folder / file.name).chmod(0o644)
        else:
            shutil.copyfile(file, folder / file.name)
    for extra in ("model.safetensors.index.json", "generation_config.json"):
        if (base.folder / extra).is_file():
            shutil.copyfile(base.folder / extra, folder / extra)
    fields = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", fields)
    base.tokenizer.save_pretrained(folder)


def _stored_as(stored: str, changed: Iterable[str]) -> str | None:
    """Return which of the changed names a stored name means; checkpoints may leave out the decoder's prefix."""
    return next((name for name in changed if name == stored or name.endswith(f".{stored}")), None)

"""Which checkpoint a model in memory is: taken when experts are put on it, and compared when they are opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmrl.errors import LlmrlError
from llmrl.fingerprints import fingerprint_weights, weight_files
from llmrl.heads import BaseReference
from llmrl.lora_switch.config import layer_number
from llmrl.modeling import local_folder


def base_of(model: Any) -> BaseReference:
    """Return the identity of the folder a model was loaded from; empty where there is none, or the model is another by now."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    try:
        folder = local_folder(name, local_files_only=True) if name else None
        same = folder is not None and holds(folder, model)
    except (LlmrlError, OSError):
        same = False
    if folder is None or not same:
        return BaseReference("", "", "", "")
    local = Path(name).is_dir()
    where, commit = (str(Path(name).resolve()), None) if local else (name, folder.name)
    return BaseReference(where, fingerprint_weights(folder), "", "", commit)


def holds(folder: Path | str, model: Any) -> bool:
    """Tell whether the weights in memory are those of a checkpoint: by all shapes, embeddings whole, two rows of each layer.

    What is on the meta device or sharded cannot be read and is taken for the checkpoint's.
    """
    from safetensors import safe_open

    modules = [(name, module) for name, module in model.named_modules() if not name.startswith("switch_router")]
    own = {f"{n}.weight": m.weight for n, m in modules if isinstance(getattr(m, "weight", None), torch.Tensor)}
    hidden = {name for name, weight in own.items() if weight.is_meta or hasattr(weight, "full_tensor")}
    compared, prefix = 0, f"{getattr(model, 'base_model_prefix', '')}."
    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            stored = set(tensors.keys())
            for name in own:
                there = name if name in stored else name.removeprefix(prefix)  # of a checkpoint without the head
                if there not in stored:
                    continue
                mine, part = own[name].detach(), tensors.get_slice(there)
                if list(mine.shape) != list(part.get_shape()):
                    return False
                compared += 1
                if name in hidden:
                    continue
                rows = (
                    [slice(row, row + 1) for row in {0, len(mine) // 2}]
                    if layer_number(name) is not None
                    else [slice(None)]
                )
                if any(not torch.equal(part[some].to(mine.dtype), mine[some].cpu()) for some in rows):
                    return False
    return compared > 0

"""Which checkpoint a model in memory is: taken when experts are put on it, and compared when they are opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmrl.errors import LlmrlError
from llmrl.fingerprints import fingerprint_weights, weight_files
from llmrl.heads import BaseReference
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
    """Tell whether the weights in memory are those of a checkpoint, by their shapes and two rows of each.

    What is on the meta device or sharded cannot be read and is taken for the checkpoint's.
    """
    from safetensors import safe_open

    modules = [(name, module) for name, module in model.named_modules() if not name.startswith("switch_router")]
    own = {f"{n}.weight": m.weight for n, m in modules if isinstance(getattr(m, "weight", None), torch.Tensor)}
    hidden = {name for name, weight in own.items() if weight.is_meta or hasattr(weight, "full_tensor")}
    compared = 0
    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            for name in own.keys() & set(tensors.keys()):
                mine, part = own[name].detach(), tensors.get_slice(name)
                if list(mine.shape) != list(part.get_shape()):
                    return False
                compared += 1
                if name in hidden:
                    continue
                for row in {0, len(mine) // 2}:
                    if not torch.equal(part[row : row + 1].to(mine.dtype), mine[row : row + 1].cpu()):
                        return False
    return compared > 0

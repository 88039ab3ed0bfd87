"""Nested state (dicts, lists, tuples, tensors, numbers) as one safetensors file and one JSON file: nothing is pickled.

`save_state(folder, "optimizer", state)` writes `optimizer.json`, the structure, and `optimizer.safetensors`, the
tensors it refers to. What JSON cannot say is tagged: `{"$tensor": "0"}`, `{"$tuple": [...]}`, `{"$float": "nan"}`, and
`{"$dict": [[key, value], ...]}` for keys that are not strings. Reading gives back equal values, bit for bit.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmrl.errors import CheckpointError
from llmrl.files import write_json


def save_state(folder: Path | str, name: str, state: Any) -> None:
    """Write `state` to `<folder>/<name>.json` and, when it holds tensors, `<folder>/<name>.safetensors`.

    Raises:
        CheckpointError: a value is neither a number, a string, a tensor nor a container of those.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(state, tensors, where=name)
    if tensors:
        save_file(tensors, Path(folder) / f"{name}.safetensors")
    write_json(Path(folder) / f"{name}.json", {"format": 1, "tensors": len(tensors), "state": structure})


def load_state(folder: Path | str, name: str) -> Any:
    """Read what `save_state` wrote; tensors are on the CPU.

    Raises:
        CheckpointError: a file is missing or does not fit the other one.
    """
    path = Path(folder) / f"{name}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["tensors"]:
            path = path.with_suffix(".safetensors")
        return _decode(content["state"], load_file(path) if content["tensors"] else {})
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: resume from another checkpoint") from error
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): resume from another checkpoint") from error


def _encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float | np.number | np.bool_):
        return _encode_number(value)
    if isinstance(value, torch.Tensor):
        return {"$tensor": _store(value, tensors, where)}
    if isinstance(value, dict):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: _encode(v, tensors, f"{where}.{k}") for k, v in value.items()}
        return {"$dict": [[k, _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which safetensors and JSON cannot hold: "
        "use an optimizer or scheduler whose state is tensors and numbers"
    )


def _encode_number(value: Any) -> Any:
    number = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, float):
        # float(): a subclass (numpy's float64 is one) would be written with its own repr
        return float(number) if math.isfinite(number) else {"$float": repr(float(number))}
    return number if isinstance(number, bool) else int(number)


def _store(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], where: str) -> str:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"{where} is a {type(tensor).__name__}, a sharded or packed tensor: save this run with FSDP or DeepSpeed's "
            "own format, or use an optimizer with plain tensors"
        )
    tensor = tensor.detach().cpu().contiguous()
    # safetensors refuses two tensors on one storage, which quantised optimizers have
    known = {t.untyped_storage().data_ptr() for t in tensors.values()}
    if tensor.numel() and tensor.untyped_storage().data_ptr() in known:
        tensor = tensor.clone()
    name = str(len(tensors))
    tensors[name] = tensor
    return name


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_decode(v, tensors) for v in value["$tuple"])
    if "$dict" in value:
        return {k: _decode(v, tensors) for k, v in value["$dict"]}
    if "$float" in value:
        return float(value["$float"])
    return {k: _decode(v, tensors) for k, v in value.items()}

"""Fingerprints of what a head was fitted on: the base's weights and configuration, its tokenizer, its chat template."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.errors import HeadMismatchError, ModelError
from llmrl.heads import CONFIG_KEY, HEADS_FILE, MODELING_MODULE, PREFIX, BaseReference

# of config.json: what may differ without the model computing anything else
_COSMETIC = frozenset(
    ("transformers_version", "_name_or_path", "architectures", "model_type", "llmrl", "dtype", "torch_dtype",
     "use_cache", "id2label", "label2id", "problem_type", "num_labels", "bos_token_id", "eos_token_id", "pad_token_id",
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
        named = fields.get("auto_map", {}).values()
        if CONFIG_KEY in fields and all(str(name).startswith(f"{MODELING_MODULE}.") for name in named):
            fields.pop("auto_map", None)  # the file that llmrl writes beside the weights for those without llmrl
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

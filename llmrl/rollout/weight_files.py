"""Weights on their way from a trainer to an engine: one safetensors file and a manifest that names every tensor.

The manifest is written from the tensors the trainer holds, the check runs on what the engine has read, so that a tensor
that was lost or changed on the way is named. A file on a memory file system (/dev/shm) is as good as shared memory, and
works the same in one process, over processes and over HTTP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.errors import SyncError
from llmrl.files import write_json

if TYPE_CHECKING:
    import torch

# name under which llmrl's vLLM plugin registers the engine that reads these files
VLLM_BACKEND = "llmrl_file"
# in the message of a failure after which the engine holds neither the old nor the new weights
WEIGHTS_TOUCHED = "the engine now holds a mixture"
WEIGHTS_FILE = "weights.safetensors"
MANIFEST_FILE = "manifest.json"
_SHOWN = 3


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and bytes."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype} {list(plain.shape)} ".encode()
    return hashlib.sha256(head + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Return one hash for a set of named tensors."""
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()[:32]


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Write tensors and manifest into a new folder; return the fingerprint of the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    digests = {name: digest(tensor) for name, tensor in tensors.items()}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS_FILE)
    write_json(folder / MANIFEST_FILE, {"fingerprint": fingerprint(digests), "digests": digests})
    return fingerprint(digests)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read what `write_weights` wrote and compare every tensor with the manifest.

    Raises:
        SyncError: the folder cannot be read here, or a tensor is missing, unknown or changed; the message names it.
    """
    from safetensors.torch import load_file

    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except Exception as error:
        raise SyncError(
            f"cannot read the new weights in {folder} ({type(error).__name__}: {error}); engine and trainer must see the "
            "same folder: set transfer_dir to one that all machines share"
        ) from error
    digests = manifest["digests"]
    check_names(tensors, digests, "the weight update")
    changed = [name for name, tensor in tensors.items() if digest(tensor) != digests[name]]
    if changed:
        raise SyncError(f"corrupted on the way to the engine: {shown(changed)}; the bytes are not those of the trainer")
    return tensors


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse a set of tensors that lacks one or has one too many.

    Raises:
        SyncError: naming the tensors.
    """
    found, expected = set(found), set(expected)
    missing, unknown = sorted(expected - found), sorted(found - expected)
    if missing:
        raise SyncError(f"{what} lacks {shown(missing)}: the engine would go on with the old values there")
    if unknown:
        raise SyncError(f"{what} holds {shown(unknown)}, which the model does not have")


def shown(names: list[str]) -> str:
    """Return the first few names and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest

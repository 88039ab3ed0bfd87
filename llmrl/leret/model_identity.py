"""Which model a folder holds, whatever path leads to it: what a run may not change, and what an adapter was trained on.

A folder is known by its weights, tokenizer and chat template, so that a copy of it is the same model and a folder whose
weights were replaced is another one. A name on the hub is known by its name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmrl.base_model import ADAPTER_CONFIG, is_adapter, load_tokenizer
from llmrl.errors import LlmrlError, ModelError, UsageError
from llmrl.files import resolve_reference
from llmrl.fingerprints import fingerprint_template, fingerprint_tokenizer, fingerprint_weights
from llmrl.leret.corpus import fingerprint
from llmrl.modeling import local_folder

_BASE = "base_model_name_or_path"


def model_identity(name: str | None) -> str | None:
    """Return what a model or an adapter is known by; None for none.

    Of an adapter its weights, settings and tokenizer count, not the base that it names. A folder without weights, which no
    engine opens, is known by its path.

    Raises:
        UsageError: `name` reads as a path and nothing is there.
    """
    if name is None:
        return None
    path, local = resolve_reference(name, "model")
    if not local:
        return name
    folder = Path(path).resolve()
    weights = _weights(folder)
    if weights is None:
        return str(folder)
    settings = {key: value for key, value in adapter_config(folder).items() if key not in (_BASE, "revision")}
    return fingerprint([weights, settings, _tokenizer(folder)])


def model_and_adapter(path: str, base: str | None) -> tuple[str, str | None]:
    """Return (model, adapter) of a folder that may hold either; the base of an adapter is `base`, or the one it names.

    Raises:
        UsageError: an adapter that names no base, or one that is not there, and none is given; or `base` is another
            model than the one it was trained on.
    """
    resolved, local = resolve_reference(path, "model")
    if not (local and is_adapter(resolved)):
        return resolved, None
    if base is not None:
        check_base(resolved, base)
        return base, resolved
    named = adapter_config(Path(resolved)).get(_BASE)
    if not named:
        raise UsageError(f"{path} is an adapter that names no base model: give --model too")
    try:
        resolve_reference(named, "model")
    except UsageError:
        raise UsageError(
            f"{path} is an adapter of {named}, which is not there: --model NAME_OF_THE_BASE --adapter {path}"
        ) from None
    return named, resolved


def check_base(adapter: Path | str, base: Path | str) -> None:
    """Refuse a base that is not the one an adapter was trained on, as far as that one can still be read.

    A base that has moved, or lies on the hub and not here, cannot be compared: then the base that is given is believed.

    Raises:
        UsageError: the weights of the two differ.
    """
    config = adapter_config(Path(adapter).expanduser())
    named = config.get(_BASE)
    if not named or base_path(named) == base_path(base):
        return
    theirs, ours = _weights_of(str(named), config.get("revision")), _weights_of(str(base))
    if theirs is not None and ours is not None and theirs != ours:
        raise UsageError(
            f"the adapter {adapter} was trained on {named}, whose weights differ from those of {base}: "
            "name the base that it was trained on"
        )


def base_path(name: Path | str) -> str:
    """Return the whole path of a folder, and any other name as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.exists() else str(name)


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter; {} where there is none.

    Raises:
        ModelError: the file is damaged.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged ({error}): save the adapter again") from None


def _weights_of(name: str, revision: str | None = None) -> str | None:
    """Return the fingerprint of a model's weights, None where they do not lie on this machine."""
    folder = Path(name).expanduser()
    if folder.exists():
        return _weights(folder)
    try:
        return _weights(local_folder(name, revision=revision, local_files_only=True))
    except Exception:  # whatever the hub's library says: it is not here
        return None


def _weights(folder: Path) -> str | None:
    from safetensors import SafetensorError

    try:
        return fingerprint_weights(folder)
    except (LlmrlError, SafetensorError, OSError, ValueError):  # whoever opens it says what is wrong with it
        return None


def _tokenizer(folder: Path) -> list[str]:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return []
    tokenizer = load_tokenizer(folder)
    return [fingerprint_tokenizer(tokenizer), fingerprint_template(tokenizer)]

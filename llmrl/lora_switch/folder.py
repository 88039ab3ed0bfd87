"""A switch model on disk: its experts and router in safetensors, and in config.json what they belong to.

    config.json         the base's configuration, model_type "llmrl_switch", and `SwitchFolder` under "llmrl_switch"
    model.safetensors   `<layer>.switch_A` [E, r, in], `<layer>.switch_B` [out, E r], `switch_router.weight` [E, hidden]

The base's weights are not in it. The name of the weight file is the one Trainer looks for when it resumes a run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.errors import HeadMismatchError, LlmrlError, ModelError, UsageError
from llmrl.files import write_json
from llmrl.fingerprints import fingerprint_weights
from llmrl.heads import BaseReference
from llmrl.lora_switch.base_identity import base_of, holds
from llmrl.lora_switch.config import SwitchConfig
from llmrl.lora_switch.model import CLASS_PREFIX, SwitchMixin, get_switch_model, is_switch_name, switch_state
from llmrl.modeling import local_folder, read_tensors

MODEL_TYPE = CONFIG_KEY = "llmrl_switch"
ARCHITECTURE_PREFIX = "LlmrlSwitch"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 2
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwitchFolder:
    """The value of `config.json["llmrl_switch"]`."""

    switch: SwitchConfig
    base: BaseReference
    base_model_type: str
    base_architecture: str
    format: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "switch": self.switch.to_json()}

    @classmethod
    def from_json(cls, value: Any, where: str = "config.json") -> SwitchFolder:
        """Read what `to_json` wrote.

        Raises:
            ModelError: another format, or a missing or broken part.
        """
        if not isinstance(value, Mapping) or value.get("format") != FORMAT_VERSION:
            found = value.get("format") if isinstance(value, Mapping) else value
            raise ModelError(
                f"{where}: switch format {found!r} is not {FORMAT_VERSION}: install the llmrl that wrote it"
            )
        try:
            fields = dict(value)
            fields["switch"] = SwitchConfig.from_json(value["switch"])
            fields["base"] = BaseReference(**value["base"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{where}: the switch configuration is damaged ({error}): save the folder again"
            ) from error


def switch_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a folder holds of a state dict: contiguous CPU tensors by name."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if is_switch_name(name)}


def save_switch_folder(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write experts, router, and the configuration into `folder`.

    Args:
        model: what `get_switch_model` returned.
        folder: made when missing.
        state: a gathered state dict; None takes the model's own.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WEIGHTS_FILE
    partial = folder / (WEIGHTS_FILE + ".tmp")
    save_file(switch_tensors(switch_state(model) if state is None else state), str(partial), metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes it readable by its owner only
    partial.replace(target)
    described = SwitchFolder(
        model.switch_config,
        _named_base(model),
        model.config.model_type,
        type(model).__name__.removeprefix(CLASS_PREFIX),
    )
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields |= {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE_PREFIX + described.base_architecture],
        CONFIG_KEY: described.to_json(),
    }
    write_json(path, fields)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _named_base(model: Any) -> BaseReference:
    """Return which base the experts belong to; none where it was changed in memory since, which is said."""
    reference: BaseReference = model.switch_base
    try:
        there = (
            local_folder(reference.model, revision=reference.revision, local_files_only=True)
            if reference.model
            else None
        )
    except (LlmrlError, OSError):  # moved away, or out of the cache
        there = None
    if there is not None and not holds(there, model):
        _log.warning(
            "the base is not what lies in %s any more (trained, resized, edited, or cast down and up again): the folder does "
            "not name it; save the base too, and pass it as base= when the experts are opened",
            reference.model,
        )
        return BaseReference("", "", "", "")
    if not reference.model:
        _log.warning("the base came from no folder of safetensors: pass it as base= when the experts are opened")
    return reference


def read_switch_folder(folder: Path | str) -> SwitchFolder:
    """Read the description in a local folder.

    Raises:
        UsageError: no such folder.
        ModelError: it is no folder of a switch model.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        raise UsageError(f"not found: {folder} (expected the folder of a switch model)")
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error})") from error
    if CONFIG_KEY not in fields:
        raise ModelError(
            f"{folder} is no switch model: its config.json has no '{CONFIG_KEY}'; save one with save_pretrained"
        )
    return SwitchFolder.from_json(fields[CONFIG_KEY], str(path))


def load_switch_model(folder: Path | str, *, base: Any = None, **kwargs: Any) -> Any:
    """Open a folder that `save_pretrained` of a switch model wrote.

    Args:
        folder: a local folder, or a hub name.
        base: the base model; None loads the one the folder names.
        kwargs: for the base's `from_pretrained`: dtype (by default that of training), device_map, attn_implementation.

    Raises:
        HeadMismatchError: the base's weights are not those the experts were trained on.
        ModelError: the base is not there, or tensors are missing, unknown or of another shape.
    """
    from transformers import AutoModelForCausalLM

    own = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "token", "revision") if key in kwargs}
    folder = local_folder(folder, **own)
    described = read_switch_folder(folder)
    reference = described.base
    hub = {**own, "revision": reference.revision}
    if base is None:
        if not reference.model:
            raise ModelError(
                f"{folder} does not name its base (it came from no folder of safetensors, or was changed in memory): "
                "pass it as base="
            )
        if kwargs.get("dtype") is None:  # the one it was trained in, which need not be the base's own
            kwargs["dtype"] = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype") or "auto"
        kwargs.update(use_safetensors=True, trust_remote_code=False, **hub)
        try:
            base = AutoModelForCausalLM.from_pretrained(reference.model, **kwargs)
        except OSError as error:
            raise ModelError(
                f"the base model of {folder} cannot be read at {reference.model}: {str(error).splitlines()[0]}\n"
                f"put it there, or change {CONFIG_KEY}.base.model in {folder / 'config.json'}"
            ) from error
        check_base(local_folder(reference.model, **hub), reference, folder)
    elif reference.weights:
        check_passed_base(base, reference, folder)
    model = get_switch_model(base, described.switch)
    model.switch_base = reference
    load_switch_tensors(model, read_tensors(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    return model.eval()


def check_base(base_folder: Path | str, reference: BaseReference, folder: Path | str) -> None:
    """Compare a base's weights with those the experts were trained on.

    Raises:
        HeadMismatchError: they differ.
    """
    if reference.weights and fingerprint_weights(base_folder) != reference.weights:
        raise HeadMismatchError(
            f"the experts in {folder} were trained on another base: the weights or the configuration in {base_folder} differ\n"
            "use the base they were trained on"
        )


def check_passed_base(base: Any, reference: BaseReference, folder: Path | str) -> None:
    """Compare a base in memory with the one the experts were trained on, as far as either is on disk.

    Raises:
        HeadMismatchError: it is another.
    """
    loaded = base_of(base)
    there = Path(reference.model).is_dir() and fingerprint_weights(reference.model) == reference.weights
    other = loaded.weights != reference.weights if loaded.weights else there and not holds(reference.model, base)
    if other:
        raise HeadMismatchError(
            f"the experts in {folder} were trained on another base than the one passed: use {reference.model}"
        )


def check_served(folder: Path | str) -> SwitchFolder:
    """Refuse a folder that vLLM cannot serve, before it is started; return its description.

    Raises:
        ModelError: a router that reads the whole prompt, or a base that is not there.
        HeadMismatchError: another base than the experts were trained on.
    """
    described = read_switch_folder(folder)
    if described.switch.router_input == "prompt_pooled":
        raise ModelError(
            "router_input 'prompt_pooled' needs the whole prompt, which vLLM reads in pieces: export the mixture a prompt "
            "calls for with llmrl.lora_switch.export_mixture and serve it as a LoRA adapter"
        )
    base = Path(described.base.model)
    if described.base.model and base.is_dir():  # a hub name is pinned to a commit instead
        check_base(base, described.base, folder)
    elif base.is_absolute() or not described.base.model:
        raise ModelError(
            f"the base model of {folder} is not at {base}: put it there, or change {CONFIG_KEY}.base.model"
        )
    return described


@torch.no_grad()
def load_switch_tensors(model: Any, tensors: Mapping[str, Tensor], where: str = WEIGHTS_FILE) -> None:
    """Copy experts and router into a switch model; names and shapes must be exactly its own.

    Raises:
        ModelError: a tensor is missing, unknown, of another shape, or not finite.
    """
    own = {n: p for n, p in model.named_parameters() if n in switch_tensors({n: p})}
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors or name not in own:
            state = "missing from" if name not in tensors else "not expected in"
            raise ModelError(
                f"{name} is {state} {where}: its config.json describes another model; save the folder again"
            )
        if own[name].shape != tensors[name].shape:
            raise ModelError(
                f"{name} in {where} has shape {list(tensors[name].shape)}, expected {list(own[name].shape)}: it belongs to "
                "another base, or to another number or rank of experts"
            )
        if not torch.isfinite(tensors[name]).all():
            raise ModelError(f"{name} in {where} holds NaN or infinity: train it again")
        own[name].copy_(tensors[name])


__all__ = ["SwitchFolder", "SwitchMixin", "load_switch_model", "read_switch_folder", "save_switch_folder"]

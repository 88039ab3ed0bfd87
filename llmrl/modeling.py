"""Heads on transformers models: `AutoModelForCausalLM.from_pretrained(DIR)` opens a folder llmrl wrote.

For a base class `XForCausalLM` a subclass `LlmrlXForCausalLM` is made on first use. It runs the base's forward, takes the
hidden states on their way into the output embedding (so exactly those rows for which logits are computed, whatever
`logits_to_keep` says), and lets the folder's heads change the logits. Generation, the KV cache, device maps and
quantisation are the base's own. On disk the model type is "llmrl"; in memory it stays the base's, because transformers
and vLLM choose code by it.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from llmrl.auto_classes import class_by_name, make_classes, transformers_class
from llmrl.errors import ModelError
from llmrl.files import write_json
from llmrl.fingerprints import check_weights, fingerprint_weights, weight_files
from llmrl.heads import (
    CONFIG_KEY,
    HEADS_FILE,
    MODEL_TYPE,
    POOLING_KINDS,
    PREFIX,
    HeadsConfig,
    build_heads,
    load_head_tensors,
    save_head_tensors,
)
from llmrl.heads_forward import LogitsHeadsMixin, forward_with_heads

CLASS_PREFIX = "Llmrl"
_INDEX = "model.safetensors.index.json"


class LlmrlConfig(PreTrainedConfig):
    """Stands for `model_type: "llmrl"` on disk; reading one returns the base's configuration with the heads in `llmrl`."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the base's configuration class, extended so that it saves itself as a llmrl folder again."""
        if CONFIG_KEY not in config_dict:
            raise ModelError(f"config.json says model_type '{MODEL_TYPE}' but has no '{CONFIG_KEY}' section")
        heads = HeadsConfig.from_json(config_dict[CONFIG_KEY])
        model_class = model_class_for(heads.base_architecture)
        fields = {**config_dict, "model_type": heads.base_model_type}
        return model_class.config_class.from_dict(fields, **kwargs)


class HeadsModelMixin(LogitsHeadsMixin):
    """A causal LM with `llmrl_heads` that is loaded from and saved to folders of llmrl."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.attach_heads(build_heads(HeadsConfig.from_json(config.llmrl)))

    @classmethod
    def from_pretrained(cls, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the base's weights (from the folder itself when merged) and the heads beside them.

        Raises:
            HeadMismatchError: the base's weights are not the ones the heads were fitted on.
        """
        hub = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "token", "revision") if key in kwargs}
        if config is None or not hasattr(config, CONFIG_KEY):
            config = LlmrlConfig.from_dict(PreTrainedConfig.get_config_dict(name, **hub)[0])
        spec = HeadsConfig.from_json(config.llmrl)
        source, base_hub = str(name), hub
        if not spec.merged:
            source, base_hub = spec.base.model, {**hub, "revision": spec.base.revision}
            kwargs["revision"] = spec.base.revision
        folder = local_folder(name, **hub)
        kwargs.update(use_safetensors=True, trust_remote_code=False)
        # the auto classes hand the caller's choice over inside `config`
        if getattr(config, "attn_logit_softcapping", None) and not getattr(config, "_attn_implementation", None):
            # the default, sdpa, leaves the soft-cap out; vLLM does not
            kwargs.setdefault("attn_implementation", "eager")
        try:
            model = super().from_pretrained(source, *args, config=config, **kwargs)  # type: ignore[misc]
        except OSError as error:
            if spec.merged:
                raise
            raise ModelError(
                f"the base model of {name} cannot be read at {source}: {str(error).splitlines()[0]}\n"
                f"put it there, or change llmrl.base.model in {folder / 'config.json'}"
            ) from error
        check_weights(local_folder(source, **base_hub), spec.base, str(name))
        heads = build_heads(spec)
        load_head_tensors(heads, read_tensors(folder / HEADS_FILE))
        loaded = model[0] if isinstance(model, tuple) else model
        loaded.attach_heads(heads.to(loaded.get_output_embeddings().weight.device))
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """Write a whole checkpoint: the base's weights and the heads."""
        state = self.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]
        state = {key: value for key, value in state.items() if not key.startswith(PREFIX)}
        super().save_pretrained(save_directory, *args, state_dict=state, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields[CONFIG_KEY]["merged"] = True
        # in another dtype or shape of files than the base was read in, these weights are the base from now on
        fields[CONFIG_KEY]["base"]["weights"] = fingerprint_weights(save_directory)
        write_json(path, fields)
        save_head_tensors(save_directory, self.llmrl_heads)
        add_heads_to_index(Path(save_directory))


@functools.cache
def model_class_for(architecture: str) -> Any:
    """Return the head-carrying subclass of the transformers class `architecture`, registered with the auto classes.

    Raises:
        ModelError: transformers has no such causal LM.
    """
    base = transformers_class(architecture)
    body = {
        "__doc__": f"{architecture} with llmrl heads.",
        "forward": forward_with_heads(base.forward),
        "_keys_to_ignore_on_load_missing": [r"^llmrl_heads\."],
        "_keys_to_ignore_on_load_unexpected": [r"^llmrl_heads\."],
    }
    return make_classes(base, CLASS_PREFIX, MODEL_TYPE, globals(), (HeadsModelMixin,), body)


def __getattr__(name: str) -> Any:
    """Make `LlmrlXForCausalLM` and `LlmrlXConfig` on first access."""
    return class_by_name(name, CLASS_PREFIX, model_class_for)


def register_auto_classes() -> None:
    """Teach `AutoConfig` the model type "llmrl"; safe to call twice."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, LlmrlConfig, exist_ok=True)


def local_folder(name: Any, **hub: Any) -> Path:
    """Return the folder a model was or would be loaded from: itself when local, else its snapshot in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils.hub import cached_file

    config = cached_file(str(name), "config.json", **hub)
    folder = Path(config).parent
    if (folder / "config.json").exists() and CONFIG_KEY in json.loads((folder / "config.json").read_text("utf-8")):
        cached_file(str(name), HEADS_FILE, **hub)
    return folder


def read_heads_config(folder: Path | str) -> HeadsConfig:
    """Read the description of the heads in a local folder.

    Raises:
        ModelError: the folder has no config.json, or llmrl did not write it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error})") from error
    if CONFIG_KEY not in fields:
        raise ModelError(f"{folder} carries no llmrl heads; make it with: llmrl calibrate MODEL --output_dir {folder}")
    return HeadsConfig.from_json(fields[CONFIG_KEY])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or broken one is a ModelError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"not found: {path}; the folder was not saved by llmrl or lost its head")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged ({error}): save it again") from error


def save_heads_folder(
    folder: Path,
    heads: nn.ModuleDict,
    config: HeadsConfig,
    tokenizer: Any,
    base_folder: Path,
    dtype: str | None = None,
) -> None:
    """Write a folder that transformers (after `import llmrl`) and vLLM open.

    Args:
        folder: an existing folder.
        heads: fitted heads.
        config: their description; with `merged` the base's weight files are copied in, byte for byte.
        tokenizer: saved into the folder.
        base_folder: where the base's files lie.
        dtype: of the base when the heads were fitted, if it was not the stored one; served in the same from then on.
    """
    base_config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    fields = {**base_config, "model_type": MODEL_TYPE, **_served_as(config), CONFIG_KEY: config.to_json()}
    if dtype is not None:
        fields.pop("torch_dtype", None)
        fields["dtype"] = dtype
    write_json(folder / "config.json", fields)
    tokenizer.save_pretrained(folder)
    if (base_folder / "generation_config.json").is_file():
        shutil.copyfile(base_folder / "generation_config.json", folder / "generation_config.json")
    if config.merged:
        for file in weight_files(base_folder):
            shutil.copyfile(file, folder / file.name)
        if (base_folder / _INDEX).is_file():
            shutil.copyfile(base_folder / _INDEX, folder / _INDEX)
    save_head_tensors(folder, heads)
    if config.merged:
        add_heads_to_index(folder)


def _served_as(config: HeadsConfig) -> dict[str, Any]:
    """Return the fields by which vLLM chooses the class: one that generates, or one that gives a reward head's K scores."""
    rewards = [spec for spec in config.heads.values() if spec.kind in POOLING_KINDS]
    if not rewards:
        return {"architectures": [CLASS_PREFIX + config.base_architecture]}
    stem = config.base_architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    labels = {str(i): f"score_{i}" for i in range(rewards[0].outputs)}
    return {
        "architectures": [f"{CLASS_PREFIX}{stem}ForSequenceClassification"],
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
        "problem_type": "regression",  # raw numbers, no softmax
    }


def add_heads_to_index(folder: Path) -> None:
    """List the head's tensors in the index of a sharded checkpoint: vLLM reads only the files an index names."""
    path = folder / _INDEX
    if path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        names = read_tensors(folder / HEADS_FILE)
        index["weight_map"].update(dict.fromkeys(names, HEADS_FILE))
        write_json(path, index)

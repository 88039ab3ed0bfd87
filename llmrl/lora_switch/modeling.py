"""`AutoModelForCausalLM.from_pretrained(DIR)` on the folder of a switch model, and `AutoConfig`, which vLLM asks."""

from __future__ import annotations

import functools
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from llmrl.auto_classes import class_by_name, make_classes, transformers_class
from llmrl.errors import ModelError
from llmrl.lora_switch.folder import ARCHITECTURE_PREFIX, CONFIG_KEY, MODEL_TYPE, SwitchFolder, load_switch_model


class LlmrlSwitchConfig(PreTrainedConfig):
    """Stands for `model_type: "llmrl_switch"` on disk; reading one returns the base's, with the description in it."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the base's configuration class, extended so that it saves itself as it was read."""
        if CONFIG_KEY not in config_dict:
            raise ModelError(f"config.json says model_type '{MODEL_TYPE}' but has no '{CONFIG_KEY}' section")
        described = SwitchFolder.from_json(config_dict[CONFIG_KEY])
        fields = {**config_dict, "model_type": described.base_model_type}
        return model_class_for(described.base_architecture).config_class.from_dict(fields, **kwargs)


def _open(cls: type, name: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
    # the auto classes hand the caller's choice over inside `config`
    chosen = getattr(config, "_attn_implementation", None)
    if chosen:
        kwargs.setdefault("attn_implementation", chosen)
    return load_switch_model(name, **kwargs)


@functools.cache
def model_class_for(architecture: str) -> Any:
    """Return the class by which the auto classes open a switch model of the transformers class `architecture`.

    Raises:
        ModelError: transformers has no such causal LM.
    """
    base = transformers_class(architecture)
    body = {"__doc__": f"Opens folders of switch models on {architecture}.", "from_pretrained": classmethod(_open)}
    return make_classes(base, ARCHITECTURE_PREFIX, MODEL_TYPE, globals(), (), body)


def __getattr__(name: str) -> Any:
    """Make `LlmrlSwitchXConfig` and `LlmrlSwitchXForCausalLM` on first access."""
    return class_by_name(name, ARCHITECTURE_PREFIX, model_class_for)


def register_auto_classes() -> None:
    """Teach `AutoConfig` the model type "llmrl_switch"; safe to call twice."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, LlmrlSwitchConfig, exist_ok=True)

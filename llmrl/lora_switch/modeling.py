"""`AutoModelForCausalLM.from_pretrained(DIR)` on the folder of a switch model, and `AutoConfig`, which vLLM asks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from llmrl.errors import ModelError
from llmrl.files import write_json
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


class _SwitchConfigMixin:
    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        result = super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "config.json"
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "model_type": MODEL_TYPE})
        return result


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
    import transformers

    base = getattr(transformers, architecture, None)
    if base is None or not hasattr(base, "forward"):
        raise ModelError(
            f"transformers {transformers.__version__} has no class {architecture}: install one that has it"
        )
    base_config = base.config_class
    name = ARCHITECTURE_PREFIX + base_config.__name__
    config_class = type(
        name, (_SwitchConfigMixin, base_config), {"__module__": __name__, "__doc__": base_config.__doc__}
    )
    opener = {
        "__module__": __name__,
        "__doc__": f"Opens folders of switch models on {architecture}.",
        "config_class": config_class,
        "from_pretrained": classmethod(_open),
    }
    model_class = type(ARCHITECTURE_PREFIX + architecture, (base,), opener)
    transformers.AutoModelForCausalLM.register(config_class, model_class)
    # by name in this module, so that pickle finds them: vLLM sends the configuration to its worker processes
    globals()[name], globals()[model_class.__name__] = config_class, model_class
    return model_class


def __getattr__(name: str) -> Any:
    """Make `LlmrlSwitchXConfig` and `LlmrlSwitchXForCausalLM` on first access (unpickling in a fresh process does this)."""
    if not name.startswith(ARCHITECTURE_PREFIX):
        raise AttributeError(name)
    base = name.removeprefix(ARCHITECTURE_PREFIX)
    if base.endswith("Config"):
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        return model_class_for(MODEL_FOR_CAUSAL_LM_MAPPING[getattr(transformers, base)].__name__).config_class
    return model_class_for(base)


def register_auto_classes() -> None:
    """Teach `AutoConfig` the model type "llmrl_switch"; safe to call twice."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(MODEL_TYPE, LlmrlSwitchConfig, exist_ok=True)

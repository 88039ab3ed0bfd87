"""Classes by which transformers' auto classes open folders of ours, made on demand for any causal LM of transformers.

On disk such a folder has a model type of its own, so that a program without llmrl refuses it; in memory the configuration is
the base's, because transformers and vLLM choose code by it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmrl.errors import ModelError
from llmrl.files import write_json


class _SavesItsType:
    disk_model_type: str

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> Any:
        result = super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / "config.json"
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "model_type": self.disk_model_type})
        return result


def transformers_class(architecture: str) -> Any:
    """Return transformers' class of a causal LM.

    Raises:
        ModelError: transformers has no such causal LM.
    """
    import transformers

    base = getattr(transformers, architecture, None)
    if base is None or not hasattr(base, "forward"):
        raise ModelError(
            f"transformers {transformers.__version__} has no class {architecture}: install one that has it"
        )
    return base


def make_classes(
    base: Any, prefix: str, model_type: str, namespace: dict[str, Any], bases: tuple[type, ...], body: Mapping[str, Any]
) -> Any:
    """Make and register the configuration class and the model class on a causal LM; return the latter.

    Args:
        base: transformers' class.
        prefix: of both names, before those of the base.
        model_type: on disk.
        namespace: `globals()` of the module they belong to: pickle finds them there by name, and vLLM sends the configuration
            to its worker processes.
        bases: before `base`.
        body: of the model class.
    """
    import transformers

    module = {"__module__": namespace["__name__"]}
    own = {**module, "__doc__": base.config_class.__doc__, "disk_model_type": model_type}
    config_class: Any = type(prefix + base.config_class.__name__, (_SavesItsType, base.config_class), own)
    model_class: Any = type(prefix + base.__name__, (*bases, base), {**module, **body, "config_class": config_class})
    transformers.AutoModelForCausalLM.register(config_class, model_class)
    namespace[config_class.__name__], namespace[model_class.__name__] = config_class, model_class
    return model_class


def class_by_name(name: str, prefix: str, model_class_for: Callable[[str], Any]) -> Any:
    """Return the class a module's `__getattr__` is asked for (unpickling in a fresh process does this).

    Raises:
        AttributeError: the name is none of ours.
    """
    if not name.startswith(prefix):
        raise AttributeError(name)
    base = name.removeprefix(prefix)
    if not base.endswith("Config"):
        return model_class_for(base)
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return model_class_for(MODEL_FOR_CAUSAL_LM_MAPPING[getattr(transformers, base)].__name__).config_class

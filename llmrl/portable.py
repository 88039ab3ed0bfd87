"""A merged checkpoint that carries its own modelling file: others open it with `trust_remote_code=True` and no llmrl.

The file is put together from llmrl's own sources, so there is one text of the mathematics: the heads (`logits_heads`), their
place in the KV cache (`head_cache`), the forward pass (`heads_forward`), and a class for the checkpoint's architecture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from llmrl._version import __version__
from llmrl.errors import ModelError
from llmrl.files import write_json
from llmrl.heads import CONFIG_KEY, HEADS_FILE, MODELING_MODULE, HeadsConfig

_PARTS = ("value_heads", "logits_heads", "head_cache", "heads_forward")
_CONFIG_CLASS, _MODEL_CLASS = "CalibratedConfig", "CalibratedForCausalLM"

_HEADER = '''"""{architecture} with temperature heads fitted by llmrl {version}; open it with trust_remote_code=True.

Put together from llmrl's sources (Apache License 2.0): {parts}. With llmrl installed this file is not needed.
"""
'''
_MODEL = '''
from types import SimpleNamespace  # noqa: E402

from safetensors.torch import load_file  # noqa: E402
from transformers import {architecture}  # noqa: E402
from transformers.utils.hub import cached_file  # noqa: E402


class CalibratedConfig({architecture}.config_class):
    """The base's configuration; the heads are described under "llmrl"."""

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict({{**config_dict, "model_type": "{model_type}"}}, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        raise RuntimeError("saving needs llmrl: import llmrl, and load without trust_remote_code")


class CalibratedForCausalLM(LogitsHeadsMixin, {architecture}):
    """{architecture} whose logits go through the heads of the folder."""

    config_class = CalibratedConfig
    forward = forward_with_heads({architecture}.forward)
    _keys_to_ignore_on_load_missing = [r"^llmrl_heads\\\\."]
    _keys_to_ignore_on_load_unexpected = [r"^llmrl_heads\\\\."]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.attach_heads(_heads(config))

    @classmethod
    def from_pretrained(cls, name, *args, config=None, **kwargs):
        if getattr(config, "attn_logit_softcapping", None) and not getattr(config, "_attn_implementation", None):
            kwargs.setdefault("attn_implementation", "eager")  # the default leaves the soft-cap out
        loaded = super().from_pretrained(name, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub = {{key: kwargs[key] for key in ("cache_dir", "local_files_only", "token", "revision") if key in kwargs}}
        tensors = load_file(cached_file(str(name), "{heads_file}", **hub))
        heads = _heads(model.config)
        heads.load_state_dict({{key.removeprefix("llmrl_heads."): value for key, value in tensors.items()}})
        model.attach_heads(heads.to(model.get_output_embeddings().weight.device))
        return loaded


def _heads(config):
    sizes = {{"outputs": 1, "intermediate_size": 0, "num_heads": 0, "num_kv_heads": 0, "head_dim": 0, "rope_theta": 1e4}}
    sizes |= {{"beta": 0.0, "support": 0.0}}
    heads = {{
        name: build_logits_head(SimpleNamespace(**{{**sizes, **spec}})) for name, spec in config.llmrl["heads"].items()
    }}
    return nn.ModuleDict(heads).requires_grad_(False)
'''


def modeling_source(config: HeadsConfig) -> str:
    """Return the text of the modelling file for a folder with these heads.

    Raises:
        ModelError: a head that gives scores of its own; such a folder is no causal LM.
    """
    if any(spec.kind == "reward" for spec in config.heads.values()):
        raise ModelError("a reward head cannot be opened as a causal LM without llmrl")
    texts = [_without_llmrl((Path(__file__).with_name(f"{part}.py")).read_text(encoding="utf-8")) for part in _PARTS]
    names = ", ".join(f"{part}.py" for part in _PARTS)
    header = _HEADER.format(architecture=config.base_architecture, version=__version__, parts=names)
    model = _MODEL.format(
        architecture=config.base_architecture, model_type=config.base_model_type, heads_file=HEADS_FILE
    ).replace("\\\\", "\\")
    return header + "\nfrom __future__ import annotations\n" + "".join(texts) + model


def _without_llmrl(text: str) -> str:
    text = re.sub(r'\A""".*?"""\n', "", text, count=1, flags=re.S)
    text = text.replace("from __future__ import annotations\n", "")
    text = text.replace("from llmrl.errors import ModelError\n", "ModelError = ValueError\n")
    return re.sub(r"^from llmrl\.\w+ import (\([^)]*\)|[^\n]*)\n", "", text, flags=re.M)


def write_modeling_file(folder: Path) -> None:
    """Write the modelling file into a merged folder and name it in its config.json.

    Raises:
        ModelError: the folder is not merged, so it has no weights that others could load.
    """
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    config = HeadsConfig.from_json(fields[CONFIG_KEY])
    if not config.merged:
        raise ModelError("a modelling file needs the base's weights beside it: calibrate with --merge")
    (folder / f"{MODELING_MODULE}.py").write_text(modeling_source(config), encoding="utf-8")
    fields["auto_map"] = {
        "AutoConfig": f"{MODELING_MODULE}.{_CONFIG_CLASS}",
        "AutoModelForCausalLM": f"{MODELING_MODULE}.{_MODEL_CLASS}",
    }
    write_json(path, fields)

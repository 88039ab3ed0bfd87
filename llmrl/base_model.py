"""Opening a base model safely: safetensors only, from a folder or the hub, with the fingerprints a head needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmrl.errors import LlmrlError, ModelError, UsageError, did_you_mean
from llmrl.files import resolve_reference
from llmrl.fingerprints import fingerprint_template, fingerprint_tokenizer, fingerprint_weights
from llmrl.heads import BaseReference
from llmrl.modeling import local_folder

ADAPTER_CONFIG = "adapter_config.json"
_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_NO_LIMIT = 1 << 20  # tokenizers without a length say 1e30
DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal LM in evaluation mode, its tokenizer, its files and its identity."""

    model: Any
    tokenizer: Any
    folder: Path
    reference: BaseReference

    @property
    def architecture(self) -> str:
        """Name of the transformers class."""
        return type(self.model).__name__


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    without_heads: bool = False,
) -> BaseModel:
    """Load a base model for reading.

    Args:
        name: a folder, or a hub name.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: a torch device; None takes the GPU when there is one.
        revision: of a hub name.
        without_heads: open a merged folder that llmrl wrote and take its heads off, instead of refusing it.

    Raises:
        UsageError: a path that is not there, or an unknown dtype.
        ModelError: no weights, pickled weights, an unreadable checkpoint, or a folder llmrl wrote.
    """
    path, local = resolve_reference(name, "model")
    path = str(Path(path).resolve()) if local else path
    model = open_causal_lm(path, dtype=dtype, device=device, revision=revision, shown_as=name)
    if hasattr(model, "llmrl_heads"):
        if not without_heads:
            raise ModelError(f"{name} already carries llmrl heads; name its base model")
        model.attach_heads(torch.nn.ModuleDict())
    tokenizer = load_tokenizer(path, revision=revision)
    folder = local_folder(path, revision=revision)
    # a snapshot folder is named after its commit: the head stays tied to it when the branch moves on
    commit = None if local else folder.name
    return BaseModel(model, tokenizer, folder, reference_for(path, folder, tokenizer, commit))


def open_causal_lm(
    name: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    shown_as: str | None = None,
) -> Any:
    """Open a causal LM frozen and in evaluation mode, with its heads in effect if it is a folder llmrl wrote.

    Args:
        name: a folder, or a hub name.
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".
        device: a torch device; None takes the GPU when there is one.
        revision: of a hub name.
        shown_as: what error messages call it.

    Raises:
        UsageError: a path that is not there, an unknown dtype, or a device that is not there.
        ModelError: no weights, pickled weights, or an unreadable checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise UsageError(f"--dtype {dtype}: not a choice{did_you_mean(dtype, _DTYPES)}")
    path, local = resolve_reference(name, "model")
    if local:
        check_model_folder(Path(path))
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        options = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=_DTYPES[dtype],
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            **options,  # sdpa, the default, leaves Gemma 2's soft-cap of the attention logits out
        )
    except (LlmrlError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(f"cannot load {shown_as or name}: {_first_line(error)}") from error
    try:
        model = model.to(device or default_device())
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UsageError(f"--device {device} cannot be used here: {_first_line(error)}") from error
    return model.eval().requires_grad_(False)


def reference_for(name: str, folder: Path, tokenizer: Any, revision: str | None = None) -> BaseReference:
    """Return the identity of a base model from its files."""
    return BaseReference(
        model=name,
        weights=fingerprint_weights(folder),
        tokenizer=fingerprint_tokenizer(tokenizer),
        template=fingerprint_template(tokenizer),
        revision=revision,
    )


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> Any:
    """Load a tokenizer; a missing or broken one is a ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(name), revision=revision, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"cannot load the tokenizer of {name}: {_first_line(error)}") from error


def is_adapter(name: str | Path) -> bool:
    """Tell whether a name is the folder of a PEFT adapter."""
    return (Path(name).expanduser() / ADAPTER_CONFIG).is_file()


def bare_model(model: Any) -> Any:
    """Return the causal LM inside peft's model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def merge_adapter(adapter: Path, folder: Path, *, dtype: str = "auto") -> None:
    """Merge a PEFT adapter into its base and write the result as a plain checkpoint.

    Args:
        adapter: folder of the adapter; its tokenizer is taken if it has one, else the base's.
        folder: where the checkpoint goes.
        dtype: of the merged weights; "auto" is the base's own.

    Raises:
        ModelError: weights that are missing or pickled, a base that is not there, an adapter that cannot be merged.
    """
    if not any(adapter.glob("*.safetensors")):
        raise ModelError(f"{adapter} has no adapter_model.safetensors; save it with safe_serialization=True")
    from peft import PeftModel

    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise ModelError(f"{adapter / ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    model = open_causal_lm(
        base, dtype=dtype, device="cpu", revision=revision, shown_as=f"{base}, the base of {adapter}"
    )
    try:
        merged = PeftModel.from_pretrained(model, str(adapter), use_safetensors=True).merge_and_unload()
    except Exception as error:
        raise ModelError(f"the adapter in {adapter} cannot be merged into {base}: {_first_line(error)}") from error
    merged.save_pretrained(folder)
    has_own = (adapter / "tokenizer_config.json").is_file()
    load_tokenizer(adapter if has_own else base, revision=None if has_own else revision).save_pretrained(folder)


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that is no checkpoint, has no weights, or only pickled ones.

    Raises:
        ModelError: with what is missing and what to do.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file; name the folder of a checkpoint")
    if is_adapter(folder):
        raise ModelError(
            f"{folder} is a PEFT adapter, here a whole model is needed: merge it into its base first\n"
            "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIR)"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when it is read; refused\n"
                "convert it to safetensors where you trust it: model.save_pretrained(DIR)"
            )
        raise ModelError(f"{folder} has no weights: expected *.safetensors")


def default_device() -> str:
    """Return "cuda:N" for this process's GPU when there is one, else "cpu"."""
    import os

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def generate_greedy(model: Any, ids: torch.Tensor, new_tokens: int) -> list[int]:
    """Return what plain greedy decoding appends to the row `ids`, without the penalties a checkpoint may bring along."""
    from transformers import GenerationConfig

    own = model.generation_config
    stops = getattr(own, "eos_token_id", None)
    plain = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=stops, pad_token_id=0)
    model.generation_config = GenerationConfig()  # generate() fills what `plain` leaves open from the model's own
    try:
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=plain)
    finally:
        model.generation_config = own
    return list(output[0, ids.shape[1] :].tolist())


def context_length(model: Any, tokenizer: Any, wanted: int | None = None) -> int:
    """Return the longest window the model reads, at most `wanted` tokens; None is DEFAULT_MAX_LENGTH."""
    limits = [getattr(model.config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    return min([limit for limit in limits if limit and limit < _NO_LIMIT] + [wanted or DEFAULT_MAX_LENGTH])


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

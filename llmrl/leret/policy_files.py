"""Opening a policy for training (a whole model, or a LoRA adapter on one), and saving it so that it loads elsewhere.

What is saved stands in one folder, whole or absent: `model.safetensors` or `adapter_model.safetensors`, the tokenizer with its
chat template, README.md. It is opened again by transformers or peft before it gets its name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmrl.base_model import ADAPTER_CONFIG, bare_model, is_adapter, load_tokenizer, open_causal_lm
from llmrl.errors import LlmrlError, ModelError, UsageError
from llmrl.files import publish_folder, resolve_reference, staging_folder
from llmrl.fingerprints import fingerprint_template, fingerprint_tokenizer
from llmrl.leret.model_identity import adapter_config, base_path, check_base
from llmrl.leret.train_settings import TrainSettings
from llmrl.training.run import write_model_card

FINAL = "final"
_CHECK = "llmrl_check"
# a Trainer writes its own wishes into these
_TOKEN_FIELDS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Policy:
    """A model that is being trained.

    Args:
        model: a causal LM, or peft's model around one.
        tokenizer: saved with it; it encodes nothing here.
        base_name: what the card names as the base.
        autocast: compute in bfloat16 on weights of another type.
        original: configuration and generation configuration before any trainer changed them.
    """

    model: Any
    tokenizer: Any
    base_name: str | None
    autocast: bool
    original: tuple[dict[str, Any], Any]

    @property
    def bare(self) -> Any:
        """The causal LM inside peft's model."""
        return bare_model(self.model)

    @property
    def is_lora(self) -> bool:
        """Whether an adapter is trained and its base is frozen."""
        return self.bare is not self.model


def open_policy(model: Any, settings: TrainSettings, tokenizer: Any = None, base: Path | str | None = None) -> Policy:
    """Open what is to be trained.

    Args:
        model: a folder (of a model or of a PEFT adapter), a hub name, or a model in memory, which is then changed.
        settings: `tuning`, `lora_*`, `dtype` and `seed` are read.
        tokenizer: of a model in memory; otherwise the folder's.
        base: of the folder of an adapter: what it is opened on, and names as its base when it is saved again; None is the
            base that it names.

    Raises:
        UsageError: a path that is not there; an adapter with `tuning` "full", or trained on another model than `base`; a
            model in memory without a tokenizer.
        ModelError: it cannot be loaded.
    """
    from transformers import set_seed

    set_seed(
        settings.seed
    )  # a new adapter starts from random numbers, the same on every process and after every resume
    if not isinstance(model, str | Path):
        if tokenizer is None:
            raise UsageError("a model in memory needs its tokenizer: tokenizer=...")
        base_name = getattr(bare_model(model).config, "_name_or_path", None) or None
    else:
        path, local = resolve_reference(str(model), "model")
        path = str(Path(path).resolve()) if local else path  # an adapter keeps the path of its base
        model, base_name, default = _load(path, settings, None if base is None else base_path(base))
        tokenizer = tokenizer or load_tokenizer(default)
    bare = bare_model(model)
    other = next((str(c.peft_type) for c in getattr(model, "peft_config", {}).values() if c.peft_type != "LORA"), None)
    if other is not None:
        raise UsageError(f"an adapter of kind {other.rpartition('.')[2]}: expected LoRA, which vLLM serves")
    if getattr(bare, "llmrl_heads", None):
        raise ModelError(
            f"{base_name} carries llmrl heads, which training its base would make wrong; name the base model"
        )
    original = (
        {name: getattr(bare.config, name, None) for name in _TOKEN_FIELDS},
        copy.deepcopy(bare.generation_config),
    )
    if settings.tuning == "full":
        if bare is not model:
            raise UsageError(
                "tuning=full trains a whole model, this is an adapter: merge it into its base, or use tuning=lora"
            )
        model.requires_grad_(True)
    elif bare is model:
        model = _add_lora(model, settings)
    if settings.gradient_checkpointing and settings.tuning == "lora":
        model.enable_input_require_grads()
    return Policy(model, tokenizer, base_name, _autocast(settings), original)


def save_policy(trainer: Any, policy: Policy, output_dir: Path | str, card: dict[str, Any]) -> Path:
    """Save the trained model or adapter as `<output_dir>/final`, after opening it once more; call it on every process.

    Args:
        trainer: it holds the trained weights and knows how to gather them.
        policy: what was trained.
        output_dir: folder of the stage.
        card: keyword arguments of `write_model_card`.

    Raises:
        ModelError: what was written does not load as it was.
    """
    final = Path(output_dir) / FINAL
    for name, value in policy.original[0].items():
        setattr(policy.bare.config, name, value)
    policy.bare.generation_config = policy.original[1]
    main = trainer.is_world_process_zero()
    staging = final.with_name(f".{final.name}.tmp")
    if not main:
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(staging))
    else:
        with staging_folder(final) as staging:
            trainer.accelerator.wait_for_everyone()
            trainer.save_model(str(staging))
            (staging / "training_args.json").unlink(missing_ok=True)  # it holds paths of this machine
            policy.tokenizer.save_pretrained(staging)
            write_model_card(staging, **card)
            if not trainer._sharded:  # a process of a sharded run holds a part of the weights
                check_saved(staging, policy)
            publish_folder(staging, final)
    trainer.accelerator.wait_for_everyone()
    return final


def check_saved(folder: Path, policy: Policy) -> None:
    """Open what was written and compare tensors, tokenizer and chat template with those in memory.

    Raises:
        ModelError: something differs; the message names it.
    """
    try:
        saved = _reload_adapter(folder, policy.model) if policy.is_lora else _reload_model(folder, policy.model)
        tokenizer = load_tokenizer(folder)
    except LlmrlError:
        raise
    except Exception as error:
        raise ModelError(f"what was saved does not load again: {error}") from error
    if policy.is_lora:
        from peft import get_peft_model_state_dict

        live = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    else:
        live = policy.model.state_dict()
    differing = sorted(saved.keys() ^ live.keys())
    differing += [name for name in saved.keys() & live.keys() if not torch.equal(saved[name].cpu(), live[name].cpu())]
    for what, fingerprint in (("the tokenizer", fingerprint_tokenizer), ("the chat template", fingerprint_template)):
        if fingerprint(tokenizer) != fingerprint(policy.tokenizer):
            differing.append(what)
    if differing:
        raise ModelError(f"what was saved differs from what was trained: {differing[0]} ({len(differing)} in all)")


def _reload_model(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=model.dtype, trust_remote_code=False).state_dict()


def _reload_adapter(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Load the adapter a second time onto its own base, under another name, and take it off again."""
    from peft import get_peft_model_state_dict

    from llmrl.rollout.adapters import check_adapter

    check_adapter(folder)  # what vLLM would refuse
    result = model.load_adapter(str(folder), adapter_name=_CHECK)
    try:
        if result.unexpected_keys:
            raise ModelError(f"peft does not know {result.unexpected_keys[0]} of the adapter that was saved")
        return get_peft_model_state_dict(model, adapter_name=_CHECK, save_embedding_layers=False)
    finally:
        model.delete_adapter(_CHECK)


def _load(path: str, settings: TrainSettings, given: str | None) -> tuple[Any, str, str]:
    """Return (model, name of its base, where its tokenizer is); `given` is the base of an adapter."""
    if not is_adapter(path):
        return open_causal_lm(path, dtype=_dtype(settings), device="cpu"), path, path
    from peft import PeftModel

    config = adapter_config(Path(path))
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if given is not None:
        check_base(path, given)
        revision = revision if base == given else None  # it is a revision of the base that is named
        base = given
    if not base:
        raise ModelError(f"{path}/{ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    shown = f"{base}, the base of the adapter {path}"
    model = open_causal_lm(base, dtype=_dtype(settings), device="cpu", revision=revision, shown_as=shown)
    try:
        model = PeftModel.from_pretrained(model, path, is_trainable=True, use_safetensors=True)
    except Exception as error:
        raise ModelError(f"cannot load the adapter {path} onto {base}: {str(error).splitlines()[0]}") from error
    for own in model.peft_config.values():
        own.base_model_name_or_path, own.revision = base, revision
    has_own = (Path(path) / "tokenizer_config.json").is_file()
    return model, base, path if has_own else base


def _add_lora(model: Any, settings: TrainSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout, target_modules="all-linear",
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model.requires_grad_(False), config)


def _dtype(settings: TrainSettings) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    return "auto" if torch.cuda.is_available() and settings.tuning == "lora" else "float32"


def _autocast(settings: TrainSettings) -> bool:
    return settings.dtype == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

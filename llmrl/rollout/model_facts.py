"""What every backend must know about a model before it answers: end tokens, context, vocabulary, identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.base_model import check_model_folder, load_tokenizer
from llmrl.errors import ModelError
from llmrl.files import resolve_reference
from llmrl.fingerprints import fingerprint_weights
from llmrl.heads import CONFIG_KEY, HEADS_FILE
from llmrl.modeling import local_folder, read_heads_config

_NO_LIMIT = 1 << 20


@dataclass(frozen=True)
class ModelFacts:
    """A causal LM on disk; `max_model_len` counts prompt and answer together."""

    name: str
    folder: Path
    tokenizer: Any
    max_model_len: int
    vocab_size: int
    end_ids: frozenset[int]
    fingerprint: str
    architecture: str
    dtype: str | None = None  # that the checkpoint is stored in, where its configuration says so
    cached_numbers: int = 0  # that a KV cache holds for each token; 0 where the configuration does not say


def read_facts(model: str, *, revision: str | None = None, max_model_len: int | None = None) -> ModelFacts:
    """Read a model's files without loading its weights.

    Args:
        model: A folder or a hub name.
        revision: Of a hub name.
        max_model_len: A shorter context than the model's own.

    Raises:
        UsageError: A path that is not there.
        ModelError: No weights, pickled weights, no tokenizer, or a longer context than the model has.
    """
    from transformers import AutoConfig

    name, is_local = resolve_reference(model, "--model: a folder or a hub name")
    if is_local:
        check_model_folder(Path(name))
    folder = local_folder(name, revision=revision)
    tokenizer = load_tokenizer(name, revision=revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False).get_text_config()
    except Exception as error:
        raise ModelError(f"cannot read the configuration of {model}: {str(error).splitlines()[0]}") from error
    longest = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    if max_model_len is not None and max_model_len > longest:
        raise ModelError(f"max_model_len {max_model_len} is more than the {longest} positions {model} was trained with")
    return ModelFacts(
        name=name,
        folder=folder,
        tokenizer=tokenizer,
        max_model_len=max_model_len or longest,
        vocab_size=config.vocab_size,
        end_ids=end_token_ids(folder, tokenizer),
        fingerprint=_fingerprint(folder),
        architecture=(config.architectures or [type(config).__name__])[0],
        cached_numbers=_cached_numbers(config),
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    )


def _cached_numbers(config: Any) -> int:
    layers, heads = getattr(config, "num_hidden_layers", 0) or 0, getattr(config, "num_attention_heads", 0) or 0
    width = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) or 0) // max(heads, 1)
    return 2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width


def _fingerprint(folder: Path) -> str:
    """Return a name for the weights; those of a folder with heads are its base's and the heads together."""
    heads = folder / HEADS_FILE
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not heads.is_file() or CONFIG_KEY not in config:  # a reward ensemble's file lies beside a plain checkpoint, too
        return fingerprint_weights(folder).removeprefix("sha256:")[:32]
    base = read_heads_config(folder).base.weights
    return hashlib.sha256(base.encode() + heads.read_bytes()).hexdigest()[:32]


def end_token_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Return every id that ends an answer: of generation_config.json, config.json and the tokenizer."""
    ids: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        path = Path(folder) / file
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ids.update(found if isinstance(found, list) else [] if found is None else [found])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)

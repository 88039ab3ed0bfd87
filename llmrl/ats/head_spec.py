"""The sizes of a head, read off the configuration of the model it is for."""

from __future__ import annotations

from typing import Any

from llmrl.errors import ModelError
from llmrl.heads import HeadSpec

_ROPE_THETA = 10000.0


def spec_for(config: Any, architecture: str) -> HeadSpec:
    """Return the spec of a head that fits a model.

    An "mlp" is as wide inside as one of the model's, a "transformer" has the sizes of its last decoder layer, so that its
    keys and values have the shape of the model's own in a KV cache.

    Args:
        config: a transformers configuration of a causal LM, or of a multimodal model around one.
        architecture: "scalar", "linear", "mlp", "transformer" or "vector".

    Raises:
        ModelError: a size is not in the configuration.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    # OPT-350m projects its hidden states before the output embedding
    inside = _size(config, "hidden_size", "n_embd", "d_model")
    width = _find(config, "word_embed_proj_dim") or inside
    if architecture == "vector":
        return HeadSpec("vector", "vector", width, outputs=_size(config, "vocab_size"))
    if architecture in ("scalar", "linear"):
        return HeadSpec("temperature", architecture, width)
    layer = _last_layer(config)
    inner = _find(layer, "intermediate_size", "n_inner", "ffn_dim", "d_inner", "ffn_hidden_size") or 4 * inside
    if architecture == "mlp":
        return HeadSpec("temperature", "mlp", width, intermediate_size=inner)
    heads = _size(layer, "num_attention_heads", "n_head", "n_heads")
    head_dim = _find(layer, "head_dim") or inside // heads
    return HeadSpec(
        "temperature",
        architecture,
        width,
        intermediate_size=inner,
        num_heads=heads,
        num_kv_heads=_kv_heads(layer, heads),
        head_dim=head_dim + head_dim % 2,  # rotary positions turn pairs
        rope_theta=_rope_theta(config),
    )


def _last_layer(config: Any) -> Any:
    """Return what holds the sizes of the last layer; in Gemma 4 and others they differ from layer to layer."""
    return config.per_layer_config[-1] if getattr(config, "is_heterogeneous", False) else config


def _find(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:  # one number a layer
            value = value[-1]
        if isinstance(value, int) and value > 0:
            return value
    return None


def _size(config: Any, *names: str) -> int:
    value = _find(config, *names)
    if value is None:
        kind = getattr(config, "model_type", type(config).__name__)
        raise ModelError(f"the configuration of {kind} has no {names[0]}: use ats-linear, which needs the width alone")
    return value


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):  # Falcon
        return 1
    found = _find(config, "num_key_value_heads", "num_kv_heads") or heads
    return found if heads % found == 0 else heads


def _rope_theta(config: Any) -> float:
    found = getattr(config, "rope_theta", None)
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)]
    if by_layer:  # Gemma 3: one set of parameters for each kind of layer
        rope = rope.get("full_attention", by_layer[-1])
    return float(found or rope.get("rope_theta") or _ROPE_THETA)

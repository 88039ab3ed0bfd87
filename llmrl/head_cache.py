"""The place of a head that reads earlier positions in a transformers KV cache: one more layer of the base's own cache.

Beam search, cropping, resetting and moving go over all layers of a cache, so they take the head's along. A dynamic cache
gets a layer that grows, a static one a layer of the same length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from llmrl.errors import ModelError
from llmrl.logits_heads import TransformerTemperatureHead, causal_attention


class GrowingHeadLayer(DynamicLayer):
    """Keys and values of the head `head`."""

    head = ""


class FixedHeadLayer(StaticLayer):
    """Keys and values of the head `head`, in a buffer of fixed length."""

    head = ""


def attention_layers(cache: Any) -> list[Any]:
    """Return the base's own layers of a cache that hold keys and values; linear attention and state spaces have none."""
    layers = getattr(cache, "layers", None) or ()
    return [layer for layer in layers if isinstance(layer, CacheLayerMixin) and not getattr(layer, "head", "")]


def cached_tokens(cache: Any) -> int | Tensor:
    """Return how many tokens a cache holds: those of its first attention layer in use, for layer 0 may have no length."""
    length: int | Tensor = next(
        (layer.get_seq_length() for layer in attention_layers(cache) if layer.is_initialized), 0
    )
    return length.clone() if isinstance(length, Tensor) else length  # a static cache counts in place


def same_sequence(position_ids: Tensor) -> Tensor | None:
    """Return which tokens of packed rows belong to one sequence, `[B, 1, T, T]` bool; None if no row holds several.

    As in transformers' own masks a sequence begins where a position does not follow the one before it.

    Args:
        position_ids: `[B, T]`, or `[4, B, T]` with the text's positions first (Qwen-VL); three axes without them tell nothing.
    """
    if position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    if position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return None
    begins = torch.nn.functional.pad(position_ids.diff(dim=-1) != 1, (1, 0))
    if not begins.any():
        return None
    number = begins.cumsum(-1)
    return (number[:, :, None] == number[:, None, :])[:, None]


def sequence_tau(
    name: str, head: TransformerTemperatureHead, hidden: Tensor, mask: Any, cache: Any, seen: int | Tensor
) -> Tensor:
    """Return tau `[B, T, 1]` for the hidden states of the tokens of this call, and remember their keys and values.

    Args:
        name: of the head.
        head: the head.
        hidden: `[B, T, H]`, every position that the base has just read.
        mask: None, `[B, S]` over all tokens so far, or `[B, 1, T, S]`: the one given to the base, or `same_sequence`.
        cache: the base's cache after the call, or None.
        seen: tokens the cache held before the call.

    Raises:
        ModelError: a cache of a kind that cannot take a layer, or one that was filled without the head.
    """
    layer = None if cache is None else _layer_of(name, cache, seen)
    past = 0 if layer is None else layer.get_seq_length()
    positions = torch.arange(hidden.shape[1], device=hidden.device) + past

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer is not None:
            k, v = (part.transpose(1, 2) for part in layer.update(k.transpose(1, 2), v.transpose(1, 2)))
        return causal_attention(q, k, v, visible(mask, positions, k.shape[1]))

    return head(hidden, positions, attend)


def visible(mask: Any, positions: Tensor, length: int) -> Tensor:
    """Return which of `length` keys each query sees, `[B or 1, 1, T, length]` bool.

    A query sees itself even where it is padding, so that no row of the softmax is empty.

    Args:
        mask: None, `[B, S]` with 0 for padding, `[B, 1, T, S]` (bool, or added to the scores), or a dict of such by kind of
            attention, as generation prepares them for a static cache.
        positions: `[T]` of the queries among the keys.
        length: number of keys.
    """
    keys = torch.arange(length, device=positions.device)
    causal = (keys[None] <= positions[:, None])[None, None]
    itself = (keys[None] == positions[:, None])[None, None]
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise ModelError(
                "a transformer head needs an attention mask of all tokens; the base has sliding windows only"
            )
        mask = mask["full_attention"]
    if mask is None:
        return causal
    mask = mask.to(positions.device)
    if mask.ndim == 2:
        allowed = mask.bool()[:, None, None, :]
    else:
        allowed = mask if mask.dtype == torch.bool else mask == 0
    short = length - allowed.shape[-1]
    allowed = torch.nn.functional.pad(allowed, (0, short), value=True) if short > 0 else allowed[..., :length]
    return (causal & allowed) | itself


def _layer_of(name: str, cache: Any, seen: int | Tensor) -> Any:
    if not attention_layers(cache):
        raise ModelError(
            f"a transformer head cannot keep its state in a {type(cache).__name__} without attention layers: "
            "generate with use_cache=False, or calibrate with --method ats-mlp"
        )
    layers = cache.layers
    found = next((layer for layer in layers if getattr(layer, "head", None) == name), None)
    if found is None:
        found = _new_layer(layers)
        found.head = name
        layers.append(found)
    known = found.get_seq_length()
    if not torch.is_tensor(known) and not torch.is_tensor(seen) and known != seen:
        raise ModelError(
            f"the KV cache holds {seen} tokens and the temperature head has seen {known} of them: "
            "fill the cache with this model from the first token on"
        )
    return found


def _new_layer(layers: list[Any]) -> Any:
    fixed = [layer.max_cache_len for layer in layers if isinstance(layer, StaticLayer)]
    return FixedHeadLayer(max(fixed)) if fixed else GrowingHeadLayer()

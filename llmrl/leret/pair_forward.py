"""Log-probabilities of the two completions of every pair, with one pass over the prompt they share.

A prompt of LeReT holds passages and is ten times as long as a query, so most of the work on a pair would be to read one prompt
twice. Here the prompt goes through the model once, keeps its keys and values, and both completions go on from there;
gradients flow back through the cache. It is the same sum in another order. Models whose layers keep something else than the
keys and values of all tokens (sliding windows, states), and gradient checkpointing, which keeps nothing, read prompt and
completion together, once for each completion.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmrl.base_model import bare_model
from llmrl.leret.losses import SequenceLogps, sequence_logps


def completion_logps(model: Any, batch: Mapping[str, Tensor]) -> tuple[SequenceLogps, SequenceLogps]:
    """Return the log-probabilities `[B]` of the chosen and of the rejected completions of a PairCollator batch."""
    mask, labels = batch["attention_mask"], batch["completion_labels"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)  # prompts are padded on the left
    forward = _after_shared_prompt if shares_prompt(model) else _side_by_side
    logits = forward(model, batch["input_ids"], mask, positions, labels)
    total, length = sequence_logps(logits, labels)
    half = len(total) // 2
    return SequenceLogps(total[:half], length[:half]), SequenceLogps(total[half:], length[half:])


def shares_prompt(model: Any) -> bool:
    """Tell whether both completions of a pair can go on from one pass over their prompt."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    bare = _bare(model)
    if not {"past_key_values", "position_ids", "logits_to_keep"} <= set(inspect.signature(bare.forward).parameters):
        return False
    # in eval mode too: reference and policy must be the same sum, or their first ratios are not 0 in 16 bits
    if getattr(bare, "is_gradient_checkpointing", False) or _is_wrapped(bare):
        return False
    layers = DynamicCache(config=bare.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _is_wrapped(bare: Any) -> bool:
    """Tell whether layers are wrapped to be computed again in the backward pass, as FSDP's activation checkpointing does."""
    return any(type(module).__name__ == "CheckpointWrapper" for module in bare.modules())


def _after_shared_prompt(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Return logits `[2B, C + 1, V]` of the last C + 1 positions; `mask` and `positions` are `[2B, P + C]` as `ids`."""
    from transformers import DynamicCache

    half, start = len(ids) // 2, ids.shape[1] - (labels.shape[1] - 1)
    cache = DynamicCache(config=_bare(model).config)
    kept = {"past_key_values": cache, "use_cache": True}
    first = model(
        input_ids=ids[:half, :start], attention_mask=mask[:half, :start], position_ids=positions[:half, :start],
        logits_to_keep=1, **kept,
    ).logits[:, -1:]  # fmt: skip
    cache.reorder_cache(torch.arange(half, device=ids.device).repeat(2))
    rest = model(input_ids=ids[:, start:], attention_mask=mask, position_ids=positions[:, start:], **kept).logits
    return torch.cat([first.repeat(2, 1, 1), rest], dim=1)


def _side_by_side(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Return the same with every prompt read twice."""
    taken = inspect.signature(_bare(model).forward).parameters
    more: dict[str, Any] = {"use_cache": False}
    if "position_ids" in taken:
        more["position_ids"] = positions
    if "logits_to_keep" in taken:
        more["logits_to_keep"] = labels.shape[1]
    return torch.as_tensor(model(input_ids=ids, attention_mask=mask, **more).logits[:, -labels.shape[1] :])


def _bare(model: Any) -> Any:
    return bare_model(getattr(model, "module", model))

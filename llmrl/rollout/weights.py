"""A trainer's weights under the names they have on disk, which is what every engine reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrl.errors import ModelError
from llmrl_kernels.backends import KERNEL_DTYPES
from llmrl_kernels.merge_all import MergeItem, MergePlan


def disk_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a causal LM by their names in a checkpoint, tied ones once.

    A model with routed experts gives experts and router alone. A PEFT model gives the weights it computes with: base plus
    adapter, merged into new tensors. The model itself is not touched: merging in place and back does not return to the same
    numbers.

    Raises:
        ModelError: a PEFT adapter of another kind than LoRA, or a DTensor, which has to be gathered first.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = unwrap(model)
    _refuse_shards(model)
    if hasattr(model, "switch_config"):  # the folder that is served names its base, which is frozen
        return {n: p.detach() for n, p in model.named_parameters() if ".switch_" in n or n.startswith("switch_router.")}
    merged: dict[str, Tensor] = {}
    if hasattr(model, "peft_config"):
        if not hasattr(model, "get_base_model"):
            raise ModelError(
                "the adapter was attached with add_adapter(): wrap the model with peft.get_peft_model instead"
            )
        _check_plain_lora(model)
        merged = _merged_layers(model)
        model = model.get_base_model()
    tensors: dict[str, Tensor] = {}
    for name, parameter in [*model.named_parameters(), *_persistent_buffers(model)]:
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name:
            continue
        tensors[plain] = merged.get(plain, parameter.detach())
    lost = sorted(merged.keys() - tensors.keys())
    if lost:
        raise ModelError(
            f"{lost[0]} has an adapter and shares its weight with another layer: train without it, or untie them"
        )
    return dict(revert_weight_conversion(model, tensors))


def unwrap(model: Any) -> Any:
    """Take off the wrappers of DDP and torch.compile."""
    while True:
        inner = getattr(model, "module", None) if type(model).__name__ == "DistributedDataParallel" else None
        inner = inner if inner is not None else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def _refuse_shards(model: Any) -> None:
    """Refuse a model that this process has parts of, before any of them is copied or merged."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if hasattr(tensor, "full_tensor"):
            raise ModelError(
                f"{name} is spread over processes (FSDP or ZeRO-3): gather the state dict and give it to engine.update(); "
                "WeightSync and GRPO on the engine train with DDP or in one process"
            )


def _persistent_buffers(model: Any) -> list[tuple[str, Tensor]]:
    kept = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def _check_plain_lora(model: Any) -> None:
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise ModelError(
                f"the adapter '{name}' is {kind}, expected LORA: no other kind is merged into weights here"
            )
        beyond = [key for key in ("use_dora", "lora_bias", "trainable_token_indices") if getattr(config, key, None)]
        if beyond:
            raise ModelError(
                f"the adapter '{name}' has {', '.join(beyond)}: train plain LoRA, W + BA is all that is merged"
            )


@torch.no_grad()
def _merged_layers(model: Any) -> dict[str, Tensor]:
    """Return W + BA for each adapted layer: summed in float32, rounded once, written beside W.

    All linear layers of a kind are one launch of `llmrl_kernels.merge_all`.
    """
    from peft.tuners.lora import LoraLayer

    merged: dict[str, Tensor] = {}
    items: dict[Any, dict[str, MergeItem]] = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            if hasattr(layer, "modules_to_save"):
                raise ModelError(f"{name} is trained whole (modules_to_save): save and reload the merged model instead")
            continue
        if layer.merged:
            raise ModelError(f"{name} has its adapter merged in place: call unmerge_adapter() before an update")
        weight = layer.get_base_layer().weight.detach()
        item = _merge_item(layer, weight)
        if item is not None:
            kind = (weight.dtype, weight.device)
            items.setdefault(kind, {})[f"{name}.weight"] = item
            continue
        total = weight.float()
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                total = total + layer.get_delta_weight(adapter).float()
        merged[f"{name}.weight"] = total.to(weight.dtype)
    for found in items.values():
        MergePlan(list(found.values()), top_k=1, scale=1.0).merge([0], [1.0])
        merged |= {name: item.out for name, item in found.items()}
    return merged


def _merge_item(layer: Any, weight: Tensor) -> MergeItem | None:
    """Return a linear layer's active adapters as one expert; None for another kind of layer, or without an adapter."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    plain = isinstance(layer.get_base_layer(), torch.nn.Linear) and weight.dtype in KERNEL_DTYPES
    if not active or not plain or not weight.is_contiguous():
        return None
    a = torch.cat([layer.lora_A[adapter].weight.detach().float() for adapter in active])
    b = torch.cat([layer.lora_B[adapter].weight.detach().float() * layer.scaling[adapter] for adapter in active], 1)
    return MergeItem(weight, torch.empty_like(weight), a[None].contiguous(), b.contiguous())

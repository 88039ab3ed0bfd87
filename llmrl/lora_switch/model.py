"""`get_switch_model`: experts and a router on a causal LM of transformers, which stays the class it was, and more."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import ConfigError, ModelError, did_you_mean
from llmrl.heads import BaseReference
from llmrl.lora_switch.base_identity import base_of
from llmrl.lora_switch.config import ALL_LINEAR, SwitchConfig, is_routed, layer_number
from llmrl.lora_switch.hooks import decoder_layers, pooled_route, route_of, watch
from llmrl.lora_switch.layer import ForwardRoute, RouteSlot, SharedInput, SwitchLinear
from llmrl.lora_switch.pack import PACKED
from llmrl.lora_switch.router import Router, router_site
from llmrl.lora_switch.routing import Route, usage

CLASS_PREFIX = "Switch"
_log = logging.getLogger(__name__)


class SwitchMixin:
    """What a switch model has beyond the class of its base. Made by `get_switch_model`, never by itself."""

    switch_config: SwitchConfig
    switch_router: Router
    switch_base: BaseReference  # empty where the base came from no folder
    _switch_now: ForwardRoute | None
    _switch_next: ForwardRoute | None  # of the call whose decoder has not begun
    _switch_off: bool
    _switch_pooled: Route | None  # of the prompts that are being continued
    _switch_fixed: Tensor | None  # gates [1, 1, E] in the router's place, see fix_route
    _switch_slots: list[RouteSlot]
    _switch_handles: list[Any]
    _switch_runner: Any  # a run mode that merges, see llmrl.lora_switch.modes

    def switch_layers(self) -> dict[str, SwitchLinear]:
        """Return the layers with experts by name, in the order of the model."""
        return {name: m for name, m in self.named_modules() if isinstance(m, SwitchLinear)}  # type: ignore[attr-defined]

    @contextmanager
    def disable_experts(self) -> Iterator[None]:
        """Compute as the base does, as long as the context lasts."""
        before, self._switch_off = self._switch_off, True
        try:
            yield
        finally:
            self._switch_off = before

    def last_route(self) -> Any:
        """Return the `Route` of the last forward pass; None before the first."""
        return None if self._switch_now is None else self._switch_now.route

    def expert_usage(self, mask: Tensor | None = None) -> Tensor:
        """Return how many choices of the last forward pass fell on each expert, `[E]`; `mask` `[B, T]` where tokens count."""
        route = self.last_route()
        if route is None:
            raise ModelError("no forward pass yet: call the model first")
        return usage(route, self.switch_config.num_experts, mask)

    def print_trainable_parameters(self) -> None:
        """Print what is trained and its share, as peft does."""
        both = [(p.numel(), p.requires_grad) for p in self.parameters()]  # type: ignore[attr-defined]
        trained, total = sum(n for n, on in both if on), sum(n for n, _ in both)
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the base's, without reentrant checkpointing, under which the router would get no gradient.

        Raises:
            ConfigError: `use_reentrant=True` was asked for.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant"):
            raise ConfigError(
                "use_reentrant=True would leave the router without a gradient: leave it out or set it to False"
            )
        super().gradient_checkpointing_enable({**options, "use_reentrant": False}, **kwargs)  # type: ignore[misc]

    def pack_for_inference(self) -> None:
        """Let layers that share an input (q, k, v; gate, up) take one product with A together; undone by `train()`."""
        groups: dict[tuple[str, str], dict[str, SwitchLinear]] = {}
        for name, layer in self.switch_layers().items():
            parent, _, leaf = name.rpartition(".")
            for packed, parts in PACKED.items():
                if leaf in parts:
                    groups.setdefault((parent, packed), {})[leaf] = layer
        for layers in groups.values():
            if len(layers) > 1:
                shared = SharedInput(list(layers.values()))
                for layer in layers.values():
                    layer.shared = shared

    def train(self, mode: bool = True) -> Any:
        """As the base's; training takes back what was packed or merged for inference.

        Raises:
            ModelError: a parameter of the base is to be trained, which no folder of experts would hold.
        """
        if mode:
            also = [n for n, p in self.named_parameters() if p.requires_grad and not is_switch_name(n)]  # type: ignore[attr-defined]
            if also:
                raise ModelError(
                    f"{also[0]} is to be trained, but experts and router are all that is saved: freeze it with "
                    "requires_grad_(False), or train and save the base first"
                )
            self._switch_runner = None
            for layer in self.switch_layers().values():
                layer.shared = layer.merged_weight = layer.resident_weights = None
        return super().train(mode)  # type: ignore[misc]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's; a pooled route is that of the prompts, however they are cached, cut or padded."""
        if self.switch_config.router_input != "prompt_pooled":
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if ids is None:
            raise ModelError("router_input 'prompt_pooled' reads the prompt's tokens: give generate() input_ids")
        if route_of(kwargs.get("past_key_values")) is not None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # goes on with the route its keys were made by
        mask = kwargs.get("attention_mask")
        self._switch_pooled = pooled_route(self, ids, self._mask_of(ids, kwargs) if mask is None else mask)
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._switch_pooled = None

    def _mask_of(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        """Return where tokens are, as `generate` guesses it: padding is what is not a token that ends a text."""
        own: Any = self.generation_config  # type: ignore[attr-defined]
        given = kwargs.get("generation_config") or own

        def chosen(key: str) -> Any:
            found = (kwargs.get(key), getattr(given, key), getattr(own, key))  # generate fills each gap from the next
            return next((value for value in found if value is not None), None)

        pad, end = chosen("pad_token_id"), chosen("eos_token_id")
        ends = end if isinstance(end, (list, tuple)) else [end]
        return None if pad is None or pad in ends else ids.ne(pad).long()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Copy the model, with its fixed route; hooks are the copy's own, and it runs fused."""
        for handle in self._switch_handles:
            handle.remove()
        runner, layers = self._switch_runner, self.switch_layers().values()
        copies = [(layer, layer.shared, layer.merged_weight, layer.resident_weights) for layer in layers]
        for layer in layers:
            layer.shared = layer.merged_weight = layer.resident_weights = None
        self._switch_handles, self._switch_now, self._switch_next, self._switch_runner = [], None, None, None
        for slot in self._switch_slots:
            slot.now = None
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        try:
            made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        finally:  # memory may not be enough for a copy
            watch(self)
            self._switch_runner = runner
            for layer, shared, merged, resident in copies:
                layer.shared, layer.merged_weight, layer.resident_weights = shared, merged, resident
        watch(made)
        return made

    def _replicate_for_data_parallel(self) -> Any:
        raise ModelError("experts do not work with DataParallel: start one process a GPU (torchrun, accelerate launch)")

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **kwargs: Any
    ) -> None:
        """Write experts and router, not the base: a folder that `load_switch_model`, transformers and vLLM open."""
        from llmrl.lora_switch.folder import save_switch_folder

        if kwargs.get("push_to_hub"):
            raise ModelError("push_to_hub is not done here: save to a folder and upload it with `hf upload`")
        if state_dict is None:
            state_dict = switch_state(self)  # gathers what is sharded, so every process has to come here
        if is_main_process:
            save_switch_folder(self, Path(save_directory), state_dict)


def get_switch_model(model: Any, config: SwitchConfig) -> Any:
    """Give a causal LM experts and a router; the base is frozen, experts and router are trained.

    The model is changed in place and returned: its class becomes a subclass `SwitchX` of its own class X, so that Trainer,
    trl and `generate` work on it as before. Names of the base's parameters stay; new ones are `<layer>.switch_A`
    `[E, r, in]`, `<layer>.switch_B` `[out, E r]` and `switch_router.weight` `[E, hidden]`.

    Args:
        model: a causal LM of transformers with plain linear layers.
        config: see `SwitchConfig`.

    Raises:
        ConfigError: target modules that the model does not have.
        ModelError: a model that already carries adapters, quantised layers, or an architecture the router cannot read.
    """
    check_plain(model)
    layers = decoder_layers(model)
    router_site(layers, config)  # refuses what it cannot read
    targets = _targets(model, config)
    slots = [RouteSlot() for _ in layers]
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    model.requires_grad_(False)
    for name in targets:
        base = model.get_submodule(name)
        slot = slots[layer_number(name) or 0]
        made = SwitchLinear(base, config.num_experts, config.r, config.scale, slot, dropout=config.dropout, dtype=dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.train(base.training))
    base_class: Any = type(model)
    model.__class__ = switch_class(base_class)
    model.switch_config, model.switch_base = config, base_of(model)
    hidden = model.config.get_text_config().hidden_size
    model.switch_router = Router(config, hidden).to(next(model.parameters()).device)
    model._switch_now = model._switch_next = model._switch_runner = None
    model._switch_off, model._switch_pooled, model._switch_fixed = False, None, None
    model._switch_slots, model._switch_handles = slots, []
    watch(model)
    return model


@functools.cache
def switch_class(base: Any) -> Any:
    """Return the subclass `SwitchX` of a causal LM's class X."""
    return type(
        CLASS_PREFIX + base.__name__, (SwitchMixin, base), {"__module__": __name__, "__doc__": SwitchMixin.__doc__}
    )


def is_switch_name(name: str) -> bool:
    """Tell whether a parameter is an expert's or the router's, by its dotted name."""
    return name.endswith((".switch_A", ".switch_B")) or name.startswith("switch_router.")


def switch_state(model: Any) -> dict[str, Tensor]:
    """Return experts and router by name; what FSDP2 shards is gathered, so that every process has to ask."""
    own = {name: p.detach() for name, p in model.named_parameters() if is_switch_name(name)}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in own.items()}


def check_plain(model: Any) -> None:
    """Refuse a model that experts cannot be put on.

    Raises:
        ModelError: it carries experts or an adapter, is quantised, or is more than a text model.
    """
    if isinstance(model, SwitchMixin):
        raise ModelError("the model already has experts: load the base again")
    if hasattr(model, "peft_config"):
        raise ModelError("the model carries a peft adapter: merge it or load the base, then import adapters as experts")
    if model.config.get_text_config() is not model.config:
        raise ModelError(f"{type(model).__name__} has more than a text model: experts sit on causal LMs for text alone")
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise ModelError("the base is quantised, experts sit on plain linear layers: load it in bfloat16 or float32")


def _targets(model: Any, config: SwitchConfig) -> list[str]:
    linear = [name for name, m in model.named_modules() if type(m) is nn.Linear and layer_number(name) is not None]
    if not linear:
        raise ModelError(f"{type(model).__name__} has no plain linear layers (torch.nn.Linear) in its decoder layers")
    missing = config.missing(linear)
    if missing:
        leaves = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(
            f"target_modules: no linear layer of the decoder layers is called '{missing[0]}'"
            f"{did_you_mean(missing[0], leaves)}; "
            f"the model has {', '.join(leaves)}"
        )
    if config.target_modules == ALL_LINEAR and any(
        p.dim() == 3 and layer_number(name) is not None for name, p in model.named_parameters()
    ):
        _log.warning(
            "the experts of the base's own mixture are no linear layers: they get no adapters, other layers do"
        )
    asked = [name for name in linear if config.targets(name)]
    found = [name for name in asked if is_routed(config, name)]
    if not found:
        raise ConfigError(
            f"target_modules: all of them run before router_input '{config.router_input}' is known; choose later layers "
            f"or another input"
        )
    return found

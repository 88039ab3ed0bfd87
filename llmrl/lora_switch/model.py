"""`get_switch_model`: experts and a router on a causal LM of transformers, which stays the class it was, and more."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import ConfigError, ModelError, did_you_mean
from llmrl.lora_switch.config import ALL_LINEAR, SwitchConfig, is_routed, layer_number
from llmrl.lora_switch.layer import ForwardRoute, RouteSlot, SharedInput, SwitchLinear
from llmrl.lora_switch.pack import PACKED
from llmrl.lora_switch.router import Router, router_site
from llmrl.lora_switch.routing import balance_loss, dense_gates, usage

ROUTE_ARGUMENT = "switch_route"
CLASS_PREFIX = "Switch"
_IGNORED = -100


class SwitchMixin:
    """What a switch model has beyond the class of its base. Made by `get_switch_model`, never by itself."""

    switch_config: SwitchConfig
    switch_router: Router
    switch_base: Any  # BaseReference of the base, or None when it came from no folder
    _switch_now: ForwardRoute | None
    _switch_next: ForwardRoute | None  # of the call whose decoder has not begun
    _switch_off: bool
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
        """As the base's; training takes back what was packed or merged for inference."""
        if mode:
            for layer in self.switch_layers().values():
                layer.shared = None
            self._switch_runner = None
        return super().train(mode)  # type: ignore[misc]

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        """Write experts and router, not the base: a folder that `load_switch_model`, transformers and vLLM open."""
        from llmrl.lora_switch.folder import save_switch_folder

        is_main = kwargs.get("is_main_process", True)
        if is_main:
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
    _check_plain(model)
    layers = decoder_layers(model)
    site, before = router_site(layers, config)
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
    model.switch_config, model.switch_base = config, None
    hidden = model.config.get_text_config().hidden_size
    model.switch_router = Router(config, hidden).to(next(model.parameters()).device)
    model._switch_now = model._switch_next = model._switch_runner = None
    model._switch_off = False
    _watch(model, layers, slots, site, before)
    return model


@functools.cache
def switch_class(base: Any) -> Any:
    """Return the subclass `SwitchX` of a causal LM's class X."""
    return type(
        CLASS_PREFIX + base.__name__, (SwitchMixin, base), {"__module__": __name__, "__doc__": SwitchMixin.__doc__}
    )


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of decoder layers.

    Raises:
        ModelError: none is found.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and layer_number(name + ".0.") == 0:
            return module
    raise ModelError(f"{type(model).__name__} has no list of {count} decoder layers named layers, h or blocks")


def _check_plain(model: Any) -> None:
    if isinstance(model, SwitchMixin):
        raise ModelError("the model already has experts: load the base again")
    if hasattr(model, "peft_config"):
        raise ModelError("the model carries a peft adapter: merge it or load the base, then import adapters as experts")
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
            f"target_modules: no linear layer is called '{missing[0]}'{did_you_mean(missing[0], leaves)}; "
            f"the model has {', '.join(leaves)}"
        )
    asked = [name for name in linear if config.targets(name)]
    found = [name for name in asked if is_routed(config, name)]
    if not found:
        raise ConfigError(
            f"target_modules: all of them run before router_input '{config.router_input}' is known; choose later layers "
            f"or another input"
        )
    return found


def _watch(model: Any, layers: nn.ModuleList, slots: list[RouteSlot], site: nn.Module, before: bool) -> None:
    """Hook the model: hooks are called whatever a trainer puts in the place of `forward` (trl does, to save memory)."""
    _watch_outside(model)
    _watch_decoder(model)

    def enter(slot: RouteSlot) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            slot.now = kwargs.pop(ROUTE_ARGUMENT, None) or model._switch_now
            return args, kwargs

        return hook

    for layer, slot in zip(layers, slots, strict=True):
        layer.register_forward_pre_hook(enter(slot), with_kwargs=True)
    slot = slots[model.switch_config.router_layer]

    def reads_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _decide(model, slot.now, args[0] if args else next(iter(kwargs.values())))

    def reads_output(module: nn.Module, args: Any, output: Any) -> None:
        _decide(model, slot.now, output)

    if before:
        site.register_forward_pre_hook(reads_input, with_kwargs=True)
    else:
        site.register_forward_hook(reads_output)


def _watch_outside(model: Any) -> None:
    """Around a call of the causal LM: the route to be filled, and the balance loss on top of the loss."""

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        prompt_mask = kwargs.pop("switch_prompt_mask", None)
        model._switch_now = model._switch_next = _begin(model, _named(module, args, kwargs), prompt_mask)
        return args, kwargs

    def end(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        now, coef = model._switch_now, model.switch_config.balance_coef
        if getattr(out, "loss", None) is not None and model.training and coef and now.route is not None:
            out.loss = out.loss + coef * _balance(now, _named(module, args, kwargs))
        return out

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(end, with_kwargs=True)


def _watch_decoder(model: Any) -> None:
    """Send the route along with the arguments of the decoder layers; make one where the decoder is called by itself."""
    decoder = model.get_decoder()
    parameters = inspect.signature(decoder.forward).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        now, model._switch_next = model._switch_next, None
        if now is None:
            prompt_mask = kwargs.pop("switch_prompt_mask", None)
            now = model._switch_now = _begin(model, _named(module, args, kwargs), prompt_mask)
        return args, {**kwargs, ROUTE_ARGUMENT: now} if takes_more else kwargs

    decoder.register_forward_pre_hook(begin, with_kwargs=True)


def _named(module: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [
        n for n, p in inspect.signature(type(module).forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(names[1:], args, strict=False)), **kwargs}


def _begin(model: Any, given: dict[str, Any], prompt_mask: Tensor | None) -> ForwardRoute:
    """Return the route to be filled, with the prompt's mask where the router pools over it."""
    now = ForwardRoute(off=model._switch_off)
    if model.switch_config.router_input != "prompt_pooled":
        return now
    now.cache = given.get("past_key_values")
    labels, attention = given.get("labels"), given.get("attention_mask")
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    kept = None
    if isinstance(attention, Tensor) and attention.dim() == 2 and tokens is not None:
        kept = attention[:, -tokens.shape[1] :].bool()
    if prompt_mask is None and labels is not None:
        prompt_mask = labels == _IGNORED
    if prompt_mask is not None:
        kept = prompt_mask.bool() if kept is None else kept & prompt_mask.bool()
        if model.training and not bool(kept.any(1).all()):
            raise ModelError(
                "router_input 'prompt_pooled' found a row without a prompt (no label is -100): give rows a prompt, or "
                "switch_prompt_mask [B, T], or choose another router_input"
            )
    now.prompt_mask = kept
    return now


def _decide(model: Any, now: ForwardRoute | None, states: Tensor) -> None:
    """Fill the route from what the router reads, `[B, T, hidden]`."""
    if now is None or now.off:
        return
    config, router = model.switch_config, model.switch_router
    runner = model._switch_runner
    if runner is not None and runner.fixed is not None:
        now.gates = runner.fixed
    elif config.router_input == "prompt_pooled":
        route = getattr(now.cache, ROUTE_ARGUMENT, None)
        if route is None:
            mask = now.prompt_mask
            mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
            route = router.pooled(states, mask)
            if now.cache is not None and not model.training:
                setattr(now.cache, ROUTE_ARGUMENT, route)
        now.route = route
    else:
        now.route = router(states)
    if now.route is not None:
        now.gates = dense_gates(now.route, config.num_experts)
    if runner is not None:
        runner.decided(now, states)


def _balance(now: ForwardRoute, given: dict[str, Any]) -> Tensor:
    """Return the balance loss of this pass, weighted as its part of a batch that is summed over several passes."""
    attention, labels = given.get("attention_mask"), given.get("labels")
    assert now.route is not None
    same = isinstance(attention, Tensor) and attention.shape == now.route.probs.shape[:-1]
    loss = balance_loss(now.route, attention if same else None)
    items = given.get("num_items_in_batch")
    if items is None or labels is None:
        return loss
    return loss * (labels[..., 1:] != _IGNORED).sum() / items


__all__ = ["ALL_LINEAR", "SwitchMixin", "decoder_layers", "get_switch_model", "switch_class"]

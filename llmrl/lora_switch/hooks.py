"""How a route is computed once a forward pass and reaches every layer: hooks on a model of transformers."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import ModelError
from llmrl.lora_switch.config import layer_number
from llmrl.lora_switch.layer import ForwardRoute, RouteSlot
from llmrl.lora_switch.router import router_site
from llmrl.lora_switch.routing import Route, balance_loss, dense_gates

ROUTE_ARGUMENT = "switch_route"
_IGNORED = -100


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


def watch(model: Any) -> None:
    """Hook the model: hooks are called whatever a trainer puts in the place of `forward` (trl does, to save memory)."""
    layers, slots = decoder_layers(model), model._switch_slots
    site, before = router_site(layers, model.switch_config)
    handles = [*_watch_outside(model), *_watch_decoder(model)]

    def enter(slot: RouteSlot) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            slot.now = kwargs.pop(ROUTE_ARGUMENT, None) or model._switch_now
            return args, kwargs

        return hook

    for layer, slot in zip(layers, slots, strict=True):
        handles.append(layer.register_forward_pre_hook(enter(slot), with_kwargs=True))
    slot = slots[model.switch_config.router_layer]

    def reads_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        _decide(model, slot.now, args[0] if args else next(iter(kwargs.values())))

    def reads_output(module: nn.Module, args: Any, output: Any) -> None:
        _decide(model, slot.now, output)

    if before:
        handles.append(site.register_forward_pre_hook(reads_input, with_kwargs=True))
    else:
        handles.append(site.register_forward_hook(reads_output))
    model._switch_handles = handles


def _watch_outside(model: Any) -> list[Any]:
    """Around a call of the causal LM: the route to be filled, and the balance loss on top of the loss."""

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        prompt_mask = kwargs.pop("switch_prompt_mask", None)
        model._switch_now = model._switch_next = _begin(model, _named(module, args, kwargs), prompt_mask)
        return args, kwargs

    def end(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        now, coef = model._switch_now, model.switch_config.balance_coef
        if not (model.training and coef and now.route is not None and torch.is_grad_enabled()):
            return out
        given = _named(module, args, kwargs)
        if getattr(out, "loss", None) is not None:
            out.loss = out.loss + coef * _balance(now, given)
        elif isinstance(out, tuple) and given.get("labels") is not None:
            out = (out[0] + coef * _balance(now, given), *out[1:])
        else:
            _warn_once(
                "the model was not given labels, so the balance loss is not part of the loss: set balance_coef=0"
            )
        return out

    def forget(module: Any, args: Any, out: Any) -> None:
        model._switch_next = None  # of a pass that failed before its decoder began

    return [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(forget, always_call=True),
        model.register_forward_hook(end, with_kwargs=True),
    ]


@functools.cache
def _warn_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _watch_decoder(model: Any) -> list[Any]:
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

    def end(module: Any, args: Any, output: Any) -> None:
        now, made = model._switch_now, getattr(output, "past_key_values", None)
        is_pooled = model.switch_config.router_input == "prompt_pooled" and not model.training
        if is_pooled and now is not None and now.route is not None and made is not None:
            setattr(made, ROUTE_ARGUMENT, now.route)  # also on a cache that the model made itself

    return [decoder.register_forward_pre_hook(begin, with_kwargs=True), decoder.register_forward_hook(end)]


def _named(module: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [
        n for n, p in inspect.signature(type(module).forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(names[1:], args, strict=False)), **kwargs}


def _begin(model: Any, given: dict[str, Any], prompt_mask: Tensor | None) -> ForwardRoute:
    """Return the route to be filled, with the prompt's mask where the router pools over it."""
    now = ForwardRoute(off=model._switch_off)
    pooling = model.switch_config.router_input == "prompt_pooled" and model._switch_pooled is None
    if not pooling or now.off or (model._switch_fixed is not None and not model.training):
        return now
    now.cache = given.get("past_key_values")
    labels, attention = given.get("labels"), given.get("attention_mask")
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    kept = None
    if isinstance(attention, Tensor) and attention.dim() == 2 and tokens is not None:
        kept = attention[:, -tokens.shape[1] :].bool()
    if prompt_mask is None and labels is not None:
        prompt_mask = (labels == _IGNORED).long().cumprod(1)  # the first answer must not be routed by what follows it
    if prompt_mask is not None:
        kept = prompt_mask.bool() if kept is None else kept & prompt_mask.bool()
        if not bool(kept.any(1).all()):
            raise ModelError(
                "router_input 'prompt_pooled' found a row without a prompt (it begins with a label that is not -100): give "
                "rows a prompt, or switch_prompt_mask [B, T], or choose another router_input"
            )
    elif model.training or given.get("use_cache") is False:  # nothing says where a prompt ends, or that one begins here
        raise ModelError(
            "router_input 'prompt_pooled' cannot tell the prompt from the answer: give labels with -100 on the prompt, or "
            "switch_prompt_mask [B, T], which is 1 on the prompt"
        )
    positions = given.get("position_ids")
    if model.training and positions is not None and bool((positions[:, 1:] == 0).any()):
        raise ModelError(
            "router_input 'prompt_pooled' gives a row one route, packed rows need several: turn packing off"
        )
    now.prompt_mask = kept
    return now


def route_of(cache: Any) -> Route | None:
    """Return the pooled route that the keys in a cache were made by; None for a cache without keys, or one that was reset."""
    route: Route | None = getattr(cache, ROUTE_ARGUMENT, None)
    return route if route is not None and int(cache.get_seq_length()) > 0 else None


@torch.no_grad()
def pooled_route(model: Any, ids: Tensor, attention: Tensor | None) -> Route:
    """Return the routes `[B, 1]` of prompts `[B, T]`."""
    mask = torch.ones_like(ids) if attention is None else attention
    with model.disable_experts():
        seen: list[Tensor] = []
        site, _ = router_site(decoder_layers(model), model.switch_config)
        handle = site.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            handle.remove()
    return model.switch_router.pooled(seen[0], mask)  # type: ignore[no-any-return]


def _decide(model: Any, now: ForwardRoute | None, states: Tensor) -> None:
    """Fill the route from what the router reads, `[B, T, hidden]`."""
    if now is None or now.off:
        return
    config, router = model.switch_config, model.switch_router
    runner = model._switch_runner
    if model._switch_fixed is not None and not model.training:
        now.gates = model._switch_fixed.to(states.device)
    elif config.router_input == "prompt_pooled":
        now.route = model._switch_pooled or route_of(now.cache)
        if now.route is None:
            mask = now.prompt_mask
            mask = torch.ones(states.shape[:2], device=states.device) if mask is None else mask
            now.route = router.pooled(states, mask)
        times = states.shape[0] // now.route.ids.shape[0]  # beams, or several answers to a prompt
        if times > 1:
            now.route = Route(*(tensor.repeat_interleave(times, 0) for tensor in now.route))
    else:
        now.route = router(states)
    if now.route is not None:
        now.gates = dense_gates(now.route, config.num_experts)
    if runner is not None:
        runner.decided(now)


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

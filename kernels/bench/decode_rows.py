"""The rows of the decode bench: what each is called, how it is made, what it is held to, and where it does not run."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from decode_bytes import Mixture, ModelShape
from decode_measure import DecodeRun, Space, Timed
from decode_models import (
    Experts,
    adapted,
    fused_model,
    gathered_model,
    in_place_model,
    layerwise_model,
    merged_model,
    peft_model,
    switch_model,
)
from decode_ops import BasePart, LinearRun, MergeRun, routes_of
from torch import Tensor
from torch.nn import functional as F

from llmrl.lora_switch import set_switch_mode
from llmrl.lora_switch.modes import merge_items
from llmrl_kernels.merge_all import MergeItem
from llmrl_kernels.switch_linear import MAX_TOKENS

STEADY = 5  # rows whose every step is alike take so many times fewer steps a round
SLOW = 50  # and an interpreter so many times fewer

BASE_EAGER, BASE_GRAPH = "base, eager", "base, CUDA graph"
IN_PLACE, K1_ALONE, K1_SYNC = "in place, one pass: baseline", "K1 merge alone", "K1 weight update, float32 A B"
LINEARS, K3_DENSE, K2_ONE = "linear layers alone", "K3 dense-masked", "K2, one launch"
K2_BASE = {False: "K2 base part, two launches", True: "K2 base part, one launch"}
CHANGES = {"K1 every token": 1.0, "K1 on change, 1 %": 0.01, "K1 on change, 10 %": 0.1, "K1 on change, 50 %": 0.5}


@dataclass(frozen=True)
class Setting:
    """What a run is about."""

    shape: ModelShape
    mixture: Mixture
    device: str
    toy: bool
    tokens: int
    one_launch: bool


class NotRun(Exception):
    """A row that cannot run here; the text says why."""


class Workshop:
    """Makes the models of the rows, each once.

    Args:
        setting: of the run.
        base: the model whose tensors all share.
        experts: the experts on it.
        space: what the rows share.
        expected: logits of the reference by kind of row.
    """

    def __init__(
        self, setting: Setting, base: Any, experts: Experts, space: Space, expected: dict[str, Tensor]
    ) -> None:
        self.setting, self.base, self.experts, self.space, self.expected = setting, base, experts, space, expected
        self._models: dict[str, Any] = {}

    def model(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the model `name`."""
        if name not in self._models:
            self._models[name] = make()
        return self._models[name]

    def decode(
        self, model: Any, kind: str, *, graph: bool = True, steps: int | None = None, **options: Any
    ) -> DecodeRun:
        """Return a row that decodes; `graph` counts where there is a GPU."""
        graph = graph and self.setting.device == "cuda"
        steps = max(1, self.setting.tokens // STEADY) if steps is None else steps
        return DecodeRun(
            model,
            self.space,
            self.expected[kind],
            graph=graph,
            steps=steps,
            change=options.pop("change", 1.0),
            **options,
        )

    def switched(self, mode: str) -> Any:
        """Return a switch model in a run mode."""

        def make() -> Any:
            model = switch_model(self.base, self.experts)
            if mode == "fused":
                model.pack_for_inference()
            set_switch_mode(model, mode)
            return model

        return self.model(mode, make)


@dataclass(frozen=True)
class Row:
    """A row: its name, the kind of `step_bytes`, how to make it, and the share of its steps that change the route."""

    name: str
    kind: str
    make: Callable[[Workshop], Timed]
    change: float = 1.0


def all_rows() -> list[Row]:
    """Return the rows in the order of the table."""
    return [
        Row(BASE_EAGER, "base", lambda shop: shop.decode(shop.base, "base", graph=False)),
        Row("base, compiled", "base", _compiled),
        Row(BASE_GRAPH, "base", lambda shop: shop.decode(shop.base, "base", graph=_captured(shop))),
        Row("merged single LoRA", "base", _merged_single),
        Row("peft LoRA of rank k r", "lora", _peft),
        Row("layer-wise mixture, eager", "layerwise", lambda shop: _layerwise(shop, False)),
        Row("layer-wise mixture, CUDA graph", "layerwise", lambda shop: _layerwise(shop, _captured(shop))),
        Row(IN_PLACE, "in_place", _in_place),
        Row(K1_ALONE, "merge", _merge_alone),
        Row(K1_SYNC, "sync", _weight_update),
        *(Row(name, "merged", _on_change(change), change) for name, change in CHANGES.items()),
        Row(K3_DENSE, "dense", lambda shop: shop.decode(shop.switched("fused"), "switch")),
        Row("K3 gathered", "gathered", _gathered),
        Row("K2, two launches", "dense", lambda shop: _fused(shop, fused=False)),
        Row(K2_ONE, "dense", lambda shop: _fused(shop, fused=True)),
        Row(LINEARS, "linears", lambda shop: _linears(shop, F.linear)),
        Row(K2_BASE[False], "linears", lambda shop: _base_part(shop, fused=False)),
        Row(K2_BASE[True], "linears", lambda shop: _base_part(shop, fused=True)),
    ]


def _captured(shop: Workshop) -> bool:
    if shop.setting.device != "cuda":
        raise NotRun("a CPU has no CUDA graphs")
    return True


def _compiled(shop: Workshop) -> Timed:
    if shop.setting.toy:
        raise NotRun("the toy is not compiled")
    run = shop.decode(shop.base, "base", graph=False, compiled=True)
    try:
        run.error()
    except Exception as error:  # what a compiler may raise is not ours to list
        raise NotRun(f"torch.compile: {type(error).__name__}: {(str(error).splitlines() or [''])[0]:.80}") from error
    return run


def _merged_single(shop: Workshop) -> Timed:
    return shop.decode(shop.model("merged single", lambda: merged_model(shop.base, shop.experts)), "fixed")


def _peft(shop: Workshop) -> Timed:
    if importlib.util.find_spec("peft") is None:
        raise NotRun("peft is not installed")
    return shop.decode(shop.model("peft", lambda: peft_model(shop.base, shop.experts)), "fixed")


def _layerwise(shop: Workshop, graph: bool) -> Timed:
    model = shop.model("layerwise", lambda: layerwise_model(shop.base, shop.experts))
    return shop.decode(model, "layerwise", graph=graph)


def _one_route(shop: Workshop) -> None:
    if shop.setting.mixture.rows > 1:
        raise NotRun(f"merged weights hold one route, {shop.setting.mixture.rows} rows have several")


def _in_place(shop: Workshop) -> Timed:
    _one_route(shop)
    return shop.decode(shop.model("in place", lambda: in_place_model(shop.base, shop.experts)), "switch")


def _items(shop: Workshop) -> list[MergeItem]:
    """Return the layers, to be merged into weights that the rows of merges alone share."""
    model = shop.model("plain switch", lambda: switch_model(shop.base, shop.experts))
    make = lambda: {name: torch.empty_like(layer.weight) for name, layer in model.switch_layers().items()}  # noqa: E731
    return merge_items(model, shop.model("merged alone", make))


def _merge_alone(shop: Workshop) -> Timed:
    _one_route(shop)
    config = shop.experts.config
    routes = routes_of(config.num_experts, config.top_k, shop.space.device)
    return MergeRun(_items(shop), routes, config.scale, shop.space, max(1, shop.setting.tokens // STEADY))


def _weight_update(shop: Workshop) -> Timed:
    """As an engine gets them: one adapter in float32, its scale within B, whatever the dtype of W."""
    r, scale = shop.experts.config.r, shop.experts.config.scale
    items = [
        MergeItem(i.base, i.out, i.A[:1].to(torch.float32, copy=True), scale * i.B[:, :r].float()) for i in _items(shop)
    ]
    steps = max(1, shop.setting.tokens // STEADY)
    return MergeRun(items, routes_of(1, 1, shop.space.device), 1.0, shop.space, steps)


def _on_change(change: float) -> Callable[[Workshop], Timed]:
    def make(shop: Workshop) -> Timed:
        _one_route(shop)
        steps = None if change == 1.0 else shop.setting.tokens
        return shop.decode(shop.switched("merged"), "switch", change=change, steps=steps)

    return make


def _gathered(shop: Workshop) -> Timed:
    return shop.decode(shop.model("gathered", lambda: gathered_model(shop.base, shop.experts)), "switch")


def _fused(shop: Workshop, *, fused: bool) -> Timed:
    _few_tokens(shop)
    if fused and shop.setting.device != "cuda":
        raise NotRun("it waits within a launch, which takes a GPU")
    if fused and not shop.setting.one_launch:
        raise NotRun("its wait has not run on a GPU yet and may hang: ask for it with --one_launch")
    interpreted, steps = cpu_backend() == "triton", None
    if shop.setting.device == "cpu" and interpreted:
        steps = max(1, shop.setting.tokens // SLOW)
    backend = cpu_backend() if shop.setting.device == "cpu" else "auto"
    make = lambda: fused_model(shop.base, shop.experts, fused=fused, backend=backend)  # noqa: E731
    return shop.decode(shop.model(f"fused {fused}", make), "switch", steps=steps)


def _linears(shop: Workshop, op: Callable[[Tensor, Tensor], Tensor], steps: int | None = None) -> Timed:
    weights = [module.weight for module in adapted(shop.base, shop.experts.config).values()]
    steps = max(1, shop.setting.tokens // STEADY) if steps is None else steps
    return LinearRun(weights, shop.space, steps, op)


def _base_part(shop: Workshop, *, fused: bool) -> Timed:
    _few_tokens(shop)
    if shop.setting.device == "cpu" and cpu_backend() == "torch":
        raise NotRun("it is a part of a kernel: TRITON_INTERPRET=1 runs it in Triton's interpreter")
    config = shop.experts.config
    op = BasePart(config.num_experts * config.r, shop.space.rows, shop.space.device, fused=fused)
    return _linears(shop, op, steps=1 if shop.setting.device == "cpu" else None)


def _few_tokens(shop: Workshop) -> None:
    if shop.setting.mixture.rows > MAX_TOKENS:
        raise NotRun(f"switch_linear takes at most {MAX_TOKENS} tokens")


def cpu_backend() -> str:
    """Return how `switch_linear` runs on a CPU: "triton" in Triton's interpreter, where that is on."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
    return "triton" if interpreted else "torch"


def how_fused(device: str) -> str:
    """Return a note on what stands behind the rows K2."""
    if device == "cuda":
        return "K2: its kernel"
    if cpu_backend() == "triton":
        return "K2: its kernel in Triton's interpreter, whose time says nothing"
    return "K2: plain torch; TRITON_INTERPRET=1 runs its kernel in Triton's interpreter"

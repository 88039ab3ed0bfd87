"""Other ways to run the same experts: merged into copies of the weights, or as resident merged copies.

    fused       y = W x + sum of experts, for any batch: what a switch model does without being told otherwise
    merged      W + experts of ONE route, written by `merge_all` from the clean base whenever the route changes
    resident    E copies W + expert e, for hard top-1 routing: a switch is another pointer
    in_place    the paper's subtract-and-add on one copy, a baseline: its rounding errors pile up, see `drift`

The last three compute with one route at a time, so they take over where a forward pass has one: a single new token, a
pooled prompt of one sequence, or a route that `fix_route` fixed. Every other pass (prefill, batches) is fused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmrl.errors import ConfigError, ModelError, did_you_mean
from llmrl.lora_switch.experts import mixture_weights
from llmrl.lora_switch.layer import ForwardRoute, SwitchLinear, stamp
from llmrl_kernels.merge_all import InPlacePlan, MergeItem, MergePlan

MODES = ("fused", "merged", "resident", "in_place")


def set_switch_mode(model: Any, mode: str) -> None:
    """Choose how a switch model computes from now on; `model.train()` goes back to "fused".

    "merged" and "in_place" hold one more copy of the adapted weights, "resident" one an expert.

    Raises:
        ConfigError: no such mode.
        ModelError: a model in training, or "resident" without hard top-1 routing.
    """
    if mode not in MODES:
        raise ConfigError(f"mode: {mode!r} is not one of {', '.join(MODES)}{did_you_mean(mode, MODES)}")
    if model.training:
        raise ModelError("the model is in training, where experts change: call model.eval() first")
    if mode != "fused":
        _check_whole(model)
    release(model)
    model._switch_runner = _RUNNERS[mode](model)


def fix_route(model: Any, weights: Sequence[float] | Mapping[int, float] | None) -> None:
    """Use one mixture of experts for every token instead of asking the router; None asks it again. Training passes ask it.

    Args:
        model: a switch model in evaluation.
        weights: one weight an expert, or weights by expert.

    Raises:
        ConfigError: an expert that there is not, or another number of weights.
        ModelError: a model in training.
    """
    if model.training:
        raise ModelError("the model is in training, where its router is learnt: call model.eval() first")
    found = None if weights is None else mixture_weights(weights, model.switch_config.num_experts)
    device = model.switch_router.weight.device
    model._switch_fixed = None if found is None else torch.tensor(found, device=device)[None, None]


def drift(model: Any) -> float:
    """Return how far the in-place copies are from base plus the experts of their route: ||error|| / ||W||, over all layers.

    Raises:
        ModelError: the model does not run in place.
    """
    runner = model._switch_runner
    if not isinstance(runner, _InPlace):
        raise ModelError("drift is measured in the mode 'in_place': call set_switch_mode(model, 'in_place')")
    return runner.drift()


def _check_whole(model: Any) -> None:
    """Refuse layers that one launch cannot merge.

    Raises:
        ModelError: tensors that are sharded, or of more than one dtype or device.
    """
    layers = list(model.switch_layers().values())
    if any(hasattr(layer.weight, "full_tensor") for layer in layers):
        raise ModelError(
            "the model is sharded (FSDP), merged copies need whole layers: save it and load it in one process"
        )
    for what in ("dtype", "device"):
        found = sorted({str(getattr(layer.weight, what)) for layer in layers})
        if len(found) > 1:
            raise ModelError(
                f"layers with experts have several {what}s ({', '.join(found)}): stay with the mode 'fused'"
            )


def merge_items(model: Any, outs: Mapping[str, Tensor]) -> list[MergeItem]:
    """Return one item a layer with experts, to be merged into `outs` by the layer's name."""
    return [
        MergeItem(layer.weight.detach(), outs[name], layer.switch_A.detach(), layer.switch_B.detach())
        for name, layer in model.switch_layers().items()
    ]


def release(model: Any) -> None:
    """Let go of merged copies."""
    model._switch_runner = None
    for layer in model.switch_layers().values():
        layer.merged_weight = layer.resident_weights = None


class _Fused:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: dict[str, SwitchLinear] = model.switch_layers()
        self._stamp = stamp(self.layers.values())

    def decided(self, now: ForwardRoute) -> None:
        """Called once a pass, after its route is known and before any layer with experts runs.

        Merged weights have no gradient to the experts; those of a model that was trained, loaded or cast are made anew.
        """
        if type(self) is _Fused or torch.is_grad_enabled():
            return
        found = self.single(now)
        if found is None:
            return
        if self._stamp != stamp(self.layers.values()):
            model = self.model
            release(model)
            self.__init__(model)  # type: ignore[misc]
            model._switch_runner = self
        self.use(now, *found)

    def use(self, now: ForwardRoute, ids: Tensor, weights: Tensor) -> None:
        """Compute the pass with this one route."""

    def forget(self) -> None:
        """Take nothing for merged: a CUDA graph was replayed or will be, which tells the host nothing."""

    def single(self, now: ForwardRoute) -> tuple[Tensor, Tensor] | None:
        """Return ids `[k]` and weights `[k]` where the pass has one route."""
        if now.route is None and now.gates is not None:  # fixed
            gates = now.gates.reshape(-1)
            return torch.arange(len(gates), dtype=torch.int32, device=gates.device), gates
        if now.route is None or now.route.ids.shape[:-1].numel() != 1:
            return None
        return now.route.ids.reshape(-1), now.route.weights.reshape(-1).float()


class _Merged(_Fused):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for layer in self.layers.values():
            layer.merged_weight = torch.empty_like(layer.weight.detach())
        self._plans: dict[int, MergePlan] = {}
        self._last = 0

    def use(self, now: ForwardRoute, ids: Tensor, weights: Tensor) -> None:
        """Merge the route; nothing is written where it is the last one's."""
        count = len(ids)
        if count not in self._plans:
            outs = {name: layer.merged_weight for name, layer in self.layers.items()}
            items = merge_items(self.model, outs)  # type: ignore[arg-type]
            self._plans[count] = MergePlan(items, top_k=count, scale=self.model.switch_config.scale)
        if count != self._last:  # another plan wrote last
            self._plans[count].invalidate()
            self._last = count
        self._plans[count].merge(ids, weights, check=False)
        now.merged = True

    def forget(self) -> None:
        """Merge anew at the next pass, whichever plan it is of."""
        for plan in self._plans.values():
            plan.invalidate()


class _Resident(_Fused):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = model.switch_config
        if config.gate != "hard" or config.top_k != 1:
            raise ModelError(
                f"a resident copy holds one expert: expected gate 'hard' and top_k 1, got '{config.gate}' and {config.top_k}"
            )
        for layer in self.layers.values():
            layer.resident_weights = [torch.empty_like(layer.weight.detach()) for _ in range(config.num_experts)]
        for expert in range(config.num_experts):
            outs = {name: layer.resident_weights[expert] for name, layer in self.layers.items()}  # type: ignore[index]
            MergePlan(merge_items(model, outs), top_k=1, scale=config.scale).merge([expert], [1.0])

    def use(self, now: ForwardRoute, ids: Tensor, weights: Tensor) -> None:
        """Point at the copy of the expert; reading its number waits for the device."""
        if now.route is not None:
            now.resident = int(ids[0])


class _InPlace(_Fused):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for layer in self.layers.values():
            layer.merged_weight = layer.weight.detach().clone()
        outs = {name: layer.merged_weight for name, layer in self.layers.items()}
        items = [MergeItem(i.out, i.out, i.A, i.B) for i in merge_items(model, outs)]  # type: ignore[arg-type]
        # one plan for routes of any length, a fixed one of every expert too: it alone knows what the copies hold
        self._most = model.switch_config.num_experts
        self._plan = InPlacePlan(items, top_k=self._most, scale=model.switch_config.scale)

    def use(self, now: ForwardRoute, ids: Tensor, weights: Tensor) -> None:
        """Subtract the last route's experts and add this one's."""
        more = self._most - len(ids)
        self._plan.merge(F.pad(ids, (0, more)), F.pad(weights, (0, more)), check=False)
        now.merged = True

    def drift(self) -> float:
        """Return ||copies - (W + experts)|| / ||W||."""
        wrong = whole = 0.0
        outs = {name: torch.empty_like(layer.weight.detach()) for name, layer in self.layers.items()}
        ids, weights = self._plan.held() or ([0], [0.0])
        plan = MergePlan(merge_items(self.model, outs), top_k=len(ids), scale=self.model.switch_config.scale)
        plan.merge(ids, weights)
        for name, layer in self.layers.items():
            assert layer.merged_weight is not None
            wrong += float((layer.merged_weight.double() - outs[name].double()).square().sum())
            whole += float(layer.weight.detach().double().square().sum())
        return float((wrong / whole) ** 0.5)


_RUNNERS: dict[str, Any] = {"fused": _Fused, "merged": _Merged, "resident": _Resident, "in_place": _InPlace}

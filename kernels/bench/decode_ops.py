"""What the decode bench times outside of a step: the merge, and linear layers alone, each over all layers with experts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from decode_measure import Space, count_launches, storages, wait
from scaled_lse_sweep import peak_bytes
from torch import Tensor

from llmrl_kernels import MergeItem, MergePlan, SwitchWorkspace, block_sizes, merge_all_reference
from llmrl_kernels.tuning import force_sizes

CHUNK = 1 << 22  # weights in float64 at a time where they are held to their definition

Route = tuple[Tensor, Tensor]
"""ids `[k]` int32 and weights `[k]` float32."""


class OpRun(ABC):
    """An op that takes steps."""

    space: Space
    steps: int

    @abstractmethod
    def _step(self) -> Any:
        """Run the op once over all layers."""

    def round(self, turn: int) -> float:
        """Return the seconds a step."""
        wait(self.space.device)
        started = time.perf_counter()
        for _ in range(self.steps):
            self._step()
        wait(self.space.device)
        return (time.perf_counter() - started) / self.steps

    def launches(self) -> int:
        """Return how many kernels a step launches."""
        self._step()  # a merge's next one is a change
        return count_launches(self._step, self.space.device.type)

    @abstractmethod
    def held(self) -> list[Tensor]:
        """Return the tensors that it works on."""

    def memory(self) -> int:
        """Return the bytes of what it works on, with what a step needs beside them."""
        return sum(storages(self.held()).values()) + peak_bytes(self._step, self.space.device.type)


class MergeRun(OpRun):
    """The out-of-place merge alone, of two routes in turn.

    Args:
        items: the layers.
        routes: the two.
        scale: factor of the experts.
        space: of the run.
        steps: merges a round.
    """

    def __init__(
        self, items: Sequence[MergeItem], routes: Sequence[Route], scale: float, space: Space, steps: int
    ) -> None:
        self.items, self.routes, self.scale, self.space, self.steps = tuple(items), routes, scale, space, steps
        self.plan = MergePlan(self.items, top_k=len(routes[0][0]), scale=scale)
        self._turn = 0

    def _step(self) -> None:
        self._turn += 1
        self.plan.merge(*self.routes[self._turn % 2], check=False)

    def error(self) -> tuple[float, float]:
        """Return the largest difference of a merged weight from the definition, and that over the largest of its layer."""
        wrong = relative = 0.0
        for route in self.routes:
            self.plan.merge(*route, check=False)
            for item in self.items:
                found = [_apart(*pair) for pair in merged_and_expected([item], route, self.scale)]
                difference, size = torch.stack(found).amax(0).tolist()
                wrong, relative = max(wrong, difference), max(relative, difference / size)
        return wrong, relative

    def held(self) -> list[Tensor]:
        """Return base, experts and merged weights."""
        return [tensor for item in self.items for tensor in item.tensors().values()]


def merged_and_expected(
    items: Sequence[MergeItem], route: tuple[Any, Any], scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `out` and what it should be, in float64, of every layer; a few rows at a time, to hold little at once."""
    ids, weights = (part.tolist() if isinstance(part, Tensor) else part for part in route)
    for item in items:
        height = max(1, CHUNK // item.base.shape[1])
        for first in range(0, len(item.base), height):
            rows = slice(first, first + height)
            part = MergeItem(item.base[rows], item.out[rows], item.A, item.B[rows])
            yield part.out.double(), merge_all_reference([part], ids, weights, scale)[0].double()


@torch.no_grad()
def merge_drift(model: Any) -> float:
    """Return how far a model that switches in place is from W + experts: ||error|| / ||W + experts||, over all layers."""
    runner, scale = model._switch_runner, model.switch_config.scale
    route: tuple[Any, Any] = runner.plan.held() or ([], [])
    wrong = whole = torch.zeros((), dtype=torch.float64, device=runner.items[0].base.device)
    for found, expected in merged_and_expected(runner.items, route, scale):
        wrong, whole = wrong + (found - expected).square().sum(), whole + expected.square().sum()
    return float((wrong / whole).sqrt())


def _apart(found: Tensor, expected: Tensor) -> Tensor:
    """Return `[2]`: the largest difference, which is infinite where a number is none, and the largest expected."""
    return torch.stack([(found - expected).abs().nan_to_num(float("inf")).max(), expected.abs().max()])


def routes_of(experts: int, top_k: int, device: torch.device) -> list[Route]:
    """Return two routes that share neither weights nor, where there are enough experts, ids."""
    order = torch.arange(experts, dtype=torch.int32, device=device)
    shares = [torch.full((top_k,), share / top_k, device=device) for share in (1.0, 0.9)]
    return [(order[:top_k], shares[0]), (order[-top_k:].clone(), shares[1])]


class LinearRun(OpRun):
    """Linear layers one after the other on a step's tokens and nothing between them, a graph where there is a GPU.

    Args:
        weights: `[out, in]` each.
        space: of the run.
        steps: passes over all of them a round.
        op: gives `[T, out]` for tokens `[T, in]` and a weight.
    """

    def __init__(
        self, weights: Sequence[Tensor], space: Space, steps: int, op: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        self.weights, self.space, self.steps, self.op = list(weights), space, steps, op
        torch.manual_seed(4)
        widths, first = sorted({weight.shape[1] for weight in weights}), weights[0]
        self.inputs = {
            width: torch.randn(space.rows, width, dtype=first.dtype, device=first.device) for width in widths
        }
        self.outputs: list[Tensor] = []
        self._graph: Any = None

    def _pass(self) -> None:
        self.outputs = [self.op(self.inputs[weight.shape[1]], weight) for weight in self.weights]

    def _step(self) -> None:
        if self.space.device.type == "cpu":
            self._pass()
            return
        if self._graph is None:
            self._capture()
        self._graph.replay()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._pass()  # compiles
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._pass()
        self._graph = graph

    def error(self) -> tuple[float, float]:
        """Return the largest difference of an output from float64, and that over the largest of its layer."""
        self._step()
        wrong = relative = 0.0
        for weight, found in zip(self.weights, self.outputs, strict=True):
            expected = self.inputs[weight.shape[1]].double() @ weight.double().T
            difference, size = _apart(found.double(), expected).tolist()
            wrong, relative = max(wrong, difference), max(relative, difference / size)
        return wrong, relative

    def held(self) -> list[Tensor]:
        """Return weights and outputs."""
        return [*self.weights, *self.outputs]


class BasePart:
    """The linear layer within K2: its kernel without an expert, so that it reads W and nothing else of size.

    Args:
        total: E*r of the layers that it stands for, whose tiles it takes.
        rows: tokens.
        device: where they are.
        fused: as one launch waits for products of A (there are none to wait for), or as the second of two launches does.
    """

    def __init__(self, total: int, rows: int, device: torch.device, *, fused: bool) -> None:
        self.total, self.fused = total, fused
        self.space, self.gates = SwitchWorkspace(1, device), torch.zeros(rows, 1, device=device)

    def __call__(self, x: Tensor, W: Tensor) -> Tensor:
        """Return W x `[T, out]` for x `[T, in]`."""
        from llmrl_kernels.switch_linear_triton import launch

        key = (self.total, x.shape[1], len(W), x.dtype)
        A, B = x.new_empty(1, 0, x.shape[1]), x.new_empty(len(W), 0)
        with force_sizes("switch_linear", block_sizes("switch_linear", *key, tokens=len(x), device=x.device)):
            return launch(x, W, A, B, self.gates, 1.0, None, self.space.u, self.space.counters, self.fused)

"""Steps that the decode bench times, and what it takes of each: error, time, launches, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from decode_models import Experts, mixtures, reference_model, switch_gates
from scaled_lse_sweep import peak_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmrl.lora_switch.decode import DecodeLoop

CHECKS = 3  # steps that are held to the reference: a token, another, the same again
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}


class Space:
    """What all rows of a run share: the cache, the prompt, the tokens.

    Args:
        base: the model that reads the prompt.
        rows: the batch.
        context: tokens of the prompt.
        tokens: most steps of a round.
    """

    def __init__(self, base: Any, rows: int, context: int, tokens: int) -> None:
        from transformers import StaticCache

        self.rows, self.context, self.tokens = rows, context, tokens
        self.length = cached_tokens(context, tokens)
        self.device, self.vocab = base.device, base.config.vocab_size
        self.cache = StaticCache(config=base.config, max_cache_len=self.length)
        generator = torch.Generator().manual_seed(3)
        prompt = torch.randint(self.vocab, (rows, context), generator=generator)
        first = torch.randint(self.vocab, (rows, 1), generator=generator)
        self.prompt, second = prompt.to(self.device), (first + 1) % self.vocab
        self.checks = torch.stack([first, second, second]).to(self.device)

    def stream(self, steps: int, change: float, seed: int) -> Tensor:
        """Return `[steps + 1, rows, 1]` tokens; `round(change * steps)` of them differ from the one before."""
        generator = torch.Generator().manual_seed(seed)
        moves = torch.zeros(steps + 1, self.rows, 1, dtype=torch.long)
        places = 1 + torch.randperm(steps, generator=generator)[: round(change * steps)]
        moves[places] = torch.randint(1, self.vocab, (len(places), self.rows, 1), generator=generator)
        moves[0] = torch.randint(self.vocab, (self.rows, 1), generator=generator)
        return (moves.cumsum(0) % self.vocab).to(self.device)


def cached_tokens(context: int, tokens: int) -> int:
    """Return the length of the static cache: prompt, a round, and the steps before a capture."""
    return context + max(tokens, CHECKS) + 4


class Timed(Protocol):
    """A way to be timed."""

    def error(self) -> tuple[float, float]: ...  # noqa: D102
    def round(self, turn: int) -> float: ...  # noqa: D102
    def launches(self) -> int: ...  # noqa: D102
    def memory(self) -> int: ...  # noqa: D102


class DecodeRun:
    """A model that decodes, in `DecodeLoop`.

    Args:
        model: the model.
        space: what the rows share.
        expected: the reference's logits for `space.checks`.
        graph: capture the step.
        change: share of the steps whose token, and so whose route, is another than the last one's.
        steps: of a round.
        compiled: compile the step instead of capturing it.
    """

    def __init__(
        self,
        model: Any,
        space: Space,
        expected: Tensor,
        *,
        graph: bool,
        change: float,
        steps: int,
        compiled: bool = False,
    ) -> None:
        self.model, self.space, self.expected, self.change, self.steps = model, space, expected, change, steps
        self.loop = DecodeLoop(model, space.length, space.rows, graph=graph)
        self.loop.cache = space.cache
        if compiled:
            self.loop._forward = torch.compile(self.loop._forward, mode="reduce-overhead")  # type: ignore[method-assign]

    def _feed(self, token: Tensor, number: int) -> None:
        self.loop.token.copy_(token)
        self.loop.position.fill_(self.space.context + number)

    def _rewind(self) -> None:
        """Go back to the end of the prompt: every step moves the cache's own count on, a warm-up's too."""
        for layer in self.space.cache.layers:
            layer.cumulative_length.fill_(self.space.context)

    @torch.no_grad()
    def walk(self, after: Callable[[], Any] = lambda: None) -> tuple[Tensor, list[Any]]:
        """Return the logits of the checks `[CHECKS, rows, vocabulary]`, and what `after` says behind prompt and checks."""
        self.loop.generate(self.space.prompt, 1)
        logits, others = [], [after()]
        for _ in range(3):  # compiles, captures
            self._rewind()
            self._feed(self.space.checks[0], 0)
            self.loop._step()
        self._rewind()
        for number, token in enumerate(self.space.checks):
            self._feed(token, number)
            logits.append(self.loop._step()[:, -1].float().cpu())
            others.append(after())
        return torch.stack(logits), others

    def error(self) -> tuple[float, float]:
        """Return the largest difference from the reference's logits, and that over the largest of them."""
        error = float((self.walk()[0] - self.expected).abs().nan_to_num(float("inf")).max())
        return error, error / float(self.expected.abs().max())

    @torch.no_grad()
    def round(self, turn: int) -> float:
        """Return the seconds a token of one round; the route that it starts from is in place before."""
        stream = self.space.stream(self.steps, self.change, 10 + turn)
        self._rewind()
        self._feed(stream[0], 0)
        self.loop._step()
        wait(self.space.device)
        started = time.perf_counter()
        for number in range(1, self.steps + 1):
            self._feed(stream[number], number)
            self.loop._step()
        wait(self.space.device)
        return (time.perf_counter() - started) / self.steps

    @torch.no_grad()
    def _one(self, step: Callable[[], Any], measure: Callable[[Callable[[], Any]], int]) -> int:
        """Measure a step whose route is new."""
        found = 0
        for token in self.space.checks[:2]:
            self._rewind()
            self._feed(token, 0)
            found = measure(step)
        return found

    def launches(self) -> int:
        """Return how many kernels a step launches (on a CPU: operations that compute)."""
        return self._one(self.loop._step, lambda step: count_launches(step, self.space.device.type))

    def memory(self) -> int:
        """Return the bytes that model and cache hold, with what one eager step needs beside them."""
        beside = self._one(self.loop._forward, lambda step: peak_bytes(step, self.space.device.type))
        return held_bytes(self.model, self.space.cache) + beside


class CopyRun:
    """A copy from memory to memory: the bandwidth that the others are measured against."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.size = device, COPY_BYTES[device.type]
        self.source = torch.zeros(self.size, dtype=torch.uint8, device=device)
        self.target = torch.empty_like(self.source)

    def round(self, turn: int) -> float:
        """Return the seconds a copy."""
        wait(self.device)
        started = time.perf_counter()
        for _ in range(4):
            self.target.copy_(self.source)
        wait(self.device)
        return (time.perf_counter() - started) / 4


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OperationCount(TorchDispatchMode):
    """Counts operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def count_launches(step: Callable[[], Any], device: str) -> int:
    """Return how many kernels, copies and fills a step is on a GPU, those of a graph too; on a CPU operations, but views."""
    if device == "cpu":
        with OperationCount() as operations:
            step()
        return operations.count
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    count = 0
    for _ in range(2):  # the first one may miss what runs while the profiler starts
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        count = sum(event.device_type == DeviceType.CUDA for event in profiler.events())
    return count


def held_bytes(model: Any, cache: Any) -> int:
    """Return the bytes of all tensors that a model and its cache hold, each once."""
    owners = [vars(layer) for layer in cache.layers]
    for module in model.modules():
        owners += [vars(module), module._parameters, module._buffers]
        owners += [vars(value) for value in vars(module).values() if type(value).__name__ == "SharedInput"]
    return sum(storages([value for owner in owners for value in owner.values()]).values())


def storages(values: Sequence[Any]) -> dict[int, int]:
    """Return the bytes of each memory that tensors among `values` lie in, by its address."""
    storages = [value.untyped_storage() for value in values if isinstance(value, Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@torch.no_grad()
def reference_logits(base: Any, experts: Experts, layerwise: Any, space: Space) -> dict[str, Tensor]:
    """Return `[CHECKS, rows, vocabulary]` logits in float32 for each kind of row, of plain torch and a growing cache.

    The layer-wise routes are those that the model takes in its own dtype, step for step as its rows: two close logits may
    be ordered otherwise in float32, which would be another mixture.
    """
    passes = [space.prompt, *space.checks]
    switch = [switch_gates(base, experts, tokens) for tokens in passes]
    eager = DecodeRun(layerwise, space, torch.empty(0), graph=False, change=1.0, steps=1)
    seen = eager.walk(lambda: [layer.seen for layer in mixtures(layerwise)])[1]
    none, fixed = torch.zeros_like(experts.fixed_gates()), experts.fixed_gates()
    count, model = len(seen[0]), reference_model(base, experts)
    routes = {"base": [[none] * count] * len(passes), "fixed": [[fixed] * count] * len(passes)}
    routes |= {"switch": [[gates] * count for gates in switch], "layerwise": seen}
    return {kind: _reference(model, passes, gates) for kind, gates in routes.items()}


def _reference(model: Any, passes: Sequence[Tensor], gates: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the logits behind every pass but the first, with the gates of each pass and layer."""
    from transformers import DynamicCache

    cache, logits = DynamicCache(config=model.config), []
    for tokens, given in zip(passes, gates, strict=True):
        for layer, one in zip(mixtures(model), given, strict=True):
            layer.given = one
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits.append(out.logits[:, -1].float().cpu())
    return torch.stack(logits[1:])


def alternate(runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Take a round of every way in turn, each time starting with another; the first is not counted."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = runs[name].round(turn)
            if turn:
                seconds[name].append(taken)
    return seconds


def spread(seconds: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Return median, smallest and largest, times `scale`."""
    return {"median": scale * statistics.median(seconds), "min": scale * min(seconds), "max": scale * max(seconds)}

"""Speed and memory of `scaled_lse_sweep`, beside a plain matrix product of the same shape.

    python kernels/bench/scaled_lse_sweep.py --output_dir kernels/results

Forward and backward in tau of one loss (likelihood plus uniform smoothing), four ways that alternate, so that a busy machine
slows all of them; medians over the rounds:
    product   hidden @ weight.T alone, written to memory: the bound of a sweep, which has the same products to take
    sweep     what `scaled_lse_sweep` chooses (the Triton kernel on a GPU)
    torch     its chunks in plain torch (on a CPU the sweep is that already)
    naive     all logits at once, in float32, autograd
On a GPU the shapes are those of a 7B model with 8,192 tokens. On a CPU they are a toy, which says nothing about GPUs and is
marked so in the file. Every way is held to the float64 definition first; no time is printed for a wrong one.
"""

from __future__ import annotations

import datetime
import functools
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmrl.config import option, parse_config, to_flat
from llmrl.errors import EXIT_DONE, ModelError, UsageError, run_command
from llmrl_kernels import LseSweep, scaled_lse_sweep, scaled_lse_sweep_reference

# (tokens, width, vocabulary)
SHAPES = {
    "cuda": ((8192, 4096, 32_000), (8192, 4096, 131_072)),
    "cpu": ((512, 256, 4_000), (512, 256, 16_000)),
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


@dataclass
class BenchConfig:
    """Options of the bench."""

    output_dir: str = option("kernels/results", help="where scaled_lse_sweep-<device>.json goes")
    rounds: int = option(9, help="times that each way is measured, after one that is not counted")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise UsageError("expected at least 3 rounds")


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of tensors that exist at a time, but for those that existed before; `peak` is the most.

    Deterministic, unlike the memory of a process; blind to what a single operation allocates within itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._live, self._before = 0, {}, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._live:
                self._before.setdefault(storage._cdata, StorageWeakRef(storage))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._before:
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._live = {key: pair for key, pair in self._live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storages(values: Any) -> list[Any]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Return how many bytes `step` needs at most beside what lay there before."""
    if device == "cpu":
        with LiveStorage() as live:
            step()
        return live.peak
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def naive_sweep(hidden: Tensor, weight: Tensor, log_scale: Tensor, labels: Tensor) -> LseSweep:
    """Take all logits at once, as one writes it down first."""
    z = torch.nn.functional.linear(hidden, weight).float()
    scaled = z * log_scale.clamp(-3.0, 2.302585092994046).exp()[:, None]
    lse = scaled.logsumexp(-1)
    top, argmax = scaled.max(-1)
    target = scaled.gather(1, labels[:, None])[:, 0]
    expected = (scaled.detach().softmax(-1) * z).sum(-1)
    return LseSweep(lse, target, top, scaled.mean(-1), top - lse, expected, argmax)


def loss_gradient(sweep: Callable[..., LseSweep], inputs: tuple[Tensor, ...]) -> Tensor:
    """Return the gradient in tau of the likelihood plus half the uniform smoothing term."""
    hidden, weight, log_scale, labels = inputs
    tau = log_scale.clone().requires_grad_()
    outputs = sweep(hidden, weight, tau, labels)
    (outputs.lse - 0.5 * (outputs.target + outputs.mean)).sum().backward()
    return tau.grad


def make_inputs(tokens: int, width: int, vocab: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return random hidden states and weights whose logits have deviation 3, tau around 0, and labels."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(vocab, width, device=device, dtype=dtype).mul_(3.0 * width**-0.5)
    log_scale = 0.5 * torch.randn(tokens, device=device)
    return hidden, weight, log_scale, torch.randint(0, vocab, (tokens,), device=device)


def ways(device: str) -> dict[str, Callable[..., LseSweep]]:
    """Return the ways that give a sweep."""
    torch_chunks = {"torch": functools.partial(scaled_lse_sweep, backend="torch")} if device == "cuda" else {}
    return {"sweep": scaled_lse_sweep, **torch_chunks, "naive": naive_sweep}


def check(device: str, dtype: torch.dtype) -> None:
    """Hold every way to the definition.

    Raises:
        ModelError: one of them is wrong.
    """
    inputs = make_inputs(300, 256, 5_003, device, dtype)
    expected = loss_gradient(scaled_lse_sweep_reference, inputs).double()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    for name, sweep in ways(device).items():
        error = (loss_gradient(sweep, inputs).double() - expected).abs().max() / expected.abs().max()
        if not error <= tolerance:
            raise ModelError(
                f"{name} is wrong on {device} in {dtype}: relative error {error:.1e}, allowed {tolerance:.0e}"
            )


def measure(shape: tuple[int, int, int], device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return time, rate, share of the product's rate and peak memory of every way that fits."""
    inputs = make_inputs(*shape, device, dtype)
    product = torch.empty(shape[0], shape[2], device=device, dtype=dtype)
    steps: dict[str, Callable[[], Any]] = {"product": lambda: torch.mm(inputs[0], inputs[1].T, out=product)}
    steps |= {name: lambda sweep=sweep: loss_gradient(sweep, inputs) for name, sweep in ways(device).items()}
    peaks: dict[str, int | None] = {}
    for name, step in list(steps.items()):
        try:
            step()  # compiles and tunes
            peaks[name] = peak_bytes(step, device)
        except torch.OutOfMemoryError:
            peaks[name] = None
            del steps[name]
    seconds = alternate(steps, device, rounds)
    operations = 2 * shape[0] * shape[1] * shape[2]
    result: dict[str, Any] = {"tokens": shape[0], "width": shape[1], "vocab": shape[2], "dtype": str(dtype)[6:]}
    for name, peak in peaks.items():
        if peak is None:
            result[name] = "out of memory"
            continue
        median = statistics.median(seconds[name])
        result[name] = {
            "median_ms": median * 1e3,
            "tflops": operations / median / 1e12,
            "share_of_product": statistics.median(seconds["product"]) / median,
            "peak_mib": None if name == "product" else peak / 2**20,
            "rounds_ms": [one * 1e3 for one in seconds[name]],
        }
    return result


def alternate(steps: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, list[float]]:
    """Run all steps in turn, each round starting with another; the first round is not counted."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the processor."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    found = None
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1] if found else platform.processor() or "unknown processor"


def main(argv: list[str]) -> int:
    """Check, measure, print a table, write JSON; return the exit code."""
    config = parse_config(
        BenchConfig, argv, prog="kernels/bench/scaled_lse_sweep.py", description="speed and memory of the sweep"
    )
    from llmrl.files import write_json
    from llmrl.training.run import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(device, DTYPES[device])
    results = [measure(shape, device, DTYPES[device], config.rounds) for shape in SHAPES[device]]
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device == "cuda" else "toy-cpu"
    report = {
        "toy": device == "cpu",
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "options": {**to_flat(config), "output_dir": None},
        "results": results,
        "environment": environment(),
    }
    write_json(output / f"scaled_lse_sweep-{name}.json", report)
    if not config.quiet:
        print_table(results, device)
        print(f"wrote {output / f'scaled_lse_sweep-{name}.json'}")
    return EXIT_DONE


def print_table(results: list[dict[str, Any]], device: str) -> None:
    """Print a row a way and shape."""
    print(f"{device_name(device)}{': a toy, not a claim about GPUs' if device == 'cpu' else ''}")
    print(f"{'tokens x width x vocab':<30}{'way':<10}{'ms':>10}{'TFLOP/s':>10}{'of product':>12}{'peak MiB':>10}")
    for result in results:
        shape = f"{result['tokens']} x {result['width']} x {result['vocab']} {result['dtype']}"
        for name in ("product", *ways(device)):
            if isinstance(result[name], str):
                print(f"{shape:<30}{name:<10} {result[name]}")
                continue
            one = result[name]
            peak = "" if one["peak_mib"] is None else f"{one['peak_mib']:.1f}"
            speed = f"{one['median_ms']:>10.2f}{one['tflops']:>10.3f}{one['share_of_product']:>12.2f}"
            print(f"{shape:<30}{name:<10}{speed}{peak:>10}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Measure tile sizes of the kernels that switch LoRA experts on this GPU, and write the table that they read.

    python kernels/bench/tune_lora_switch.py --shapes 4096x4096+1024+1024,4096x4096,4096x14336+14336,14336x4096

A shape is in x out of a linear layer; with a plus, of layers that share their input, which are measured packed as one and each
alone. For each op, shape and number of tokens (one a bucket of the table) every candidate is held to plain torch, then timed
on scratch outputs with a cold cache; the fastest is written to kernels/llmrl_kernels/tuned/<device>.json beside what the
defaults took. Entries that a table already has for other sizes stay. A call of an op never measures; without a table it takes
the defaults.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, LlmrlError, ModelError, UsageError, run_command
from llmrl_kernels import tuning
from llmrl_kernels.merge_all import MergeItem, MergePlan
from llmrl_kernels.routed_gathered import routed_expand_gathered, routed_shrink_gathered
from llmrl_kernels.routed_lora import routed_expand, routed_shrink
from llmrl_kernels.switch_linear import SwitchWorkspace, switch_linear

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}  # of the largest output
MERGE_BYTES = 1 << 30  # of base weights at a time: far beyond a cache
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "routed_shrink": {"BLOCK_T": (16, 32, 64, 128), "BLOCK_R": (16, 32, 64, 128), "BLOCK_K": (64, 128, 256)}
    | {"SPLIT": (0, 1, 4, 16)},
    "routed_expand": {"BLOCK_T": (16, 32, 64, 128), "BLOCK_O": (32, 64, 128, 256), "BLOCK_R": (16, 32, 64)},
    "gathered_shrink": {"BLOCK_T": (16, 32, 64), "BLOCK_R": (16, 32, 64), "BLOCK_K": (64, 128, 256)},
    "gathered_expand": {"BLOCK_T": (16, 32, 64), "BLOCK_O": (64, 128, 256), "BLOCK_R": (16, 32, 64)},
    "merge_all": {"BLOCK_M": (64, 128, 256), "BLOCK_N": (64, 128, 256), "OCCUPANCY": (1, 2, 3, 4)},
    "switch_linear": {"BLOCK_R": (16, 32), "BLOCK_O": (16, 32, 64), "BLOCK_K": (128, 256, 512)},
}
LAUNCH: dict[str, tuple[int, ...]] = {"num_warps": (4, 8), "num_stages": (2, 3, 4)}


@dataclass
class TuneConfig:
    """Options of the command."""

    shapes: list[str] = option(
        ["4096x4096+4096+4096", "4096x4096", "4096x11008+11008", "11008x4096"],
        help="linear layers as in x out, layers that share an input as in x out+out",
    )
    tokens: list[int] = option(
        [1, 32, 64, 128, 256, 512, 1024, 2048, 4096], help="how many tokens a call has; the first of a bucket counts"
    )
    experts: int = option(8, help="experts a layer, E")
    rank: int = option(16, help="rank of an expert, r")
    top_k: int = option(2, help="experts a token, k")
    dtype: str = option("bfloat16", help="of weights and activations", choices=tuple(DTYPES))
    output_dir: str = option(str(tuning.TUNED_FOLDER), help="where <device>.json goes")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        if min(self.experts, self.rank, self.top_k, *self.tokens) < 1 or self.top_k > self.experts:
            raise UsageError("expected positive tokens, experts, rank and top_k, with top_k at most experts")
        for shape in self.shapes:
            if len(parts := shape.split("x")) != 2 or not parts[0].isdigit():
                raise UsageError(f"--shapes: expected in x out such as 4096x11008 or 4096x4096+1024, got {shape!r}")
            if not all(part.isdigit() and int(part) for part in (parts[0], *parts[1].split("+"))):
                raise UsageError(f"--shapes: expected in x out such as 4096x11008 or 4096x4096+1024, got {shape!r}")

    @property
    def layers(self) -> list[Layer]:
        """The shapes."""
        pairs = [shape.split("x") for shape in self.shapes]
        return [Layer(int(width), tuple(map(int, outs.split("+")))) for width, outs in pairs]


@dataclass(frozen=True)
class Layer:
    """Linear layers that share an input of `width`, packed as one; or one alone."""

    width: int
    outs: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One entry of the table: its op and key, and `make`, which gives the call to time for a backend."""

    op: str
    key: str
    make: Callable[[str], Callable[[], Any]]
    fixed: tuple[str, ...] = field(default=())
    """Sizes that this form of the op does not use; they stay as in the defaults."""


def candidates(job: Job, tokens: int) -> Iterator[dict[str, int]]:
    """Yield the default first, then every combination; no tile of more tokens than the bucket has."""
    default = tuning.default_sizes(job.op, tokens)
    yield default
    grid = {name: values for name, values in (CANDIDATES[job.op] | LAUNCH).items() if name not in job.fixed}
    if "BLOCK_T" in grid:
        grid["BLOCK_T"] = tuple(size for size in grid["BLOCK_T"] if size <= tuning.token_bucket(tokens))
    for values in itertools.product(*grid.values()):
        yield default | dict(zip(grid, values, strict=True))


class Inputs:
    """Random tensors of layers packed as one, made when a job first asks for them."""

    def __init__(self, config: TuneConfig, layer: Layer, tokens: int) -> None:
        self.config, self.layer, self.tokens, self.dtype = config, layer, tokens, DTYPES[config.dtype]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=self.dtype)

    @functools.cached_property
    def x(self) -> Tensor:
        """`[T, in]`."""
        return self._random(self.tokens, self.layer.width)

    @functools.cached_property
    def A(self) -> Tensor:
        """`[n*E, r, in]`."""
        experts = len(self.layer.outs) * self.config.experts
        return self._random(experts, self.config.rank, self.layer.width).mul_(self.layer.width**-0.5)

    @functools.cached_property
    def B(self) -> Tensor:
        """`[sum out, E*r]`."""
        return self._random(sum(self.layer.outs), self.config.experts * self.config.rank)

    @functools.cached_property
    def W(self) -> Tensor:
        """`[out, in]`."""
        return self._random(sum(self.layer.outs), self.layer.width).mul_(self.layer.width**-0.5)

    @functools.cached_property
    def route(self) -> tuple[Tensor, Tensor]:
        """The chosen experts' ids and weights, `[T, k]` each."""
        weights, ids = torch.rand(self.tokens, self.config.experts, device="cuda").topk(self.config.top_k, -1)
        return ids.int(), weights

    @functools.cached_property
    def gates(self) -> Tensor:
        """`[T, n*E]`."""
        ids, weights = self.route
        empty = torch.zeros(self.tokens, self.config.experts, device="cuda")
        return empty.scatter(1, ids.long(), weights).repeat(1, len(self.layer.outs))

    @functools.cached_property
    def u(self) -> Tensor:
        """`[T, n*E*r]`, gated."""
        return routed_shrink(self.x, self.A, self.gates, backend="torch")[0]

    @functools.cached_property
    def chosen(self) -> Tensor:
        """`[T, k, r]`, gated."""
        return routed_shrink_gathered(self.x, self.A, *self.route, backend="torch")[0]


def jobs(config: TuneConfig, layer: Layer, tokens: int) -> Iterator[Job]:
    """Yield the ops of layers at a number of tokens: packed as one, then each alone. Some keys may come more than once."""
    alone = [Layer(layer.width, (out,)) for out in dict.fromkeys(layer.outs)]
    for one in dict.fromkeys([layer, *alone]):
        yield from dense_jobs(Inputs(config, one, tokens))
    for one in alone:
        yield from other_jobs(Inputs(config, one, tokens))


def dense_jobs(inputs: Inputs) -> Iterator[Job]:
    """Yield `routed_shrink`, timed with the expand that adds the parts of its sums, and `routed_expand`."""
    config, layer, tokens = inputs.config, inputs.layer, inputs.tokens
    total, bucket = config.experts * config.rank, tuning.token_bucket(tokens)

    def both(backend: str) -> Callable[[], Tensor]:
        x, A, B, gates = inputs.x, inputs.A, inputs.B, inputs.gates

        def step() -> Tensor:
            u, _ = routed_shrink(x, A, gates, partial=True, backend=backend)
            return routed_expand(u, B, scale=1.0, slices=layer.outs, backend=backend)

        return step

    def up(backend: str) -> Callable[[], Tensor]:
        u, B = inputs.u, inputs.B
        return lambda: routed_expand(u, B, scale=1.0, slices=layer.outs, backend=backend)

    key = tuning.entry_key("routed_shrink", bucket, len(layer.outs) * total, layer.width, inputs.dtype)
    yield Job("routed_shrink", key, both, () if tokens <= 16 else ("SPLIT",))
    yield Job("routed_expand", tuning.entry_key("routed_expand", bucket, total, sum(layer.outs), inputs.dtype), up)


def other_jobs(inputs: Inputs) -> Iterator[Job]:
    """Yield the gathered ops of one layer, and for few tokens `switch_linear`."""
    config, (out,), width = inputs.config, inputs.layer.outs, inputs.layer.width
    bucket, few = tuning.token_bucket(inputs.tokens), inputs.tokens <= 16
    fixed = ("BLOCK_T",) if few else ()

    def down(backend: str) -> Callable[[], Tensor]:
        arguments = (inputs.x, inputs.A, *inputs.route)
        return lambda: routed_shrink_gathered(*arguments, backend=backend)[0]

    def up(backend: str) -> Callable[[], Tensor]:
        arguments = (inputs.chosen, inputs.B, inputs.route[0])
        return lambda: routed_expand_gathered(*arguments, scale=1.0, backend=backend)

    def switch(backend: str) -> Callable[[], Tensor]:
        arguments = (inputs.x, inputs.W, inputs.A, inputs.B, inputs.gates, 1.0)
        space = SwitchWorkspace(config.experts * config.rank, "cuda")
        return lambda: switch_linear(*arguments, workspace=space, backend=backend)

    for op, size, make in (("gathered_shrink", width, down), ("gathered_expand", out, up)):
        yield Job(op, tuning.entry_key(op, bucket, config.rank, size, inputs.dtype), make, fixed)
    if few:
        total = config.experts * config.rank
        yield Job("switch_linear", tuning.entry_key("switch_linear", bucket, total, width, out, inputs.dtype), switch)


def merge_jobs(config: TuneConfig) -> Iterator[Job]:
    """Yield the merge of layers of all shapes: of a route, of one expert, and of one float32 adapter as in a weight update."""
    dtype = DTYPES[config.dtype]
    for top_k, kind in dict.fromkeys([(config.top_k, dtype), (1, dtype), (1, torch.float32)]):
        key = tuning.entry_key("merge_all", tuning.token_bucket(1), config.rank, top_k, kind, dtype)
        yield Job("merge_all", key, functools.partial(merge_step, config, top_k, kind))


def merge_step(config: TuneConfig, top_k: int, kind: torch.dtype, backend: str) -> Callable[[], Tensor]:
    """Return the merge of `top_k` experts of dtype `kind` into layers of all shapes."""
    torch.manual_seed(0)  # the same for every backend
    dtype, items, random = DTYPES[config.dtype], [], functools.partial(torch.randn, device="cuda")
    pairs = [(layer.width, out) for layer in config.layers for out in layer.outs]
    element = torch.finfo(dtype).bits // 8
    for _ in range(max(1, MERGE_BYTES // sum(w * o * element for w, o in pairs))):
        for width, out in pairs:
            base = random(out, width, dtype=dtype)
            A = random(config.experts, config.rank, width, dtype=kind)
            B = random(out, config.experts * config.rank, dtype=kind)
            items.append(MergeItem(base, torch.empty_like(base), A, B))
    ids = torch.arange(top_k, device="cuda", dtype=torch.int32)
    weights = torch.full((top_k,), 1.0 / top_k, device="cuda")
    plan = MergePlan(items, top_k=top_k, scale=0.1, backend=backend)

    def step() -> Tensor:
        plan.invalidate()
        plan.merge(ids, weights)
        return items[0].out

    return step


def all_jobs(config: TuneConfig) -> Iterator[tuple[Job, int]]:
    """Yield what there is to measure and for how many tokens, each key of the table once."""
    seen = set()
    layers = itertools.product(config.layers, config.tokens)
    each = ((job, tokens) for layer, tokens in layers for job in jobs(config, layer, tokens))
    for job, tokens in itertools.chain(((job, 1) for job in merge_jobs(config)), each):
        if job.key not in seen:
            seen.add(job.key)
            yield job, tokens


def tune(job: Job, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fastest sizes of a job with its time and the defaults' in ms.

    Raises:
        ModelError: a candidate is wrong, or none of them runs.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    expected = job.make("torch")().double()
    best: dict[str, Any] = {"ms": float("inf")}
    default_ms = None
    for index, sizes in enumerate(candidates(job, tokens)):
        with tuning.force_sizes(job.op, sizes):
            try:
                step = job.make("triton")
                error = (step().double() - expected).abs().max() / expected.abs().max()
            except OutOfResources:
                continue
            if not error <= TOLERANCE[dtype]:
                raise ModelError(f"{job.key} is wrong with {sizes}: error {error:.1e}, allowed {TOLERANCE[dtype]:.0e}")
            ms = float(do_bench(step, warmup=5, rep=20, return_mode="median"))
        default_ms = ms if index == 0 else default_ms
        if ms < best["ms"]:
            best = {"ms": ms, "sizes": sizes}
    if "sizes" not in best:
        raise ModelError(f"{job.key}: expected a candidate that fits on this GPU, got none")
    return {**best, "default_ms": default_ms}


def main(argv: list[str]) -> int:
    """Measure everything, print a line an entry, write the table; return the exit code."""
    config = parse_config(
        TuneConfig, argv, prog="kernels/bench/tune_lora_switch.py", description="tile sizes of the LoRA kernels"
    )
    if not torch.cuda.is_available():
        raise LlmrlError(
            "expected a GPU to measure tile sizes on, got a machine without CUDA: run this on the GPU it is for"
        )
    import triton

    from llmrl.files import write_json

    torch.manual_seed(0)
    device, dtype = torch.cuda.get_device_name(), DTYPES[config.dtype]
    file = Path(config.output_dir) / tuning.device_file(device).name
    entries = tuning.read_table(file) if file.exists() else {}
    times = json.loads(file.read_text(encoding="utf-8")).get("times", {}) if entries else {}
    for job, tokens in all_jobs(config):
        found = tune(job, tokens, dtype)
        entries[job.key] = found["sizes"]
        times[job.key] = {"ms": found["ms"], "default_ms": found["default_ms"]}
        if not config.quiet:
            print(
                f"{job.key:<50}{found['ms']:>9.4f} ms, defaults {found['default_ms'] or float('nan'):.4f}  {found['sizes']}"
            )
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    table = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "versions": versions | {"python": platform.python_version()},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, table | {"entries": entries, "times": times})
    if not config.quiet:
        print(f"wrote {file}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Measure tile sizes of the kernels that switch LoRA experts on this GPU, and write the table that they read.

    python kernels/bench/tune_lora_switch.py --shapes 4096x4096,4096x11008,11008x4096 --experts 8 --rank 16

For each op, shape (in x out) and number of tokens every candidate is held to plain torch, then timed on scratch outputs with a
cold cache; the fastest is written to kernels/llmrl_kernels/tuned/<device>.json beside what the defaults took. Entries that
a table already has for other sizes stay. A call of an op never measures; without a table it takes the defaults.
"""

from __future__ import annotations

import datetime
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
    "routed_shrink": {"BLOCK_T": (16, 32, 64, 128), "BLOCK_R": (16, 32, 64, 128), "BLOCK_K": (64, 128, 256)},
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

    shapes: list[str] = option(["4096x4096"], help="linear layers as in x out")
    tokens: list[int] = option([1, 16, 64, 1024, 4096], help="how many tokens a call has")
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
            if len(parts := shape.split("x")) != 2 or not all(part.isdigit() and int(part) for part in parts):
                raise UsageError(f"--shapes: expected in x out such as 4096x11008, got {shape!r}")


@dataclass(frozen=True)
class Job:
    """One entry of the table: its op and key, and `make`, which gives the call to time for a backend."""

    op: str
    key: str
    make: Callable[[str], Callable[[], Any]]
    fixed: tuple[str, ...] = field(default=())
    """Sizes that this form of the op does not use; they stay as in the defaults."""


def candidates(job: Job, tokens: int) -> Iterator[dict[str, int]]:
    """Yield the default first, then every combination."""
    default = tuning.default_sizes(job.op, tokens)
    yield default
    grid = {name: values for name, values in (CANDIDATES[job.op] | LAUNCH).items() if name not in job.fixed}
    for values in itertools.product(*grid.values()):
        yield default | dict(zip(grid, values, strict=True))


def jobs(config: TuneConfig, width: int, out: int, tokens: int) -> Iterator[Job]:
    """Yield the ops of a layer at a number of tokens."""
    dtype, total, bucket = DTYPES[config.dtype], config.experts * config.rank, tuning.token_bucket(tokens)
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    x, A, B = random(tokens, width), random(config.experts, config.rank, width), random(out, total)
    A *= width**-0.5
    logits = torch.rand(tokens, config.experts, device="cuda")
    weights, ids = logits.topk(config.top_k, -1)
    gates, ids = torch.zeros_like(logits).scatter(1, ids, weights), ids.int()
    u, _ = routed_shrink(x, A, gates, backend="torch")
    chosen, _ = routed_shrink_gathered(x, A, ids, weights, backend="torch")
    down, up = (bucket, total, width, dtype), (bucket, total, out, dtype)
    yield Job(
        "routed_shrink",
        tuning.entry_key("routed_shrink", *down),
        lambda backend: lambda: routed_shrink(x, A, gates, backend=backend)[0],
    )
    yield Job(
        "routed_expand",
        tuning.entry_key("routed_expand", *up),
        lambda backend: lambda: routed_expand(u, B, scale=1.0, backend=backend),
    )
    few = ("BLOCK_T",) if tokens <= 16 else ()
    yield Job(
        "gathered_shrink",
        tuning.entry_key("gathered_shrink", bucket, config.rank, width, dtype),
        lambda backend: lambda: routed_shrink_gathered(x, A, ids, weights, backend=backend)[0],
        few,
    )
    yield Job(
        "gathered_expand",
        tuning.entry_key("gathered_expand", bucket, config.rank, out, dtype),
        lambda backend: lambda: routed_expand_gathered(chosen, B, ids, scale=1.0, backend=backend),
        few,
    )
    if tokens <= 16:
        W, space = random(out, width).mul_(width**-0.5), SwitchWorkspace(total, "cuda")
        yield Job(
            "switch_linear",
            tuning.entry_key("switch_linear", bucket, total, width, out, dtype),
            lambda backend: lambda: switch_linear(x, W, A, B, gates, 1.0, workspace=space, backend=backend),
        )


def merge_job(config: TuneConfig) -> Job:
    """Return the merge of layers of all shapes."""
    dtype, items = DTYPES[config.dtype], []
    pairs = [tuple(map(int, shape.split("x"))) for shape in config.shapes]
    element = torch.finfo(dtype).bits // 8
    for _ in range(max(1, MERGE_BYTES // sum(w * o * element for w, o in pairs))):
        for width, out in pairs:
            base = torch.randn(out, width, device="cuda", dtype=dtype)
            A = torch.randn(config.experts, config.rank, width, device="cuda", dtype=dtype)
            B = torch.randn(out, config.experts * config.rank, device="cuda", dtype=dtype)
            items.append(MergeItem(base, torch.empty_like(base), A, B))
    ids = torch.arange(config.top_k, device="cuda", dtype=torch.int32)
    weights = torch.full((config.top_k,), 1.0 / config.top_k, device="cuda")

    def make(backend: str) -> Callable[[], Tensor]:
        plan = MergePlan(items, top_k=config.top_k, scale=0.1, backend=backend)

        def step() -> Tensor:
            plan.invalidate()
            plan.merge(ids, weights)
            return items[0].out

        return step

    return Job("merge_all", tuning.entry_key("merge_all", tuning.token_bucket(1), config.rank, dtype), make)


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
    shapes = [tuple(map(int, shape.split("x"))) for shape in config.shapes]
    layers = (
        (job, tokens)
        for (w, o), tokens in itertools.product(shapes, config.tokens)
        for job in jobs(config, w, o, tokens)
    )
    for job, tokens in itertools.chain([(merge_job(config), 1)], layers):
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

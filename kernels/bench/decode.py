"""Time of a decoding step with routed LoRA experts, beside the base, one adapter, layer-wise routing and merging.

    python kernels/bench/decode.py --model 7b --output kernels/results/decode-h200.json      # on a GPU
    python kernels/bench/decode.py --device cpu --toy                                        # does it run

One random Llama-shaped model carries all rows; they decode the same tokens in `DecodeLoop`, graphed on a GPU but where a row
says otherwise. Each is held to float32 logits of the same mixture first (ops outside of a step: to what defines them, in every
layer): a wrong one is not timed, and the command returns 1.
Then all alternate in rounds, so that a busy machine slows all of them, together with a copy in memory, which is the bandwidth
that shares refer to. Bytes are modelled from shapes (`decode_bytes.py`). A toy or a CPU says nothing about GPUs.

    --sweep         batches at r = 16, ranks and modules at batch 1; --sweep full: every combination. Each is written when it is
                    done, and a command that goes on with the same file takes the ones that are missing.
"""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decode_bytes import MODULES, SHAPES, Mixture, step_bytes
from decode_measure import CopyRun, Space, alternate, cached_tokens, reference_logits, spread
from decode_models import build_base, build_experts, layerwise_model, merge_snrs
from decode_ops import merge_drift
from decode_rows import BASE_EAGER, BASE_GRAPH, IN_PLACE, NotRun, Row, Setting, Workshop, all_rows, how_fused
from decode_table import print_result
from scaled_lse_sweep import device_name

from llmrl.config import check_least, option, parse_config, to_flat
from llmrl.errors import EXIT_DONE, ModelError, UsageError, run_command
from llmrl.lora_switch import SwitchConfig
from llmrl.lora_switch.config import ALL_LINEAR

RESULTS = Path(__file__).resolve().parents[1] / "results"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit
BATCHES, RANKS = (1, 2, 4, 8, 16, 64), (8, 16, 32, 64)


@dataclass
class BenchConfig:
    """Options of the bench."""

    device: str = option("auto", choices=("auto", "cuda", "cpu"), help="auto: a GPU where there is one")
    toy: bool = option(False, help="a model of two small layers, which says nothing about speed; all that a CPU runs")
    output: str | None = option(None, help="the JSON file to write")
    model: str = option("7b", choices=tuple(SHAPES), help="shape of the model; its weights are random")
    experts: int = option(8, help="experts a layer, E")
    r: int = option(16, help="rank of an expert")
    top_k: int = option(2, help="experts a token, k")
    batch: int = option(1, help="rows that decode together")
    context: int = option(128, help="tokens of the prompt")
    modules: str = option("all", choices=tuple(MODULES), help="layers with experts")
    tokens: int = option(100, help="steps a round where the route changes now and then; a fifth of them elsewhere")
    rounds: int = option(9, help="times that each row is measured, after one that is not counted")
    one_launch: bool = option(False, help="also run K2 in one launch, which has not run on a GPU yet and may hang")
    sweep: str = option("none", choices=("none", "some", "full"), const="some", help="many batches, ranks and modules")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(self, {"batch": 1, "context": 2, "tokens": 100, "rounds": 3})
        self.switch_config()
        self.toy = self.toy or self.model == "toy"
        if self.toy:
            self.model = "toy"

    def switch_config(self) -> SwitchConfig:
        """Return the experts that are asked for."""
        targets = ALL_LINEAR if self.modules == "all" else MODULES[self.modules]
        return SwitchConfig(num_experts=self.experts, r=self.r, top_k=self.top_k, target_modules=targets)


def choose_device(config: BenchConfig) -> str:
    """Return "cuda" or "cpu".

    Raises:
        UsageError: no GPU where one is asked for, or a CPU for what only a GPU can run.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = found if config.device == "auto" else config.device
    if device == "cuda" and found == "cpu":
        raise UsageError(
            "--device cuda: expected a GPU, got a machine without CUDA; --device cpu --toy shows that it runs"
        )
    if device == "cpu" and not config.toy:
        raise UsageError(f"--model {config.model} takes a GPU, got a CPU: --device cpu --toy shows that it runs")
    if device == "cpu" and config.sweep != "none":
        raise UsageError("--sweep takes a GPU, got a CPU: leave it out")
    return device


def check_output(config: BenchConfig, device: str) -> None:
    """Refuse a place where the result must not go.

    Raises:
        UsageError: a toy or a CPU among the results, or a sweep without a file.
    """
    if config.output is None:
        if config.sweep != "none":
            raise UsageError("--sweep writes after every configuration: name the file with --output")
        return
    path = Path(config.output).expanduser().resolve()
    if (config.toy or device == "cpu") and path.is_relative_to(RESULTS):
        raise UsageError("--output: a toy or a CPU is no result: write it outside of kernels/results")
    if not path.parent.is_dir():
        raise UsageError(f"--output: not found: {path.parent} (expected a folder for the file)")


def configurations(config: BenchConfig) -> list[BenchConfig]:
    """Return the configurations of a sweep, or the one that was given."""
    if config.sweep == "none":
        return [config]
    if config.sweep == "full":
        grid = list(itertools.product(BATCHES, RANKS, MODULES))
    else:
        grid = [(batch, 16, "all") for batch in BATCHES] + [(1, r, "all") for r in RANKS if r != 16]
        grid += [(1, 16, modules) for modules in MODULES if modules != "all"]
    return [replace(config, batch=batch, r=r, modules=modules) for batch, r, modules in grid]


@torch.no_grad()
def run_one(config: BenchConfig, device: str) -> dict[str, Any]:
    """Check and measure every row of a configuration."""
    shape, dtype = SHAPES[config.model], torch.bfloat16 if device == "cuda" else torch.float32
    cached = cached_tokens(config.context, config.tokens)
    mixture = Mixture(config.modules, config.experts, config.r, config.top_k, config.batch, cached)
    setting = Setting(shape, mixture, device, config.toy, config.tokens, config.one_launch)
    base = build_base(shape, device, dtype, cached)
    experts = build_experts(base, config.switch_config())
    space = Space(base, config.batch, config.context, config.tokens)
    layerwise = layerwise_model(base, experts)
    expected = reference_logits(base, experts, layerwise, space)
    free_memory(device)
    moved = check_reference(expected, TOLERANCE[dtype])
    shop = Workshop(setting, base, experts, space, expected)
    shop.model("layerwise", lambda: layerwise)
    runs, results = prepare(all_rows(), shop, TOLERANCE[dtype])
    copying = CopyRun(base.device)
    seconds = alternate({"copy": copying, **runs}, config.rounds)
    copy = 2 * copying.size / spread(seconds.pop("copy"))["median"] / 1e9
    element = torch.finfo(dtype).bits // 8
    for row in all_rows():
        if row.name in seconds:
            moves = step_bytes(row.kind, shape, mixture, element=element, change=row.change)
            results[row.name] |= timings(seconds[row.name], moves, copy)
    reference = add_ratios(results)
    result = {"configuration": configuration(config), "dtype": str(dtype)[6:], "copy_gb_s": copy, "ratio_to": reference}
    drift = merge_drift(runs[IN_PLACE].model) if IN_PLACE in runs else None
    launches = "kernels, copies and fills, by the profiler" if device == "cuda" else "operations of torch, but views"
    launches += ", of a step whose route is new"
    result |= {
        "experts_move_logits_by": moved,
        "in_place_drift": drift,
        "merge_snr": merge_snrs(base, experts),
        "launches_are": launches,
        "k2_is": how_fused(device),
    }
    return result | {"rows": [{"name": name, **found} for name, found in results.items()]}


def free_memory(device: str) -> None:
    """Let go of models that nothing uses; theirs refer to themselves."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def check_reference(expected: dict[str, torch.Tensor], tolerance: float) -> float:
    """Return how far the experts move the logits, of the largest.

    Raises:
        ModelError: so little that a row without experts would pass.
    """
    moved = float((expected["switch"] - expected["base"]).abs().max() / expected["switch"].abs().max())
    if not moved > 4 * tolerance:
        raise ModelError(
            f"the experts move the logits by {moved:.1e} of the largest, expected more than {4 * tolerance:.1e}"
        )
    return moved


def prepare(rows: list[Row], shop: Workshop, tolerance: float) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Make every row and hold it to the reference; return those to time, and what there is to say of all."""
    runs: dict[str, Any] = {}
    results: dict[str, dict[str, Any]] = {}
    for row in rows:
        try:
            run = row.make(shop)
            error, relative = run.error()
            results[row.name] = {"error": error, "relative_error": relative}
            if not relative <= tolerance:
                results[row.name]["wrong"] = f"error {relative:.1e} of the largest, allowed {tolerance:.0e}"
                continue
            results[row.name] |= {"launches": run.launches(), "bytes_held": run.memory()}
            runs[row.name] = run
        except NotRun as reason:
            results[row.name] = {"not_run": str(reason)}
        except torch.OutOfMemoryError:
            results[row.name] = {"not_run": "out of memory"}
        except Exception as error:  # one broken row costs no other
            results[row.name] = {"wrong": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.80}"}
    return runs, results


def timings(seconds: list[float], moves: float, copy: float) -> dict[str, Any]:
    """Return times, modelled bytes and what they come to."""
    rate = moves / spread(seconds)["median"] / 1e9
    times = {"ms": spread(seconds, 1e3), "rounds_ms": [one * 1e3 for one in seconds]}
    return {**times, "gb": moves / 1e9, "gb_s": rate, "share_of_copy": rate / copy}


def add_ratios(results: dict[str, dict[str, Any]]) -> str | None:
    """Put each row's time over that of the graphed base (the eager one where there is no other); return its name."""
    name = next((one for one in (BASE_GRAPH, BASE_EAGER) if "ms" in results.get(one, {})), None)
    for found in results.values():
        if "ms" in found and name is not None:
            found["ratio"] = found["ms"]["median"] / results[name]["ms"]["median"]
    return name


def configuration(config: BenchConfig) -> dict[str, Any]:
    """Return what a result is a result of."""
    names = ("model", "batch", "context", "experts", "r", "top_k", "modules", "tokens", "rounds", "one_launch")
    return {name: getattr(config, name) for name in names} | {"shape": asdict(SHAPES[config.model])}


def open_report(config: BenchConfig, device: str) -> dict[str, Any]:
    """Return the report to fill; in a sweep, the one that the file holds.

    Raises:
        UsageError: the file is of another device.
    """
    from llmrl.training.run import environment

    report: dict[str, Any] = {
        "toy": config.toy,
        "date": datetime.date.today().isoformat(),
        "device": device_name(device) if device == "cuda" else "cpu",
        "processor": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "options": {**to_flat(config), "output": None},
        "environment": environment(),
        "results": [],
    }
    path = Path(config.output).expanduser() if config.output else None
    if config.sweep != "none" and path is not None and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if any(before.get(name) != report[name] for name in ("device", "toy", "environment")):
            raise UsageError(f"--output: {path} is of another machine, package or model size: name another file")
        report["results"] = [one for one in before["results"] if not any("wrong" in row for row in one["rows"])]
    return report


def main(argv: list[str]) -> int:
    """Run the configurations, print a table each, write JSON after each; return the exit code.

    Raises:
        ModelError: a row is wrong or broken; the others are measured all the same.
    """
    config = parse_config(BenchConfig, argv, prog="kernels/bench/decode.py", description="time of a decoding step")
    from llmrl.files import write_json

    device = choose_device(config)
    check_output(config, device)
    report = open_report(config, device)
    done = [result["configuration"] for result in report["results"]]
    wrong: list[str] = []
    for one in configurations(config):
        if configuration(one) in done:
            continue
        result = run_one(one, device)
        report["results"].append(result)
        wrong += [row["name"] for row in result["rows"] if "wrong" in row]
        if not config.quiet:
            print_result(result, report["device"], config.toy)
        if config.output is not None:
            write_json(Path(config.output).expanduser(), report)
        free_memory(device)
    if config.output is not None and not config.quiet:
        print(f"wrote {config.output}")
    if wrong:
        raise ModelError(f"not timed, because wrong or broken: {', '.join(sorted(set(wrong)))}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Routed experts against LoRA of equal rank on four tasks: held-out loss a task, three seeds, the router's input ablated.

    python evals/lora_switch.py --output_dir evals/results          # goes on where it was cut off

Every way trains on the same rows in the same order with the same number of steps. Learning rates are chosen apart, on rows
taken out of the training rows (`--part tune`, seed 9), never on the held-out ones: one for LoRA and one for experts.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.commands import quiet_libraries
from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, run_command
from llmrl.files import write_json
from llmrl.lora_switch.evaluate import evaluate_model
from llmrl.lora_switch.options import TrainConfig
from llmrl.lora_switch.tasks import encode, read_rows
from llmrl.lora_switch.train import train
from llmrl.training.run import environment

DATA = Path("recipes/lora_switch/data")
RATES = (1e-3, 3e-3, 1e-2)
TUNED = {"lora 8": ("lora 8", "lora 32"), "embedding": ()}  # and the ways like it; experts are the rest
EXPERTS: dict[str, Any] = {"num_experts": 8, "r": 4, "top_k": 2}
WAYS: dict[str, dict[str, Any]] = {
    "lora 8": {"num_experts": 1, "r": 8, "top_k": 1, "balance_coef": 0.0},  # as many ranks as are active
    "lora 32": {"num_experts": 1, "r": 32, "top_k": 1, "balance_coef": 0.0},  # as many as there are
    "embedding": EXPERTS,
    "layer0_mlp": {**EXPERTS, "router_input": "layer0_mlp"},
    "layer_k": {**EXPERTS, "router_input": "layer_k", "router_layer": 1},
    "prompt_pooled": {**EXPERTS, "router_input": "prompt_pooled"},
    "embedding, no balance": {**EXPERTS, "balance_coef": 0.0},
    "layer0_mlp, hard top-1": {**EXPERTS, "router_input": "layer0_mlp", "gate": "hard", "top_k": 1},
}
ABLATIONS = ("embedding, no balance", "layer0_mlp, hard top-1")


@dataclass
class Options:
    """Options of this eval."""

    output_dir: str = option("evals/results", help="where lora-switch.json goes")
    work_dir: str = option("runs/lora-switch", help="what is finished is kept here")
    part: str = option("all", choices=("all", "tune", "compare"), help="what to run")
    model: str = option("examples/tiny_lm", help="the base")
    seeds: int = option(3, help="runs a way")
    ablation_seeds: int = option(3, help="of the last two ways")
    batch_size: int = option(8, help="rows a step")
    max_length: int = option(192, help="longer rows are left out and counted")
    epochs: float = option(0.5, help="passes over the data")


def one(options: Options, way: str, seed: int, lr: float, files: tuple[Path, Path], epochs: float) -> dict[str, Any]:
    """Train and measure one way, or return what is kept of it."""
    folder = (
        Path(options.work_dir)
        / f"{Path(options.model).name}-{files[1].stem.split('.')[0]}-{way.replace(' ', '-').replace(',', '')}-{lr:g}-{seed}"
    )
    kept = Path(f"{folder}.json")
    if not kept.is_file():
        config = TrainConfig(
            model=options.model, data=[str(files[0])], test_data=[str(files[1])], output_dir=str(folder),
            max_length=options.max_length, batch_size=options.batch_size,
            epochs=epochs, lr=lr, seed=seed, overwrite=True, quiet=True, save_steps=10_000, **WAYS[way],
        )  # fmt: skip
        report = train(config)
        write_json(kept, report)
        shutil.rmtree(folder)
    return json.loads(kept.read_text(encoding="utf-8"))


def tune(options: Options) -> dict[str, float]:
    """Return the learning rate of each kind of way, by the loss of a tenth of the training rows."""
    rows = [json.loads(line) for line in gzip.decompress((DATA / "train.jsonl.gz").read_bytes()).decode().splitlines()]
    folder = Path(options.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "tune-train.jsonl", folder / "tune-dev.jsonl"
    for path, wanted in zip(files, (False, True), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for i, row in enumerate(rows) if (i % 10 == 0) == wanted))
    chosen = {}
    for way in TUNED:
        losses = {lr: one(options, way, 9, lr, files, options.epochs)["held_out"]["mean"]["nll"] for lr in RATES}
        print("tune", way, {lr: round(nll, 4) for lr, nll in losses.items()}, flush=True)
        chosen[way] = min(losses, key=losses.__getitem__)
    return chosen


def base_losses(options: Options) -> dict[str, Any]:
    """Return what the base loses without any training."""
    from llmrl.base_model import load_base

    base = load_base(options.model, dtype="float32")
    rows, _ = encode(read_rows([DATA / "test.jsonl.gz"]), base.tokenizer, options.max_length)
    return evaluate_model(base.model, rows)


def paired(one_way: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean over seeds of the difference of the mean task loss, with a t interval."""
    from scipy import stats

    one_way, other = one_way[: len(other)], other[: len(one_way)]
    found = np.array(
        [a["held_out"]["mean"]["nll"] - b["held_out"]["mean"]["nll"] for a, b in zip(one_way, other, strict=True)]
    )
    half = (
        float(stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / len(found) ** 0.5)
        if len(found) > 1
        else float("nan")
    )
    return {"value": float(found.mean()), "low": float(found.mean()) - half, "high": float(found.mean()) + half}


def compare(options: Options, rates: dict[str, float]) -> dict[str, Any]:
    """Run every way with every seed."""
    files, runs = (DATA / "train.jsonl.gz", DATA / "test.jsonl.gz"), {}
    for seed in range(options.seeds):
        for way in WAYS:
            if seed >= options.ablation_seeds and way in ABLATIONS:
                continue
            lr = rates["lora 8" if way in TUNED["lora 8"] else "embedding"]
            report = one(options, way, seed, lr, files, options.epochs)
            runs.setdefault(way, []).append(report)
            tasks = {name: round(task["nll"], 3) for name, task in report["held_out"]["tasks"].items()}
            print(
                f"seed {seed} {way}: {report['held_out']['mean']['nll']:.4f} {tasks} {report['seconds']:.0f} s",
                flush=True,
            )
    return runs


def _shown(options: Options) -> dict[str, Any]:
    """Return the options that a number depends on: no folders."""
    return {k: v for k, v in asdict(options).items() if k not in ("output_dir", "work_dir", "part")}


def main(argv: list[str]) -> int:
    """Tune, compare, write."""
    options = parse_config(Options, argv, prog="evals/lora_switch.py", description="Routed experts against LoRA.")
    quiet_libraries(True)
    rates = tune(options)
    if options.part == "tune":
        return EXIT_DONE
    runs = compare(options, rates)
    for reports in runs.values():
        for report in reports:
            report["held_out"].pop("rows")
    result = {
        "command": f"python evals/lora_switch.py --model {options.model} --output_dir evals/results",
        "environment": environment(),
        "options": {**_shown(options), "rates": rates, "ways": WAYS},
        "base": {k: v for k, v in base_losses(options).items() if k != "rows"},
        "runs": runs,
        "against": {
            baseline: {way: paired(found, runs[baseline]) for way, found in runs.items() if way != baseline}
            for baseline in ("lora 8", "lora 32")
        },
    }
    write_json(Path(options.output_dir) / f"lora-switch-{Path(options.model).name}.json", result)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

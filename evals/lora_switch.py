"""Routed experts against LoRA of equal rank on four tasks: held-out loss a task, three seeds, the router's input ablated.

    python evals/lora_switch.py --output_dir evals/results          # goes on where it was cut off

Every way trains on the same rows in the same order with the same number of steps. Learning rates are chosen apart, on rows
taken out of the training rows (`--part tune`, seed 9), never on the held-out ones: one for LoRA and one for experts.

`known task` is a control: four LoRAs of rank 8, each trained on the rows of one task for as many passes, and every row gets
the one of its task. That is what a router which knew the task could reach with experts that share nothing.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.commands import quiet_libraries
from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, run_command
from llmrl.files import write_json, write_text
from llmrl.lora_switch.evaluate import evaluate_model
from llmrl.lora_switch.options import TrainConfig
from llmrl.lora_switch.tasks import encode, read_rows
from llmrl.lora_switch.train import train
from llmrl.training.run import environment

DATA = Path("recipes/lora_switch/data")
RATES = (1e-3, 3e-3, 1e-2)
TUNED = {"lora 8": ("lora 8", "lora 32", "known task"), "embedding": ()}  # and the ways like it; experts are the rest
LORA_8: dict[str, Any] = {"num_experts": 1, "r": 8, "top_k": 1, "balance_coef": 0.0}  # as many ranks as are active
LORA_32: dict[str, Any] = {**LORA_8, "r": 32}  # as many as there are
EXPERTS: dict[str, Any] = {"num_experts": 8, "r": 4, "top_k": 2}
WAYS: dict[str, dict[str, Any]] = {
    "lora 8": LORA_8,
    "lora 32": LORA_32,
    "known task": LORA_8,
    "embedding": EXPERTS,
    "layer0_mlp": {**EXPERTS, "router_input": "layer0_mlp"},
    "layer_k": {**EXPERTS, "router_input": "layer_k", "router_layer": 1},
    "prompt_pooled": {**EXPERTS, "router_input": "prompt_pooled"},
    "embedding without balance": {**EXPERTS, "balance_coef": 0.0},
    "embedding at half the scale": {**EXPERTS, "alpha": 8.0},
    "prompt_pooled at half the scale": {**EXPERTS, "alpha": 8.0, "router_input": "prompt_pooled"},
    "embedding with a still router": {**EXPERTS, "router_lr": 1e-12},
    "embedding with all experts active": {**EXPERTS, "top_k": 8, "alpha": 16.0},
    "layer0_mlp hard top-1": {**EXPERTS, "router_input": "layer0_mlp", "gate": "hard", "top_k": 1},
}
LONG = ("lora 8", "lora 32", "known task", "embedding", "prompt_pooled")


@dataclass
class Options:
    """Options of this eval."""

    output_dir: str = option("evals/results", help="where lora-switch.json goes")
    work_dir: str = option("runs/lora-switch", help="what is finished is kept here")
    part: str = option("all", choices=("all", "tune"), help="what to run")
    model: str = option("examples/tiny_lm", help="the base")
    seeds: int = option(3, help="runs a way")
    batch_size: int = option(8, help="rows a step")
    max_length: int = option(192, help="longer rows are left out and counted")
    epochs: float = option(0.5, help="passes over the data")
    long_epochs: float = option(2.0, help="of the ways that are trained longer, too")
    ways: list[str] | None = option(None, help="these alone, to share the work among processes; nothing is written")


def train_one(
    options: Options,
    folder: Path,
    way: dict[str, Any],
    seed: int,
    lr: float,
    files: tuple[Path, Path],
    epochs: float,
) -> dict[str, Any]:
    """Train and measure one way, or return what is kept of it."""
    kept = Path(f"{folder}.json")
    if not kept.is_file():
        config = TrainConfig(
            model=options.model, data=[str(files[0])], test_data=[str(files[1])], output_dir=str(folder),
            max_length=options.max_length, batch_size=options.batch_size,
            epochs=epochs, lr=lr, seed=seed, overwrite=True, quiet=True, save_steps=10_000, **way,
        )  # fmt: skip
        report = train(config)
        write_json(kept, report)
        shutil.rmtree(folder)
    return json.loads(kept.read_text(encoding="utf-8"))


def one(options: Options, way: str, seed: int, lr: float, files: tuple[Path, Path], epochs: float) -> dict[str, Any]:
    """Train and measure one of WAYS, or return what is kept of it."""
    if way == "known task":
        return _known_task(options, seed, lr, files, epochs)
    kind = f"{Path(options.model).name}-{files[1].name.split('.')[0]}-{epochs:g}"
    folder = Path(options.work_dir) / f"{kind}-{way.replace(' ', '-')}-{lr:g}-{seed}"
    return train_one(options, folder, WAYS[way], seed, lr, files, epochs)


def _known_task(options: Options, seed: int, lr: float, files: tuple[Path, Path], epochs: float) -> dict[str, Any]:
    """Return a report as of one run: each task's loss is that of the LoRA that learnt this task alone."""
    trains, tests = (by_task(path, Path(options.work_dir)) for path in files)
    reports = {task: one(options, "lora 8", seed, lr, (trains[task], tests[task]), epochs) for task in trains}
    tasks = {task: report["held_out"]["tasks"][task] for task, report in reports.items()}
    mean = float(np.mean([task["nll"] for task in tasks.values()]))
    whole = {key: sum(report[key] for report in reports.values()) for key in ("trainable", "steps", "seconds")}
    return {**whole, "held_out": {"tasks": tasks, "mean": {"nll": mean}, "rows": []}}


def by_task(path: Path, folder: Path) -> dict[str, Path]:
    """Write the rows of each task to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_lines(path):
        found.setdefault(row["task"], []).append(row)
    files = {}
    for task, rows in sorted(found.items()):
        files[task] = folder / f"{path.name.split('.')[0]}-{task}.jsonl"
        write_text(files[task], "".join(json.dumps(row) + "\n" for row in rows))
    return files


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file, gzipped or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def dev_split(folder: Path) -> tuple[Path, Path]:
    """Write the training rows in two files, all but a tenth and that tenth, and return them."""
    rows = read_lines(DATA / "train.jsonl.gz")
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "tune-train.jsonl", folder / "tune-dev.jsonl"
    for path, wanted in zip(files, (False, True), strict=True):
        write_text(path, "".join(json.dumps(row) + "\n" for i, row in enumerate(rows) if (i % 10 == 0) == wanted))
    return files


def tune(options: Options) -> dict[str, float]:
    """Return the learning rate of each kind of way, by the loss of a tenth of the training rows."""
    files = dev_split(Path(options.work_dir))
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


def compare(options: Options, rates: dict[str, float], ways: Sequence[str], epochs: float) -> dict[str, Any]:
    """Run these ways with every seed."""
    files, runs = (DATA / "train.jsonl.gz", DATA / "test.jsonl.gz"), {}
    for seed in range(options.seeds):
        for way in ways:
            if options.ways is not None and way not in options.ways:
                continue
            lr = rates["lora 8" if way in TUNED["lora 8"] else "embedding"]
            report = one(options, way, seed, lr, files, epochs)
            runs.setdefault(way, []).append(report)
            tasks = {name: round(task["nll"], 3) for name, task in report["held_out"]["tasks"].items()}
            mean, seconds = report["held_out"]["mean"]["nll"], report["seconds"]
            print(f"{epochs:g} passes, seed {seed}, {way}: {mean:.4f} {tasks} {seconds:.0f} s", flush=True)
    return runs


def described(runs: dict[str, Any]) -> dict[str, Any]:
    """Return runs without their single rows, and what each way is against both baselines."""
    for report in (report for reports in runs.values() for report in reports):
        report["held_out"].pop("rows")
    against = {
        baseline: {way: paired(found, runs[baseline]) for way, found in runs.items() if way != baseline}
        for baseline in ("lora 8", "lora 32")
    }
    return {"runs": runs, "against": against}


def _shown(options: Options) -> dict[str, Any]:
    """Return the options that a number depends on: no folders."""
    return {k: v for k, v in asdict(options).items() if k not in ("output_dir", "work_dir", "part", "ways")}


def main(argv: list[str]) -> int:
    """Tune, compare, write."""
    options = parse_config(Options, argv, prog="evals/lora_switch.py", description="Routed experts against LoRA.")
    quiet_libraries(True)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    rates = tune(options)
    if options.part == "tune":
        return EXIT_DONE
    runs = compare(options, rates, tuple(WAYS), options.epochs)
    long = compare(options, rates, LONG, options.long_epochs)
    if options.ways is not None:
        return EXIT_DONE
    result = {
        "command": f"python evals/lora_switch.py --model {options.model} --output_dir evals/results",
        "environment": environment(),
        "options": {**_shown(options), "rates": rates, "ways": WAYS},
        "base": {k: v for k, v in base_losses(options).items() if k != "rows"},
        **described(runs),
        "long": described(long),
    }
    write_json(Path(options.output_dir) / f"lora-switch-{Path(options.model).name}.json", result)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

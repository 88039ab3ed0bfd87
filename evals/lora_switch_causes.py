"""Why one LoRA beats routed experts on four tasks: one change at a time, on a tenth of the training rows kept aside.

    python evals/lora_switch_causes.py --output_dir evals/results          # goes on where it was cut off

Ways, passes and learning rate are those of evals/lora_switch.py, whose held-out rows are not looked at.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lora_switch import EXPERTS, LORA_8, LORA_32, Options, dev_split, one, train_one

from llmrl.commands import quiet_libraries
from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, run_command
from llmrl.files import write_json
from llmrl.training.run import environment

LR = 3e-3
POOLED = {**EXPERTS, "router_input": "prompt_pooled"}
CAUSES: dict[str, dict[str, Any]] = {
    "lora 8": LORA_8,
    "lora 32": LORA_32,
    "known task": LORA_8,
    "embedding": EXPERTS,
    "prompt_pooled": POOLED,
    "embedding, half the scale": {**EXPERTS, "alpha": 8.0},
    "embedding, twice the scale": {**EXPERTS, "alpha": 32.0},
    "prompt_pooled, half the scale": {**POOLED, "alpha": 8.0},
    "embedding, slow router": {**EXPERTS, "router_lr": 3e-4},
    "embedding, still router": {**EXPERTS, "router_lr": 1e-12},
    "embedding, all active": {**EXPERTS, "top_k": 8, "alpha": 16.0},
    "embedding, four of rank 8": {"num_experts": 4, "r": 8, "top_k": 1, "gate": "hard"},
}


@dataclass
class CauseConfig:
    """Options of this script."""

    output_dir: str = option("evals/results", help="where lora-switch-causes.json goes")
    work_dir: str = option("runs/lora-switch", help="what is finished is kept here")
    model: str = option("examples/tiny_lm", help="the base")
    seeds: int = option(3, help="runs of each")


def losses(options: Options, name: str, seed: int, files: tuple[Path, Path]) -> dict[str, float]:
    """Return the held-out nats a token of each task."""
    if name == "known task":
        report = one(options, name, seed, LR, files, options.epochs)
    else:
        stem = f"causes-{name}-{seed}".replace(" ", "-").replace(",", "")
        report = train_one(options, Path(options.work_dir) / stem, CAUSES[name], seed, LR, files, options.epochs)
    return {task: held["nll"] for task, held in report["held_out"]["tasks"].items()}


def main(argv: list[str]) -> int:
    """Train every cause with every seed, print each mean, write all."""
    config = parse_config(CauseConfig, argv, prog="evals/lora_switch_causes.py", description="Why experts lose.")
    quiet_libraries(True)
    options = Options(output_dir=config.output_dir, work_dir=config.work_dir, model=config.model)
    files, found = dev_split(Path(config.work_dir)), []
    for seed in range(9, 9 + config.seeds):
        for name in CAUSES:
            tasks = losses(options, name, seed, files)
            mean = float(np.mean(list(tasks.values())))
            found.append({"name": name, "seed": seed, "mean": mean, "tasks": tasks})
            print(f"seed {seed}, {name}: {mean:.4f}", flush=True)
    shown = {k: v for k, v in asdict(config).items() if k in ("model", "seeds")}
    command = "python evals/lora_switch_causes.py --output_dir evals/results"
    result = {"command": command, "environment": environment(), "options": shown, "causes": CAUSES, "runs": found}
    write_json(Path(config.output_dir) / "lora-switch-causes.json", result)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Tables and pictures of evals/lora_switch.py: `python evals/lora_switch_report.py`, from evals/results to docs/images."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, run_command
from llmrl.files import write_text
from llmrl.lora_switch.config import ROUTER_INPUTS
from llmrl.tables import aligned_table

matplotlib.use("Agg")


@dataclass
class ReportConfig:
    """Options of this script."""

    results: str = option("evals/results", help="where lora-switch-*.json lie, and lora-switch.md goes")
    images: str = option("docs/images", help="where the pictures go")


def losses(runs: list[dict[str, Any]], task: str | None = None) -> np.ndarray:
    """Return one loss a seed, of a task or of the mean of all."""
    held = [run["held_out"] for run in runs]
    return np.array([one["mean"]["nll"] if task is None else one["tasks"][task]["nll"] for one in held])


def result_table(found: dict[str, Any], base: dict[str, Any]) -> str:
    """Return nats a token of the base and of every way: the mean of all tasks a seed, their mean, and each task."""
    tasks = list(base["tasks"])
    untrained = [base["mean"]["nll"], *(base["tasks"][t]["nll"] for t in tasks)]
    rows = [["base, untrained", "", *(f"{x:.3f}" for x in untrained), "", ""]]
    for way, runs in found["runs"].items():
        seeds = ", ".join(f"{x:.3f}" for x in losses(runs))
        means = [losses(runs).mean(), *(losses(runs, t).mean() for t in tasks)]
        rows.append(
            [
                way,
                seeds,
                *(f"{x:.3f}" for x in means),
                *(_against(found, baseline, way) for baseline in found["against"]),
            ]
        )
    head = ["way", "seeds", "mean", *tasks, *(f"against {base}" for base in found["against"])]
    return aligned_table(head, rows)


def _against(found: dict[str, Any], base: str, way: str) -> str:
    one = found["against"][base].get(way)
    if one is None or one["low"] is None:
        return ""
    return f"{one['value']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def plot_usage(found: dict[str, Any], path: Path) -> None:
    """Draw the share of each task's choices on each expert, seed 0: a panel a router's input, then the longer runs."""
    from matplotlib import pyplot

    kinds = [(found["runs"], way, found["options"]["epochs"]) for way in ROUTER_INPUTS]
    kinds += [(found["long"]["runs"], way, found["options"]["long_epochs"]) for way in ROUTER_INPUTS]
    kinds = [kind for kind in kinds if kind[1] in kind[0]]
    columns = (len(kinds) + 1) // 2
    figure, panels = pyplot.subplots(2, columns, figsize=(3.4 * columns, 4.6), layout="constrained")
    image = None
    for axes, (runs, way, passes) in zip(panels.flat, kinds, strict=False):
        tasks = runs[way][0]["held_out"]["tasks"]
        shares = np.array([tasks[name]["experts"] for name in tasks])
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
        axes.set_title(f"{way}, {passes:g} passes", fontsize=10)
        axes.set_yticks(range(len(tasks)), list(tasks), fontsize=8)
        axes.set_xticks(range(shares.shape[1]))
        axes.set_xlabel("expert", fontsize=8)
    for axes in panels.flat[len(kinds) :]:
        axes.axis("off")
    figure.colorbar(image, ax=panels, shrink=0.7, label="share of a task's choices")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    """Write lora-switch.md and the pictures."""
    config = parse_config(
        ReportConfig, argv, prog="evals/lora_switch_report.py", description="Tables of routed experts."
    )
    parts = ["# Routed LoRA experts on four tasks", "Held-out nats a token; lower is better."]
    for path in sorted(Path(config.results).glob("lora-switch-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        name, options = path.stem.removeprefix("lora-switch-"), found["options"]
        parts += [
            f"## {name}",
            f"{options['batch_size']} rows a step; learning rates "
            f"{', '.join(f'{lr:g} for ways like {way}' for way, lr in options['rates'].items())}. 95% t intervals over seeds, "
            f"paired by seed. {found['environment']['cpu_count']} CPU cores, `{found['command']}`.",
            f"### {options['epochs']:g} passes over the rows",
            result_table(found, found["base"]),
            f"### {options['long_epochs']:g} passes",
            result_table(found["long"], found["base"]),
        ]
        plot_usage(found, Path(config.images) / f"lora-switch-{name}.png")
    write_text(Path(config.results) / "lora-switch.md", "\n\n".join(parts) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

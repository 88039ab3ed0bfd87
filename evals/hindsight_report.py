"""Tables and pictures of evals/hindsight.py: `python evals/hindsight_report.py --results evals/results --images docs/images`.

summary      of each method: mean return over seeds and episodes, the intervals of both, greedy play
differences  from ilql, paired: the policies of a seed played the same episodes
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hindsight_report_regeneration import draw_rounds, llm_section, real_section, regenerated_section
from numpy.typing import NDArray
from scipy.stats import t, ttest_1samp

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, run_command
from llmrl.files import write_text
from llmrl.intervals import draw_means, interval
from llmrl.tables import aligned_table

DRAWS = 5000
FILES = (
    "hindsight-charity", "hindsight-charity-long", "hindsight-charity-lora", "hindsight-charity-long-lora",
    "hindsight-charity-users", "hindsight-charity-ablations", "maze", "hindsight-maze-ablations", "hindsight-questions",
    "hindsight-questions-10k", "hindsight-regeneration", "hindsight-regeneration-long",
)  # fmt: skip
_RED, _BLUE, _GREEN, _GREY = "#c8442f", "#1f6fb4", "#2e8b57", "#9aa0a6"


@dataclass
class ReportConfig:
    """Options of the report."""

    results: str = option("evals/results", help="where the JSON files are, and hindsight.md goes")
    images: str = option("docs/images", help="where the pictures go")


def main(argv: list[str]) -> int:
    """Write hindsight.md and the pictures from the parts that were run."""
    config = parse_config(
        ReportConfig, argv, prog="evals/hindsight_report.py", description=str(__doc__).splitlines()[0]
    )
    results, parts = Path(config.results), ["# Offline RL for dialogues: what was measured"]
    for name in FILES:
        if (results / f"{name}.json").is_file():
            found = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
            parts += section(name, found)
            draw(found, Path(config.images) / f"hindsight-{name.removeprefix('hindsight-')}.png")
            if "regenerated" in found:
                parts += regenerated_section(found)
                draw_rounds(found, Path(config.images) / f"{name}-rounds.png")
    for name, tell in (("hindsight-real", real_section), ("hindsight-llm", llm_section)):
        if (results / f"{name}.json").is_file():
            parts += tell(json.loads((results / f"{name}.json").read_text(encoding="utf-8")))
    write_text(results / "hindsight.md", "\n\n".join(parts) + "\n")
    return EXIT_DONE


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands at the head of a file: the summary, and the fields that a reader of ILQL's result looks for."""
    methods = {label: _of_method(seeds) for label, seeds in found["policies"].items()}
    best = methods.get("ilql")
    head = {} if best is None else {key: best[key] for key in ("return", "greedy", "seeds")}
    return {
        **head,
        "optimum": found["optimum"],
        "gap": None if best is None else found["optimum"] - best["return"]["value"],
        "baselines": {label: of for label, of in methods.items() if label != "ilql"},
        "differences": _differences(found["policies"]),
    }


def _of_method(seeds: Mapping[str, Any]) -> dict[str, Any]:
    returns = [np.asarray(one["returns"]) for one in seeds.values()]
    greedy = [one["greedy"]["return"]["value"] for one in seeds.values() if "greedy" in one]
    return {
        "return": _over_seeds(returns),
        "seeds": [float(values.mean()) for values in returns],
        "greedy": float(np.mean(greedy)) if greedy else None,
        "greedy_seeds": greedy,
        "beta": [one["beta"] for one in seeds.values()],
        "invalid_share": float(np.mean([one["invalid_share"] for one in seeds.values()])),
    }


def _differences(policies: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for each method, ilql's mean return less its own on the same logs and episodes, seed by seed.

    `p` is that of a paired t test over seeds, `holm` the same corrected for the number of methods it is compared with.
    """
    found: dict[str, Any] = {}
    for label, seeds in policies.items():
        both = [seed for seed in seeds if label != "ilql" and seed in policies.get("ilql", {})]
        pairs = [(policies["ilql"][seed]["returns"], seeds[seed]["returns"]) for seed in both]
        if pairs:
            difference = [np.asarray(one) - np.asarray(other) for one, other in pairs]
            found[label] = {**_over_seeds(difference), "p": _t_test([float(one.mean()) for one in difference])}
    least = 0.0
    for i, label in enumerate(sorted(found, key=lambda name: found[name]["p"])):
        least = max(least, min(1.0, (len(found) - i) * found[label]["p"]))
        found[label]["holm"] = least
    return found


def _over_seeds(values: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """Return the mean over seeds with its 95% t interval; of one seed, the bootstrap interval of its episodes."""
    means = np.array([one.mean() for one in values])
    if len(means) == 1:
        return interval(float(means[0]), draw_means(values[0][:, None], DRAWS, 0)[:, 0], None, basic=False)
    half = float(t.ppf(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5)
    return {"value": float(means.mean()), "low": float(means.mean()) - half, "high": float(means.mean()) + half}


def _t_test(means: Sequence[float]) -> float:
    if len(means) < 2:
        return 1.0
    if np.ptp(means) < 1e-12:
        return 0.0 if means[0] else 1.0
    return float(ttest_1samp(means, 0.0).pvalue)


def section(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the tables of one part."""
    logs = list(found["logs"].values())
    of = {**found["baselines"], **({"ilql": found} if "return" in found else {})}
    rows = []
    for label, seeds in found["policies"].items():
        one, difference = of[label], found["differences"].get(label)
        beta = [policy["beta"] for policy in seeds.values()]
        rows.append(
            [
                label,
                _cell(one["return"]),
                ", ".join(f"{value:.2f}" for value in one["seeds"]),
                "" if one["greedy"] is None else f"{one['greedy']:.2f}",
                "" if beta[0] is None else ", ".join(f"{b:g}" for b in beta),
                f"{100 * np.mean([p['invalid_share'] for p in seeds.values()]):.1f}%",
                "" if difference is None else _cell(difference, signed=True) + _p(difference, len(seeds)),
            ]
        )
    mean = np.mean([one["mean"] for one in logs])
    head = ["", "return [95%]", "seeds", "greedy", "beta", "no action", "ilql is better by [95%], Holm's p"]
    return [
        f"## {name}",
        f"{found['model']}. Logs: mean {mean:.2f}, best {max(one['most'] for one in logs):.2f}. The best there is: "
        f"{found['optimum']:.2f}. `{found['command']}`",
        aligned_table(head, rows),
    ]


def _p(difference: Mapping[str, Any], seeds: int) -> str:
    return f", p {difference['holm']:.2g}" if seeds > 1 else ""


def _cell(value: Mapping[str, float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value['value']:{sign}.2f} [{value['low']:{sign}.2f}, {value['high']:{sign}.2f}]"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw what each method earns, and the steered ones over beta."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0), width_ratios=(1.15, 1))
    labels = list(found["policies"])
    of = {**found["baselines"], **({"ilql": found} if "return" in found else {})}
    for i, label in enumerate(labels):
        one, colour = of[label]["return"], _RED if label == "ilql" else _BLUE
        left.barh(i, one["value"] - _floor(found), left=_floor(found), color=colour, alpha=0.35)
        left.errorbar(
            one["value"], i, xerr=[[one["value"] - one["low"]], [one["high"] - one["value"]]], color=colour, capsize=3
        )
        left.plot(of[label]["seeds"], [i] * len(of[label]["seeds"]), "o", color=colour, markersize=4)
        if of[label]["greedy"] is not None:
            left.plot(of[label]["greedy"], i, "D", color="#444444", markersize=5, markerfacecolor="none")
    left.axvline(found["optimum"], color=_GREEN, linestyle="--", linewidth=1.2)
    logs = float(np.mean([one["mean"] for one in found["logs"].values()]))
    left.axvline(logs, color=_GREY, linestyle=":", linewidth=1.2)
    left.set_yticks(range(len(labels)), labels)
    left.invert_yaxis()
    left.set(xlabel="mean return (dots: seeds, diamond: greedy)")
    left.set_title("dotted: the logs, dashed: the best there is", fontsize=9)
    _draw_beta(right, found)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _floor(found: Mapping[str, Any]) -> float:
    return (
        min(0.0, *(one["mean"] for one in found["logs"].values()))
        if found["optimum"] > 0
        else 1.05
        * min(np.mean([np.mean(one["returns"]) for one in seeds.values()]) for seeds in found["policies"].values())
    )


def _draw_beta(axis: Any, found: Mapping[str, Any]) -> None:
    colours = itertools.cycle((_BLUE, _GREEN, "#8a5fb0", "#c58b1b", "#444444", "#17a2a2"))
    for label, seeds in found["policies"].items():
        grids = [one["grid"] for one in seeds.values() if "grid" in one]
        if not grids:
            continue
        betas, colour = [float(b) for b in grids[0]], _RED if label == "ilql" else next(colours)
        sampled = np.mean([[of["return"]["value"] for of in grid.values()] for grid in grids], axis=0)
        greedy = np.mean([[of["greedy"]["return"]["value"] for of in grid.values()] for grid in grids], axis=0)
        axis.plot(betas, sampled, "o-", color=colour, markersize=4, label=label)
        axis.plot(betas, greedy, "D--", color=colour, markersize=4, markerfacecolor="none", linewidth=0.9, alpha=0.7)
    axis.axhline(found["optimum"], color=_GREEN, linestyle="--", linewidth=1.2)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="beta (other luck than is reported)", ylabel="mean return (full: sampled, broken: greedy)")
    if axis.get_legend_handles_labels()[1]:
        many = len(found["policies"]) > 9  # beside the lines, which would hide it
        axis.legend(fontsize=8, frameon=False, **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if many else {}))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

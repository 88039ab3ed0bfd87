"""Tables and plots of evals/calibration.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmrl.ats.evaluate import ORACLE
from llmrl.ats.options import NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE

Records = dict[str, list[dict[str, Any]]]  # of each setting one record a seed

COLUMNS = {
    "ece": "ECE",
    "smooth_ece": "smooth ECE",
    "brier": "Brier",
    "brier_resolution": "resolution",
    "nll": "NLL",
    "auroc": "AUROC",
    "aurc": "AURC",
}
SCALARS = (TEMPERATURE, TEMPERATURE_ECE)


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, None where a value is missing."""
    kept = list(values)
    known = [value for value in kept if value is not None]
    return sum(known) / len(known) if known and len(known) == len(kept) else None


def mean_score(seeds: list[dict[str, Any]], method: str, metric: str) -> float | None:
    """Return the mean of a score over seeds."""
    return mean(record["methods"][method][metric]["value"] for record in seeds)


def table(records: Records) -> str:
    """Return a Markdown table for each setting: means over seeds, and how often a method differs from each scalar."""
    parts = []
    for name, seeds in records.items():
        first = seeds[0]
        head = [*COLUMNS.values(), *(f"against {reference}" for reference in SCALARS)]
        lines = [
            f"## {name}",
            "",
            f"{first['level'].capitalize()} level; {first['tokens']['fit']:,} fitted on, {first['tokens']['test']:,} tested; "
            f"means of {len(seeds)} seeds.",
            "",
            f"| method | {' | '.join(head)} |",
            f"| --- |{' --- |' * len(head)}",
        ]
        for method in first["methods"]:
            cells = [_number(mean_score(seeds, method, metric)) for metric in COLUMNS]
            cells += [verdicts(seeds, method, reference) for reference in SCALARS]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        if "thresholds" in first:
            lines += ["", *_threshold_table(seeds)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def verdicts(seeds: list[dict[str, Any]], method: str, reference: str) -> str:
    """Return in how many seeds the paired 95% interval of ECE and of Brier lies below (+) and above (-) 0."""
    if f"{method} - {reference}" not in seeds[0]["differences"]:
        return ""
    parts = []
    for metric, shown in (("ece", "ECE"), ("brier", "Brier")):
        found = [record["differences"][f"{method} - {reference}"][metric] for record in seeds]
        better = sum(d["high"] is not None and d["high"] < 0 for d in found)
        worse = sum(d["low"] is not None and d["low"] > 0 for d in found)
        parts.append(f"{shown} +{better}-{worse}")
    return " ".join(parts)


def _threshold_table(seeds: list[dict[str, Any]]) -> list[str]:
    """What a threshold found on validation for a target error does on test; seeds without one answer nothing."""
    targets = list(next(iter(seeds[0]["thresholds"].values())))
    lines = [
        "Answers given, and wrong ones among them, on test, with the threshold that validation gives for a target error:",
        "",
        f"| method | {' | '.join(f'at most {float(target):.0%}' for target in targets)} |",
        f"| --- |{' --- |' * len(targets)}",
    ]
    for method in seeds[0]["thresholds"]:
        cells = []
        for target in targets:
            found = [record["thresholds"][method][target] for record in seeds]
            errors = [one["test_error"] for one in found if one["test_error"] is not None]
            given = f"{mean(one['test_coverage'] for one in found):.0%} given"
            cells.append(
                f"{given}, {mean(errors):.1%} wrong ({len(errors)} of {len(seeds)} seeds)" if errors else "no threshold"
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}"[1:] if abs(value) < 1 else f"{value:.3f}"


# --- plots ------------------------------------------------------------------------------------------------------------


def plot(records: Records, folder: Path) -> list[Path]:
    """Draw ECE and Brier score by setting and method, and risk against coverage at answer level; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    files = [
        _plot_scores(records, "ece", folder / "calibration-ece.png"),
        _plot_scores(records, "brier", folder / "calibration-brier.png"),
    ]
    graded = {name: seeds[0] for name, seeds in records.items() if "risk_coverage" in seeds[0]}
    return [*files, _plot_risk(graded, folder / "calibration-risk-coverage.png")] if graded else files


def _colour(method: str) -> str:
    if method in (SHUFFLED, ORACLE):
        return "tab:gray"
    return "tab:blue" if method.startswith("ats-") else "tab:orange"


def _plot_scores(records: Records, metric: str, path: Path) -> Path:
    """One panel a setting: a row a method, a dot with its interval a seed; the line is the better of the two scalars."""
    from matplotlib import pyplot

    rows = -(-len(records) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(13, 3.5 * rows), squeeze=False)
    for axis in axes.flat[len(records) :]:
        axis.set_axis_off()
    for axis, (name, seeds) in zip(axes.flat, records.items(), strict=False):
        methods = [method for method in seeds[0]["methods"] if method != NONE][::-1]
        scalars = [mean_score(seeds, scalar, metric) for scalar in SCALARS]
        axis.axvline(min(value for value in scalars if value is not None), color="black", linewidth=0.8, linestyle="--")
        for row, method in enumerate(methods):
            for k, record in enumerate(seeds):
                score, y = record["methods"][method][metric], row + (k - (len(seeds) - 1) / 2) * 0.22
                axis.plot([score["low"], score["high"]], [y, y], color=_colour(method), alpha=0.5, linewidth=1.5)
                axis.plot([score["value"]], [y], "o", color=_colour(method), markersize=3.5)
        size = f"{seeds[0]['tokens']['test']:,} {seeds[0]['level']}s"
        axis.set_title(f"{name}\n{size}; uncalibrated {mean_score(seeds, NONE, metric):.3f}", fontsize=9)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_xlim(left=0 if metric == "ece" else None)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
        axis.set_xlabel(COLUMNS[metric], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _plot_risk(records: dict[str, dict[str, Any]], path: Path) -> Path:
    """One panel a setting, its first seed: the error among the answers given, by how many are given."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(records), figsize=(4.8 * len(records), 3.8), squeeze=False)
    for axis, (name, record) in zip(axes[0], records.items(), strict=True):
        for method in ("none", "temperature", "ats-linear", "ats-mlp", "ats-transformer"):
            curve = record["risk_coverage"][method]
            axis.plot(curve["coverage"], curve["risk"], label=method, linewidth=1.3)
        axis.set(xlabel="share of questions answered", ylabel="share of answers that are wrong", title=name)
        axis.set(xlim=(0, 1), ylim=(0, None))
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path

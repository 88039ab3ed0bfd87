"""The report of a calibration: JSON for programs, a markdown table and plain sentences for people."""

from __future__ import annotations

from typing import Any

from llmrl.ats.metrics import LOWER_IS_BETTER, METRICS
from llmrl.ats.options import NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE

_TITLES = {
    "ece": "ECE",
    "ece_equal_mass": "ECE, equal mass",
    "nll": "NLL",
    "brier": "Brier",
    "auroc": "AUROC",
    "accuracy": "accuracy",
}
_CONTROL = "(control)"


def markdown_table(methods: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table of one test slice: value and 95% interval, the best value of a column marked with *."""
    rows = [["method", *(_TITLES[m] for m in METRICS)]]
    for name, scores in methods.items():
        label = f"{name} {_CONTROL}" if name == SHUFFLED else name
        rows.append([label, *(_cell(scores[m], _is_best(methods, name, m)) for m in METRICS)])
    return _align(rows)


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _cell(score: dict[str, Any], best: bool) -> str:
    value = _number(score["value"]) + ("*" if best else "")
    return f"{value} [{_number(score['low'])}, {_number(score['high'])}]"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "n/a"
    return f"{value:.3f}" if abs(value) >= 1 else f"{value:.4f}".replace("0.", ".", 1)


def _is_best(methods: dict[str, dict[str, dict[str, float]]], name: str, metric: str) -> bool:
    values = {n: s[metric]["value"] for n, s in methods.items() if n != SHUFFLED and s[metric]["value"] is not None}
    if metric == "accuracy" or name not in values or len(set(values.values())) < 2:
        return False
    best = min(values.values()) if metric in LOWER_IS_BETTER else max(values.values())
    return values[name] == best


def seeds_table(seeds: dict[str, dict[str, Any]], metrics: tuple[str, ...] = ("ece", "nll", "brier")) -> str:
    """Return one row a method: value and interval of each seed, so that a lucky split cannot hide."""
    names = next(iter(seeds.values()))["methods"]
    rows = [["method", *(f"{_TITLES[m]}, seed {s}" for m in metrics for s in seeds)]]
    for name in names:
        label = f"{name} {_CONTROL}" if name == SHUFFLED else name
        rows.append([label, *(_cell(r["methods"][name][m], False) for m in metrics for r in seeds.values())])
    return _align(rows)


def sentences(report: dict[str, Any]) -> list[str]:
    """Say in words what the paired differences show, for and against the selected method."""
    selected = report["selected"]
    lines = []
    for reference in (NONE, TEMPERATURE, TEMPERATURE_ECE):
        key = f"{selected} - {reference}"
        if key not in report["differences"]:
            continue
        verdicts = {m: _verdict(report["differences"][key][m], m) for m in ("ece", "nll", "brier")}
        for word in ("better", "worse", "no different"):
            named = [_TITLES[m] for m, verdict in verdicts.items() if verdict == word]
            if named:
                than = "from" if word == "no different" else "than"
                lines.append(f"{selected} is {word} {than} {reference} in {', '.join(named)} (paired 95% intervals)")
    if f"{SHUFFLED} - {TEMPERATURE_ECE}" in report["differences"]:
        verdict = _verdict(report["differences"][f"{SHUFFLED} - {TEMPERATURE_ECE}"]["ece"], "ece")
        than = "from" if verdict == "no different" else "than"
        lines.append(f"the control (features shuffled) is {verdict} {than} {TEMPERATURE_ECE} in ECE")
    return lines


def _verdict(difference: dict[str, float], metric: str) -> str:
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low != low or low <= 0 <= high:
        return "no different"
    return "better" if (high < 0) == (metric in LOWER_IS_BETTER) else "worse"


def excluded_line(excluded: dict[str, int], rows: int) -> str | None:
    """Return the sentence about rows that were left out, or None."""
    if not excluded:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(excluded.items()))
    return f"excluded of {rows} rows: {reasons}"

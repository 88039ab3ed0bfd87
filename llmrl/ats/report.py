"""The report of a calibration: JSON for programs, a markdown table and plain sentences for people."""

from __future__ import annotations

from typing import Any

from llmrl.ats.metrics import LOWER_IS_BETTER
from llmrl.ats.options import NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE
from llmrl.tables import aligned_table

_TITLES = {
    "ece": "ECE",
    "ece_equal_mass": "ECE, equal mass",
    "nll": "NLL",
    "brier": "Brier",
    "auroc": "AUROC",
    "accuracy": "accuracy",
    "smooth_ece": "smooth ECE",
    "brier_reliability": "Brier reliability",
    "brier_resolution": "Brier resolution",
    "aurc": "AURC",
    "ece_debiased": "debiased L2 error",
}
# of METRICS: what fits on a screen; report.json has all
TABLE = ("ece", "smooth_ece", "nll", "brier", "auroc", "accuracy")
# an ECE near its own noise has intervals that are too narrow; those of the reliability term hold
_SAID = ("ece", "brier_reliability", "nll", "brier")
_CONTROL = "(control)"


def markdown_table(methods: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table of one test slice: value and 95% interval, the best value of a column marked with *."""
    rows = [["method", *(_TITLES[m] for m in TABLE)]]
    for name, scores in methods.items():
        label = f"{name} {_CONTROL}" if name == SHUFFLED else name
        rows.append([label, *(_cell(scores[m], _is_best(methods, name, m)) for m in TABLE)])
    return aligned_table(rows[0], rows[1:])


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


def seeds_table(seeds: dict[str, dict[str, Any]], metric: str = "ece") -> str:
    """Return one row a method and one column a seed, so that a lucky split cannot hide."""
    rows = [["method", *(f"{_TITLES[metric]}, seed {seed}" for seed in seeds)]]
    for name in next(iter(seeds.values()))["methods"]:
        label = f"{name} {_CONTROL}" if name == SHUFFLED else name
        cells = [_cell(r["methods"][name][metric], _is_best(r["methods"], name, metric)) for r in seeds.values()]
        rows.append([label, *cells])
    return aligned_table(rows[0], rows[1:])


def scope(level: str | None, answer_confidence: str | None) -> str | None:
    """Return the sentence about where the probabilities may be believed; None for a fit on text.

    Args:
        level: of `HeadsConfig`.
        answer_confidence: of `HeadsConfig`.
    """
    if level != "answer":
        return None
    if answer_confidence is None:
        return "fitted on answer letters: read its confidence there; sampled text of this folder is not calibrated"
    return (
        f"fitted on graded answers: the confidence of a whole answer is calibrated (--answer_confidence {answer_confidence} of "
        "its tokens' probabilities); the probabilities of other text of this folder are not"
    )


def sentences(report: dict[str, Any]) -> list[str]:
    """Say in words what the paired differences show, for and against the selected method, over all seeds."""
    selected, seeds = report["selected"], list(report["seeds"].values())
    lines = []
    for reference in (NONE, TEMPERATURE, TEMPERATURE_ECE):
        if f"{selected} - {reference}" in report["differences"]:
            lines.append(f"{selected} against {reference}: {_verdicts(seeds, selected, reference)}")
    scalars = [name for name in (TEMPERATURE, TEMPERATURE_ECE) if name in report["methods"]]
    if SHUFFLED in report["methods"] and scalars:
        best = min(scalars, key=lambda name: report["methods"][name]["ece"]["value"])
        lines.append(f"the control (features shuffled) against {best}: {_verdicts(seeds, SHUFFLED, best)}")
    return lines


def _verdicts(seeds: list[dict[str, Any]], method: str, reference: str) -> str:
    parts = []
    for metric in _SAID:
        found = [_verdict(seed["differences"][f"{method} - {reference}"][metric], metric) for seed in seeds]
        if len(seeds) == 1:
            parts.append(f"{_TITLES[metric]} {found[0]}")
        else:
            counts = [f"{word} in {found.count(word)}" for word in ("better", "worse", "no different") if word in found]
            parts.append(f"{_TITLES[metric]} {', '.join(counts)} of {len(seeds)} seeds")
    return "; ".join(parts)


def _verdict(difference: dict[str, float], metric: str) -> str:
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low != low or low <= 0 <= high:
        return "no different"
    return "better" if (high < 0) == (metric in LOWER_IS_BETTER) else "worse"

"""The report of `llmrl hyre eval` as Markdown that reads in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmrl.tables import aligned_table

SHOWN = (
    "uniform", "single", "worst", "average", "best-head", "lore", "pref", "finetune", "hyre", "hyre-auto", "refine",
    "oracle-head",
)  # fmt: skip


def cell(value: Mapping[str, float], *, signed: bool = False, interval: bool = True) -> str:
    """Return a value in percent with its interval."""
    sign = "+" if signed else ""
    text = f"{100 * value['value']:{sign}.1f}"
    return f"{text} [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]" if interval else text


def report_markdown(report: Mapping[str, Any]) -> str:
    """Return tables of accuracies, differences and harm, and what they say."""
    sizes = [str(n) for n in report["sizes"]]
    methods = report["methods"]
    rows = []
    for name in (name for name in SHOWN if name in methods):
        found = methods[name]
        cells = [cell(found["0"])] + [""] * len(sizes) if "0" in found else ["", *(cell(found[n]) for n in sizes)]
        rows.append([name, *cells])
    parts = [
        f"{report['users']} users, {report['draws']} draws of their labels; accuracy in percent on pairs that share no text "
        "with the labels, with 95% intervals over users and draws.",
        aligned_table(["", "no label", *(f"n = {n}" for n in sizes)], rows),
        aligned_table(
            ["difference, points", *(f"n = {n}" for n in sizes)],
            [[name, *(cell(of[n], signed=True) for n in sizes)] for name, of in report["paired"].items()],
        ),
        aligned_table(
            ["users below uniform (mean loss)", *(f"n = {n}" for n in sizes)],
            [
                [name, *(f"{of[n]['share']:.0%} ({of[n]['mean']:.1%})" for n in sizes)]
                for name, of in report["harm"].items()
            ],
        ),
        f"finetune is the strongest of every start and penalty at each n, chosen in hindsight: "
        f"{', '.join(f'{n}: {name}' for n, name in report['strongest_finetune'].items())}.",
    ]
    if "calibration" in report:
        rows = [[n, *(f"{of[key]:.4f}" for key in ("ece", "nll", "brier"))] for n, of in report["calibration"].items()]
        rows[0][0] = "0 (uniform)"
        parts.append(
            "Probabilities of HyRe's margins on the same pairs, a mean over users:\n\n"
            + aligned_table(["labels", "ECE", "NLL", "Brier"], rows)
        )
    if report.get("sizes_left_out"):
        parts.append(
            f"Left out, because some user has too few pairs: n = {', '.join(map(str, report['sizes_left_out']))}."
        )
    if report.get("users_left_out"):
        parts.append(f"Users with too few pairs to measure, left out: {', '.join(report['users_left_out'])}.")
    at = report["crossover"]
    parts.append(
        f"Fine-tuning is above reweighting from n = {at} on."
        if at is not None
        else "Fine-tuning is not above reweighting at the most labels."
    )
    return "\n\n".join(parts) + "\n"

"""hyre.md: the tables of every part of evals/hyre.py that has been run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmrl.files import write_text
from llmrl.hyre.report import cell, report_markdown
from llmrl.tables import aligned_table


def write_summary(output: Path) -> None:
    """Write hyre.md from the JSON files in `output`."""
    parts = ["# HyRe on real data"]
    for name, section in (
        ("persona", persona),
        ("sides", sides),
        ("uci", uci),
        ("controls", controls),
        ("active", active),
        ("diversity", diversity),
        ("speed", speed),
    ):
        file = output / f"hyre-{name}.json"
        if file.is_file():
            parts += section(json.loads(file.read_text(encoding="utf-8")))
    write_text(output / "hyre.md", "\n\n".join(parts) + "\n")


def persona(found: Mapping[str, Any]) -> list[str]:
    """Return the tables of users that agree or disagree with statements."""
    parts = [f"## Personas, {found['seeds']} splits"]
    for kind in ("natural", "two-sided"):
        parts += [f"### {kind} users", report_markdown(found[kind]).rstrip()]
    return parts


def sides(found: Mapping[str, Any]) -> list[str]:
    """Return the table of one ensemble adapted to one of two sources."""
    rows = []
    sizes = list(dict.fromkeys(key.split()[2] for key in found["with length"] if key.startswith("hyre ")))
    for name in ("with length", "without length"):
        part = found[name]
        for to in ("harmless", "quality"):
            for side in ("harmless", "quality"):
                for method in ("hyre", "refine", "finetune"):
                    changes = [cell(part[f"{method} {to} {n} {side}"]["change"], signed=True) for n in sizes]
                    rows.append([name, f"{method} to {to}", side, cell(part["uniform"][side]), *changes])
    longer = ", ".join(f"{side} {100 * share:.1f}%" for side, share in found["longer wins"].items())
    disagreements = ", ".join(f"{name} {found[name]['disagreement']:.1%}" for name in ("with length", "without length"))
    return [
        "## Harmlessness against quality of answers",
        f"The longer answer is the chosen one: {longer}. Two heads disagree on: {disagreements}.",
        aligned_table(["features", "adapted", "tested on", "uniform", *(f"n = {n}, points" for n in sizes)], rows),
    ]


def uci(found: Mapping[str, Any]) -> list[str]:
    """Return ratios and absolute errors of regression under a shift."""
    parts = [f"## Regression under a shift, {found['settings']['seeds']} seeds"]
    for n, methods in found["summary"].items():
        rows = [
            [
                name,
                f"{of['mean']:.3f}",
                f"{of['worst']:.3f}",
                *(f"{of['ratios'][s]:.2f} ({of['errors'][s]:.2f})" for s in of["errors"]),
            ]
            for name, of in methods.items()
        ]
        sets = list(next(iter(methods.values()))["errors"])
        parts += [aligned_table([f"n = {n}: error / uniform (error)", "mean", "worst", *sets], rows)]
    return parts


def controls(found: Mapping[str, Any]) -> list[str]:
    """Return what labels that say nothing, and heads that agree, bring."""
    rows = []
    for name in ("shuffled labels", "heads that agree", "bootstrap heads"):
        for n in (key for key in found[name] if key.isdigit()):
            of = found[name][n]
            cells = [cell(of[key], signed=True) for key in ("hyre - uniform", "hyre-auto - uniform")]
            rows.append([name, n, *cells, f"{of['guarded']:.0%}"])
    names = ("none", "gain", "gain + error")
    guarded = [
        [
            kind,
            n,
            f"{100 * of['uniform']:.1f}",
            *(f"{100 * of[g]['accuracy']:.1f} ({of[g]['kept']:.0%})" for g in names),
        ]
        for kind, sizes in found["guards"].items()
        for n, of in sizes.items()
    ]
    warning = str(found["heads that agree"]["warning"]).split("\n")[0]
    return [
        "## Negative controls",
        aligned_table(["", "labels", "hyre - uniform, points", "with choice and guard", "guard fell back"], rows),
        f"Of heads that agree, training says: {warning}",
        "Guards on natural users: accuracy in percent (how often the uniform ensemble is kept)",
        aligned_table(["", "labels", "uniform", *names], guarded),
    ]


def active(found: Mapping[str, Any]) -> list[str]:
    """Return the criteria of active querying."""
    rows = [
        [
            name,
            *(f"{100 * of['curve'][n]:.1f}" for n in (2, 5, 10, 20)),
            cell(of["area"]),
            cell(of["above random"], signed=True),
        ]
        for name, of in found["criteria"].items()
    ]
    return [
        f"## Which pair to ask: {found['users']} simulated users",
        aligned_table(["criterion", "2 labels", "5", "10", "20", "mean over 1 to 20", "minus random, points"], rows),
    ]


def diversity(found: Mapping[str, Any]) -> list[str]:
    """Return the recipes of what each head sees."""
    rows = [
        [name, f"{of['disagreement']:.1%}", *(cell(of[n]) for n in ("0", "1", "5", "20"))]
        for name, of in found["recipes"].items()
    ]
    return [
        f"## What makes heads differ: natural users of {found['seeds']} splits",
        aligned_table(["heads see", "two heads disagree", "no label", "n = 1", "5", "20"], rows),
    ]


def speed(found: Mapping[str, Any]) -> list[str]:
    """Return what labels and training cost."""
    rows = [[name.replace("_", " "), _seconds(value)] for name, value in found["seconds"].items()]
    return [
        "## Speed",
        f"{found['heads']} heads, {found['labels']} labels a user, {found['users']:,} users; training on {found['pairs']:,} "
        f"pairs, features of width {found['width']}; {found['threads']} thread(s).",
        aligned_table(["", "median time"], rows),
    ]


def _seconds(value: float) -> str:
    return f"{1e6 * value:.1f} us" if value < 1e-3 else f"{1e3 * value:.1f} ms" if value < 1 else f"{value:.1f} s"

"""Pictures of a run: what more queries are worth, how systems compare, how training and rounds went.

Each function writes one PNG and returns False, with nothing written, where matplotlib is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.leret.best_of import best_of_curve
from llmrl.leret.records import Group
from llmrl.leret.report import TITLES

_RED, _BLUE, _GREEN, _GREY = "#c8442f", "#1f6fb4", "#2e8b57", "#9aa0a6"
_HOPS = (_BLUE, _RED, _GREEN, "#8a5fb0", "#c58b1b", "#444444")
_SHOWN = ("recall", "ap")
_PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}  # keeps numbers readable on lines
_LONG = {"recall": "RE: share of gold documents found", "ap": "AP: average precision of what was found"}


def recall_against_queries(path: Path | str, groups: Sequence[Group], title: str = "") -> bool:
    """Draw the expected recall of the best of n queries by n, one line a hop with its 95% band over questions.

    Args:
        path: of the PNG.
        groups: what exploration tried; stop actions are no queries.
        title: above the picture.

    Raises:
        DataError: no query was tried.
    """
    plt = _pyplot()
    if plt is None:
        return False
    by_hop = _recalls(groups)
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for hop, values in by_hop.items():
        questions = len({question for question, _ in values})
        curve, colour = best_of_curve(values), _HOPS[(hop - 1) % len(_HOPS)]
        n, value = [point["n"] for point in curve], [point["value"] for point in curve]
        low, high = ([point[key] for point in curve] for key in ("low", "high"))
        axis.fill_between(n, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.plot(
            n,
            value,
            "o-",
            color=colour,
            markersize=4,
            label=f"hop {hop} ({questions} questions)",
        )
        _label(axis, n[0], value[0], colour, (-8, 0), "right")
        if len(n) > 1:
            _label(axis, n[-1], value[-1], colour, (8, 0), "left")
    axis.set(xlabel="queries sampled in a state", ylabel="expected recall of the best of them")
    axis.set_ylim(max(0.0, axis.get_ylim()[0] - 0.04), min(1.02, axis.get_ylim()[1] + 0.04))
    axis.margins(x=0.13)
    axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axis.legend(loc="lower right", fontsize=9, frameon=False)
    return _save(plt, figure, [axis], path, title)


def systems_dots(path: Path | str, report: Mapping[str, Any], title: str = "") -> bool:
    """Draw RE and AP of each system as a dot with its interval, the best at the top; the policy stands out.

    Args:
        path: of the PNG.
        report: of `report_json` or `report_seeds`.
        title: above the picture.
    """
    plt = _pyplot()
    if plt is None:
        return False
    systems = report["systems"]
    names = sorted(systems, key=lambda name: systems[name]["recall"]["value"])
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 1.4 + 0.42 * len(names)), sharey=True)
    for axis, metric in zip(axes, _SHOWN, strict=True):
        for row, name in enumerate(names):
            score, colour = systems[name][metric], _BLUE if name == "policy" else _GREY
            if score["low"] is not None:
                axis.plot([score["low"], score["high"]], [row, row], color=colour, linewidth=2.4, alpha=0.6)
            for value in score.get("runs", {}).values():
                axis.plot([value], [row], "|", color=colour, markersize=9)
            axis.plot([score["value"]], [row], "o", color=colour, markersize=7)
            axis.annotate(
                f"{score['value']:.3f}", (score["value"], row), (0, 8), textcoords="offset points", ha="center",
                fontsize=8, bbox=_PAPER, zorder=3,
            )  # fmt: skip
        if "policy" in systems:
            axis.axvline(systems["policy"][metric]["value"], color=_BLUE, linewidth=0.8, linestyle="--", zorder=0)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.6, len(names) - 0.3)
        axis.set_xlabel(_LONG[metric])
        axis.grid(axis="x", alpha=0.25)
    seeds = len(report["bootstrap"]["training_seeds"])
    runs = f"; mean of {seeds} training seeds, each a tick" if seeds else ""
    return _save(plt, figure, list(axes), path, title or f"{report['questions']} questions, 95% intervals{runs}")


def training_curves(path: Path | str, stages: Mapping[str, Sequence[Mapping[str, Any]]], title: str = "") -> bool:
    """Draw margin and pair accuracy of preference training by step, with the margin that the loss asks for.

    Args:
        path: of the PNG.
        stages: by name the rows of a metrics.jsonl with "step", "accuracy" and "margin", or "margin_per_token" where the
            loss asks for one a token ("target_margin_per_token"); rows without them are left out.
        title: above the picture.
    """
    plt = _pyplot()
    if plt is None:
        return False
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8))
    rows = [row for of in stages.values() for row in of]
    per_token = any("target_margin_per_token" in row for row in rows)
    margin = "margin_per_token" if per_token else "margin"
    targets = sorted({row[f"target_{margin}"] for row in rows if f"target_{margin}" in row})
    drawn = {name: of for name, of in stages.items() if any(row.get(margin) is not None for row in of)}
    for index, (name, of) in enumerate(drawn.items()):
        colour = _HOPS[index % len(_HOPS)]
        for axis, key in ((left, margin), (right, "accuracy")):
            points = [(row["step"], row[key]) for row in of if row.get(key) is not None]
            marker = "o-" if len(points) < 40 else "-"
            axis.plot(
                *(zip(*points, strict=True) if points else ([], [])), marker, color=colour, markersize=3, label=name
            )
    for target in targets:
        left.axhline(target, color="black", linewidth=0.9, linestyle="--")
        left.annotate(f"asked for: {target:g}", (1, target), (-4, 4), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    left.axhline(0, color=_GREY, linewidth=0.8)
    right.axhline(0.5, color=_GREY, linewidth=0.8, linestyle="--")
    left.set(xlabel="step", ylabel="margin, nats a token" if per_token else "margin, nats a pair")
    right.set(xlabel="step", ylabel="share of pairs in the right order", ylim=(0.4, 1.02))
    if len(drawn) > 1:
        right.legend(loc="lower right", fontsize=9, frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return _save(plt, figure, [left, right], path, title)


def rounds_on_dev(
    path: Path | str,
    rounds: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "",
) -> bool:
    """Draw RE and AP on the dev questions by round, with intervals; the first entry is the model before training.

    Args:
        path: of the PNG.
        rounds: one a round, METRICS as {"value", "low", "high"} (a system of a report).
        baselines: by name, likewise; drawn as lines.
        title: above the picture.
    """
    plt = _pyplot()
    if plt is None:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for axis, metric in zip(axes, _SHOWN, strict=True):
        for number, found in enumerate(rounds):
            score = found[metric]
            if score["low"] is not None:
                axis.plot([number] * 2, [score["low"], score["high"]], color=_BLUE, linewidth=2.4, alpha=0.45)
            _label(axis, number, score["value"], _BLUE, (9, -9), "left")
        axis.plot(range(len(rounds)), [found[metric]["value"] for found in rounds], "o-", color=_BLUE, markersize=6)
        for name, found in (baselines or {}).items():
            value = found[metric]["value"]
            axis.axhline(value, color=_RED, linewidth=1, linestyle="--")
            axis.annotate(f"{name} {value:.3f}", (1, value), (-4, 4), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", fontsize=8, color=_RED, bbox=_PAPER)  # fmt: skip
        axis.set(xlabel="round (0: before training)", ylabel=f"dev {TITLES[metric]}")
        axis.margins(x=0.15, y=0.12)
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
        axis.grid(axis="y", alpha=0.25)
    return _save(plt, figure, list(axes), path, title)


def _recalls(groups: Sequence[Group]) -> dict[int, list[tuple[str, list[float]]]]:
    """Return by hop (question id, recall of each query) of the states in which a query was tried."""
    by_hop: dict[int, list[tuple[str, list[float]]]] = {}
    for group in sorted(groups, key=lambda group: group.hop):
        tried = [candidate.recall for candidate in group.candidates if not candidate.stopped]
        if tried:
            by_hop.setdefault(group.hop, []).append((group.question_id, tried))
    if not by_hop:
        raise DataError("nothing to draw: no query was tried in any state")
    return by_hop


def _label(axis: Any, x: float, y: float, colour: str, offset: tuple[int, int], ha: str) -> None:
    axis.annotate(
        f"{y:.3f}",
        (x, y),
        offset,
        textcoords="offset points",
        fontsize=9,
        color=colour,
        ha=ha,
        va="center",
        bbox=_PAPER,
    )


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, axes: Sequence[Any], path: Path | str, title: str) -> bool:
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return True

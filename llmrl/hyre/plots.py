"""Pictures of an evaluation: accuracy against labels, and which head knows which user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_LINES = (
    ("refine", "refine (reweighted, then fine-tuned)", "#c0392b", "-"),
    ("hyre", "HyRe", "#1f5fa8", "-"),
    ("finetune", "fine-tuned head, strongest in hindsight", "#2c8c4a", "--"),
    ("lore", "weights by gradient (LoRe)", "#8e6bb8", ":"),
    ("pref", "free weights (PReF)", "#b8862b", ":"),
    ("best-head", "best head on the labels", "#777777", ":"),
)
_LEVELS = (("uniform", "uniform ensemble", "#333333"), ("single", "single model", "#999999"))


def draw_plots(folder: Path, report: Mapping[str, Any], names: Sequence[str] = ()) -> None:
    """Write accuracy.png and heads.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    accuracy_curves(folder / "accuracy.png", report)
    heat_map(folder / "heads.png", report["heat_map"], names)


def accuracy_curves(path: Path, report: Mapping[str, Any], title: str | None = None) -> None:
    """Draw accuracy against the number of labels with 95% bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    sizes = report["sizes"]
    for name, label, colour in _LEVELS:
        if name in report["methods"]:
            axes.axhline(100 * report["methods"][name]["0"]["value"], color=colour, lw=1, ls=(0, (5, 3)), label=label)
    for name, label, colour, style in _LINES:
        found = report["methods"].get(name)
        if found is None:
            continue
        of = [found[str(n)] for n in sizes]
        axes.plot(sizes, [100 * v["value"] for v in of], color=colour, ls=style, marker="o", ms=3.5, label=label)
        if name in ("hyre", "refine", "finetune"):
            low, high = [100 * v["low"] for v in of], [100 * v["high"] for v in of]
            axes.fill_between(sizes, low, high, color=colour, alpha=0.10, lw=0)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("labels of one user")
    axes.set_ylabel("pairs of that user ranked right, %")
    axes.set_title(title or f"{report['users']} users the ensemble was not trained on", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def heat_map(path: Path, rows: Mapping[str, Sequence[float]], names: Sequence[str] = ()) -> None:
    """Draw the accuracy of each head on each user; heads in the order of their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = 100 * np.array(list(rows.values()))
    order = np.argsort(values.mean(0))
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.19 * len(values)), layout="constrained")
    image = axes.imshow(values[:, order], aspect="auto", cmap="RdBu", vmin=0, vmax=100, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [name[:48] or "all" for name in rows], fontsize=6.5)
    axes.set_xticks([])
    axes.set_xlabel(f"{values.shape[1]} heads, by mean accuracy")
    figure.colorbar(image, label="pairs ranked right, %", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)

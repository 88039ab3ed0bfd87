"""The reliability diagram: what the model says against how often it is right, before and after, at a glance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmrl.ats.options import NONE, SHUFFLED

_RED, _BLUE, _GREY = "#c8442f", "#1f6fb4", "#9aa0a6"


def reliability_diagram(path: Path, report: dict[str, Any], title: str) -> bool:
    """Draw the base, the best single temperature and the selected method side by side.

    Returns:
        False when matplotlib is not installed, in which case nothing is written.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = _panels(report)
    figure, axes = plt.subplots(
        2, len(names), figsize=(3.7 * len(names), 5.0), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": [3.2, 1], "hspace": 0.08, "wspace": 0.28},
    )  # fmt: skip
    for column, name in enumerate(names):
        _panel(axes[0][column], axes[1][column], name, report, first=column == 0)
    figure.suptitle(title, fontsize=11, y=0.98)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return True


def _panels(report: dict[str, Any]) -> list[str]:
    methods = report["methods"]
    scalars = [name for name in methods if name.startswith("temperature")]
    best_scalar = min(scalars, key=lambda name: methods[name]["ece"]["value"], default=None)
    wanted = [NONE, best_scalar, report["selected"]]
    return [name for name in dict.fromkeys(wanted) if name in methods and name != SHUFFLED]


def _panel(top: Any, bottom: Any, name: str, report: dict[str, Any], first: bool) -> None:
    curve, ece = report["reliability"][name], report["methods"][name]["ece"]
    count = curve["count"]
    total = max(sum(count), 1)
    width = 1 / len(count)
    filled = [i for i, n in enumerate(count) if n]
    x = [curve["confidence"][i] for i in filled]
    y = [curve["accuracy"][i] for i in filled]
    share = [count[i] / total for i in filled]
    top.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle="--", zorder=1)
    for xi, yi in zip(x, y, strict=True):
        top.plot([xi, xi], [xi, yi], color=_RED, linewidth=3, alpha=0.55, solid_capstyle="butt", zorder=2)
    top.plot(x, y, color=_BLUE, linewidth=1.2, zorder=3)
    top.scatter(x, y, s=[14 + 240 * s for s in share], color=_BLUE, zorder=4, edgecolor="white", linewidth=0.6)
    top.set(xlim=(0, 1), ylim=(0, 1))
    top.set_title("base model" if name == NONE else name, fontsize=10)
    top.text(
        0.04, 0.95, f"ECE {ece['value']:.3f}\n[{ece['low']:.3f}, {ece['high']:.3f}]", transform=top.transAxes,
        va="top", fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
    )  # fmt: skip
    bottom.bar([(i + 0.5) * width for i in range(len(count))], [n / total for n in count], width * 0.92, color=_GREY)
    bottom.set(xlim=(0, 1), xlabel="confidence in the next token")
    if first:
        top.set_ylabel("how often it is right")
        bottom.set_ylabel("share of\ntokens")
        top.plot([], [], color=_RED, linewidth=3, alpha=0.55, label="gap")
        top.legend(loc="lower right", fontsize=8, frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)

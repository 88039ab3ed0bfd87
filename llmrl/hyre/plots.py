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


def weight_bars(path: Path, users: Sequence[Any], names: Sequence[str], labels: int = 5, top: int = 8) -> None:
    """Draw the heaviest heads of some users (`llmrl.hyre.evaluate.UserPairs`) after a few labels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from llmrl.hyre.evaluate import split
    from llmrl.hyre.posterior import label_losses, posterior_weights

    figure, all_axes = plt.subplots(len(users), 1, figsize=(7.2, 1.7 * len(users)), layout="constrained", squeeze=False)
    for axes, user in zip(all_axes[:, 0], users, strict=True):
        rows = split(user.keys, np.random.default_rng(0))[0][:labels]
        weights = posterior_weights(label_losses(user.margins[rows], np.ones(len(rows))).sum(0))
        order = np.argsort(-weights)[:top][::-1]
        axes.barh([f"{names[k]} ({k})"[:60] for k in order], 100 * weights[order], color="#1f5fa8", height=0.7)
        axes.axvline(100 / len(weights), color="#333333", lw=0.8, ls="--")
        axes.set_title(f"{user.name or 'user'}: {labels} labels", fontsize=8.5, loc="left")
        axes.tick_params(labelsize=6.5)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("weight, % (dashed: all heads alike)", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def reliability(path: Path, users: Sequence[Any], labels: int = 5, draws: int = 20, bins: int = 10) -> None:
    """Draw how often the more probable side of a pair is right against its probability, before and after `labels` labels.

    Probabilities are sigmoid(margin) of the weighted ensemble, of pairs that share no text with the labels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], color="#999999", lw=0.8)
    for title, colour, margins in (
        ("uniform ensemble", "#333333", _test_margins(users, 0, draws)),
        (f"after {labels} labels", "#1f5fa8", _test_margins(users, labels, draws)),
    ):
        confidence, right, error = reliability_bins(margins, bins)
        axes.plot(confidence, right, color=colour, marker="o", ms=4, label=f"{title}: ECE {error:.3f}")
    axes.set_xlabel("probability of the side that the ensemble prefers")
    axes.set_ylabel("share of pairs where it is right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def reliability_bins(margins: Any, bins: int = 10) -> tuple[Any, Any, float]:
    """Return mean confidence and accuracy of each bin of equal width from 0.5 to 1 that is not empty, and the ECE.

    Args:
        margins: `[N]`, above 0 where the ensemble is right.
        bins: their number.
    """
    m = np.asarray(margins, np.float64)
    confidence, right = 1 / (1 + np.exp(-np.abs(m))), (m > 0) + 0.5 * (m == 0)
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    count = np.bincount(index, minlength=bins)
    kept = count > 0
    means = [np.bincount(index, v, bins)[kept] / count[kept] for v in (confidence, right)]
    return means[0], means[1], float((count[kept] / len(m) * np.abs(means[0] - means[1])).sum())


def _test_margins(users: Sequence[Any], labels: int, draws: int) -> Any:
    from llmrl.hyre.evaluate import split
    from llmrl.hyre.posterior import label_losses, posterior_weights

    found = []
    for user in users:
        for draw in range(draws):
            rows, tests = split(user.keys, np.random.default_rng([draw]))
            losses = label_losses(user.margins[rows[:labels]], np.ones(min(labels, len(rows)))).sum(0)
            found.append(user.margins[tests] @ posterior_weights(losses))
    return np.concatenate(found)

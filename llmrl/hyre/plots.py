"""Pictures of an evaluation: accuracy against labels, which head knows which user, what labels do to the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.hyre.evaluate import UserPairs

_DRAWN = 4  # users, in pictures of users one by one
_LINES = (
    ("refine", "refine (reweighted, then fine-tuned)", "#c0392b", "-"),
    ("hyre", "HyRe", "#1f5fa8", "-"),
    ("finetune", "fine-tuned head, strongest in hindsight", "#2c8c4a", "--"),
    ("lore", "weights by gradient (LoRe)", "#8e6bb8", ":"),
    ("pref", "free weights (PReF)", "#b8862b", ":"),
    ("best-head", "best head on the labels", "#777777", ":"),
)
_STACK = ("#1f5fa8", "#c0392b", "#2c8c4a", "#b8862b", "#8e6bb8", "#dddddd")
_LEVELS = (("uniform", "uniform ensemble", "#333333"), ("single", "single model", "#999999"))


def draw_plots(folder: Path, report: Mapping[str, Any], users: Sequence[UserPairs], names: Sequence[str] = ()) -> None:
    """Write accuracy.png, heads.png, weights.png, reliability.png and queries.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    accuracy_curves(folder / "accuracy.png", report)
    heat_map(folder / "heads.png", report["heat_map"])
    weight_bars(folder / "weights.png", users[:_DRAWN], names)
    reliability(folder / "reliability.png", users)
    query_traces(folder / "queries.png", users[:_DRAWN], names)


def accuracy_curves(path: Path, report: Mapping[str, Any], title: str | None = None) -> None:
    """Draw accuracy against the number of labels with 95% bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 5.2), layout="constrained")
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
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def heat_map(path: Path, rows: Mapping[str, Sequence[float]]) -> None:
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


def weight_bars(
    path: Path, users: Sequence[UserPairs], names: Sequence[str] = (), labels: int = 5, top: int = 8
) -> None:
    """Draw the heaviest heads of some users after a few labels."""
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
        axes.barh([_name(names, k) for k in order], 100 * weights[order], color="#1f5fa8", height=0.7)
        axes.axvline(100 / len(weights), color="#333333", lw=0.8, ls="--")
        axes.set_title(f"{user.name or 'user'}: {labels} labels", fontsize=8.5, loc="right")
        axes.tick_params(labelsize=6.5)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("weight, % (dashed: all heads alike)", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def reliability(path: Path, users: Sequence[UserPairs], labels: int = 5, draws: int = 20) -> None:
    """Draw how often the more probable side of a pair is right against its probability, before and after `labels` labels.

    Probabilities are sigmoid(margin) of the weighted ensemble, of pairs that share no text with the labels.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from llmrl.hyre.reliability import held_margins, reliability_bins

    figure, axes = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], color="#999999", lw=0.8)
    for title, colour, (margins, weights) in (
        ("uniform ensemble", "#333333", held_margins(users, 0, draws)),
        (f"after {labels} labels", "#1f5fa8", held_margins(users, labels, draws)),
    ):
        confidence, right, error = reliability_bins(margins, weights)
        axes.plot(confidence, right, color=colour, marker="o", ms=4, label=f"{title}: ECE {error:.3f}")
    axes.set_xlabel("probability of the side that the ensemble prefers")
    axes.set_ylabel("share of pairs where it is right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def query_traces(path: Path, users: Sequence[UserPairs], names: Sequence[str] = (), queries: int = 20) -> None:
    """Draw what answers do to a user: the weights of the heads, question by question, and pairs ranked right.

    Half of a user's pairs are the pool, the other half, which shares no text with it, is ranked. Questions are those of BALD;
    the mean of ten random orders is drawn beside.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(len(users), 2, figsize=(11, 2.1 * len(users)), layout="constrained", squeeze=False)
    for (left, right), user in zip(all_axes, users, strict=True):
        weights, asked, drawn = _trace(user, queries)
        _stack_weights(left, weights, names)
        left.set_title(user.name or "user", fontsize=8.5, loc="left")
        right.plot(100 * asked, color="#1f5fa8", marker="o", ms=3, label="most disagreement first (BALD)")
        right.plot(100 * drawn, color="#999999", ls="--", label="random, mean of ten orders")
        right.set_ylabel("ranked right, %", fontsize=8)
        right.set_ylim(0, 102)
        right.grid(axis="y", color="#dddddd", lw=0.6)
        for axes in (left, right):
            axes.set_xlim(0, len(asked) - 1)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    all_axes[0, 1].legend(frameon=False, fontsize=7, loc="lower right")
    for axes in all_axes[-1]:
        axes.set_xlabel("labels", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _trace(user: UserPairs, queries: int) -> tuple[Any, Any, Any]:
    """Return weights `[n + 1, K]` and accuracy `[n + 1]` of questions by BALD, and the mean accuracy of random ones."""
    from llmrl.hyre.annotator import query_curve
    from llmrl.hyre.evaluate import split

    pool, tests = split(user.keys, np.random.default_rng(0))
    pairs, count = (user.margins[pool], user.margins[tests]), min(queries, len(pool))
    won, truth = np.ones((10, len(pool))), np.ones((10, len(tests)))
    asked = query_curve(pairs[0], won[0], pairs[1], truth[0], criterion="bald", queries=count)
    drawn = query_curve(pairs[0], won, pairs[1], truth, criterion="random", queries=count)
    return asked.weights, asked.accuracy, drawn.accuracy.mean(0)


def _stack_weights(axes: Any, weights: Any, names: Sequence[str]) -> None:
    heaviest = np.argsort(-weights[-1])[: len(_STACK) - 1]
    rest = 1 - weights[:, heaviest].sum(1)
    labels = [*(_name(names, k) for k in heaviest), "all others"]
    axes.stackplot(range(len(weights)), *(100 * weights[:, heaviest].T), 100 * rest, labels=labels, colors=_STACK, lw=0)
    axes.set_ylabel("weight, %", fontsize=8)
    axes.set_ylim(0, 100)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _name(names: Sequence[str], k: int) -> str:
    return f"{names[k][:48]} ({k})" if names else f"head {k}"

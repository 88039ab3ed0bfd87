"""What each head is trained on. Heads that see the same data agree, and reweighting heads that agree moves nothing.

A plan gives head k a weight on every row and a sign: -1 trains it to prefer the other side, which is what a user needs who
disagrees with everybody the ensemble was trained on. Recipes, and when they help:

    group      one user or source a head, some turned round: for pairs that say who labelled them (two and more users)
    mixture    every head its own proportions of all groups: for a few sources
    em         groups that agree share a head, found in turn with the heads (`llmrl.hyre.em`): for more groups than heads
    cluster    a few clusters of prompts (or of any features) a head: where nothing says who labelled
    subset     a random part of the rows a head, without replacement
    bootstrap  rows drawn with replacement: heads end up close to each other
    none       all rows for all heads: diversity must come from non-linear priors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrl.errors import DataError, VersionError

RECIPES = ("group", "mixture", "cluster", "subset", "bootstrap", "none")
_CLUSTERS, _CLUSTERS_A_HEAD = 16, 4
_MIXTURE = 0.3  # of the Beta or Dirichlet: most heads lean to one source
_SUBSET = 0.25


@dataclass(frozen=True)
class HeadPlan:
    """Data of every head.

    Attributes:
        rows: `[K, N]` weights of the rows; each head's sum to 1.
        signs: `[K]`, 1 or -1.
        names: `[K]`, what the head saw, for people.
    """

    rows: NDArray[np.float32]
    signs: NDArray[np.float32]
    names: tuple[str, ...]


def plan_heads(
    recipe: str,
    heads: int,
    rows: int,
    *,
    groups: Sequence[str] | None = None,
    features: NDArray[np.float32] | None = None,
    flip: float = 0.25,
    seed: int = 0,
) -> HeadPlan:
    """Return who learns from what.

    Args:
        recipe: one of RECIPES.
        heads: K.
        rows: N.
        groups: `[N]` names, for "group" and "mixture".
        features: `[N, H]`, for "cluster".
        flip: share of heads that are turned round, for "group".
        seed: of all that is drawn.

    Raises:
        DataError: the recipe needs groups or features that are not given, or fewer rows than clusters.
    """
    rng = np.random.default_rng(seed)
    if recipe in ("group", "mixture"):
        if groups is None:
            raise DataError(f"diversity {recipe} needs a group on every row: add a 'group' column, or use cluster")
        made = _by_group if recipe == "group" else _mixtures
        return made(rng, heads, np.asarray(groups), flip)
    signs = np.ones(heads, np.float32)
    if recipe == "cluster":
        if features is None:
            raise DataError("diversity cluster needs features to cluster")
        weights, names = _clusters(rng, heads, features, seed)
        return HeadPlan(weights, signs, names)
    if recipe == "subset":
        size = max(1, round(_SUBSET * rows))
        weights = np.zeros((heads, rows), np.float32)
        for k in range(heads):
            weights[k, rng.choice(rows, size, replace=False)] = 1
        return HeadPlan(normalised(weights), signs, tuple(f"{size} rows" for _ in range(heads)))
    if recipe == "bootstrap":
        counts = rng.multinomial(rows, np.full(rows, 1 / rows), size=heads).astype(np.float32)
        return HeadPlan(normalised(counts), signs, ("bootstrap",) * heads)
    if recipe == "none":
        return HeadPlan(np.full((heads, rows), 1 / rows, np.float32), signs, ("all",) * heads)
    raise DataError(f"expected a recipe out of {', '.join(RECIPES)}, got {recipe!r}")


def _by_group(rng: np.random.Generator, heads: int, groups: NDArray[np.str_], flip: float) -> HeadPlan:
    """One group a head, each as often as the others; a group that comes again is drawn with replacement."""
    names = np.unique(groups)
    rounds = [rng.permutation(len(names)) for _ in range(-(-heads // len(names)))]
    chosen = np.concatenate(rounds)[:heads]
    turned = np.zeros(heads, bool)
    turned[rng.permutation(heads)[: round(flip * heads)]] = True
    weights = np.zeros((heads, len(groups)), np.float32)
    seen: set[tuple[int, bool]] = set()
    for k, (g, turn) in enumerate(zip(chosen.tolist(), turned.tolist(), strict=True)):
        own = np.flatnonzero(groups == names[g])
        again = (g, turn) in seen
        seen.add((g, turn))
        weights[k, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own))) if again else 1
    labels = tuple(f"{'-' if turn else '+'}{names[g]}" for g, turn in zip(chosen, turned, strict=True))
    return HeadPlan(normalised(weights), np.where(turned, -1, 1).astype(np.float32), labels)


def _mixtures(rng: np.random.Generator, heads: int, groups: NDArray[np.str_], flip: float) -> HeadPlan:
    names, of = np.unique(groups, return_inverse=True)
    shares = rng.dirichlet(np.full(len(names), _MIXTURE), size=heads)
    weights = np.zeros((heads, len(groups)), np.float32)
    for g in range(len(names)):
        own = np.flatnonzero(of == g)
        drawn = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=heads)
        weights[:, own] = shares[:, g : g + 1] * drawn / len(own)
    labels = tuple(" ".join(f"{n}:{s:.2f}" for n, s in zip(names, row, strict=True) if s >= 0.005) for row in shares)
    return HeadPlan(normalised(weights), np.ones(heads, np.float32), labels)


def _clusters(
    rng: np.random.Generator, heads: int, features: NDArray[np.float32], seed: int
) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    of = clusters_of(features, _CLUSTERS, seed)
    names = np.unique(of)
    each = min(_CLUSTERS_A_HEAD, len(names))
    weights = np.zeros((heads, len(features)), np.float32)
    labels = []
    for k in range(heads):
        chosen = rng.choice(names, each, replace=False)
        weights[k] = np.isin(of, chosen)
        labels.append("clusters " + " ".join(map(str, sorted(chosen.tolist()))))
    return normalised(weights), tuple(labels)


def clusters_of(features: NDArray[np.float32], clusters: int, seed: int) -> NDArray[np.int64]:
    """Return the cluster of each row `[N]`, by k-means.

    Raises:
        VersionError: scikit-learn is missing.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise VersionError("clusters need scikit-learn: pip install 'llmrl[hyre]'") from error
    found = KMeans(min(clusters, len(features)), n_init=3, random_state=seed).fit_predict(features)
    return np.asarray(found, np.int64)


def normalised(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows that sum to 1."""
    return weights / weights.sum(1, keepdims=True)

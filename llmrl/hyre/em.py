"""Hard EM: heads and the groups they explain are found in turn, so that users who want the same end up with one head.

A head that sees one user has that user's few pairs; a head that sees everybody has an opinion that nobody holds. Between the
two, each group goes to the head that predicts it best, each head is trained on its groups, and so on until no group moves (the
hard assignment of arXiv 2402.08925, with linear heads). Where nothing says who labelled, clusters of pairs stand for groups.

A group is judged on pairs that its head was not trained on (their texts may recur in others). On pairs it was trained on every
head looks good, and the first random assignment would stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from llmrl.errors import DataError
from llmrl.hyre.diversity import HeadPlan, clusters_of, normalised
from llmrl.hyre.fit import FitSettings, Pairs, fit_heads, row_losses

_ROUNDS = 20
_CLUSTERS_A_HEAD, _PAIRS_A_CLUSTER = (
    4,
    4,
)  # where there are no groups: most clusters for each head, fewest pairs of each
_STEPS = 50  # of L-BFGS a round: what is sought is an order of losses
Index = NDArray[np.int64]


def em_plan(
    examples: Pairs,
    heads: int,
    *,
    groups: Sequence[str] | None = None,
    settings: FitSettings | None = None,
    seed: int = 0,
) -> HeadPlan:
    """Return which groups each head learns from.

    Args:
        examples: N pairs.
        heads: K, at most as many as groups.
        groups: `[N]` names; None clusters the pairs by their features.
        settings: `l2` of the heads.
        seed: of the first assignment, the halves and the clusters.

    Raises:
        DataError: more heads than groups or clusters, or a group of one pair.
    """
    rng = np.random.default_rng([seed, 2])
    names, of = _units(examples, heads, groups, seed)
    count = np.bincount(of)
    if heads > len(names):
        what, instead = ("groups", "group") if groups is not None else ("clusters of pairs", "cluster")
        raise DataError(
            f"--diversity em finds heads that several {what} share: {heads} heads for {len(names)} {what}; ask for fewer "
            f"--heads, or use --diversity {instead}"
        )
    if count.min() < 2:
        raise DataError(f"--diversity em needs two pairs of each group, {names[int(count.argmin())]!r} has one")
    half = _halves(of, rng)
    settings = replace(settings or FitSettings(), steps=_STEPS)
    assigned = rng.permutation(np.arange(len(names)) % heads)
    for _ in range(_ROUNDS):
        losses = _held_out_losses(examples, of, half, assigned, heads, settings)
        new = _filled(losses.argmin(1), losses, heads)
        if (new == assigned).all():
            break
        assigned = new
    weights = normalised((assigned[of][None] == np.arange(heads)[:, None]).astype(np.float32))
    labels = tuple("+" + " +".join(names[u] for u in np.flatnonzero(assigned == k)) for k in range(heads))
    return HeadPlan(weights, np.ones(heads, np.float32), labels)


def _units(examples: Pairs, heads: int, groups: Sequence[str] | None, seed: int) -> tuple[list[str], Index]:
    if groups is not None:
        found, of = np.unique(np.asarray(groups), return_inverse=True)
        return found.tolist(), of
    centres = ((examples.chosen + examples.rejected) / 2).numpy()
    clusters = max(1, min(_CLUSTERS_A_HEAD * heads, len(centres) // _PAIRS_A_CLUSTER))
    of = clusters_of(centres, clusters, seed)
    large = np.flatnonzero(np.bincount(of) > 1)  # a pair that is alone goes to the nearest of the others
    means = np.stack([centres[of == c].mean(0) for c in large])
    for row in np.flatnonzero(~np.isin(of, large)):
        of[row] = large[((means - centres[row]) ** 2).sum(1).argmin()]
    kept, of = np.unique(of, return_inverse=True)
    return [f"cluster {c}" for c in kept.tolist()], of


def _halves(of: Index, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a half of each group's rows, as `[N]`."""
    half = np.zeros(len(of), bool)
    for unit in range(int(of.max()) + 1):
        rows = rng.permutation(np.flatnonzero(of == unit))
        half[rows[: len(rows) // 2]] = True
    return half


def _held_out_losses(
    examples: Pairs, of: Index, half: NDArray[np.bool_], assigned: Index, heads: int, settings: FitSettings
) -> NDArray[np.float64]:
    """Return the mean loss of each head on each group, `[U, K]`, of heads trained on the other half of the rows."""
    total = np.zeros((int(of.max()) + 1, heads))
    for trained in (half, ~half):
        weights = normalised(((assigned[of] == np.arange(heads)[:, None]) & trained).astype(np.float32))
        plan = HeadPlan(weights, np.ones(heads, np.float32), ("",) * heads)
        head = fit_heads(examples, plan, settings=settings)
        rows = torch.from_numpy(np.flatnonzero(~trained))
        with torch.no_grad():
            first, second = head(examples.chosen[rows]), head(examples.rejected[rows])
            losses = row_losses(examples, first, second, torch.ones(heads), rows).double().numpy()
        np.add.at(total, of[~trained], losses)
    return np.asarray(total / np.bincount(of)[:, None])


def _filled(assigned: Index, losses: NDArray[np.float64], heads: int) -> Index:
    """Return the assignment with a group for every head: one without gets the group that is explained worst."""
    assigned = assigned.copy()
    own = losses[np.arange(len(assigned)), assigned]
    for k in np.setdiff1d(np.arange(heads), assigned):
        shared = np.bincount(assigned, minlength=heads)[assigned] > 1
        worst = int(np.where(shared, own, -np.inf).argmax())
        assigned[worst], own[worst] = k, -np.inf
    return assigned

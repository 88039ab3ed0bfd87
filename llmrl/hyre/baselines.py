"""Every way to use a few labels, on the same labels, of many draws at once.

uniform        all heads alike, whatever the labels
single         one head trained on all pairs
worst          the least margin of any head: what a careful user of an ensemble takes
average        one head whose parameters are the mean of all heads' (Rame et al., 2024); of linear heads it is `uniform`
best-head      the head with the least loss on the labels
hyre           heads weighted by exp(-loss), beta 1, summed
hyre-auto      loss and beta by leave-one-out, with the guard
refine         hyre, then a linear correction
finetune-*     a linear correction from the single head, from the mean of the heads before some were turned round, or from
               zero
lore           softmax weights over heads by 500 steps of Adam on the labels' likelihood (Bose et al., 2025)
pref           free weights over heads, logistic regression with a penalty (Shenfeld et al., 2025)
oracle-head    the head that is best on the test pairs: nobody knows it beforehand
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrl.hyre.posterior import label_losses, posterior_weights
from llmrl.hyre.refine import refine
from llmrl.hyre.select import choose

Array = NDArray[np.float64]
L2_GRID = (0.003, 0.01, 0.03, 0.1, 0.3)  # of fine-tuning
UNLABELLED = ("uniform", "single", "worst", "average")


@dataclass(frozen=True)
class Labels:
    """Labels of D draws of n pairs each.

    Attributes:
        margins: `[D, n, K]`, of the heads.
        features: `[D, n, H]`, differences of scaled features.
        starts: margins `[D, n]` of the heads that fine-tuning starts at, by name.
    """

    margins: Array
    features: Array
    starts: Mapping[str, Array]


@dataclass(frozen=True)
class Tests:
    """Pairs of one draw's test: `[T, K]`, `[T, H]`, and `[T]` by name."""

    margins: Array
    features: Array
    starts: Mapping[str, Array]


@dataclass(frozen=True)
class Fitted:
    """What a method made of the labels of D draws: margins are start + heads . weights + features . correction.

    Attributes:
        start: name of a head in `Tests.starts`, or None.
        weights: `[D, K]`, or None.
        correction: `[D, H]`, or None.
    """

    start: str | None = None
    weights: Array | None = None
    correction: Array | None = None

    def margins(self, draw: int, tests: Tests) -> Array:
        """Return margins `[T]` of the tests of one draw."""
        found = np.zeros(len(tests.margins)) if self.start is None else tests.starts[self.start]
        if self.weights is not None:
            found = found + tests.margins @ self.weights[draw]
        return found if self.correction is None else found + tests.features @ self.correction[draw]


def without_labels(tests: Tests) -> dict[str, Array]:
    """Return margins `[T]` of what needs no label."""
    found = {"uniform": tests.margins.mean(1), "worst": tests.margins.min(1)}
    return found | {name: tests.starts[name] for name in ("single", "average") if name in tests.starts}


def fit_all(labels: Labels) -> dict[str, Fitted]:
    """Return every method fitted to the labels; fine-tuning is named "method l2"."""
    losses = label_losses(labels.margins, np.ones(labels.margins.shape[:-1])).sum(1)
    least = losses == losses.min(1, keepdims=True)
    zero = np.zeros(labels.margins.shape[:-1])
    weights = posterior_weights(losses)
    found = {
        "hyre": Fitted(weights=weights),
        "best-head": Fitted(weights=least / least.sum(1, keepdims=True)),
        "hyre-auto": Fitted(weights=automatic_weights(labels.margins)),
        "lore": Fitted(weights=lore_weights(labels.margins)),
        "pref": Fitted(weights=refine(labels.margins, zero, l2=1.0)),
    }
    mixed = (labels.margins @ weights[..., None])[..., 0]
    found["refine"] = Fitted(weights=weights, correction=refine(labels.features, mixed))
    for l2 in L2_GRID:
        found[f"finetune-zero {l2:g}"] = Fitted(correction=refine(labels.features, zero, l2))
        for name, start in labels.starts.items():
            found[f"finetune-{name} {l2:g}"] = Fitted(start=name, correction=refine(labels.features, start, l2))
    return found


def automatic_weights(margins: Array) -> Array:
    """Return `[D, K]` weights by `llmrl.hyre.select.choose` for each draw."""
    rows = []
    for one in margins:
        choice = choose(one)
        losses = label_losses(one, np.ones(len(one)), choice.loss).sum(0)
        rows.append(posterior_weights(losses, beta=choice.beta))
    return np.stack(rows)


def lore_weights(margins: Array, steps: int = 500, lr: float = 0.1) -> Array:
    """Return softmax weights `[D, K]` that Adam finds for the likelihood of the labels `[D, n, K]`, from equal ones."""
    logits = np.zeros((margins.shape[0], margins.shape[2]))
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    for step in range(1, steps + 1):
        w = posterior_weights(-logits)
        mixed = (margins @ w[..., None])[..., 0]
        outer = -1 / (1 + np.exp(np.clip(mixed, -500, 500)))  # d/dm of -log sigmoid(m)
        gradient = (outer[..., None, :] @ margins)[..., 0, :]
        gradient = w * (gradient - (w * gradient).sum(-1, keepdims=True))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        logits = logits - lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return posterior_weights(-logits)

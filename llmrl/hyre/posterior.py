"""Weights over the heads of an ensemble, given labels: generalised Bayes in log space, and nothing but numpy.

Head k has cumulated a loss L_k over the labels seen. Its weight is w_k = pi_k exp(-beta L_k) / sum_i pi_i exp(-beta L_i), and
the ensemble's output is sum_k w_k f_k (following arXiv 2412.08812, where pi is uniform and beta 1). The losses of labels are
*summed*: a mean would never let many labels say more than one.

Outputs are numbers a head gives for one labelled thing: the margin of a pair (score of the chosen minus score of the
rejected, target 1), a logit (target 0 or 1), logits `[C]` of classes (target: the class), or a prediction (target: the
number).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmrl.errors import DataError

Array = NDArray[np.float64]
LOSSES = ("nll", "zero_one", "squared")
STATE_FORMAT = 1


def label_losses(outputs: ArrayLike, targets: ArrayLike, loss: str = "nll") -> Array:
    """Return the loss of every head on every label, `[..., K]`.

    Args:
        outputs: `[..., K]`; of a classifier with C classes `[..., K, C]`, told by one axis more than `targets` has plus one.
        targets: `[...]`, 1 or 0 (of a pair: 1, the chosen one wins), the class, or the number.
        loss: "nll" is -log of the label's probability, "zero_one" 1 for a wrong label and 1/2 for a tie at zero, "squared"
            (f - y)^2 / 2.

    Raises:
        DataError: an output or target that is not finite, or a target that does not fit the loss.
    """
    f, y = np.asarray(outputs, np.float64), np.asarray(targets, np.float64)
    if loss not in LOSSES:
        raise DataError(f"expected a loss out of {', '.join(LOSSES)}, got {loss!r}")
    if not np.isfinite(f).all() or not np.isfinite(y).all():
        raise DataError("an output of a head, or a target, is not finite: check the model and the labels")
    if f.ndim == y.ndim + 2:
        return _class_losses(f, y, loss)
    if f.ndim != y.ndim + 1 or f.shape[:-1] != y.shape:
        raise DataError(f"expected outputs [..., K] of targets [...], got {list(f.shape)} and {list(y.shape)}")
    if loss == "squared":
        return (f - y[..., None]) ** 2 / 2
    if not ((y == 0) | (y == 1)).all():
        raise DataError(f"expected targets of 0 and 1 for the loss {loss}")
    return _margin_losses(np.where(y[..., None] == 1, f, -f), loss)


def _margin_losses(margins: Array, loss: str) -> Array:
    return np.logaddexp(0.0, -margins) if loss == "nll" else (margins < 0) + 0.5 * (margins == 0)


def _class_losses(f: Array, y: Array, loss: str) -> Array:
    if loss == "squared" or not ((y == np.floor(y)) & (y >= 0) & (y < f.shape[-1])).all():
        raise DataError(f"expected classes from 0 to {f.shape[-1] - 1} as targets, and the loss nll or zero_one")
    right = np.take_along_axis(f, y.astype(int)[..., None, None], -1)[..., 0]
    if loss == "zero_one":
        best = f.max(-1)
        ties = (f == best[..., None]).sum(-1)
        return np.where(right < best, 1.0, 1 - 1 / ties)
    top = f.max(-1, keepdims=True)
    return np.log(np.exp(f - top).sum(-1)) + top[..., 0] - right


def posterior_weights(losses: ArrayLike, prior: ArrayLike | None = None, beta: ArrayLike = 1.0) -> Array:
    """Return weights `[..., K]` that sum to 1, of one user or of any number at once.

    Args:
        losses: `[..., K]`, cumulated over a user's labels.
        prior: `[K]` weights before any label; uniform without.
        beta: how much a unit of loss counts: a number, or one a user `[...]`. 0 leaves the prior.
    """
    rows = np.asarray(losses, np.float64)
    logs = -beta * rows if isinstance(beta, int | float) else -np.asarray(beta, np.float64)[..., None] * rows
    if prior is not None:
        with np.errstate(divide="ignore"):  # a head of prior 0 stays out
            logs = logs + np.log(np.asarray(prior, np.float64))
    logs = logs - logs.max(-1, keepdims=True)
    weights = np.exp(logs)
    return weights / weights.sum(-1, keepdims=True)


def effective_heads(weights: ArrayLike) -> Array:
    """Return 1 / sum w^2: K when all heads count alike, 1 when one has it all."""
    return 1 / (np.asarray(weights, np.float64) ** 2).sum(-1)


def entropy(weights: ArrayLike) -> Array:
    """Return the entropy of weights in nats."""
    w = np.asarray(weights, np.float64)
    return -(w * np.log(np.where(w > 0, w, 1.0))).sum(-1)


def probabilities(outputs: ArrayLike) -> Array:
    """Return 1 / (1 + exp(-f)), without overflow."""
    f = np.asarray(outputs, np.float64)
    return np.exp(-np.logaddexp(0.0, -f))


class HyrePosterior:
    """The labels of one user and the weights they give; starts at the prior.

    Args:
        heads: K.
        prior: `[K]` weights before any label; uniform without.
        beta: see `posterior_weights`.
        loss: "nll", "zero_one" or "squared".
        forgetting: each label multiplies the losses before it by this; below 1 for a user who changes.
        ensemble: fingerprint of the ensemble whose heads these are; states of two ensembles never mix.

    Raises:
        DataError: an argument out of range.
    """

    def __init__(
        self,
        heads: int,
        *,
        prior: ArrayLike | None = None,
        beta: float = 1.0,
        loss: str = "nll",
        forgetting: float = 1.0,
        ensemble: str = "",
    ) -> None:
        if heads < 1 or not 0 <= beta < np.inf or not 0 < forgetting <= 1 or loss not in LOSSES:
            raise DataError(
                f"expected heads >= 1, beta >= 0, 0 < forgetting <= 1 and a loss out of {', '.join(LOSSES)}, got {heads}, "
                f"{beta}, {forgetting} and {loss!r}"
            )
        self.heads, self.beta, self.loss, self.forgetting, self.ensemble = heads, beta, loss, forgetting, ensemble
        self.prior = None if prior is None else _checked_prior(prior, heads)
        self._losses: list[Array] = []
        self._total = np.zeros(heads)

    def __len__(self) -> int:
        """Return the number of labels seen."""
        return len(self._losses)

    def update(self, outputs: ArrayLike, targets: ArrayLike | None = None) -> None:
        """Take one label, outputs `[K]`, or several, `[n, K]`, in order; of a classifier `[K, C]` or `[n, K, C]`.

        Args:
            outputs: see above.
            targets: a number, or `[n]`; without, all are 1: the outputs are margins of chosen over rejected.

        Raises:
            DataError: another number of heads, something that is not finite; then nothing is taken.
        """
        f = np.asarray(outputs, np.float64)
        if targets is None and self.loss != "squared" and f.ndim == 1 and np.isfinite(f).all():
            new = _margin_losses(f, self.loss)[None]  # the label of a pair, without checks of what it cannot be
        else:
            y = np.ones(f.shape[:-1]) if targets is None else np.asarray(targets, np.float64)
            new = np.atleast_2d(label_losses(f, y, self.loss))
        if new.shape[-1] != self.heads:
            raise DataError(f"expected the outputs of {self.heads} heads, got {new.shape[-1]}")
        for row in new:
            self._losses.append(row)
            self._total = self.forgetting * self._total + row

    def undo(self, labels: int = 1) -> None:
        """Take back the last labels; what is left is exactly what it was before them.

        Raises:
            DataError: there are not as many.
        """
        if not 0 <= labels <= len(self):
            raise DataError(f"expected to take back 0 to {len(self)} labels, got {labels}")
        kept = self._losses[: len(self) - labels]
        self._losses, self._total = [], np.zeros(self.heads)
        for row in kept:
            self._losses.append(row)
            self._total = self.forgetting * self._total + row

    def merge(self, other: HyrePosterior) -> HyrePosterior:
        """Return the posterior of this one's labels followed by the other's.

        Raises:
            DataError: they differ in anything but the labels.
        """
        for name in ("heads", "beta", "loss", "forgetting", "ensemble"):
            if getattr(self, name) != getattr(other, name):
                raise DataError(
                    f"cannot merge: {name} is {getattr(self, name)!r} here and {getattr(other, name)!r} there"
                )
        if (self.prior is None) != (other.prior is None) or (
            self.prior is not None and not np.array_equal(self.prior, other.prior)  # type: ignore[arg-type]
        ):
            raise DataError("cannot merge: the priors differ")
        merged = self._empty()
        for row in (*self._losses, *other._losses):
            merged._losses.append(row)
            merged._total = merged.forgetting * merged._total + row
        return merged

    def _empty(self) -> HyrePosterior:
        return HyrePosterior(
            self.heads,
            prior=self.prior,
            beta=self.beta,
            loss=self.loss,
            forgetting=self.forgetting,
            ensemble=self.ensemble,
        )

    @property
    def losses(self) -> Array:
        """The cumulated loss of each head, `[K]`."""
        return self._total.copy()

    @property
    def weights(self) -> Array:
        """The weight of each head, `[K]`."""
        return posterior_weights(self._total, self.prior, self.beta)

    @property
    def effective_heads(self) -> float:
        """1 / sum w^2."""
        return float(effective_heads(self.weights))

    @property
    def entropy(self) -> float:
        """Entropy of the weights in nats."""
        return float(entropy(self.weights))

    def predict(self, outputs: ArrayLike, *, as_probability: bool = False) -> Array:
        """Return the weighted output `[...]` of outputs `[..., K]`, or the weighted probability of their logits.

        The second is the Bayesian predictive; the first is what a reward needs, and keeps scores additive.
        """
        f = np.asarray(outputs, np.float64)
        if f.shape[-1] != self.heads:
            raise DataError(f"expected the outputs of {self.heads} heads, got {f.shape[-1]}")
        return (probabilities(f) if as_probability else f) @ self.weights

    def predict_classes(self, outputs: ArrayLike) -> Array:
        """Return the weighted logits `[..., C]` of a classifier's outputs `[..., K, C]`."""
        f = np.asarray(outputs, np.float64)
        if f.ndim < 2 or f.shape[-2] != self.heads:
            raise DataError(f"expected the logits [..., {self.heads}, C] of {self.heads} heads, got {list(f.shape)}")
        return np.asarray((f * self.weights[:, None]).sum(-2))

    def to_json(self) -> dict[str, Any]:
        """Return the state: settings and each label's losses, from which everything else follows."""
        return {
            "format": STATE_FORMAT,
            "ensemble": self.ensemble,
            "heads": self.heads,
            "prior": None if self.prior is None else self.prior.tolist(),
            "beta": self.beta,
            "loss": self.loss,
            "forgetting": self.forgetting,
            "losses": [row.tolist() for row in self._losses],
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any] | str) -> HyrePosterior:
        """Read what `to_json` returned, as a mapping or its text.

        Raises:
            DataError: it is cut off, of another format, or something in it is missing or not a number.
        """
        try:
            fields = dict(json.loads(state) if isinstance(state, str) else state)
            if fields["format"] != STATE_FORMAT:
                raise DataError(
                    f"state of format {fields['format']!r}, expected {STATE_FORMAT}: install the llmrl that wrote it"
                )
            names = ("prior", "beta", "loss", "forgetting", "ensemble")
            made = cls(int(fields["heads"]), **{name: fields[name] for name in names})
            rows = np.asarray(fields["losses"], np.float64).reshape(-1, made.heads)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"the state of a user is damaged ({type(error).__name__}: {error}); label again") from error
        if len(rows) != len(fields["losses"]) or not np.isfinite(rows).all():
            raise DataError(f"the state of a user is damaged: expected {made.heads} finite losses a label")
        for row in rows:
            made._losses.append(row)
            made._total = made.forgetting * made._total + row
        return made


def _checked_prior(prior: ArrayLike, heads: int) -> Array:
    weights = np.asarray(prior, np.float64)
    if weights.shape != (heads,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise DataError(f"expected a prior of {heads} weights that are not negative, got {list(weights.shape)}")
    return weights / weights.sum()

"""A user's file: labels as the losses of the heads, what was chosen of them, and the correction of a refined user.

It holds no text of the labels, only numbers, and the fingerprint of the ensemble they belong to.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from llmrl.errors import DataError, HeadMismatchError, UsageError
from llmrl.files import write_json
from llmrl.hyre.ensemble import RewardEnsemble
from llmrl.hyre.pairs import Pair
from llmrl.hyre.posterior import HyrePosterior
from llmrl.hyre.refine import DEFAULT_L2, refine
from llmrl.hyre.select import BETAS, DEFAULT, Choice, choose

Array = NDArray[np.float64]
FORMAT = 1


@dataclass
class User:
    """One user of an ensemble.

    Attributes:
        posterior: of the labels; beta 0 where the guard fell back.
        choice: how loss and beta were chosen; None where they were given.
        correction: `[H]` on the differences of raw features, of a refined user.
    """

    posterior: HyrePosterior
    choice: Choice | None = None
    correction: Array | None = None

    def margins(self, head_margins: ArrayLike, chosen: Tensor | None = None, rejected: Tensor | None = None) -> Array:
        """Return the margin of each pair, `[N]`, above 0 where the chosen one wins.

        Args:
            head_margins: `[N, K]`.
            chosen, rejected: features `[N, H]`, which a correction needs.
        """
        found = self.posterior.predict(head_margins)
        if self.correction is None:
            return found
        if chosen is None or rejected is None:
            raise DataError("a refined user needs the features of both answers")
        return found + (chosen - rejected).double().numpy() @ self.correction

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        choice = None if self.choice is None else {**vars(self.choice)}
        return {
            "format": FORMAT,
            "ensemble": self.posterior.ensemble,
            "labels": len(self.posterior),
            "weights": self.posterior.weights.tolist(),
            "effective_heads": self.posterior.effective_heads,
            "choice": choice,
            "posterior": self.posterior.to_json(),
            "correction": None if self.correction is None else self.correction.tolist(),
        }

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.to_json())


def adapt(
    ensemble: RewardEnsemble,
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float | None = None,
    loss: str | None = None,
    guard: bool = True,
    refined: bool = False,
    l2: float = DEFAULT_L2,
) -> User:
    """Return the user whose labels are these pairs.

    Args:
        ensemble: whose heads are weighted.
        chosen, rejected: features `[n, H]` of the labels.
        beta, loss: of the posterior; what is None is chosen by leave-one-out.
        guard: fall back to the uniform ensemble where the labels speak against reweighting.
        refined: add a correction (`llmrl.hyre.refine`).
        l2: its strength.

    Raises:
        DataError: no label, or scores that are not finite.
    """
    return adapt_margins(
        ensemble.margins(chosen, rejected),
        ensemble=ensemble.fingerprint,
        beta=beta,
        loss=loss,
        guard=guard,
        differences=(chosen - rejected).double().numpy() if refined else None,
        l2=l2,
        scale=float(ensemble.facts.get("feature_scale", 1.0)),
    )


def adapt_margins(
    margins: Array,
    *,
    ensemble: str = "",
    beta: float | None = None,
    loss: str | None = None,
    guard: bool = True,
    differences: Array | None = None,
    l2: float = DEFAULT_L2,
    scale: float = 1.0,
) -> User:
    """Return the user of head margins `[n, K]`; see `adapt`. With `differences` `[n, H]` of features the user is refined."""
    losses = ("nll", "zero_one") if loss is None else (loss,)
    betas = BETAS if beta is None else (beta,)
    default = (loss or DEFAULT[0], DEFAULT[1] if beta is None else beta)
    choice = choose(margins, candidates=tuple((name, b) for name in losses for b in betas), default=default)
    used = choice.beta if guard else choice.without_guard
    posterior = HyrePosterior(margins.shape[1], beta=used, loss=choice.loss, ensemble=ensemble)
    posterior.update(margins)
    correction = None
    if differences is not None:
        correction = refine(differences, posterior.predict(margins), l2, scale)
    return User(posterior, choice, correction)


def load_user(path: Path | str, ensemble: RewardEnsemble) -> User:
    """Read a user's file and check that it belongs to the ensemble.

    Raises:
        UsageError: the file is not there.
        DataError: it is cut off or damaged.
        HeadMismatchError: it was made with another ensemble, or another number of heads.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"not found: {path} (--user)")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise DataError(
                f"{path} has format {fields['format']!r}, expected {FORMAT}: install the llmrl that wrote it"
            )
        posterior = HyrePosterior.from_json(fields["posterior"])
        choice = None if fields["choice"] is None else Choice(**fields["choice"])
        correction = None if fields["correction"] is None else np.asarray(fields["correction"], np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no whole user file ({type(error).__name__}: {error}); adapt again") from error
    if posterior.heads != ensemble.heads:
        raise HeadMismatchError(
            f"{path} weighs {posterior.heads} heads, the ensemble has {ensemble.heads}: adapt again"
        )
    if posterior.ensemble != ensemble.fingerprint:
        raise HeadMismatchError(
            f"{path} was made with another ensemble ({posterior.ensemble}): adapt again with this one"
        )
    width = ensemble.head.spec.hidden_size
    if correction is not None and (correction.shape != (width,) or not np.isfinite(correction).all()):
        raise DataError(f"{path} is damaged: expected a correction of {width} finite numbers; adapt again")
    return User(posterior, choice, correction)


def once_each(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the labels of one user without those that say what another one says: leave-one-out would predict each by itself.

    Raises:
        DataError: two labels say the opposite of each other; names the places of both.
    """
    found: dict[tuple[Any, str, str], Pair] = {}
    for pair in pairs:
        other = found.get((pair.prompt, pair.rejected, pair.chosen))
        if other is not None:
            raise DataError(
                f"{pair.where} says the opposite of {other.where}: one user cannot prefer both; remove one of them"
            )
        found.setdefault((pair.prompt, pair.chosen, pair.rejected), pair)
    if len(found) < len(pairs):
        print(f"warning: {len(pairs) - len(found)} labels say what another one says: each counts once", file=sys.stderr)
    return list(found.values())

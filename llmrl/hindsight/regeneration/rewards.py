"""Reward models of finished dialogues, and how far each agrees with what is known of the logs.

`rule` reads the words, or takes what a scripted world gives. `regression` reads the states of a frozen model, with a ridge on
what the logs earned. `judge` asks a model with a rubric; its scores, which have units of their own, are put on the scale of the
logs by a line through scored logs. What cannot tell good from bad logs thus gives all dialogues the same reward, not noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmrl.errors import DataError, RequestError, UsageError
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.regeneration.asking import Asker
from llmrl.hindsight.regeneration.budget import BudgetSpent
from llmrl.hindsight.regeneration.edits import BadAnswer, unfenced
from llmrl.hindsight.regeneration.forward import Continuation
from llmrl.hindsight.regeneration.prompts import RUBRIC, judge_prompt
from llmrl.hindsight.regeneration.rules import at_the_end, rule_of
from llmrl.intervals import draw_counts, interval
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message

_TEST_SHARE = 0.3  # of labelled dialogues, on which a regression is measured and not fitted
_ALPHAS = tuple(10.0**k for k in range(-1, 6))
_DRAWS = 300
_MOST_PAIRED = 1000  # dialogues that are compared with each other: pairs grow with the square
_FEWEST_TO_SPLIT = 20
_JUDGE_SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 400},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
    },
    "required": ["reason", "score"],
    "additionalProperties": False,
}
Array = NDArray[np.float64]


class Reward(Protocol):
    """Rewards finished dialogues; can be called from many threads.

    Attributes:
        name: of what judges.
        sd: standard deviation of its error on logs, None where it is exact.
        agreement: with what is known of the logs, see `agreement`; None where it is exact.
    """

    name: str
    sd: float | None
    agreement: dict[str, Any] | None

    def rewards(self, played: Continuation, task: str, seed: int) -> tuple[float, ...]:
        """Return a reward for each message; other than 0 only at the agent's.

        Raises:
            BadAnswer: a judge answers what cannot be read.
            BudgetSpent, RequestError, EngineError: it could not be asked.
        """
        ...


class RuleReward:
    """What the world gives, or the rule of the task reads.

    Args:
        dialogues: logs, for the agreement.
        exact: the world gives rewards.
    """

    name = "rule"

    def __init__(self, dialogues: Sequence[Dialogue], *, exact: bool) -> None:
        self.sd, self.agreement = None, None
        if not exact:
            rules = {task: rule_of(task) for task in {dialogue.task for dialogue in dialogues}}
            read = [sum(rules[d.task](d.messages)) for d in dialogues]
            actual = [d.total for d in dialogues]
            self.agreement = agreement(read, actual)
            self.sd = float(np.sqrt(np.mean(np.square(np.subtract(read, actual)))))

    def rewards(self, played: Continuation, task: str, seed: int) -> tuple[float, ...]:
        """See `Reward`."""
        return played.rewards if played.rewards is not None else rule_of(task)(played.messages)


class RegressionReward:
    """A ridge on features of the dialogue, fitted to what the logs earned.

    Args:
        features: texts of dialogues to `[N, H]`.
        dialogues: labelled ones, at least 20.
        seed: of the split into what is fitted and what it is measured on.
        name: of the model that the features come from.

    Raises:
        UsageError: too few dialogues, or scikit-learn is missing.
    """

    def __init__(
        self,
        features: Callable[[Sequence[Sequence[Message]]], Array],
        dialogues: Sequence[Dialogue],
        seed: int,
        name: str,
    ) -> None:
        try:
            from sklearn.linear_model import RidgeCV
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            raise UsageError("--reward regression needs scikit-learn: pip install scikit-learn") from None
        if len(dialogues) < 20:
            raise UsageError(f"--reward regression: expected 20 labelled dialogues at least, got {len(dialogues)}")
        self.name, self._features = f"regression on {name}", features
        order = sorted(range(len(dialogues)), key=lambda i: derive_seed(seed, "reward", dialogues[i].id))
        cut = round(_TEST_SHARE * len(order))
        states = features([d.messages for d in dialogues])
        totals = np.array([d.total for d in dialogues])
        test, fit = order[:cut], order[cut:]
        self._model = make_pipeline(StandardScaler(), RidgeCV(_ALPHAS)).fit(states[fit], totals[fit])
        self._low, self._high = float(totals.min()), float(totals.max())
        predicted = self._predict(states[test])
        self.agreement: dict[str, Any] | None = agreement(predicted.tolist(), totals[test].tolist())
        self.sd: float | None = float(np.sqrt(np.mean((predicted - totals[test]) ** 2)))

    def _predict(self, states: Array) -> Array:
        # nothing regenerated can be worth more than the best log: a line goes on for ever
        return np.clip(self._model.predict(states), self._low, self._high)

    def rewards(self, played: Continuation, task: str, seed: int) -> tuple[float, ...]:
        """See `Reward`."""
        return at_the_end(played.messages, float(self._predict(self._features([played.messages]))[0]))


class JudgeReward:
    """A model with a rubric.

    Args:
        asker: the model, as "judge".
        dialogues: labelled ones that it scores, to be put on their scale; a few dozen.
        seed: of its answers.
        rubric: what a score means.
        progress: called with (done, total) after each of these.
        concurrency: of them under way.

    Raises:
        DataError: not one of them could be scored.
        BudgetSpent, EngineError: it could not be asked.
    """

    def __init__(
        self,
        asker: Asker,
        dialogues: Sequence[Dialogue],
        seed: int,
        rubric: str = RUBRIC,
        progress: Callable[[int, int], None] = lambda done, total: None,
        concurrency: int = 16,
    ) -> None:
        self.name, self._asker, self._rubric = f"judge {asker.name}", asker, rubric
        found = list[float | None]()
        with ThreadPoolExecutor(concurrency) as pool:
            for score in pool.map(lambda dialogue: self._score_of_log(dialogue, seed), dialogues):
                found.append(score)
                progress(len(found), len(dialogues))
        pairs = [(score, d.total) for d, score in zip(dialogues, found, strict=True) if score is not None]
        if not pairs:
            raise DataError(
                f"judge {asker.name}: none of {len(dialogues)} logs could be scored; take another model, or a larger budget"
            )
        self._low, self._high = min(d.total for d in dialogues), max(d.total for d in dialogues)
        self._slope, self._intercept = _line(pairs)
        scores, totals = [score for score, _ in pairs], [total for _, total in pairs]
        # ranks are those of the scores; errors are of logs that the line was not laid through
        halves = (pairs[1::2], pairs[::2]) if len(pairs) >= _FEWEST_TO_SPLIT else (pairs, pairs)
        lines = [_line(half) for half in halves]
        errors = np.array([lines[i % 2][0] * score + lines[i % 2][1] - total for i, (score, total) in enumerate(pairs)])
        told = {"unread": len(found) - len(pairs), "mean_error": float(errors.mean())}
        self.agreement: dict[str, Any] | None = agreement(scores, totals) | told
        self.sd: float | None = float(np.sqrt(np.mean(errors**2)))

    def rewards(self, played: Continuation, task: str, seed: int) -> tuple[float, ...]:
        """See `Reward`."""
        score = self._score(played.messages, derive_seed(seed, "judge"))
        return at_the_end(played.messages, self._reward(score))

    def _reward(self, score: float) -> float:
        # nothing is worth more than the best log: a line goes on for ever
        return min(max(self._slope * score + self._intercept, self._low), self._high)

    def _score_of_log(self, dialogue: Dialogue, seed: int) -> float | None:
        try:
            return self._score(dialogue.messages, derive_seed(seed, "judge", dialogue.id))
        except (BadAnswer, RequestError, BudgetSpent):
            return None

    def _score(self, messages: Sequence[Message], seed: int) -> float:
        answer = self._asker.ask(judge_prompt(messages, self._rubric, _JUDGE_SCHEMA), seed, _JUDGE_SCHEMA)
        try:
            score = json.loads(unfenced(answer.text))["score"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadAnswer("judge: prose", f"no score in {answer.text[:80]!r} ({type(error).__name__})") from None
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 10:
            raise BadAnswer("judge: no score", f"expected a score from 0 to 10, got {score!r:.40}")
        return float(score)


def _line(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope, at least 0, and intercept of the line of least squares through (score, total)."""
    x, y = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    spread = float(((x - x.mean()) ** 2).sum())
    slope = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum()) / spread) if spread else 0.0
    return slope, float(y.mean() - slope * x.mean())


def agreement(predicted: Sequence[float], actual: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Return how far predictions agree with what dialogues did earn.

    Args:
        predicted, actual: of the same dialogues.
        seed: of the bootstrap over dialogues.

    Returns:
        `spearman` and `pairs` (share of pairs of different outcome that are in the right order, ties half: .5 is chance), each
        with a 95% interval, null where all are alike, pairs among 1,000 of them at most; `mean_error`, predicted less actual;
        `dialogues`.
    """
    x, y = np.asarray(predicted, float), np.asarray(actual, float)
    found: dict[str, Any] = {"dialogues": len(x), "mean_error": float((x - y).mean())}
    some = np.sort(np.random.default_rng(seed).permutation(len(x))[:_MOST_PAIRED])
    for name, measure, rows in (("spearman", _spearman, np.arange(len(x))), ("pairs", _pairs_right, some)):
        a, b = x[rows], y[rows]
        value = measure(a, b, np.ones(len(a)))
        draws = np.array([measure(a, b, row) for row in draw_counts(len(a), _DRAWS, seed)])
        low, high = (-1.0, 1.0) if name == "spearman" else (0.0, 1.0)
        found[name] = None if math.isnan(value) else interval(min(max(value, low), high), draws, low, high, basic=False)
    return found


def _spearman(x: Array, y: Array, weights: Array) -> float:
    a, b = (_ranks(np.repeat(v, weights.astype(int))) for v in (x, y))
    spread = float(a.std() * b.std())
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else float("nan")


def _ranks(values: Array) -> Array:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values), dtype=float)


def _pairs_right(x: Array, y: Array, weights: Array) -> float:
    dx, dy = np.sign(x[:, None] - x[None]), np.sign(y[:, None] - y[None])
    both = weights[:, None] * weights[None] * (dy != 0)
    total = float(both.sum())
    return float((both * (1 + dx * dy) / 2).sum() / total) if total else float("nan")

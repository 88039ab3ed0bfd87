"""From tokens to answers: of graded answers the report is about whole answers, not about the tokens they are made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from llmrl.ats.answers import answer_confidences
from llmrl.ats.metrics import Predictions
from llmrl.errors import DataError

_SMALLEST = 1e-12  # of a confidence and of its complement: a certain answer that is wrong costs 28 nats, not infinity


def answers_of(tokens: Predictions, aggregate: str, question: Tensor | None = None) -> Predictions:
    """Return one prediction an answer.

    Args:
        tokens: of graded answers: the probability of each token that was said, the grade of its answer at each of them,
            `window` the answer it belongs to.
        aggregate: how the probabilities become the answer's confidence, one of `llmrl.ats.losses.AGGREGATES`.
        question: `[W]` of `TokenFeatures`, the question of each window; None or empty: every answer has its own.

    Returns:
        Confidence and grade of each answer, in ascending order of `tokens.window`; its `nll` is the binary log loss of "the
        answer is right", its `window` the question: several answers to one are no independent evidence.
    """
    with np.errstate(divide="ignore"):
        confidence = answer_confidences(np.log(tokens.confidence), tokens.window, aggregate)
    window, first = np.unique(tokens.window, return_index=True)
    correct = tokens.correct[first]
    said = np.where(correct, confidence, 1.0 - confidence)
    loss = -np.log(np.clip(said, _SMALLEST, 1.0))
    if question is not None and len(question):
        window = question.numpy()[window]
    return Predictions(confidence, correct, loss, window, questions=True)


def check_outcomes(right: Sequence[bool]) -> None:
    """Refuse to fit on answers that are all right or all wrong: nothing in them says when to be less sure.

    Args:
        right: of each answer that is fitted on, whether it is right.

    Raises:
        DataError: they are all the same.
    """
    if len(set(right)) < 2:
        outcome = "right" if all(right) else "wrong"
        raise DataError(
            f"all {len(right)} answers to fit on are {outcome}, and a confidence is fitted on right and wrong ones: "
            f"give more rows, or {'harder' if all(right) else 'easier'} questions"
        )

"""Graded answers: scores and scalar fits are about whole answers."""

import numpy as np
import pytest
import torch

from llmrl.ats.answer_level import answers_of
from llmrl.ats.features import TokenFeatures
from llmrl.ats.fit import fit_temperature
from llmrl.ats.losses import Loss
from llmrl.ats.metrics import Predictions
from llmrl_kernels import curve_knots, lse_curve

TOKENS = Predictions(
    confidence=np.array([0.5, 0.8, 0.9, 0.4, 1.0]),
    correct=np.array([True, True, False, True, False]),
    nll=np.zeros(5),
    window=np.array([3, 3, 5, 8, 9]),
)


def test_answers_of_hand_computed():
    found = answers_of(TOKENS, "mean")
    assert found.confidence == pytest.approx([0.65, 0.9, 0.4, 1.0])
    assert found.correct.tolist() == [True, False, True, False]
    assert found.window.tolist() == [3, 5, 8, 9]
    assert found.nll[:3] == pytest.approx([-np.log(0.65), -np.log(0.1), -np.log(0.4)])
    assert 25 < found.nll[3] < 30  # wrong, and certain of it
    assert answers_of(TOKENS, "product").confidence == pytest.approx([0.4, 0.9, 0.4, 1.0])
    assert answers_of(TOKENS, "min").confidence == pytest.approx([0.5, 0.9, 0.4, 1.0])


def graded_features(answers, tokens, true_scale, seed=0):
    """Answers of the token with the largest of 8 logits; right as often as their confidence at `true_scale` says."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(answers * tokens, 8, generator=generator) * 2
    top = (z * true_scale).softmax(-1).amax(-1)
    right = torch.rand(answers, generator=generator) < top.view(answers, tokens).mean(1)
    n = answers * tokens
    curve, slope = lse_curve(z, curve_knots())
    return TokenFeatures(
        states=torch.zeros(n, 2), offsets=torch.zeros(0, dtype=torch.long), row=torch.arange(n),
        window=torch.arange(answers).repeat_interleave(tokens), target=z.argmax(-1), gap=torch.zeros(n),
        mean_gap=torch.zeros(n), top_gap=torch.zeros(n), correct=right.repeat_interleave(tokens),
        graded=torch.ones(n, dtype=torch.bool), choice=torch.full((n,), -1), choices=torch.zeros(0, 0, dtype=torch.long),
        curve=curve, slope=slope,
    )  # fmt: skip


@pytest.mark.parametrize("true_scale", [0.4, 2.5])
@pytest.mark.parametrize("loss", [Loss("answer"), None], ids=["answer", "ece"])
def test_scalar_of_graded_answers_finds_the_scale_they_were_made_with(loss, true_scale):
    features = graded_features(4000, 3, true_scale)
    assert np.exp(fit_temperature(features, loss)) == pytest.approx(true_scale, rel=0.12)


def test_scalar_by_likelihood_would_only_sharpen_a_models_own_words():
    """Why graded answers are not fitted by NLL: the words are the likeliest, so more certainty is always better."""
    assert np.exp(fit_temperature(graded_features(500, 3, 0.4), Loss("nll"))) == pytest.approx(10)

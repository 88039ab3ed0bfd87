"""Graded answers: scores and scalar fits are about whole answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmrl.ats.answer_level import answers_of, check_outcomes
from llmrl.ats.evaluate import fit_and_score
from llmrl.ats.features import TokenFeatures
from llmrl.ats.fit import fit_temperature
from llmrl.ats.losses import Loss
from llmrl.ats.metrics import METRICS, Predictions, clusters_of, compare_methods
from llmrl.ats.splits import Split
from llmrl.errors import DataError
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


# --- several answers to a question ------------------------------------------------------------------------------------


def answers_to(question, confidence, correct):
    """Answers of one token each."""
    count = len(question)
    tokens = Predictions(confidence, correct, np.zeros(count), np.arange(count))
    return answers_of(tokens, "mean", torch.from_numpy(question))


def test_answers_of_groups_them_by_question():
    question = torch.tensor([9, 9, 9, 4, 9, 7, 9, 9, 4, 4])
    found = answers_of(TOKENS, "mean", question)
    assert found.confidence == pytest.approx([0.65, 0.9, 0.4, 1.0])  # one prediction an answer, as before
    assert found.window.tolist() == [4, 7, 4, 4]


@pytest.mark.parametrize("questions", [60, 8])
def test_intervals_of_answers_do_not_narrow_when_every_answer_is_said_again(questions):
    """The same answer five times over tells nothing new, with few questions either."""
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 0.9, questions)
    correct = rng.random(questions) < confidence
    widths = []
    for copies in (1, 5):
        order = rng.permutation(questions * copies)
        question = np.arange(questions).repeat(copies)[order]
        p = answers_to(question, confidence.repeat(copies)[order], correct.repeat(copies)[order])
        scores = compare_methods({"a": p}, draws=200)[0]["a"]
        # the other two depend on how many answers there are, ranks by their ties
        names = [name for name in METRICS if name not in ("ece_debiased", "aurc")]
        widths.append([scores[name]["high"] - scores[name]["low"] for name in names])
    assert widths[1] == pytest.approx(widths[0], rel=1e-6, abs=1e-9)


def test_intervals_of_answers_hold_the_truth_when_only_the_question_decides():
    """40 questions, 8 answers to each; drawn by answer, the interval of the Brier score holds it in 7 of 10 samples."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(60):
        knows = rng.beta(0.5, 0.5, 40).repeat(8)
        p = answers_to(np.arange(40).repeat(8), np.full(320, 0.6), rng.random(320) < knows)
        accuracy = compare_methods({"a": p}, draws=100)[0]["a"]["brier"]
        held += accuracy["low"] <= (0.4**2 + 0.6**2) / 2 <= accuracy["high"]
    assert held >= 51


def test_fit_and_score_hands_the_questions_on(make_world):
    features = replace(
        make_world(lambda hidden: torch.zeros(len(hidden)), tokens=400, windows=200).features,
        graded=torch.ones(400, dtype=torch.bool),
        question=torch.arange(200) // 5,
    )
    features = replace(features, correct=(features.question % 3 == 0)[features.window])
    layer = make_world(lambda hidden: torch.zeros(len(hidden)), tokens=64).layer
    split = Split(list(range(100)), list(range(100, 130)), list(range(130, 200)))
    found = fit_and_score(features, split, layer, methods=["none"], loss="answer", seed=0, draws=10)
    predictions = found.predictions["test"]["none"]
    assert predictions.window.tolist() == (np.arange(130, 200) // 5).tolist()
    assert clusters_of(predictions.window, questions=predictions.questions)[1] == "question"


@pytest.mark.parametrize(("right", "words"), [(True, "are right.*harder"), (False, "are wrong.*easier")])
def test_check_outcomes_refuses_answers_that_are_all_the_same(right, words):
    check_outcomes([right, not right])
    with pytest.raises(DataError, match=f"all 3 answers to fit on {words}"):
        check_outcomes([right] * 3)

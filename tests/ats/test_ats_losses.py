import math
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import log_loss
from torch.nn.functional import cross_entropy

from llmrl.ats.losses import (
    AGGREGATES,
    LOSSES,
    REFERENCE,
    Loss,
    Tempered,
    answer_log_confidence,
    answer_log_loss,
    calibration_loss,
    nll,
    reference_weights,
    selective_smoothing,
    top_label_brier,
    top_label_log_loss,
)
from llmrl.errors import UsageError
from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE
from llmrl_kernels import curve_knots, lse_curve, lse_interpolate

N, V = 200, 50
ALPHA = 0.3
TOKEN_LOSSES = [name for name in LOSSES if not Loss(name).of_windows]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * 3
    target = torch.where(torch.rand(N, generator=generator) < 0.5, logits.argmax(-1), torch.arange(N) % V)
    log_scale = torch.rand(N, generator=generator, dtype=torch.float64) * 2 - 1
    return logits, target, log_scale


def tempered(logits, target, log_scale, lse=None, graded=None):
    """What the losses take, from full logits; differentiable in `log_scale`."""
    top, argmax = logits.max(-1)
    gap = top - logits.gather(1, target[:, None])[:, 0]
    if lse is None:
        lse = ((logits - top[:, None]) * log_scale.exp()[:, None]).logsumexp(-1)
    return Tempered(
        lse=lse,
        scale=log_scale.exp(),
        gap=gap,
        mean_gap=top - logits.mean(-1),
        top_gap=top - logits.sort(-1).values[:, -5:].mean(-1),
        confidence_gap=torch.zeros_like(gap) if graded is None else gap,
        correct=argmax == target if graded is None else graded,
        window=torch.arange(len(target)),
        unscored=torch.zeros(len(target), dtype=torch.long),
    )


def expected_losses(name, logits, target, log_scale):
    """The same losses written with softmax over the vocabulary, nothing shared with the code under test."""
    scaled = logits * log_scale.exp()[:, None]
    hard = cross_entropy(scaled, target, reduction="none")
    log_p = scaled.log_softmax(-1)
    p = log_p.exp().amax(-1)
    right = logits.argmax(-1) == target
    binary = -torch.where(right, p.log(), torch.log1p(-p))
    uniform = cross_entropy(scaled, target, reduction="none", label_smoothing=1.0)
    top5 = -log_p.gather(1, logits.topk(5).indices).mean(-1)
    a = ALPHA
    return {
        "nll": hard,
        "top_label": binary,
        "nll+top_label": hard + binary,
        "top_label_brier": (p - right.double()) ** 2,
        "smoothing": torch.where(right, (1 - a) * hard, a * uniform),
        "smoothing-topk": torch.where(right, (1 - a) * hard, a * top5),
    }[name]


# --- each loss against full logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_calibration_loss_is_its_definition_on_full_logits(name, batch):
    found = calibration_loss(Loss(name, alpha=ALPHA), tempered(*batch))
    torch.testing.assert_close(found, expected_losses(name, *batch), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_calibration_loss_passes_gradcheck(name, batch):
    logits, target, log_scale = (part[:20] for part in batch)

    def mean(log_scale):
        return calibration_loss(Loss(name, alpha=ALPHA), tempered(logits, target, log_scale)).mean()

    assert torch.autograd.gradcheck(mean, log_scale.clone().requires_grad_())


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("log_scale", [MIN_LOG_SCALE, MAX_LOG_SCALE])
def test_calibration_loss_at_the_clip_is_right_and_finite(name, log_scale, batch):
    logits, target, _ = batch
    constant = torch.full((N,), log_scale, dtype=torch.float64)
    at = tempered(logits, target, constant)
    loss = calibration_loss(Loss(name, alpha=ALPHA), at)
    expected = expected_losses(name, logits, target, constant)
    representable = (-torch.expm1(-at.lse) > 1e-6) | at.correct  # elsewhere the floor of 1 - p counts
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss[representable], expected[representable], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_calibration_loss_through_the_curve_has_the_value_and_gradient_of_full_logits(name, batch):
    logits, target, log_scale = batch
    direct = log_scale.clone().requires_grad_()
    (expected,) = torch.autograd.grad(expected_losses(name, logits, target, direct).sum(), direct)

    curve, slope = lse_curve(logits.float(), curve_knots())
    ours = log_scale.float().requires_grad_()
    at = tempered(logits.float(), target, ours, lse=lse_interpolate(curve, slope, ours))
    loss = calibration_loss(Loss(name, alpha=ALPHA), at)
    (gradient,) = torch.autograd.grad(loss.sum(), ours)
    torch.testing.assert_close(loss.detach().double(), expected_losses(name, *batch), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-2, atol=2e-3)


def test_nll_is_cross_entropy_of_scaled_logits(batch):
    logits, target, log_scale = batch
    at = tempered(*batch)
    direct = cross_entropy(logits * log_scale.exp()[:, None], target, reduction="none")
    torch.testing.assert_close(nll(at.lse, at.scale, at.gap), direct, rtol=1e-12, atol=1e-12)


# --- the binary losses ------------------------------------------------------------------------------------------------


def test_top_label_log_loss_is_sklearn_log_loss(batch):
    logits, _, log_scale = batch
    at = tempered(*batch)
    confidence = (logits * log_scale.exp()[:, None]).softmax(-1).amax(-1)
    ours = top_label_log_loss(at.lse, at.correct).mean().item()
    assert ours == pytest.approx(log_loss(at.correct.numpy(), confidence.numpy(), labels=[False, True]), rel=1e-9)


def test_top_label_log_loss_confidence_of_exactly_one_is_finite():
    surprise = torch.tensor([0.0, 0.0], requires_grad=True)
    loss = top_label_log_loss(surprise, torch.tensor([True, False]))
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, -math.log(1e-7)]))
    loss.sum().backward()
    assert torch.isfinite(surprise.grad).all()


def test_top_label_log_loss_below_zero_lse_from_interpolation_is_finite():
    loss = top_label_log_loss(torch.tensor([-1e-6, -1e-6]), torch.tensor([True, False]))
    assert torch.isfinite(loss).all()
    assert top_label_brier(torch.tensor([-1e-6]), torch.tensor([True])).item() == 0.0


def test_top_label_log_loss_of_a_sure_and_wrong_token_keeps_its_digits():
    """1 - exp(-1e-6) in float32 is five percent off."""
    found = top_label_log_loss(torch.tensor([1e-6]), torch.tensor([False]))
    torch.testing.assert_close(found, torch.tensor([-math.log(1e-6)]), rtol=1e-6, atol=0)


def test_top_label_brier_by_hand():
    surprise = -torch.tensor([0.75, 0.75, 1.0, 0.0625]).log()
    correct = torch.tensor([True, False, False, True])
    torch.testing.assert_close(
        top_label_brier(surprise, correct), torch.tensor([0.0625, 0.5625, 1.0, 0.9375**2]), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("name", ["top_label", "top_label_brier"])
def test_calibration_loss_of_a_graded_answer_is_about_the_token_that_was_said(name, batch):
    """Its confidence is p of that token, likeliest or not, and it is right when the answer was."""
    logits, target, log_scale = batch
    grade = torch.arange(N) % 3 == 0
    p = (logits * log_scale.exp()[:, None]).softmax(-1).gather(1, target[:, None])[:, 0]
    found = calibration_loss(Loss(name), tempered(*batch, graded=grade))
    expected = {
        "top_label": -torch.where(grade, p.log(), torch.log1p(-p)),
        "top_label_brier": (p - grade.double()) ** 2,
    }
    torch.testing.assert_close(found, expected[name], rtol=1e-6, atol=1e-9)


# --- selective smoothing ----------------------------------------------------------------------------------------------


def test_selective_smoothing_by_hand():
    """p = (1/2, 1/4, 1/4): right costs (1 - a) ln 2, wrong a times the mean of ln 2, ln 4, ln 4."""
    z = torch.tensor([[math.log(2.0), 0.0, 0.0]] * 2, dtype=torch.float64)
    at = tempered(z, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.float64))
    found = selective_smoothing(at.lse, at.scale, at.gap, at.mean_gap, at.correct, alpha=0.25)
    ln2 = math.log(2.0)
    torch.testing.assert_close(found, torch.tensor([0.75 * ln2, 0.25 * 5 * ln2 / 3], dtype=torch.float64))


def test_selective_smoothing_mean_does_not_depend_on_the_micro_batch(batch):
    def loss(part):
        return calibration_loss(Loss("smoothing"), tempered(*(tensor[part] for tensor in batch)))

    parts = [loss(slice(0, 30)), loss(slice(30, 90)), loss(slice(90, N))]
    assert sum(p.sum().item() for p in parts) / N == pytest.approx(loss(slice(0, N)).mean().item(), rel=1e-12)


ONE = torch.zeros(1, dtype=torch.long)  # a window without a prompt


def weights_of(correct, alpha, unscored=0):
    """The weights in one window."""
    return reference_weights(correct, alpha, torch.zeros(len(correct), dtype=torch.long), ONE + unscored)


def test_reference_weights_by_hand():
    """3 right, 1 wrong, alpha 0.4: weights .6 * 1/4 and .4 * 3/4 over their sum, each over its class."""
    correct = torch.tensor([True, True, True, False])
    # the loss of a token times its factor of the paper weighting
    per_token = weights_of(correct, 0.4) * torch.tensor([0.6, 0.6, 0.6, 0.4])
    expected = torch.tensor([0.15 / 0.45 / 3] * 3 + [0.3 / 0.45])
    torch.testing.assert_close(per_token, expected)
    assert per_token.sum() == pytest.approx(1.0)


def test_reference_weights_ratio_is_that_of_the_note():
    """((1 - alpha) / alpha) (wrong / right)^2, in front of the bare losses of a right and of a wrong token."""
    correct = torch.arange(10) < 7
    weights = weights_of(correct, 0.2).double() * torch.where(correct, 0.8, 0.2)
    assert weights[0] / weights[9] == pytest.approx((0.8 / 0.2) * (3 / 7) ** 2, rel=1e-5)
    # with a prompt of 11 tokens, which count as wrong
    weights = weights_of(correct, 0.2, unscored=11).double() * torch.where(correct, 0.8, 0.2)
    assert weights[0] / weights[9] == pytest.approx((0.8 / 0.2) * (14 / 7) ** 2, rel=1e-5)


@pytest.mark.parametrize("value", [True, False])
def test_reference_weights_of_one_class_alone_are_zero(value):
    assert weights_of(torch.full((4,), value), 0.5).eq(0).all()


SIZES = (60, 1, 39, 100)  # tokens of four sequences
PROMPTS = torch.tensor([25, 4, 0, 160])


def in_windows(at):
    return replace(at, window=torch.arange(4).repeat_interleave(torch.tensor(SIZES)), unscored=PROMPTS)


def loss_of_the_papers_code(logits, target, log_scale, prompt):
    """Of one sequence, as SelectiveSmoothingLoss does it: labels with -100, two means, weighed by each other's share."""
    labels = torch.cat([torch.full((prompt,), -100), target])
    scaled = torch.cat([torch.randn(prompt, V, dtype=torch.float64), logits * log_scale.exp()[:, None]])
    right = scaled.argmax(-1) == labels
    share = right.double().mean()

    def mean(rows, smoothing):
        one = cross_entropy(scaled[rows], labels[rows], reduction="none", label_smoothing=smoothing, ignore_index=-100)
        return one.sum() / rows.sum().clamp_min(1)

    hard, smooth = (1 - ALPHA) * (1 - share), ALPHA * share
    return (hard * mean(right, 0.0) + smooth * mean(~right, 1.0)) / (hard + smooth).clamp_min(1e-30)


def test_smoothing_reference_is_the_papers_code_one_sequence_at_a_time(batch):
    parts = [tensor.split(SIZES) for tensor in batch]
    expected = torch.stack([
        loss_of_the_papers_code(*part, prompt) for *part, prompt in zip(*parts, PROMPTS.tolist(), strict=True)
    ])  # fmt: skip
    found = calibration_loss(Loss(REFERENCE, alpha=ALPHA), in_windows(tempered(*batch)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    without = replace(in_windows(tempered(*batch)), unscored=torch.zeros(4, dtype=torch.long))
    assert (calibration_loss(Loss(REFERENCE, alpha=ALPHA), without) - expected).abs().max() > 0.05


def test_smoothing_reference_passes_gradcheck(batch):
    def mean(log_scale):
        return calibration_loss(Loss(REFERENCE, alpha=ALPHA), in_windows(tempered(*batch[:2], log_scale))).mean()

    assert torch.autograd.gradcheck(mean, batch[2].clone().requires_grad_())


# --- answers ----------------------------------------------------------------------------------------------------------

ANSWERS = torch.tensor([0, 0, 0, 1, 2, 2])
LOG_P = torch.tensor([0.5, 0.25, 0.5, 0.9, 0.8, 0.2], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("mean", [1.25 / 3, 0.9, 0.5]),
        ("geometric_mean", [0.0625 ** (1 / 3), 0.9, 0.4]),
        ("product", [0.0625, 0.9, 0.16]),
        ("min", [0.25, 0.9, 0.2]),
        ("first", [0.5, 0.9, 0.8]),
        ("last", [0.5, 0.9, 0.2]),
    ],
)
def test_answer_log_confidence_by_hand(aggregate, expected):
    found = answer_log_confidence(LOG_P, ANSWERS, aggregate).exp()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_answer_log_loss_is_sklearn_log_loss_and_passes_gradcheck(aggregate):
    grade = torch.tensor([True, True, True, False, True, True])
    confidence = answer_log_confidence(LOG_P, ANSWERS, aggregate).exp()
    found = answer_log_loss(LOG_P, ANSWERS, grade, aggregate)
    assert found.shape == (3,)
    assert found.mean().item() == pytest.approx(log_loss([1, 0, 1], confidence.numpy(), labels=[0, 1]), rel=1e-9)
    log_p = LOG_P.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: answer_log_loss(x, ANSWERS, grade, aggregate), log_p)


def test_answer_log_confidence_of_hopeless_answers_is_finite():
    log_p = torch.tensor([-500.0, -900.0], requires_grad=True)
    for aggregate in AGGREGATES:
        loss = answer_log_loss(log_p, torch.tensor([0, 0]), torch.tensor([True, True]), aggregate)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(torch.autograd.grad(loss.sum(), log_p)[0]).all()


def test_calibration_loss_answer_reads_the_probability_of_what_was_said(batch):
    logits, target, log_scale = batch
    at = tempered(*batch, graded=torch.arange(N) // 4 % 2 == 0)
    at = replace(at, window=torch.arange(N) // 4, unscored=torch.zeros(N // 4, dtype=torch.long))
    found = calibration_loss(Loss("answer", aggregate="product"), at)
    p = (logits * log_scale.exp()[:, None]).softmax(-1).gather(1, target[:, None])[:, 0]
    confidence, grade = p.view(-1, 4).prod(-1), torch.arange(N // 4) % 2 == 0
    expected = -torch.where(grade, confidence.log(), torch.log1p(-confidence))
    torch.testing.assert_close(found, expected)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "top-label"}, "unknown loss 'top-label'; did you mean 'top_label'"),
        ({"name": "answer", "aggregate": "max"}, "unknown answer confidence 'max'"),
        ({"name": "smoothing", "alpha": 1.0}, "alpha .* between 0 and 1, got 1.0"),
    ],
)
def test_loss_refuses_what_it_does_not_know(arguments, words):
    with pytest.raises(UsageError, match=words):
        Loss(**arguments)

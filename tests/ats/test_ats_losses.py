import math

import pytest
import torch
from sklearn.metrics import log_loss

from llmrl.ats.losses import LOSSES, calibration_loss, nll, top_label_log_loss
from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE
from llmrl_kernels import curve_knots, lse_curve, lse_interpolate

N, V = 200, 50


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64) * 3
    target = torch.where(torch.rand(N, generator=generator) < 0.5, logits.argmax(-1), torch.arange(N) % V)
    log_scale = torch.rand(N, generator=generator, dtype=torch.float64) * 2 - 1
    return logits, target, log_scale


def pieces(logits, target, log_scale):
    """What the losses take, in float64 from full logits."""
    top, argmax = logits.max(-1)
    lse = ((logits - top[:, None]) * log_scale.exp()[:, None]).logsumexp(-1)
    return lse, top - logits.gather(1, target[:, None])[:, 0], argmax == target


def expected_loss(name, logits, target, log_scale):
    """The same losses written with log_softmax and log(1 - p), nothing shared with the code under test."""
    scaled = logits * log_scale.exp()[:, None]
    log_p = scaled.log_softmax(-1)
    target_nll = torch.nn.functional.cross_entropy(scaled, target, reduction="none")
    top = log_p.amax(-1)
    binary = -torch.where(logits.argmax(-1) == target, top, torch.log1p(-top.exp()))
    return {"nll": target_nll, "top_label": binary, "nll+top_label": target_nll + binary}[name]


def test_nll_is_cross_entropy_of_scaled_logits(batch):
    logits, target, log_scale = batch
    lse, gap, _ = pieces(*batch)
    direct = -(logits * log_scale.exp()[:, None]).log_softmax(-1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(nll(lse, log_scale, gap), direct, rtol=1e-12, atol=1e-12)


def test_top_label_log_loss_is_sklearn_log_loss(batch):
    logits, _, log_scale = batch
    lse, _, correct = pieces(*batch)
    confidence = (logits * log_scale.exp()[:, None]).softmax(-1).amax(-1)
    ours = top_label_log_loss(lse, correct).mean().item()
    assert ours == pytest.approx(log_loss(correct.numpy(), confidence.numpy(), labels=[False, True]), rel=1e-9)


def test_top_label_log_loss_confidence_of_exactly_one_is_finite():
    lse = torch.tensor([0.0, 0.0], requires_grad=True)
    loss = top_label_log_loss(lse, torch.tensor([True, False]))
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, -math.log(1e-7)]))
    loss.sum().backward()
    assert torch.isfinite(lse.grad).all()


def test_top_label_log_loss_below_zero_lse_from_interpolation_is_finite():
    loss = top_label_log_loss(torch.tensor([-1e-6, -1e-6]), torch.tensor([True, False]))
    assert torch.isfinite(loss).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("log_scale", [MIN_LOG_SCALE, MAX_LOG_SCALE])
def test_calibration_loss_at_the_clip_is_right_and_finite(name, log_scale, batch):
    logits, target, _ = batch
    constant = torch.full((N,), log_scale, dtype=torch.float64)
    lse, gap, correct = pieces(logits, target, constant)
    loss = calibration_loss(name, lse, constant, gap, correct)
    expected = expected_loss(name, logits, target, constant)
    representable = (-torch.expm1(-lse) > 1e-6) | correct  # elsewhere the floor of 1 - p counts
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss[representable], expected[representable], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_calibration_loss_gradient_is_that_of_full_logits(name, batch):
    logits, target, log_scale = batch
    direct = log_scale.clone().requires_grad_()
    (expected,) = torch.autograd.grad(expected_loss(name, logits, target, direct).sum(), direct)

    curve, slope = lse_curve(logits.float(), curve_knots())
    ours = log_scale.float().requires_grad_()
    _, gap, correct = pieces(*batch)
    loss = calibration_loss(name, lse_interpolate(curve, slope, ours), ours, gap.float(), correct)
    (gradient,) = torch.autograd.grad(loss.sum(), ours)
    torch.testing.assert_close(loss.detach().double(), expected_loss(name, *batch), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-2, atol=2e-3)


def test_calibration_loss_unknown_name():
    one = torch.ones(1)
    with pytest.raises(ValueError, match="unknown loss 'brier'; valid: nll, top_label"):
        calibration_loss("brier", one, one, one, one.bool())

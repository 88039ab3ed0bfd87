"""The reference against torch's own functions, the portable path against the reference."""

import math
import sys

import pytest
import torch
from sweep_inputs import EVERYTHING, assert_matches_reference, sweep_inputs, with_gradients
from torch.nn import functional

from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE
from llmrl_kernels import LseSweep, curve_knots, lse_curve, scaled_lse_sweep, scaled_lse_sweep_reference

MODULE = sys.modules["llmrl_kernels.scaled_lse_sweep"]  # the package's attribute of that name is the function


def sweep(arguments, keywords=None, **more):
    return scaled_lse_sweep(*arguments, **(keywords or {}), **more)


def one_hot_inputs(logits, tau, label=0):
    """Arguments for which the logits are the given ones, `[N, V]`: hidden states are unit vectors."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    count = len(logits)
    labels = torch.full((count,), label)
    return torch.eye(count), logits.T.contiguous(), torch.full((count,), float(tau)), labels


# --- the definition


def test_scaled_lse_sweep_reference_is_cross_entropy_of_the_scaled_logits():
    (hidden, weight, tau, labels), _ = sweep_inputs(63, 20, 100)
    outputs, gradients = with_gradients(scaled_lse_sweep_reference, (hidden, weight, tau, labels), {})
    u = tau.double().requires_grad_()
    scaled = (hidden.double() @ weight.double().T) * u.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE).exp()[:, None]
    weights = torch.linspace(-1, 2, 63)
    for mean_target, smoothing in ((outputs.target, 0.0), (outputs.mean, 1.0)):
        theirs = functional.cross_entropy(scaled, labels, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(outputs.lse - mean_target, theirs, rtol=1e-12, atol=1e-12)
    hard = functional.cross_entropy(scaled, labels, reduction="none")
    (slope,) = torch.autograd.grad((hard * weights).sum(), u)
    torch.testing.assert_close(gradients["lse"] - gradients["target"], slope.float(), rtol=1e-5, atol=1e-5)


def test_scaled_lse_sweep_reference_describes_the_distribution():
    (hidden, weight, tau, labels), _ = sweep_inputs(50, 20, 100)
    labels = labels.clamp_min(0)
    outputs = scaled_lse_sweep_reference(hidden, weight, tau, labels)
    z = hidden.double() @ weight.double().T
    p = torch.distributions.Categorical(logits=z * tau.double().clamp(MIN_LOG_SCALE, MAX_LOG_SCALE).exp()[:, None])
    torch.testing.assert_close(outputs.top_logprob.exp(), p.probs.max(-1).values)
    torch.testing.assert_close(outputs.expected, (p.probs * z).sum(-1))
    assert outputs.argmax.equal(z.max(-1).indices)


def test_scaled_lse_sweep_reference_applies_scale_then_cap_and_leaves_out_what_is_absent():
    # z = 4 tanh(0.5 (3 + b) / 4): by hand for b = 1 and b = -1; the third entry is absent, the fourth padding
    bias = torch.tensor([1.0, -1.0, -math.inf, 100.0])
    weight = torch.tensor([[3.0], [3.0], [3.0], [3.0]])
    outputs = scaled_lse_sweep_reference(
        torch.ones(1, 1),
        weight,
        torch.zeros(1),
        torch.tensor([1]),
        bias=bias,
        logit_scale=0.5,
        soft_cap=4.0,
        vocab_size=3,
    )
    high, low = 4 * math.tanh(0.5), 4 * math.tanh(0.25)
    assert outputs.lse.item() == pytest.approx(math.log(math.exp(high) + math.exp(low)))
    assert outputs.target.item() == pytest.approx(low)
    assert outputs.top.item() == pytest.approx(high)
    assert outputs.mean.item() == pytest.approx((high + low) / 2)


# --- the portable path


@pytest.mark.parametrize("vocab", [1, 63, 1000])
@pytest.mark.parametrize("tokens", [1, 63, 100])
def test_scaled_lse_sweep_matches_reference(tokens, vocab):
    for width in (1, 7, 64):
        assert_matches_reference(*sweep_inputs(tokens, width, vocab, seed=width), backend="torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [(), *((name,) for name in EVERYTHING), EVERYTHING], ids=str)
def test_scaled_lse_sweep_matches_reference_with_every_option(options, dtype):
    outputs = assert_matches_reference(*sweep_inputs(63, 33, 100, dtype=dtype, options=options), backend="torch")
    assert outputs.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 13), (10, 1000), (1000, 10), (100, 64)])
def test_scaled_lse_sweep_does_not_depend_on_its_chunks(monkeypatch, height, width):
    arguments, keywords = sweep_inputs(63, 33, 100, options=EVERYTHING)
    whole = sweep(arguments, keywords)
    monkeypatch.setattr(MODULE, "_chunk_shape", lambda rows, vocab, device: (height, width))
    for ours, theirs in zip(sweep(arguments, keywords), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert_matches_reference(arguments, keywords, backend="torch")


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (8192, 512), (8192, 131_072), (3, 262_144), (100_000, 3)])
def test_chunk_shape_stays_within_its_bytes_and_covers_something(rows, vocab):
    for device, budget in ((torch.device("cpu"), 4 << 20), (torch.device("cuda"), 256 << 20)):
        height, width = MODULE._chunk_shape(rows, vocab, device)
        assert 1 <= height <= rows
        assert 1 <= width <= vocab
        assert 4 * height * width <= budget
        assert 4 * height * width > budget / 4 or (height, width) == (rows, vocab)


def test_scaled_lse_sweep_agrees_with_lse_curve():
    (hidden, weight, _, labels), _ = sweep_inputs(40, 20, 300)
    knots = curve_knots()
    values, slopes = lse_curve(hidden @ weight.T, knots)
    for k in (0, 20, 40):
        tau = torch.full((40,), float(knots[k]), requires_grad=True)
        outputs = scaled_lse_sweep(hidden, weight, tau, labels.clamp_min(0))
        torch.testing.assert_close(outputs.top_logprob, -values[:, k], rtol=1e-5, atol=1e-5)
        (slope,) = torch.autograd.grad(outputs.top_logprob.sum(), tau)
        torch.testing.assert_close(slope, -slopes[:, k], rtol=1e-4, atol=1e-5)


def losses(outputs, correct):
    """A loss of each kind in one: likelihood, uniform smoothing, confidence against correctness."""
    confidence = (outputs.top - outputs.lse).exp()
    brier = (confidence - correct) ** 2
    likelihood = (outputs.top - outputs.target) - outputs.top_logprob
    return (likelihood + 0.3 * (outputs.lse - outputs.mean) + brier).sum()


def test_scaled_lse_sweep_gradient_of_losses_is_the_float64_one():
    (hidden, weight, tau, labels), keywords = sweep_inputs(100, 20, 300, options=EVERYTHING)
    slopes = []
    for function in (scaled_lse_sweep, scaled_lse_sweep_reference):
        u = tau.clone().requires_grad_()
        outputs = function(hidden, weight, u, labels, **keywords)
        losses(outputs, (outputs.argmax == labels).to(outputs.lse.dtype)).backward()
        slopes.append(u.grad)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
    assert slopes[0][labels >= 0].ne(0).float().mean() > 0.5


def test_scaled_lse_sweep_gradcheck():
    (hidden, weight, tau, labels), keywords = sweep_inputs(7, 5, 30, dtype=torch.float64, options=EVERYTHING)
    tau = tau.double().clamp(-2.9, 2.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: scaled_lse_sweep(hidden, weight, u, labels, **keywords)[:5], tau)


@pytest.mark.parametrize("end", [MIN_LOG_SCALE, MAX_LOG_SCALE])
def test_scaled_lse_sweep_clips_like_torch_clamp(end):
    arguments, _ = sweep_inputs(6, 5, 30)
    outward = math.copysign(1.0, end)
    nearest = torch.tensor(end)  # float32
    tau = torch.stack([nearest - outward * 0.1, nearest, nearest + outward * 1e-6, nearest + outward * 50])
    tau = torch.cat([tau, tau[1:3]]).requires_grad_()
    clamped = tau.detach().clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)
    labels = torch.arange(6)
    outputs = scaled_lse_sweep(arguments[0], arguments[1], tau, labels)
    inside = scaled_lse_sweep(arguments[0], arguments[1], clamped, labels)
    for ours, theirs in zip(outputs, inside, strict=True):
        assert ours.equal(theirs)
    (mask,) = torch.autograd.grad(tau.clamp(MIN_LOG_SCALE, MAX_LOG_SCALE).sum(), tau)
    assert mask.tolist() == [1, 1, 0, 0, 1, 0]
    for output in outputs[:5]:
        (slope,) = torch.autograd.grad(output.sum(), tau, retain_graph=True)
        assert slope.ne(0).float().equal(mask)


def test_scaled_lse_sweep_takes_other_ends():
    (hidden, weight, _, labels), _ = sweep_inputs(9, 5, 30)
    outputs = scaled_lse_sweep(hidden, weight, torch.full((9,), 4.0), labels, min_log_scale=0.0, max_log_scale=0.5)
    inside = scaled_lse_sweep(hidden, weight, torch.full((9,), 0.5), labels)
    assert outputs.lse.equal(inside.lse)


def test_ends_of_the_clip_are_those_of_a_head():
    defaults = scaled_lse_sweep.__kwdefaults__
    assert (defaults["min_log_scale"], defaults["max_log_scale"]) == (MIN_LOG_SCALE, MAX_LOG_SCALE)


# --- what is left out


def test_scaled_lse_sweep_ignores_label_minus_100():
    (hidden, weight, tau, labels), keywords = sweep_inputs(40, 20, 100, options=EVERYTHING)
    ignored = labels == -100
    hidden[ignored] = math.nan  # out of padded positions
    tau[ignored] = math.nan
    tau.requires_grad_()
    outputs = scaled_lse_sweep(hidden, weight, tau, labels, **keywords)
    alone = scaled_lse_sweep(hidden[~ignored], weight, tau[~ignored], labels[~ignored], **keywords)
    for ours, theirs in zip(outputs, alone, strict=True):
        torch.testing.assert_close(ours[~ignored], theirs)
        assert ours[ignored].eq(-1 if ours is outputs.argmax else 0).all()
    losses(outputs, 1.0).backward()
    assert tau.grad[ignored].eq(0).all()
    assert tau.grad[~ignored].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 5])
def test_scaled_lse_sweep_nothing_to_sweep(tokens):
    tau = torch.zeros(tokens, requires_grad=True)
    outputs = scaled_lse_sweep(torch.randn(tokens, 4), torch.randn(9, 4), tau, torch.full((tokens,), -100))
    assert all(part.shape == (tokens,) for part in outputs)
    sum(part.sum() for part in outputs[:5]).backward()
    assert tau.grad.eq(0).all()


def test_scaled_lse_sweep_never_reads_padding():
    (hidden, weight, tau, labels), _ = sweep_inputs(20, 8, 50)
    labels = labels.clamp_max(39)
    weight[40:] = math.nan
    bias = torch.zeros(50)
    bias[40:] = math.nan
    assert_matches_reference((hidden, weight, tau, labels), {"vocab_size": 40, "bias": bias}, backend="torch")


@pytest.mark.parametrize("cap", [None, 2.0])
def test_scaled_lse_sweep_bias_of_minus_infinity_is_as_if_the_entry_were_not_there(monkeypatch, cap):
    (hidden, weight, tau, _), _ = sweep_inputs(20, 8, 60)
    bias = torch.full((60,), -math.inf)
    bias[25:30] = 0.0  # the chunks before and after hold nothing
    monkeypatch.setattr(MODULE, "_chunk_shape", lambda rows, vocab, device: (7, 10))
    masked = scaled_lse_sweep(hidden, weight, tau, torch.full((20,), 27), bias=bias, soft_cap=cap)
    plain = scaled_lse_sweep(hidden, weight[25:30], tau, torch.full((20,), 2), soft_cap=cap)
    for name in LseSweep._fields[:-1]:
        torch.testing.assert_close(getattr(masked, name), getattr(plain, name))
    assert masked.argmax.equal(plain.argmax + 25)


def test_scaled_lse_sweep_absent_label_has_no_chance():
    bias = torch.tensor([0.0, -math.inf, 0.0])
    tau = torch.zeros(1, requires_grad=True)
    outputs = scaled_lse_sweep(torch.ones(1, 2), torch.ones(3, 2), tau, torch.tensor([1]), bias=bias)
    assert outputs.target.item() == -math.inf
    assert outputs.lse.item() == pytest.approx(2 + math.log(2))
    outputs.lse.sum().backward()  # a loss without the target is not spoilt by it
    assert tau.grad.item() == pytest.approx(2)


# --- extremes


def test_scaled_lse_sweep_confidence_of_exactly_one():
    arguments = one_hot_inputs([[1e4, 0.0, -5.0], [0.0, 300.0, 10.0]], tau=0.0)
    tau = arguments[2].requires_grad_()
    outputs = sweep(arguments)
    assert outputs.top_logprob.eq(0).all()
    assert outputs.lse.equal(outputs.top)
    (slope,) = torch.autograd.grad(outputs.top_logprob.sum(), tau)
    assert slope.eq(0).all()
    assert outputs.expected.tolist() == [1e4, 300.0]


def test_scaled_lse_sweep_confidence_close_to_one_keeps_its_digits():
    # p_top = 1 / (1 + 3 e^-d): log p = -3 e^-d to first order, below what lse - top can show in float32
    for distance in (12.0, 20.0, 40.0):
        arguments = one_hot_inputs([[200.0, 200 - distance, 200 - distance, 200 - distance]], tau=0.0)
        tau = arguments[2].requires_grad_()
        outputs = sweep(arguments)
        tail = 3 * math.exp(-distance)
        expected = -math.log1p(tail) if distance < 16 else 0.0  # 1 + e^-16 is 1 in float32
        assert outputs.top_logprob.item() == pytest.approx(expected, rel=2e-2, abs=1e-12)
        (slope,) = torch.autograd.grad(outputs.top_logprob.sum(), tau)
        assert slope.item() == pytest.approx(distance * tail, rel=1e-4)


def test_scaled_lse_sweep_equal_logits():
    tau = torch.tensor([-3.0, 0.0, 1.0], requires_grad=True)
    outputs = scaled_lse_sweep(torch.ones(3, 2), torch.ones(1000, 2), tau, torch.tensor([0, 999, 5]))
    torch.testing.assert_close(outputs.top_logprob, torch.full((3,), -math.log(1000)))
    assert outputs.argmax.eq(0).all()
    assert outputs.target.equal(outputs.top)
    torch.testing.assert_close(outputs.mean, outputs.top)
    torch.testing.assert_close(outputs.expected, torch.full((3,), 2.0))
    (slope,) = torch.autograd.grad((outputs.lse - outputs.target).sum(), tau)
    torch.testing.assert_close(slope, torch.zeros(3), rtol=0, atol=1e-5)


def test_scaled_lse_sweep_argmax_is_the_first_of_equals_across_chunks(monkeypatch):
    logits = torch.zeros(3, 40)
    logits[0, [13, 14, 37]] = 5.0
    logits[1, [39]] = 1.0
    logits[2, [9, 10]] = 2.0
    for width in (1, 3, 10, 40):
        monkeypatch.setattr(MODULE, "_chunk_shape", lambda rows, vocab, device, w=width: (2, w))
        assert sweep(one_hot_inputs(logits, 0.0)).argmax.tolist() == [13, 39, 9]


@pytest.mark.parametrize("highest", [300, -300])
def test_scaled_lse_sweep_maximum_that_moves_at_every_chunk_or_never(monkeypatch, highest):
    monkeypatch.setattr(MODULE, "_chunk_shape", lambda rows, vocab, device: (1, 1))
    logits = torch.linspace(-highest, highest, 41)[None]
    for tau in (-3.0, 0.0, 2.0):
        assert_matches_reference(one_hot_inputs(logits, tau, label=20), {}, backend="torch", atol=1e-4)


def test_scaled_lse_sweep_nan_or_infinite_logit_spoils_its_own_row_alone():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    good = sweep(one_hot_inputs(logits, 0.3))
    weight = logits.T.contiguous()
    hidden = torch.eye(4)
    hidden[1, 1], hidden[2, 2] = math.nan, math.inf
    bad = scaled_lse_sweep(hidden, weight, torch.full((4,), 0.3), torch.zeros(4, dtype=torch.long))
    for ours, theirs in zip(bad[:6], good[:6], strict=True):
        assert ours[1:3].isnan().all()
        torch.testing.assert_close(ours[[0, 3]], theirs[[0, 3]])
    assert bad.argmax[1:3].tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_lse_sweep_rounds_logits_as_the_model_does(dtype):
    (hidden, weight, _, _), _ = sweep_inputs(50, 64, 300, dtype=dtype)
    outputs = scaled_lse_sweep(hidden, weight, torch.zeros(50), torch.zeros(50, dtype=torch.long))
    logits = functional.linear(hidden, weight)
    assert logits.dtype == dtype
    assert outputs.top.equal(logits.float().amax(-1))
    assert outputs.argmax.equal(logits.float().argmax(-1))
    torch.testing.assert_close(outputs.lse, logits.float().logsumexp(-1))

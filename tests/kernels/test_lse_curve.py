import math

import pytest
import torch

from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE
from llmrl_kernels import curve_knots, lse_curve, lse_curve_reference, lse_interpolate

KNOTS = curve_knots()


def random_logits(rows, columns, spread=3.0, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def definition(logits, log_scale):
    """L and dL/dlog s in float64, the slope by automatic differentiation; `log_scale` broadcasts over rows."""
    z = logits.double()
    shifted = z - z.amax(-1, keepdim=True)
    u = (log_scale + torch.zeros(len(z), dtype=torch.float64)).requires_grad_()
    value = (shifted * u.exp()[:, None]).logsumexp(-1)
    return value.detach(), torch.autograd.grad(value.sum(), u)[0]


def assert_curve_is_right(logits, rtol=2e-5, atol=2e-6):
    values, slopes = lse_curve(logits, KNOTS)
    assert values.shape == slopes.shape == (len(logits), len(KNOTS))
    assert values.dtype == slopes.dtype == torch.float32
    for k in (0, 1, 9, 22, 35, 48, len(KNOTS) - 1):
        value, slope = definition(logits, KNOTS[k])
        torch.testing.assert_close(values[:, k].double(), value, rtol=rtol, atol=atol)
        torch.testing.assert_close(slopes[:, k].double(), slope, rtol=10 * rtol, atol=10 * atol)


@pytest.mark.parametrize("columns", [1, 2, 63, 100, 1000])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_lse_curve_matches_definition(rows, columns):
    assert_curve_is_right(random_logits(rows, columns))


def test_lse_curve_wide_rows_in_several_blocks():
    assert_curve_is_right(random_logits(19, 20_011))


def test_lse_curve_no_rows():
    values, slopes = lse_curve(torch.empty(0, 50), KNOTS)
    assert values.shape == slopes.shape == (0, len(KNOTS))


def test_lse_curve_one_column_is_zero():
    values, slopes = lse_curve(torch.tensor([[3.0], [-1e4]]), KNOTS)
    assert values.eq(0).all()
    assert slopes.eq(0).all()


def test_lse_curve_two_equal_logits_is_log_two():
    values, slopes = lse_curve(torch.full((1, 2), -5.0), KNOTS)
    torch.testing.assert_close(values, torch.full_like(values, math.log(2)))
    assert slopes.eq(0).all()


def test_lse_curve_ignores_padded_vocabulary():
    logits = random_logits(9, 100)
    padded = torch.cat([logits, torch.full((9, 28), -math.inf)], dim=1)
    for plain, with_padding in zip(lse_curve(logits, KNOTS), lse_curve(padded, KNOTS), strict=True):
        assert torch.isfinite(with_padding).all()
        torch.testing.assert_close(with_padding, plain, rtol=1e-5, atol=1e-6)


def test_lse_curve_huge_logits():
    logits = random_logits(5, 63, spread=1e4)
    assert_curve_is_right(logits, rtol=1e-4)
    assert_curve_is_right(random_logits(5, 63) + 1e4, rtol=1e-3, atol=1e-4)


def test_lse_curve_nan_row_is_nan_and_others_are_not():
    logits = random_logits(3, 100)
    logits[1, 40] = math.nan
    for table in lse_curve(logits, KNOTS):
        assert table[1].isnan().all()
        assert torch.isfinite(table[[0, 2]]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lse_curve_computes_half_precision_in_float32(dtype):
    logits = random_logits(4, 100).to(dtype)
    for half, full in zip(lse_curve(logits, KNOTS), lse_curve(logits.float(), KNOTS), strict=True):
        assert half.dtype == torch.float32
        assert half.equal(full)


def test_lse_curve_leaves_its_input_alone():
    logits = random_logits(4, 100)
    before = logits.clone()
    lse_curve(logits, KNOTS)
    assert logits.equal(before)


def test_lse_curve_slope_is_the_numeric_derivative():
    logits = random_logits(6, 100)
    _, slopes = lse_curve(logits, KNOTS)
    step = 1e-5
    z = logits.double() - logits.double().amax(-1, keepdim=True)
    for k in (0, 20, 40, len(KNOTS) - 1):
        up, down = [(z * math.exp(float(KNOTS[k]) + sign * step)).logsumexp(-1) for sign in (1, -1)]
        torch.testing.assert_close(slopes[:, k].double(), (up - down) / (2 * step), rtol=1e-4, atol=1e-5)


def test_lse_curve_reference_matches_definition():
    logits = random_logits(5, 63)
    logits[:, 50:] = -math.inf
    values, slopes = lse_curve_reference(logits, KNOTS)
    for k in range(len(KNOTS)):
        value, slope = definition(logits[:, :50], KNOTS[k])
        torch.testing.assert_close(values[:, k], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slopes[:, k], slope, rtol=1e-10, atol=1e-10)


def test_curve_knots_reach_over_the_clip_of_a_head():
    assert KNOTS[0] <= MIN_LOG_SCALE
    assert KNOTS[-1] >= MAX_LOG_SCALE
    torch.testing.assert_close(KNOTS.diff(), torch.full((len(KNOTS) - 1,), math.log(2) / 8, dtype=torch.float64))


@pytest.fixture(scope="module")
def model_logits(stories_dir, stories_tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories_dir)
    ids = stories_tokenizer(
        "Once upon a time, there was a little girl named Lily. " * 12, return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        return model(ids).logits[0].float().clone()


def zipf_logits(rows=16, columns=32_000):
    ranks = torch.arange(1, columns + 1, dtype=torch.float32)
    return random_logits(rows, columns, spread=1.5) - 1.2 * ranks.log()


@pytest.mark.parametrize("source", ["model", "zipf"])
def test_lse_interpolate_error_is_below_1e_4_everywhere(source, model_logits):
    logits = model_logits if source == "model" else zipf_logits()
    values, slopes = lse_curve(logits, KNOTS)
    for log_scale in [MIN_LOG_SCALE, MAX_LOG_SCALE, *torch.linspace(MIN_LOG_SCALE, MAX_LOG_SCALE, 23).tolist()]:
        constant = torch.full((len(logits),), log_scale)
        value, _ = definition(logits, constant[0].double())
        error = lse_interpolate(values, slopes, constant).double() - value
        assert error.abs().max() < 1e-4, log_scale


def test_lse_interpolate_at_a_knot_is_the_table():
    logits = random_logits(50, 100)
    values, slopes = lse_curve(logits, KNOTS)
    for k in (0, 1, 30, len(KNOTS) - 1):
        at_knot = lse_interpolate(values.double(), slopes.double(), KNOTS[k].expand(50))
        torch.testing.assert_close(at_knot, values[:, k].double(), rtol=0, atol=1e-9)


def test_lse_interpolate_takes_one_scale_a_row(model_logits):
    logits = model_logits[:40]
    values, slopes = lse_curve(logits, KNOTS)
    log_scale = torch.linspace(MIN_LOG_SCALE, MAX_LOG_SCALE, 40)
    direct = ((logits.double() - logits.double().amax(-1, keepdim=True)) * log_scale.double().exp()[:, None]).logsumexp(
        -1
    )
    torch.testing.assert_close(lse_interpolate(values, slopes, log_scale).double(), direct, rtol=0, atol=1e-4)


def test_lse_interpolate_gradient_is_the_float64_derivative(model_logits):
    values, slopes = lse_curve(model_logits, KNOTS)
    for log_scale in (MIN_LOG_SCALE, -1.234, 0.0, 0.777, MAX_LOG_SCALE):
        u = torch.full((len(model_logits),), log_scale, requires_grad=True)
        (gradient,) = torch.autograd.grad(lse_interpolate(values, slopes, u).sum(), u)
        _, slope = definition(model_logits, u.detach()[0].double())
        assert (gradient.double() - slope).abs().max() < 3e-3, log_scale

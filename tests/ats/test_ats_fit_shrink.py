"""How far a fitted head's temperatures are drawn in: the factor from the validation part, the offset from both parts."""

import pytest
import torch

from llmrl.ats.fit_heads import shrink
from llmrl.ats.losses import Loss
from llmrl.ats.run_heads import head_log_scales
from llmrl.heads import HeadSpec, build_head

NLL = Loss("nll")
DIRECTION = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])


def mean_nll(world, log_scale):
    """From full logits, float64."""
    scaled = world.logits.double() * log_scale.double().exp()[:, None]
    return torch.nn.functional.cross_entropy(scaled, world.features.target).item()


def known_head(direction):
    head = build_head(HeadSpec("temperature", "linear", 8)).requires_grad_(False)
    head.weight.copy_(direction[None])
    head.bias.fill_(-0.4)
    return head


def test_shrink_draws_tau_in_where_it_is_spread_too_far(make_world):
    """The truth is half as wide as the head believes."""
    fit, validation, test = (make_world(lambda h: h @ DIRECTION / 2 - 0.4, tokens=16384, seed=i) for i in range(3))
    head = known_head(DIRECTION)
    before = head_log_scales(head, test.features)
    factor = shrink(head, fit.features, validation.features, NLL)
    assert factor == pytest.approx(0.5, abs=0.12)
    assert head.bias.item() == pytest.approx(-0.4, abs=0.05)
    mean = head_log_scales(known_head(DIRECTION), validation.features).mean()
    after = head_log_scales(head, test.features)
    offset = after - (mean + factor * (before - mean))  # one number: it went into the last layer
    assert offset[before > -2.5].std() < 1e-4
    assert offset[before > -2.5].abs().max() < 0.05


def test_shrink_takes_the_factor_from_validation_and_the_offset_from_both_parts(make_world):
    """In the fit part the head is right but for its mean; in the validation part its temperatures lie half as far apart."""
    fit = make_world(lambda h: h @ DIRECTION - 0.8, tokens=8192, seed=1)
    validation = make_world(lambda h: h @ DIRECTION / 2 - 0.4, tokens=4096, seed=2)
    before = [head_log_scales(known_head(DIRECTION), world.features) for world in (fit, validation)]
    head = known_head(DIRECTION)
    factor = shrink(head, fit.features, validation.features, NLL)
    assert factor == pytest.approx(0.5, abs=0.12)
    drawn_in = [before[1].mean() + factor * (tau - before[1].mean()) for tau in before]

    def best_offset(*shares):
        def score(u):
            return sum(n * mean_nll(w, tau + u) for n, w, tau in zip(shares, (fit, validation), drawn_in, strict=True))

        return min(torch.linspace(-0.5, 0.5, 101).tolist(), key=score)

    found = (head_log_scales(head, validation.features) - drawn_in[1]).median().item()
    assert found == pytest.approx(best_offset(8192, 4096), abs=0.02)
    assert abs(best_offset(8192, 4096) - best_offset(0, 4096)) > 0.1


def test_shrink_never_widens_and_leaves_a_right_head_alone(make_world):
    fit, validation = (make_world(lambda h: h @ DIRECTION - 0.4, tokens=16384, seed=i) for i in range(2))
    narrow, right = known_head(DIRECTION / 2), known_head(DIRECTION)
    assert shrink(narrow, fit.features, validation.features, NLL) == 1.0
    assert shrink(right, fit.features, validation.features, NLL) > 0.85


def test_shrink_of_a_head_that_knows_nothing_is_a_scalar(make_world):
    fit, validation = (make_world(lambda h: torch.full((len(h),), -0.5), tokens=8192, seed=i) for i in range(2))
    head = known_head(DIRECTION)
    assert shrink(head, fit.features, validation.features, NLL) < 0.15
    assert head_log_scales(head, validation.features).mean() == pytest.approx(-0.5, abs=0.08)

"""Ratios of policy to sampler: their numbers, when they are refused, and what they are for."""

import pytest
import torch

from llmrl.errors import ConfigError
from llmrl.rollout.ratios import log_ratios, tempered_logprobs
from llmrl.types import SamplingConfig


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tempered_logprobs_equal_float64(temperature, dtype):
    logits = (20 * torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    ids = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(1))
    found = tempered_logprobs(logits, ids, temperature)
    wanted = (logits.double() / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert found.shape == (3, 5)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 2e-4  # values reach -300


def test_tempered_logprobs_have_the_gradient_of_log_softmax():
    logits = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    tempered_logprobs(logits, torch.tensor(0), 2.0).backward()
    probs = (logits.detach() / 2).softmax(-1)
    torch.testing.assert_close(logits.grad, (torch.tensor([1.0, 0.0, 0.0]) - probs) / 2)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_tempered_logprobs_refuse_a_temperature_that_is_not_positive(temperature):
    with pytest.raises(ConfigError, match="above 0"):
        tempered_logprobs(torch.zeros(3), torch.tensor(0), temperature)


@pytest.mark.parametrize(
    ("setting", "mend"),
    [
        ({"top_p": 0.9}, "set top_p=1"),
        ({"top_k": 5}, "set top_k=0"),
        ({"min_p": 0.1}, "set min_p=0"),
        ({"temperature": 0.0}, "set temperature=1"),
        ({"json_schema": {"type": "object"}}, "set json_schema=None"),
        ({"top_p": 0.9, "min_p": 0.1}, "set top_p=1, min_p=0"),
    ],
    ids=str,
)
def test_log_ratios_refuse_truncated_samples(setting, mend):
    sampling = SamplingConfig(**setting)
    with pytest.raises(ConfigError) as caught:
        log_ratios(torch.zeros(2), torch.zeros(2), sampling, new_temperature=sampling.temperature or 1.0)
    assert str(caught.value).endswith(mend)


@pytest.mark.parametrize(("new", "behaviour"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.7), (0.5, 0.5)])
def test_log_ratios_refuse_unequal_temperatures(new, behaviour):
    sampling = SamplingConfig(temperature=0.7)
    with pytest.raises(ConfigError, match=r"drawn at temperature 0\.7.*tempered_logprobs\(\.\.\., 0\.7\)"):
        log_ratios(torch.zeros(2), torch.zeros(2), sampling, new_temperature=new, behaviour_temperature=behaviour)


def test_log_ratios_take_engine_logprobs_at_temperature_one_only():
    """Engines record at temperature 1, so that is what the behaviour's temperature is unless said otherwise."""
    with pytest.raises(ConfigError, match="of the sampler of 1"):
        log_ratios(torch.zeros(2), torch.zeros(2), SamplingConfig(temperature=0.7), new_temperature=0.7)
    found = log_ratios(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), SamplingConfig(), new_temperature=1.0)
    assert found.tolist() == [0.5, -1.0]


def test_log_ratios_are_importance_weights():
    """Over a vocabulary of six: E_old[ratio f] = E_new[f], where both are taken at the temperature drawn at."""
    generator = torch.Generator().manual_seed(3)
    old, new = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    values, ids, t = torch.arange(6.0), torch.arange(6), 0.6
    drawn_from = (old.double() / t).softmax(-1)
    behaviour = tempered_logprobs(old.expand(6, 6), ids, t)
    policy = tempered_logprobs(new.expand(6, 6), ids, t)
    log_ratio = log_ratios(policy, behaviour, SamplingConfig(temperature=t), new_temperature=t, behaviour_temperature=t)
    wanted = ((new.double() / t).softmax(-1) * values).sum()
    assert abs((drawn_from * log_ratio.double().exp() * values).sum() - wanted) < 1e-5
    assert abs((drawn_from * log_ratio.double().exp()).sum() - 1) < 1e-6
    # with one side at temperature 1, which log_ratios refuses, neither holds
    for one_sided in (policy - old.log_softmax(-1), new.log_softmax(-1) - behaviour):
        assert abs((drawn_from * one_sided.double().exp() * values).sum() - wanted) > 0.1

"""Value heads: shapes against formulas, the start at the behaviour policy, the support filter, the fold."""

import pytest
import torch

from llmrl.errors import ModelError
from llmrl.heads import HeadSpec, build_head
from llmrl.logits_heads import apply_logits_heads
from llmrl.value_heads import fold_values, initialise_values, steer

WIDTH, VOCABULARY, INNER = 6, 11, 4
HIDDEN = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def head(architecture, *, drawn=True, beta=0.0, support=0.0):
    spec = HeadSpec("value", architecture, WIDTH, VOCABULARY, INNER, beta=beta, support=support)
    made, draw = build_head(spec), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if drawn:
                parameter.normal_(generator=draw)
    return made


@pytest.mark.parametrize("architecture", ["linear", "low_rank", "mlp"])
def test_q_and_v_are_their_formulas(architecture):
    made = head(architecture)
    q = made.q(HIDDEN)
    assert q.shape == (2, 3, 5, VOCABULARY)
    for i in range(2):
        read = HIDDEN
        if architecture != "linear":
            read = HIDDEN @ made.down_weight[i].T
        if architecture == "mlp":
            read = (read + made.down_bias[i]).clamp(min=0)
        bias = made.q_bias[i] if architecture == "mlp" else 0
        assert torch.allclose(q[i], read @ made.q_weight[i].T + bias, atol=1e-5)
    read = HIDDEN if architecture != "mlp" else (HIDDEN @ made.v_down_weight.T + made.v_down_bias).clamp(min=0)
    assert torch.allclose(made.v(HIDDEN), (read @ made.v_weight.T + made.v_bias)[..., 0], atol=1e-5)
    states, tokens = HIDDEN.flatten(0, 1), torch.arange(15) % VOCABULARY
    assert torch.allclose(made.q_of(states, tokens), made.q(states)[:, torch.arange(15), tokens], atol=1e-5)
    slow = {id(p) for p in made.q_parameters()}
    assert slow == {id(p) for name, p in made.named_parameters() if name[0] != "v"}


@pytest.mark.parametrize("architecture", ["linear", "low_rank", "mlp"])
def test_a_fresh_head_is_the_behaviour_policy_at_every_beta(architecture):
    made = head(architecture, drawn=False, beta=16.0)
    initialise_values(made, torch.Generator().manual_seed(2))
    logits = torch.randn(3, 5, VOCABULARY)
    assert torch.equal(apply_logits_heads(torch.nn.ModuleDict({"value": made}), logits, HIDDEN), logits)
    assert float(made.v(HIDDEN).detach().abs().max()) == 0
    if architecture != "linear":
        assert float(made.down_weight.detach().std()) == pytest.approx(WIDTH**-0.5, rel=0.3)
    made.q_of(HIDDEN[0], torch.arange(5)).sum().backward()
    assert float(made.q_weight.grad.abs().sum()) > 0  # it can learn from there


def test_the_policy_is_the_behaviour_policy_times_exp_of_beta_q():
    made = head("low_rank", beta=0.7)
    logits = torch.randn(3, 5, VOCABULARY)
    found = apply_logits_heads(torch.nn.ModuleDict({"value": made}), logits, HIDDEN).softmax(-1)
    wanted = logits.softmax(-1) * (0.7 * made.q(HIDDEN).min(0).values).exp()
    assert torch.allclose(found, wanted / wanted.sum(-1, keepdim=True), atol=1e-5)
    made.beta = 0.0  # chosen after loading
    assert torch.equal(apply_logits_heads(torch.nn.ModuleDict({"value": made}), logits, HIDDEN), logits)


def test_tokens_that_were_never_said_are_not_chosen_however_good_q_says_they_are():
    """Returns are negative and Q of the unseen stays at 0: what measured runs died of."""
    logits = torch.tensor([[0.0, -1.0, -30.0]])
    q = torch.tensor([[-5.0, -6.0, 0.0]])
    assert steer(logits, q, 16.0, 0.0).argmax() == 2
    filtered = steer(logits, q, 16.0, 0.05).softmax(-1)
    assert filtered[0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert steer(logits, q, 16.0, 0.05)[0, 2] == -torch.inf
    # a share of the likeliest: exp(-1) of it stays at .3 and goes at .4
    assert torch.isfinite(steer(logits, None, 0.0, 0.3))[0].tolist() == [True, True, False]
    assert torch.isfinite(steer(logits, None, 0.0, 0.4))[0].tolist() == [True, False, False]


@pytest.mark.parametrize("architecture", ["linear", "low_rank"])
def test_the_fold_is_the_mean_of_both_heads(architecture):
    made, lm_head = head(architecture), torch.randn(VOCABULARY, WIDTH)
    wanted = HIDDEN @ lm_head.T + 2.0 * made.q(HIDDEN).mean(0)
    assert torch.allclose(HIDDEN @ fold_values(lm_head, made, 2.0).T, wanted, atol=1e-4)


@pytest.mark.parametrize(("name", "value"), [("beta", -1.0), ("beta", float("nan")), ("support", 1.5)])
def test_bad_settings_of_a_head_are_refused(name, value):
    with pytest.raises(ModelError, match="beta >= 0 and support from 0 to 1"):
        HeadSpec("value", "linear", WIDTH, VOCABULARY, **{name: value})


def test_a_spec_is_the_same_after_json():
    spec = HeadSpec("value", "low_rank", WIDTH, VOCABULARY, INNER, beta=4.0, support=0.02)
    assert HeadSpec(**spec.to_json()) == spec
    assert "beta" not in HeadSpec("temperature", "linear", WIDTH).to_json()

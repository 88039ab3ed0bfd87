import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmrl.errors import ModelError
from llmrl.heads import (
    HEADS_FILE,
    BaseReference,
    HeadsConfig,
    HeadSpec,
    build_head,
    build_heads,
    load_head_tensors,
    save_head_tensors,
)
from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE, TemperatureHead, apply_logits_heads
from llmrl.modeling import read_heads_config, read_tensors
from llmrl.reward_heads import RewardHead

LINEAR = HeadSpec("temperature", "linear", 8)
SCALAR = HeadSpec("temperature", "scalar", 8)
REWARD = HeadSpec("reward", "linear", 8, outputs=3)
BASE = BaseReference("base", "sha256:w", "sha256:t", "sha256:c", revision="abc")
CONFIG = HeadsConfig({"temperature": LINEAR}, BASE, "llama", "LlamaForCausalLM", method="ats-linear")


def random_(head, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return head


def scaled(head, logits, hidden):
    return apply_logits_heads(nn.ModuleDict({"temperature": head}), logits, hidden)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- the heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LINEAR, SCALAR], ids=["linear", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_head_fresh_is_the_base_bit_for_bit(spec, dtype):
    hidden, logits = torch.randn(4, 5, 8).to(dtype) * 100, torch.randn(4, 5, 33).to(dtype) * 30
    out = scaled(build_head(spec), logits, hidden)
    assert out.dtype == torch.float32
    assert out.to(dtype).equal(logits)
    assert out.equal(logits.float())


def test_temperature_head_is_the_formula():
    head = random_(build_head(LINEAR), spread=0.2)
    hidden, logits = torch.randn(6, 8), torch.randn(6, 11)
    tau = hidden.double() @ head.weight[0].double() + head.bias.double()
    assert tau.abs().max() < MAX_LOG_SCALE  # the clip has a test of its own
    torch.testing.assert_close(head(hidden)[:, 0].double(), tau, rtol=1e-5, atol=1e-6)
    expected = logits.double() * tau.exp()[:, None]
    torch.testing.assert_close(scaled(head, logits, hidden).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [LINEAR, SCALAR], ids=["linear", "scalar"])
def test_temperature_head_multiplier_stays_in_its_range(spec):
    for bias, multiplier in ((1000.0, 10.0), (-1000.0, math.exp(-3))):
        head = build_head(spec)
        with torch.no_grad():
            head.bias.fill_(bias)
        out = scaled(head, torch.ones(2, 4), torch.randn(2, 8))
        torch.testing.assert_close(out, torch.full((2, 4), multiplier))
    assert pytest.approx(math.log(10)) == MAX_LOG_SCALE
    assert MIN_LOG_SCALE == -3.0


def test_temperature_head_keeps_neighbouring_bfloat16_logits_apart():
    """Two bfloat16 numbers that differ in the last bit, under many temperatures: the order stays."""
    lower = torch.linspace(0.5, 40, 200).to(torch.bfloat16)
    upper = torch.nextafter(lower, torch.full_like(lower, 1e4))
    assert (upper > lower).all()
    logits = torch.stack([lower, upper, -upper, -lower], dim=1)
    for tau in torch.linspace(MIN_LOG_SCALE, MAX_LOG_SCALE, 101):
        head = build_head(SCALAR)
        with torch.no_grad():
            head.bias.fill_(tau)
        out = scaled(head, logits, torch.zeros(200, 8, dtype=torch.bfloat16))
        assert (out[:, 1] > out[:, 0]).all()
        assert (out[:, 3] > out[:, 2]).all()


def test_temperature_head_keeps_float32_when_the_model_is_cast():
    head = random_(build_head(LINEAR))
    hidden = torch.randn(5, 8).to(torch.bfloat16)
    before = head(hidden)
    assert before.dtype == torch.float32
    assert head.to(torch.bfloat16)(hidden).dtype == torch.float32


def test_reward_head_scores_are_float32_and_linear():
    head = random_(build_head(REWARD))
    hidden = torch.randn(4, 8).to(torch.bfloat16)
    expected = hidden.double() @ head.weight.double().T + head.bias.double()
    assert head(hidden).dtype == torch.float32
    torch.testing.assert_close(head(hidden).double(), expected, rtol=1e-5, atol=1e-5)


def test_apply_logits_heads_skips_heads_with_scores_of_their_own():
    heads = nn.ModuleDict({"reward": random_(RewardHead(REWARD)), "temperature": random_(TemperatureHead(LINEAR))})
    logits, hidden = torch.randn(2, 5), torch.randn(2, 8)
    assert apply_logits_heads(heads, logits, hidden).equal(scaled(heads["temperature"], logits, hidden))
    assert apply_logits_heads(nn.ModuleDict(), logits, hidden) is logits


def test_build_heads_are_frozen_and_zero():
    heads = build_heads(CONFIG)
    assert list(heads) == ["temperature"]
    assert all(not p.requires_grad and p.eq(0).all() and p.dtype == torch.float32 for p in heads.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("temprature", "linear", 8), "unknown head kind 'temprature'; did you mean 'temperature'?"),
        (("temperature", "liner", 8), "unknown architecture 'liner' for a temperature head; did you mean 'linear'?"),
        (("reward", "scalar", 8), "unknown architecture 'scalar' for a reward head"),
        (("temperature", "linear", 0), "a linear head needs hidden_size >= 1, got 0"),
        (("reward", "linear", 8, 0), "needs outputs >= 1, got 0"),
        (("temperature", "mlp", 8), "a mlp head needs intermediate_size >= 1, got 0"),
        (("temperature", "transformer", 8, 1, 16, 4, 3, 8), "num_heads a multiple of num_kv_heads"),
        (("temperature", "transformer", 8, 1, 16, 4, 2, 7), "an even head_dim"),
        (("vector", "linear", 8, 100), "unknown architecture 'linear' for a vector head"),
        (("temperature", "linear", 8, 2), "a temperature head has 1 output, got 2"),
    ],
)
def test_head_spec_refuses(fields, message):
    with pytest.raises(ModelError) as error:
        HeadSpec(*fields)
    assert message in str(error.value)


# --- the description --------------------------------------------------------------------------------------------------


def test_heads_config_json_round_trip():
    config = replace(CONFIG, heads={"temperature": SCALAR, "reward": REWARD}, merged=True)
    assert HeadsConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    graded = replace(config, level="answer", answer_confidence="product")
    assert HeadsConfig.from_json(json.loads(json.dumps(graded.to_json()))) == graded
    older = {key: value for key, value in config.to_json().items() if key not in ("level", "answer_confidence")}
    assert HeadsConfig.from_json(older) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "head format 2 is not 1: install the llmrl that wrote it"),
        ({"format": None}, "head format None is not 1"),
        ({"mergd": True}, "unknown key 'mergd' in the head configuration; did you mean 'merged'?"),
        ({"heads": None}, "the head configuration is damaged"),
        ({"heads": {"temperature": {"kind": "temperature"}}}, "the head configuration is damaged"),
        ({"base": {"model": "x"}}, "the head configuration is damaged"),
        ({"heads": {"temperature": {**LINEAR.__dict__, "kind": "teperature"}}}, "unknown head kind 'teperature'"),
    ],
)
def test_heads_config_from_json_refuses(change, message):
    with pytest.raises(ModelError) as error:
        HeadsConfig.from_json({**CONFIG.to_json(), **change})
    assert message in str(error.value)


@pytest.mark.parametrize("missing", ["heads", "base", "base_model_type"])
def test_heads_config_from_json_with_a_part_missing(missing):
    value = CONFIG.to_json()
    del value[missing]
    with pytest.raises(ModelError, match="the head configuration is damaged"):
        HeadsConfig.from_json(value)


@pytest.mark.parametrize("value", [None, 3, "x", []])
def test_heads_config_from_json_that_is_no_object(value):
    with pytest.raises(ModelError, match="is not 1"):
        HeadsConfig.from_json(value)


# --- tensors on disk --------------------------------------------------------------------------------------------------


def test_head_tensors_save_and_load_are_equal(tmp_path):
    heads = nn.ModuleDict({"temperature": random_(build_head(LINEAR)), "reward": random_(build_head(REWARD))})
    save_head_tensors(tmp_path, heads)
    stored = load_file(tmp_path / HEADS_FILE)
    assert set(stored) == {f"llmrl_heads.{n}.{p}" for n in heads for p in ("weight", "bias")}
    assert (tmp_path / HEADS_FILE).stat().st_mode & 0o777 == 0o644
    fresh = build_heads(replace(CONFIG, heads={"temperature": LINEAR, "reward": REWARD}))
    load_head_tensors(fresh, stored)
    for name, value in heads.state_dict().items():
        assert fresh.state_dict()[name].equal(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("llmrl_heads.temperature.bias"), "temperature.bias is missing from llmrl_heads.safetensors"),
        (lambda t: t.update({"llmrl_heads.other.bias": torch.zeros(1)}), "other.bias is not expected in"),
        (
            lambda t: t.update({"llmrl_heads.temperature.weight": torch.zeros(1, 9)}),
            "temperature.weight has shape [1, 9], config.json says [1, 8]",
        ),
        (
            lambda t: t["llmrl_heads.temperature.weight"].__setitem__((0, 3), math.nan),
            "temperature.weight holds NaN or infinity: fit the head again",
        ),
        (lambda t: t["llmrl_heads.temperature.bias"].fill_(math.inf), "temperature.bias holds NaN or infinity"),
    ],
)
def test_load_head_tensors_refuses(change, message):
    tensors = {f"llmrl_heads.temperature.{k}": v.clone() for k, v in random_(build_head(LINEAR)).state_dict().items()}
    change(tensors)
    with pytest.raises(ModelError) as error:
        load_head_tensors(build_heads(CONFIG), tensors)
    assert message in str(error.value)


def test_load_head_tensors_ignores_the_tensors_of_the_base():
    tensors = {f"llmrl_heads.temperature.{k}": v for k, v in random_(build_head(LINEAR)).state_dict().items()}
    heads = build_heads(CONFIG)
    load_head_tensors(heads, {**tensors, "model.norm.weight": torch.ones(8)})
    assert heads["temperature"].weight.equal(tensors["llmrl_heads.temperature.weight"])


def test_read_tensors_missing_and_damaged(tmp_path):
    with pytest.raises(ModelError, match=r"not found: .*lost its head"):
        read_tensors(tmp_path / HEADS_FILE)
    (tmp_path / HEADS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ModelError, match=r"is damaged \(.*\): save it again"):
        read_tensors(tmp_path / HEADS_FILE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no model folder: it has no config.json"),
        ("{broken", r"config\.json is damaged"),
        ('{"model_type": "llama"}', "carries no llmrl heads; make it with: llmrl calibrate MODEL"),
        ('{"model_type": "llmrl", "llmrl": {"format": 9}}', "head format 9 is not 1"),
    ],
)
def test_read_heads_config_refuses(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        read_heads_config(tmp_path)

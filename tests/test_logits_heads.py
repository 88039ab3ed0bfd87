"""The heads as functions of hidden states and logits: against transformers' own decoder layer, and by their formulas."""

import math

import pytest
import torch
from torch import nn

from llmrl.heads import HeadsConfig, HeadSpec, build_head, build_heads, load_head_tensors, save_head_tensors
from llmrl.logits_heads import (
    MAX_LOG_SCALE,
    MIN_LOG_SCALE,
    apply_logits_heads,
    initialise,
    reads_sequence,
    rms_norm,
)
from llmrl.modeling import read_tensors

MLP = HeadSpec("temperature", "mlp", 16, intermediate_size=24)
BLOCK = HeadSpec(
    "temperature", "transformer", 16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=500.0
)
VECTOR = HeadSpec("vector", "vector", 16, outputs=11)
SPECS = pytest.mark.parametrize("spec", [MLP, BLOCK, VECTOR], ids=lambda spec: spec.architecture)


def filled(spec, seed=0):
    """A head whose every parameter matters, with tau well within its clip."""
    head = build_head(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if name == "weight":
                parameter.mul_(0.1)
    return head


def scaled(head, logits, hidden):
    return apply_logits_heads(nn.ModuleDict({"temperature": head}), logits, hidden)


@SPECS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_head_is_the_base_bit_for_bit(spec, dtype):
    torch.manual_seed(0)
    head = build_head(spec)
    initialise(head, torch.Generator().manual_seed(1))
    hidden, logits = torch.randn(2, 5, 16).to(dtype) * 100, torch.randn(2, 5, 11).to(dtype) * 30
    assert scaled(head, logits, hidden).equal(logits.float())


@SPECS
def test_building_a_head_draws_no_random_numbers(spec):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_head(spec)
    assert torch.get_rng_state().equal(before)


def test_initialise_is_seeded_and_leaves_the_last_layer_zero():
    first, again, other = (build_head(BLOCK) for _ in range(3))
    for head, seed in ((first, 5), (again, 5), (other, 6)):
        initialise(head, torch.Generator().manual_seed(seed))
    assert first.q_weight.equal(again.q_weight)
    assert not first.q_weight.equal(other.q_weight)
    assert first.weight.eq(0).all()
    assert first.gate_weight.std().item() == pytest.approx(16**-0.5, rel=0.2)


def test_initialise_draws_the_matrices_in_a_fixed_order():
    """So a seed gives the same fit in every version."""
    head = build_head(BLOCK)
    initialise(head, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    shapes = {
        "gate": (24, 16),
        "up": (24, 16),
        "down": (16, 24),
        "q": (32, 16),
        "k": (16, 16),
        "v": (16, 16),
        "o": (16, 32),
    }
    for name, shape in shapes.items():
        drawn = torch.empty(shape).normal_(0.0, shape[1] ** -0.5, generator=generator)
        assert getattr(head, f"{name}_weight").equal(drawn), name


@SPECS
def test_heads_have_no_modules_that_quantisers_and_adapters_look_for(spec):
    assert list(build_head(spec).children()) == []


def test_mlp_head_is_its_formula():
    head, hidden = filled(MLP), torch.randn(7, 16, generator=torch.Generator().manual_seed(2))
    w = {name: p.double() for name, p in head.named_parameters()}
    x = hidden.double() * w["scale"] + w["shift"]
    gate = x @ w["gate_weight"].T + w["gate_bias"]
    up = x @ w["up_weight"].T + w["up_bias"]
    y = x + (gate / (1 + torch.exp(-gate)) * up) @ w["down_weight"].T
    expected = y @ w["weight"][0] + w["bias"]
    assert expected.std() > 0.1
    torch.testing.assert_close(head(hidden)[:, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_transformer_head_is_a_llama_decoder_layer_and_a_linear_layer():
    """The same weights in transformers' LlamaDecoderLayer."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, mlp_bias=True,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )  # fmt: skip
    head, hidden = filled(BLOCK), torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(2))
    layer = LlamaDecoderLayer(config, 0)
    own = head.state_dict()
    attention = {f"self_attn.{n}_proj.weight": own[f"{n}_weight"] for n in "qkvo"}
    names = [("gate", "weight"), ("gate", "bias"), ("up", "weight"), ("up", "bias"), ("down", "weight")]
    mlp = {f"mlp.{part}_proj.{kind}": own[f"{part}_{kind}"] for part, kind in names}
    norms = {"input_layernorm.weight": head.attention_norm, "post_attention_layernorm.weight": head.mlp_norm}
    missing = layer.load_state_dict({**attention, **mlp, **norms, "mlp.down_proj.bias": torch.zeros(16)})
    assert not missing.missing_keys
    x = hidden * head.scale + head.shift
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(9)[None])
    with torch.no_grad():
        y = layer(x, attention_mask=mask, position_embeddings=rotary)
        y = y[0] if isinstance(y, tuple) else y
        expected = y @ head.weight[0] + head.bias
        torch.testing.assert_close(head(hidden)[..., 0], expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.05


def test_transformer_head_reads_earlier_positions_only():
    head, hidden = filled(BLOCK), torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2))
    before = head(hidden)
    hidden[0, 5] += 3.0
    after = head(hidden)
    assert after[0, :5].equal(before[0, :5])
    assert ((after - before)[0, 5:].abs() > 1e-4).all()


def test_transformer_head_depends_on_distances_not_on_the_first_position():
    head, hidden = filled(BLOCK), torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(head(hidden, torch.arange(9) + 40), head(hidden), rtol=0, atol=2e-6)
    assert (head(hidden, torch.arange(9) * 2) - head(hidden)).abs().max() > 1e-3


def test_vector_head_is_its_formula_and_may_move_the_argmax():
    head, logits = filled(VECTOR), torch.randn(50, 11, generator=torch.Generator().manual_seed(2))
    out = scaled(head, logits, torch.zeros(50, 16))
    expected = logits.double() * head.scale.double() + head.bias.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    assert (out.argmax(-1) != logits.argmax(-1)).any()


@pytest.mark.parametrize("spec", [MLP, BLOCK], ids=lambda spec: spec.architecture)
def test_tau_is_clipped(spec):
    hidden = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(2))
    for bias, limit in ((1000.0, MAX_LOG_SCALE), (-1000.0, MIN_LOG_SCALE)):
        head = filled(spec)
        with torch.no_grad():
            head.bias.fill_(bias)
        assert head(hidden).eq(torch.tensor(limit)).all()
    assert math.exp(MAX_LOG_SCALE) == pytest.approx(10)


@SPECS
def test_head_computes_in_float32_after_a_cast_of_the_model(spec):
    head = filled(spec).to(torch.bfloat16)
    rounded = filled(spec)
    with torch.no_grad():
        for own, cast in zip(rounded.parameters(), head.parameters(), strict=True):
            own.copy_(cast)
    hidden, logits = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(2)), torch.ones(2, 3, 11)
    assert scaled(head, logits, hidden).equal(scaled(rounded, logits, hidden))


def test_rms_norm_of_ones_is_its_weight():
    weight = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(rms_norm(torch.full((2, 3), 5.0), weight), weight.expand(2, 3))
    torch.testing.assert_close(
        rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2)), torch.tensor([[3.0, 4.0]]) / 12.5**0.5
    )


def test_taus_computed_elsewhere_are_used_and_only_sequence_heads_need_them():
    heads = nn.ModuleDict({"block": filled(BLOCK), "vector": filled(VECTOR)})
    assert reads_sequence(heads)
    assert not reads_sequence(nn.ModuleDict({"mlp": filled(MLP)}))
    logits, hidden = torch.randn(2, 11), torch.randn(2, 16)
    tau = torch.tensor([[0.5], [-0.5]])
    out = apply_logits_heads(heads, logits, hidden, {"block": tau})
    assert out.equal(heads["vector"](logits * tau.exp()))


@SPECS
def test_head_tensors_round_trip(spec, tmp_path):
    config = HeadsConfig({"own": spec}, None, "llama", "LlamaForCausalLM")
    heads = nn.ModuleDict({"own": filled(spec)})
    save_head_tensors(tmp_path, heads)
    again = build_heads(config)
    load_head_tensors(again, read_tensors(tmp_path / "llmrl_heads.safetensors"))
    for name, tensor in heads.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    assert HeadSpec(**spec.to_json()) == spec
    assert ("num_heads" in spec.to_json()) == (spec.architecture == "transformer")

"""What a SwitchConfig accepts, what it says about what it does not, and that it comes back from JSON."""

import json

import pytest

from llmrl.errors import ConfigError
from llmrl.lora_switch import SwitchConfig
from llmrl.lora_switch.config import is_routed, layer_number

Q0, UP0, Q2 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected a whole number from 1, got 0"),
        ({"r": 1.5}, "r: expected a whole number"),
        ({"top_k": 9}, "top_k: expected at most num_experts = 8, got 9"),
        ({"router_input": "embeding"}, "did you mean 'embedding'"),
        ({"gate": "hart"}, "did you mean 'hard'"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of auto, float32"),
        ({"router_layer": 2}, "router_layer belongs to router_input 'layer_k', got 'embedding'"),
        ({"router_input": "layer_k", "router_layer": -1}, "router_layer: expected the number of a decoder layer"),
        ({"alpha": -1.0}, "alpha: expected 0 or more"),
        ({"dropout": 1.0}, "dropout: expected 0 up to below 1"),
        ({"target_modules": ()}, "target_modules: name at least one layer"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ConfigError) as caught:
        SwitchConfig(**options)
    assert message in str(caught.value)


def test_config_scale():
    assert SwitchConfig(r=4).scale == 4.0  # two experts of weight 1/2 each: 2 as LoRA of rank 8 has it
    assert SwitchConfig(r=4, num_experts=1, top_k=1).scale == SwitchConfig(r=4, gate="hard", top_k=1).scale == 2.0
    assert SwitchConfig(r=4, alpha=4.0).scale == 1.0


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ("q_proj", "up_proj"), "router_input": "layer_k", "router_layer": 1}]
)
def test_config_comes_back_from_json(options):
    config = SwitchConfig(**options)
    assert SwitchConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_config_from_json_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="unknown key 'topk'"):
        SwitchConfig.from_json({"topk": 2})
    with pytest.raises(ConfigError, match="expected an object"):
        SwitchConfig.from_json([1])


def test_targets_are_last_parts_of_names():
    config = SwitchConfig(target_modules=("q_proj", "mlp.up_proj"))
    assert config.targets(Q0)
    assert config.targets(UP0)
    assert not config.targets("model.layers.0.self_attn.seq_proj")
    assert config.missing([Q0, UP0]) == []
    assert config.missing([Q0]) == ["mlp.up_proj"]
    assert SwitchConfig().targets(Q0)


def test_layer_number():
    assert layer_number(Q2) == 2
    assert layer_number("transformer.h.11.attn.c_attn") == 11
    assert layer_number("lm_head") is None


@pytest.mark.parametrize(
    ("options", "routed"),
    [
        ({}, (True, True, True)),
        ({"router_input": "prompt_pooled"}, (True, True, True)),
        ({"router_input": "layer0_mlp"}, (False, True, True)),
        ({"router_input": "layer_k", "router_layer": 1}, (False, False, True)),
        ({"router_input": "layer_k", "router_layer": 0}, (True, True, True)),
    ],
)
def test_only_layers_behind_the_router_are_routed(options, routed):
    config = SwitchConfig(**options)
    assert tuple(is_routed(config, name) for name in (Q0, UP0, Q2)) == routed
    assert not is_routed(config, "lm_head")

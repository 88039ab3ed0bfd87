"""Sizes of heads for configurations as transformers gives them; the numbers are those of the published models' shapes."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from llmrl.ats.head_spec import spec_for
from llmrl.errors import ModelError
from llmrl.heads import build_head

SIZES = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "rope_theta")


def llama(**fields):
    return transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, **fields
    )


GEMMA3 = transformers.Gemma3TextConfig(
    hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=4, head_dim=256
)
CONFIGS = {
    "llama": (
        llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        (4096, 14336, 32, 8, 128, 500000.0),
    ),
    "mistral": (
        transformers.MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
        ),
        (4096, 14336, 32, 8, 128, 10000.0),
    ),
    # heads and width do not have to agree: 16 * 128 against 1024
    "qwen3": (
        transformers.Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128
        ),
        (1024, 3072, 16, 8, 128, 10000.0),
    ),
    "gemma2": (
        transformers.Gemma2Config(
            hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4, head_dim=256
        ),
        (2304, 9216, 8, 4, 256, 10000.0),
    ),
    # a theta for each kind of layer: that of full attention
    "gemma3": (GEMMA3, (2560, 10240, 8, 4, 256, 1000000.0)),
    "gemma3-multimodal": (
        transformers.Gemma3Config(text_config=GEMMA3.to_dict()),
        (2560, 10240, 8, 4, 256, 1000000.0),
    ),
    # sizes differ from layer to layer: those of the last one
    "gemma4": (transformers.Gemma4TextConfig(), (2304, 9216, 8, 4, 512, 1000000.0)),
    "gpt2": (transformers.GPT2Config(), (768, 3072, 12, 12, 64, 10000.0)),
    "gpt2-inner": (transformers.GPT2Config(n_embd=512, n_head=8, n_inner=1000), (512, 1000, 8, 8, 64, 10000.0)),
    # its states are projected to the width of the embedding before the output
    "opt-350m": (
        transformers.OPTConfig(hidden_size=1024, word_embed_proj_dim=512, ffn_dim=4096, num_attention_heads=16),
        (512, 4096, 16, 16, 64, 10000.0),
    ),
    "phi": (
        transformers.PhiConfig(hidden_size=2560, intermediate_size=10240, num_attention_heads=32),
        (2560, 10240, 32, 32, 80, 10000.0),
    ),
    "falcon-7b": (
        transformers.FalconConfig(hidden_size=4544, num_attention_heads=71, multi_query=True),
        (4544, 18176, 71, 1, 64, 10000.0),
    ),
    "gpt-bigcode": (transformers.GPTBigCodeConfig(), (768, 3072, 12, 1, 64, 10000.0)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_spec_for_transformer_has_the_models_sizes(name):
    config, expected = CONFIGS[name]
    spec = spec_for(config, "transformer")
    assert tuple(getattr(spec, size) for size in SIZES) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt-350m", "gemma4"])
def test_spec_for_the_smaller_heads(name):
    config, (width, inner, *_) = CONFIGS[name]
    assert spec_for(config, "mlp").intermediate_size == inner
    for architecture in ("scalar", "linear", "mlp"):
        spec = spec_for(config, architecture)
        assert (spec.kind, spec.architecture, spec.hidden_size) == ("temperature", architecture, width)
    vector = spec_for(config, "vector")
    assert (vector.kind, vector.hidden_size, vector.outputs) == ("vector", width, config.vocab_size)


def test_spec_for_an_old_configuration_reads_rope_theta_itself():
    config = SimpleNamespace(hidden_size=64, num_attention_heads=4, intermediate_size=96, rope_theta=5000)
    assert spec_for(config, "transformer").rope_theta == 5000.0


def test_spec_for_an_odd_head_is_made_even():
    """Rotary positions turn pairs of numbers."""
    config = SimpleNamespace(hidden_size=60, num_attention_heads=4, num_key_value_heads=3, intermediate_size=96)
    spec = spec_for(config, "transformer")
    assert spec.head_dim == 16
    assert spec.num_kv_heads == 4  # 3 do not go into 4
    head = build_head(spec)
    assert head(torch.zeros(1, 5, 60)).shape == (1, 5, 1)


def test_spec_for_a_model_without_attention_says_what_can_be_used():
    with pytest.raises(ModelError, match="mamba has no num_attention_heads: use ats-linear"):
        spec_for(transformers.MambaConfig(), "transformer")
    assert spec_for(transformers.MambaConfig(), "linear").hidden_size == 768


def test_spec_for_builds_a_head_for_each_tiny_model(any_model):
    """The width is that of the states that enter the output embedding."""
    model = transformers.AutoModelForCausalLM.from_pretrained(any_model)
    width = model.get_output_embeddings().weight.shape[1]
    for architecture in ("linear", "mlp", "transformer"):
        head = build_head(spec_for(model.config, architecture))
        assert head(torch.zeros(1, 3, width)).shape == (1, 3, 1)
    assert spec_for(model.config, "vector").outputs == model.get_output_embeddings().weight.shape[0]

"""Small random causal LMs of architectures that differ from Llama where a head is attached: cache, decoder, output layer."""

import torch
import transformers

from llmrl.ats.head_spec import spec_for
from llmrl.errors import ModelError
from llmrl.heads import BaseReference, HeadsConfig, HeadSpec, build_heads
from llmrl.logits_heads import initialise
from llmrl.modeling import model_class_for

_SIZES = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_chunk_size": 8}
_PARTICULAR = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 8},
    # its decoder gives a MoeCausalLMOutputWithPast
    "Llama4ForCausalLM": {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8},
    # its output embedding is called `decoder`, and a dense layer lies before it
    "ModernBertDecoderForCausalLM": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "FalconH1ForCausalLM": {**_MAMBA, "mamba_n_groups": 1, "lm_head_multiplier": 0.5, "head_dim": 8},
    # layer 0 of its cache has no length
    "MiniMaxForCausalLM": {
        "head_dim": 8, "num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"],
    },
    # state inside the modules, and a soft-cap
    "RecurrentGemmaForCausalLM": {
        "lru_width": 32, "attention_window_size": 16, "logits_soft_cap": 30.0, "num_hidden_layers": 3, "head_dim": 8,
    },
    "xLSTMForCausalLM": {"num_heads": 4, "output_logit_soft_cap": 20.0},
    "MambaForCausalLM": {"state_size": 4},
    "HyperCLOVAXForCausalLM": {"head_dim": 8, "logits_scaling": 0.5},
}  # fmt: skip


def config_fields(name):
    """Return the arguments of the configuration of the transformers class `name`."""
    return {**_SIZES, **_PARTICULAR[name]}


def random_model(name, model_class=None, config=None, dtype=torch.float32):
    """Return the causal LM `name`, seeded, with weights far from their usual start so that mistakes show."""
    base_class = model_class or getattr(transformers, name)
    torch.manual_seed(0)
    model = base_class(config or base_class.config_class(**config_fields(name))).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.startswith("llmrl_heads") and parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
    return model.to(dtype).requires_grad_(False)


def with_head(name, architecture="transformer", dtype=torch.float32):
    """Return the same model with a random head that moves tau a lot, and the head."""
    model_class = model_class_for(name)
    config = model_class.config_class(**config_fields(name))
    try:
        spec = spec_for(config, architecture)
    except ModelError:  # a model without attention has no sizes for a head's
        spec = HeadSpec(
            "temperature", architecture, 32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8
        )  # fmt: skip
    described = HeadsConfig({"temperature": spec}, BaseReference("b", "w", "t", "c"), config.model_type, name)
    config.llmrl = described.to_json()
    model = random_model(name, model_class, config, dtype)
    heads, generator = build_heads(described), torch.Generator().manual_seed(3)
    initialise(heads["temperature"], generator)
    heads["temperature"].weight.normal_(0, 0.1, generator=generator)
    model.attach_heads(heads)
    model.generation_config.eos_token_id = None
    return model, heads["temperature"]

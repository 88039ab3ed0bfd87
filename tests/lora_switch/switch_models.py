"""Small switch models for the tests: random bases of several architectures, experts that matter."""

import torch
import transformers

from llmrl.lora_switch import SwitchConfig, get_switch_model

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
PARTICULAR = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 8},
    "MistralForCausalLM": {"sliding_window": None},
    "Gemma2ForCausalLM": {"head_dim": 8, "query_pre_attn_scalar": 8},
}


def base_model(name="LlamaForCausalLM", dtype=torch.float32, seed=0):
    """Return a random causal LM, in evaluation, whose linear maps are far from their small usual start."""
    torch.manual_seed(seed)
    base_class = getattr(transformers, name)
    config = base_class.config_class(**{**SIZES, **PARTICULAR[name]})
    config._attn_implementation = "eager"
    model = base_class(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.2)
    return model.to(dtype).eval()


def switch_model(name="LlamaForCausalLM", dtype=torch.float32, seed=0, spread=0.3, **options):
    """Return a switch model whose experts change the logits a lot."""
    config = SwitchConfig(**{"num_experts": 4, "r": 3, "top_k": 2, **options})
    model = get_switch_model(base_model(name, dtype, seed), config)
    stir(model, spread, seed)
    return model.eval()


@torch.no_grad()
def stir(model, spread=0.3, seed=0):
    """Give every expert a B that is not zero."""
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in model.switch_layers().values():
        layer.switch_B.copy_(torch.randn(layer.switch_B.shape, generator=generator) * spread)


def prompt(rows=2, length=9, seed=3):
    """Return token ids `[rows, length]`."""
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))

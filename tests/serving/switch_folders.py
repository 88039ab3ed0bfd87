"""Folders of switch models for vLLM: every family, every router input that vLLM can serve, several shapes of experts."""

import torch
from serving_folders import greedy, random_model, token_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.lora_switch import SwitchConfig, get_switch_model, load_switch_model
from llmrl.lora_switch.routing import dense_gates

MLP0, LAYER1 = {"router_input": "layer0_mlp"}, {"router_input": "layer_k", "router_layer": 1}
SWITCHED = {
    "switch-llama": ("LlamaForCausalLM", {}),
    "switch-llama-hard": ("LlamaForCausalLM", {"gate": "hard", "top_k": 1}),
    "switch-llama-v-down": ("LlamaForCausalLM", {"target_modules": ("v_proj", "up_proj", "down_proj"), "r": 5}),
    "switch-qwen2-mlp": ("Qwen2ForCausalLM", MLP0),
    "switch-qwen3": ("Qwen3ForCausalLM", LAYER1),
    "switch-phi3": ("Phi3ForCausalLM", {}),  # q, k and v are one layer on disk too
    "switch-mistral": ("MistralForCausalLM", MLP0 | {"num_experts": 3, "top_k": 3}),
    "switch-gemma2": ("Gemma2ForCausalLM", {"alpha": 24.0}),  # its soft caps leave little of a small change
    "switch-gemma2-mlp": ("Gemma2ForCausalLM", MLP0 | {"alpha": 24.0}),
}
SWITCH_BFLOAT16 = ("switch-llama", "switch-gemma2", "switch-phi3")  # routers of embeddings
SWITCH_PAGING = {"switch-llama": 7, "switch-qwen2-mlp": 7}


def switch_folder(folder, architecture, options):
    """Write a random base and, beside it, a switch model on it whose experts change the text; return the latter."""
    base = random_model(architecture, folder / "base")
    # transformers' other attention leaves Gemma 2's soft cap of attention scores out, vLLM does not
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = get_switch_model(model, SwitchConfig(**{"num_experts": 4, "r": 3, **options}))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in model.switch_layers().values():
            layer.switch_B.copy_(torch.randn(layer.switch_B.shape, generator=generator) * 0.3)
        model.switch_router.weight.copy_(torch.randn(model.switch_router.weight.shape, generator=generator) * 0.2)
    model.save_pretrained(folder / "switch")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "switch")
    return folder / "switch"


def expected_gates(folder, prompts):
    """Return the gates `[T, E]` of each prompt in a bfloat16 model."""
    model = load_switch_model(folder, attn_implementation="eager", dtype=torch.bfloat16)
    found = []
    for ids in prompts:
        with torch.no_grad():
            model(torch.tensor([ids]))
        found.append(dense_gates(model.last_route(), model.switch_config.num_experts)[0])
    return found


def expected_switch(folder, prompts):
    """Return what vLLM must say about a switch model, as `serving_folders.expected` does for heads."""
    model = load_switch_model(folder, attn_implementation="eager")
    continuations = greedy(model, prompts)
    whole = [prompt + new for prompt, new in zip(prompts, continuations, strict=True)]
    logprobs = [token_logprobs(model, ids) for ids in whole]
    with model.disable_experts():
        base = [token_logprobs(model, ids) for ids in whole]
    return {"greedy": continuations, "logprobs": logprobs, "base_logprobs": base}

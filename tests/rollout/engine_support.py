"""Small models that vLLM's CPU build can attend with, and what a plain forward pass says about tokens."""

import copy
from pathlib import Path

import torch

STORIES = Path(__file__).parents[2] / "examples" / "stories260k"
SMALL = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 32}
TEXTS = ["Once upon a time", "The little dog ran to the park and saw a big red ball. He was very happy", "1"]

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the least that vLLM attends with on a CPU
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# a projection of its own for the output; biases; norms of queries and keys; soft caps and tied embeddings; experts, which
# transformers stacks into other tensors than those on disk
_FAMILIES = {
    "untied": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "biased": ("Qwen2ForCausalLM", {"tie_word_embeddings": False}),
    "qknorm": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "softcap": ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 32, "final_logit_softcapping": 8.0}),
    "experts": ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}),
}


def write_tiny(name, folder):
    """Write a random model whose distributions are far from uniform."""
    import transformers

    family, options = _FAMILIES[name]
    model_class = getattr(transformers, family)
    torch.manual_seed(len(name))
    model = model_class(model_class.config_class(**_SHAPE, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
            else:  # norms and biases start as ones and zeros, which would hide one left out
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


def trainer(folder):
    """Open a model as a trainer has it: float32, in training mode, its parameters asking for gradients."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.train()


def train(model, steps=1, lr=1e-3, seed=0):
    """Take real optimizer steps on random text."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        ids = torch.randint(3, 512, (4, 32), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def disturbed(model, scale=0.05, seed=0):
    """Return a copy with other weights: each parameter moved by noise of `scale` times its own spread."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * parameter.std() * noise)
    return other


def weights(model):
    """Return what a checkpoint of the model holds, by a way of its own: transformers' save_pretrained."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors"))


@torch.inference_mode()
def token_logprobs(model, ids, temperature=1.0):
    """Return log p of tokens 1 to T-1, from one forward pass over one row, without cache or padding, in float64."""
    mode = model.training
    logits = model.eval()(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    model.train(mode)
    rows = (logits.double() / temperature).log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(ids[1:])]


def largest(one, other):
    """Return the largest difference of two equally long rows of numbers."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def assert_sampled_from(sample, prompt, model, tolerance=1e-3):
    """The logprobs of a sample are those the model gives to its tokens after the prompt."""
    wanted = token_logprobs(model, [*prompt, *sample.token_ids])[len(prompt) - 1 :]
    assert largest(sample.logprobs, wanted) < tolerance

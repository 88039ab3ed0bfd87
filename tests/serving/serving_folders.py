"""Small models, llmrl folders on them with heads of clearly non-zero weights, and what transformers says about both."""

import os
from pathlib import Path

import torch
from torch import nn

from llmrl.base_model import load_base
from llmrl.heads import HeadsConfig, HeadSpec, build_head
from llmrl.logits_heads import VectorHead, initialise
from llmrl.modeling import read_heads_config, save_heads_folder
from llmrl.value_heads import ValueHead

ROOT = Path(__file__).parents[2]
STORIES = ROOT / "examples" / "stories260k"
PROMPTS = ["Once upon a time", "The little dog ran to the park and saw a big red ball. He was very happy", "1"]
NEW_TOKENS = 16
HIDDEN = 64

# no compilation of the logprob counter, no other plugins, no telemetry; few threads, as the suite shares its cores
ENVIRONMENT = {
    **os.environ,
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "llmrl",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SCALAR, LINEAR = {"architecture": "scalar"}, {"architecture": "linear"}
VECTOR = {"architecture": "vector", "kind": "vector", "outputs": 512}
VALUE = {"kind": "value", "outputs": 512, "beta": 1.5}
MLP, TRANSFORMER = {"architecture": "mlp"}, {"architecture": "transformer"}
BESIDE, MERGED = {"merged": False}, {"merged": True}
# every architecture, and every combination of head, merged or not, and one file or several
PARITY = {
    "llama": ("LlamaForCausalLM", False, LINEAR | BESIDE),
    "llama-sharded-merged": ("LlamaForCausalLM", True, LINEAR | MERGED),
    "qwen2-merged": ("Qwen2ForCausalLM", False, SCALAR | MERGED),
    "qwen3-sharded": ("Qwen3ForCausalLM", True, SCALAR | BESIDE),
    "mistral-sharded-merged": ("MistralForCausalLM", True, SCALAR | MERGED),
    "gemma2-merged": ("Gemma2ForCausalLM", False, LINEAR | MERGED),
    "gemma3": ("Gemma3ForCausalLM", False, SCALAR | BESIDE),
    "llama-vector": ("LlamaForCausalLM", False, VECTOR | BESIDE),
    "llama-value": ("LlamaForCausalLM", False, {"architecture": "low_rank"} | VALUE | BESIDE),
    "qwen3-value": ("Qwen3ForCausalLM", True, LINEAR | VALUE | MERGED),
    "gemma2-value": ("Gemma2ForCausalLM", False, MLP | VALUE | MERGED),
    "qwen2-mlp": ("Qwen2ForCausalLM", False, MLP | BESIDE),
    "llama-transformer": ("LlamaForCausalLM", False, TRANSFORMER | BESIDE),
    "qwen2-transformer": ("Qwen2ForCausalLM", False, TRANSFORMER | MERGED),
    "qwen3-transformer": ("Qwen3ForCausalLM", False, TRANSFORMER | MERGED),
    "mistral-transformer": ("MistralForCausalLM", True, TRANSFORMER | MERGED),  # with a sliding window
    "gemma2-transformer": ("Gemma2ForCausalLM", False, TRANSFORMER | BESIDE),
    "gemma3-transformer": ("Gemma3ForCausalLM", False, TRANSFORMER | MERGED),
}
# the whole way of the command on each family: fitted, saved, opened, generating, served
FITTED = {
    "llama-fitted": ("LlamaForCausalLM", ()),
    "qwen2-fitted": ("Qwen2ForCausalLM", ("--merge",)),
    "qwen3-fitted": ("Qwen3ForCausalLM", ()),
    "mistral-fitted": ("MistralForCausalLM", ("--merge",)),
    "gemma2-fitted": ("Gemma2ForCausalLM", ()),
}
# of these the second has a sliding window, which vLLM keeps apart from a head that sees everything; with the number of
# cache blocks: enough for the longest prompt, not for all of `paging_prompts`
PAGING = {"llama-transformer": 7, "mistral-transformer": 12}
# reward ensembles: (base, None for the pretrained one; kind of heads); linear heads are stock checkpoints, others the plugin's
ENSEMBLES = {
    "stock": (None, "linear"),
    "stock-gemma3": ("Gemma3ForCausalLM", "linear"),
    "mlp": (None, "mlp"),
    "epinet-qwen2": ("Qwen2ForCausalLM", "epinet"),
}


def prompt_ids():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def paging_prompts():
    """Return random prompts: three chunks and more; its first 64 ids and others; shorter ones."""
    generator = torch.Generator().manual_seed(7)
    draw = [torch.randint(3, 512, (size,), generator=generator).tolist() for size in (90, 20, 60, 5, 33)]
    return [draw[0], draw[0][:64] + draw[1], *draw[2:]]


def bfloat16_prompts():
    """Return a text of more than one chunk, and prompts of one token, where attention has one thing to see."""
    return [prompt_ids()[0] + prompt_ids()[1][1:], *([token] for token in (1, 5, 50, 300, 403))]


def random_model(architecture, folder, *, shards=False):
    """Write a tiny model whose weights are large enough for its distributions to be far from uniform."""
    import transformers

    # vLLM on a CPU attends with heads of at least 32
    shape = {
        "vocab_size": 512,
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    extra = {
        "LlamaForCausalLM": {"tie_word_embeddings": False},
        "Gemma2ForCausalLM": {"query_pre_attn_scalar": 32, "final_logit_softcapping": 8.0},
        "Gemma3ForCausalLM": {"query_pre_attn_scalar": 32},
        "MistralForCausalLM": {"sliding_window": 8},
    }
    model_class = getattr(transformers, architecture)
    torch.manual_seed(len(architecture))
    model = model_class(model_class.config_class(**shape, **extra.get(architecture, {})))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    transformers.AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return folder


STEERED = ((0.0, 0.0), (4.0, 0.0), (4.0, 0.2))  # beta and support that "llama-value" is loaded with


def heads_folder(base, folder, *, kind="temperature", architecture="linear", outputs=1, merged=False, seed=0, beta=0.0):
    """Write a folder as `llmrl calibrate` does, with random heads instead of fitted ones."""
    opened = load_base(str(base))
    sizes = {"intermediate_size": 80} if architecture in ("mlp", "transformer", "low_rank") else {}
    if architecture == "transformer":
        sizes |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    spec = HeadSpec(kind, architecture, opened.model.config.hidden_size, outputs, beta=beta, **sizes)
    head = build_head(spec)
    fill(head, seed)
    config = HeadsConfig(
        heads={kind: spec},
        base=opened.reference,
        base_model_type=opened.model.config.model_type,
        base_architecture=opened.architecture,
        merged=merged,
        method=f"ats-{architecture}",
    )
    folder.mkdir(parents=True)
    save_heads_folder(folder, nn.ModuleDict({kind: head}), config, opened.tokenizer, opened.folder)
    return folder


def ensemble_folder(base, folder, kind):
    """Write a reward ensemble for vLLM; return (folder, base, its heads as they are in training)."""
    from small_ensembles import random_ensemble

    from llmrl.hyre.export import export_ensemble

    ensemble, unfolded = random_ensemble(base, kind)
    return export_ensemble(ensemble, folder).folder, base, unfolded


def fitted_folder(base, folder, *options):
    """Let `llmrl calibrate` write a folder with a transformer head that was fitted on a little text."""
    from llmrl.cli import main

    texts = sorted(str(path) for path in (ROOT / "examples" / "text").glob("*.gz"))
    sizes = ["--max_length", "65", "--max_tokens", "2500", "--bootstrap_draws", "20"]
    argv = [
        "calibrate",
        str(base),
        "--data",
        *texts,
        "--output_dir",
        str(folder),
        "--method",
        "ats-transformer",
        "--quiet",
    ]
    assert main([*argv, *sizes, *options]) == 0
    return folder


def fill(head, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if isinstance(head, ValueHead):
            for parameter in head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            return
        initialise(head, generator)
        if isinstance(head, VectorHead):
            head.scale.add_(torch.randn(head.scale.shape, generator=generator) * 0.05)
            head.bias.copy_(torch.randn(head.bias.shape, generator=generator) * 0.5)
            return
        if head.weight is not None:
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * 0.08)
        head.bias.copy_(torch.randn(head.bias.shape, generator=generator) * 0.1 - 0.7)


def greedy(model, prompts):
    """Return greedy continuations, one token and one whole forward pass at a time."""
    continuations = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        continuations.append(ids[len(prompt) :])
    return continuations


def token_logprobs(model, ids):
    """Return the logprob of each token but the first, given those before it."""
    with torch.inference_mode():
        rows = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [rows[i, token].item() for i, token in enumerate(ids[1:])]


def expected(folder, base, prompts):
    """Return what vLLM must say about `folder`: the base's greedy ids, the head's logprobs of prompt and continuation."""
    from transformers import AutoModelForCausalLM

    changes_text = not all(spec.kind == "temperature" for spec in read_heads_config(folder).heads.values())
    # transformers' other attention leaves Gemma 2's soft cap of attention scores out, vLLM does not
    with_head = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    without = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    continuations = greedy(with_head if changes_text else without, prompts)
    whole = [prompt + new for prompt, new in zip(prompts, continuations, strict=True)]
    return {
        "greedy": continuations,
        "logprobs": [token_logprobs(with_head, ids) for ids in whole],
        "base_logprobs": [token_logprobs(without, ids) for ids in whole],
    }


def largest_difference(one, other):
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def assert_agrees(found, wanted):
    """vLLM says what transformers says, and neither says what the base says."""
    assert [answer["ids"] for answer in found] == wanted["greedy"]
    logprobs = [answer["prompt_logprobs"] + answer["logprobs"] for answer in found]
    assert largest_difference(logprobs, wanted["logprobs"]) < 1e-3
    assert largest_difference(logprobs, wanted["base_logprobs"]) > 0.3
    # each of the two kinds of logprobs has the head in it
    prompts = [answer["prompt_logprobs"] for answer in found]
    base_prompts = [row[: len(p)] for row, p in zip(wanted["base_logprobs"], prompts, strict=True)]
    assert largest_difference(prompts, base_prompts) > 0.3
    base_new = [row[-NEW_TOKENS:] for row in wanted["base_logprobs"]]
    assert largest_difference([answer["logprobs"] for answer in found], base_new) > 0.3

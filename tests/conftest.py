"""Shared by all tests: the example model, the example texts, tiny random models of other architectures, head folders."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small a second thread costs more than it gives

import pytest

REPO = Path(__file__).resolve().parents[1]
_ONE_PROCESS = ("e2e", "rollout", "serving")

_SMALL = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
# what is particular about each: see the values; the vocabulary of qwen2 is padded beyond the tokenizer's
_ARCHITECTURES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"vocab_size": 520, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "gemma2": (
        "Gemma2",
        {"final_logit_softcapping": 1.5, "tie_word_embeddings": True, "head_dim": 8, "query_pre_attn_scalar": 8},
    ),
    "cohere": ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "phi": ("Phi", {"num_key_value_heads": 4}),
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With pytest-xdist, folders that share a vLLM stay in one process; of the others each file does."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = Path(nodeid.split("::")[0])
            return path.parent.name if path.parent.name in _ONE_PROCESS else str(path)

    return ByFolder(config, log)


@pytest.fixture(scope="session")
def stories_dir():
    """Folder of the 260k-parameter Llama that lies in the repository."""
    return REPO / "examples" / "stories260k"


@pytest.fixture(scope="session")
def text_files():
    """The example texts, all compressed."""
    return sorted((REPO / "examples" / "text").glob("*.gz"))


@pytest.fixture(scope="session")
def stories_tokenizer(stories_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories_dir)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, stories_tokenizer):
    """Return `tiny_model(name) -> folder` of a seeded random model with the example model's tokenizer."""
    made = {}

    def make(name):
        if name not in made:
            import torch
            import transformers

            family, particular = _ARCHITECTURES[name]
            fields = {**_SMALL, **particular}
            if family == "GPT2":
                fields = {
                    key: value for key, value in fields.items() if not key.startswith(("num_", "hidden", "inter"))
                }
            torch.manual_seed(0)
            suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
            model = getattr(transformers, family + suffix)(getattr(transformers, family + "Config")(**fields))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:  # norms and biases start as ones and zeros, which would hide mistakes
                        parameter.add_(0.3 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(name) / name
            model.save_pretrained(folder)
            stories_tokenizer.save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


@pytest.fixture(scope="session", params=sorted(_ARCHITECTURES))
def any_model(request, tiny_model):
    """Folder of a tiny model, for each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def save_head():
    """Return `save_head(base_folder, folder, ...) -> heads`: a temperature head on the base, saved as llmrl does."""

    def save(base_folder, folder, *, architecture="linear", merged=False, zero=False, method="ats-linear", **reference):
        import json
        from dataclasses import replace

        import torch
        from torch import nn

        from llmrl.base_model import load_tokenizer, reference_for
        from llmrl.heads import HeadsConfig, HeadSpec, build_head
        from llmrl.logits_heads import initialise
        from llmrl.modeling import save_heads_folder

        config = json.loads((base_folder / "config.json").read_text())
        width = config.get("hidden_size") or config["n_embd"]
        attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8} if architecture == "transformer" else {}
        inner = {} if architecture == "linear" else {"intermediate_size": 48}
        spec = HeadSpec("temperature", architecture, width, **inner, **attention)
        heads = nn.ModuleDict({"temperature": build_head(spec)}).requires_grad_(False)
        if not zero:
            generator = torch.Generator().manual_seed(7)
            initialise(heads["temperature"], generator)
            heads["temperature"].weight.copy_(torch.randn(1, width, generator=generator) * 0.5 / width**0.5)
            heads["temperature"].bias.fill_(0.3)
        tokenizer = load_tokenizer(base_folder)
        base = replace(reference_for(str(base_folder), base_folder, tokenizer), **reference)
        described = HeadsConfig(
            heads={"temperature": spec},
            base=base,
            base_model_type=config["model_type"],
            base_architecture=config["architectures"][0],
            merged=merged,
            method=method,
        )
        folder.mkdir(parents=True, exist_ok=True)
        save_heads_folder(folder, heads, described, tokenizer, base_folder)
        return heads

    return save


@pytest.fixture(scope="session")
def llama(tiny_model):
    """Folder of the tiny Llama."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def head_folders(llama, save_head, tmp_path_factory):
    """The three kinds of folder for one base: head only, merged, and merged from a base in several files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("head_folders")
    shards = root / "base-shards"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(shards, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(llama).save_pretrained(shards)
    assert len(list(shards.glob("*.safetensors"))) > 2
    heads = save_head(llama, root / "head")
    save_head(llama, root / "merged", merged=True)
    save_head(shards, root / "sharded", merged=True)
    return {"head": root / "head", "merged": root / "merged", "sharded": root / "sharded", "heads": heads}

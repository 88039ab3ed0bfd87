"""The output layer and the states before it, of causal LMs that are not built like Llama; what is not known is refused."""

from dataclasses import replace

import pytest
import torch
from small_models import random_model
from torch import nn

from llmrl.ats.data import Window
from llmrl.ats.extract import extract_features
from llmrl.ats.output_layer import MASKED, OutputLayer, check_output_layer, check_sequence_states, hidden_states
from llmrl.errors import ModelError

IDS = torch.randint(3, 250, (2, 14), generator=torch.Generator().manual_seed(1))
TOKENS = IDS[0].tolist()
UNLIKE_LLAMA = [
    "Llama4ForCausalLM", "ModernBertDecoderForCausalLM", "FalconH1ForCausalLM", "MiniMaxForCausalLM", "MambaForCausalLM",
    "RecurrentGemmaForCausalLM", "xLSTMForCausalLM", "HyperCLOVAXForCausalLM",
]  # fmt: skip


def windows(count=3):
    ids = torch.randint(3, 250, (count, 12), generator=torch.Generator().manual_seed(2)).tolist()
    return [Window(row, [False] + [True] * 11, i, "w.txt", f"w.txt:{i + 1}") for i, row in enumerate(ids)]


def extract(model, folder, sequences=False):
    return extract_features(
        model, windows(), batch_size=2, cache_dir=folder, fingerprint="base", sequences=sequences
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNLIKE_LLAMA)
def test_output_layer_on_the_entering_states_gives_the_models_own_logits(name, dtype):
    model = random_model(name, dtype=dtype)
    with torch.inference_mode():
        own = model(input_ids=IDS, use_cache=False).logits.float()
        states = hidden_states(model, IDS, torch.ones_like(IDS))
        ours = OutputLayer.of(model).logits(states)
    assert states.dtype == dtype
    assert own.std() > 0.1
    error = ((ours - own).abs().max() / own.abs().max()).item()
    assert error < (1e-6 if dtype == torch.float32 else 6e-3)  # the models scale and cap in bfloat16
    check_output_layer(model, OutputLayer.of(model), TOKENS)


@pytest.mark.parametrize("name", ["ModernBertDecoderForCausalLM", "RecurrentGemmaForCausalLM", "FalconH1ForCausalLM"])
def test_extract_features_are_the_models_own_of_architectures_unlike_llama(name, tmp_path):
    model = random_model(name)
    found = extract(model, tmp_path)
    ids = torch.tensor([w.token_ids for w in windows()])
    with torch.inference_mode():
        z = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    gap = z.amax(-1) - z.gather(1, ids[:, 1:].reshape(-1, 1))[:, 0]
    torch.testing.assert_close(found.gap, gap, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("RecurrentGemmaForCausalLM", {"soft_cap": None}),  # changes these logits by 2% at most
        ("RecurrentGemmaForCausalLM", {"soft_cap": 32.0}),
        ("xLSTMForCausalLM", {"soft_cap": None}),
        ("FalconH1ForCausalLM", {"scale": 0.49}),
        ("HyperCLOVAXForCausalLM", {"scale": 2.0}),
        ("LlamaForCausalLM", {"scale": 1.001}),
        ("LlamaForCausalLM", {"soft_cap": 200.0}),
        ("LlamaForCausalLM", {"bias": torch.full((256,), 0.2)}),
    ],
)
def test_check_output_layer_finds_small_errors_in_every_dtype(name, wrong, dtype):
    model = random_model(name, dtype=dtype)
    if "bias" in wrong:
        wrong = {"bias": wrong["bias"].to(dtype)}
    with pytest.raises(ModelError, match=f"{name} computes its logits in a way llmrl does not know"):
        check_output_layer(model, replace(OutputLayer.of(model), **wrong), TOKENS)


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min])
def test_check_output_layer_refuses_logits_that_the_model_masks(value):
    model = random_model("LlamaForCausalLM")
    plain = model.forward

    def masking(**kwargs):
        output = plain(**kwargs)
        output.logits[..., 40:50] = value
        return output

    model.forward = masking
    assert value < MASKED
    with pytest.raises(ModelError, match="in a way llmrl does not know"):
        check_output_layer(model, OutputLayer.of(model), TOKENS)


def test_check_output_layer_leaves_the_model_as_it_was():
    model = random_model("LlamaForCausalLM")
    before = model(input_ids=IDS).logits
    check_output_layer(model, OutputLayer.of(model), TOKENS)
    hidden_states(model, IDS, torch.ones_like(IDS))
    check_sequence_states(model, TOKENS)
    assert model(input_ids=IDS).logits.equal(before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_output_layer_of_refuses_what_is_no_plain_matrix():
    from peft import LoraConfig, get_peft_model

    model = random_model("LlamaForCausalLM")
    model.lm_head.weight = nn.Parameter(torch.zeros(256, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"is a Linear without a matrix of floating point numbers: quantise the model"):
        OutputLayer.of(model)
    tuned = get_peft_model(random_model("LlamaForCausalLM"), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ModelError, match=r"an adapter changes the output embedding: merge it first"):
        OutputLayer.of(tuned)


def test_output_embedding_that_is_called_otherwise_is_refused(tmp_path):
    model = random_model("LlamaForCausalLM")
    plain = model.forward
    model.forward = lambda **kwargs: (plain(**kwargs), plain(**kwargs))[0]
    with pytest.raises(
        ModelError, match=r"calls its output embedding on \[\[2, 14, 32\], \[2, 14, 32\]\] for ids \[2, 14\]"
    ):
        hidden_states(model, IDS, torch.ones_like(IDS))
    with pytest.raises(ModelError, match="calls its output embedding on"):
        extract(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RecurrentGemmaForCausalLM", "keeps its state outside past_key_values"),
        ("MambaForCausalLM", "keeps its state outside past_key_values"),
        ("ModernBertDecoderForCausalLM", "changes its hidden states between ModernBertDecoderModel and the output"),
    ],
)
def test_extract_features_for_sequence_heads_refuse_a_base_that_cannot_run_them(name, message, tmp_path):
    model = random_model(name)
    with pytest.raises(ModelError, match=rf"{message}.*--method ats-mlp"):
        extract(model, tmp_path / "whole", sequences=True)
    assert len(extract(model, tmp_path / "scored")) == 33


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Llama4ForCausalLM", "MiniMaxForCausalLM", "FalconH1ForCausalLM"])
def test_check_sequence_states_lets_bases_with_attention_pass(name):
    check_sequence_states(random_model(name), TOKENS)


def test_check_sequence_states_refuses_a_cache_without_attention(monkeypatch):
    model = random_model("LlamaForCausalLM")
    monkeypatch.setattr("llmrl.ats.output_layer.attention_layers", lambda cache: [])
    with pytest.raises(ModelError, match="the DynamicCache of LlamaForCausalLM has no attention layers"):
        check_sequence_states(model, TOKENS)

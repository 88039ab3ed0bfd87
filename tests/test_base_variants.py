"""Bases that are not a plain checkpoint: a PEFT adapter, and weights quantised by bitsandbytes."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.base_model import is_adapter, load_base, merge_adapter
from llmrl.errors import ModelError

IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))
QUANTISED = {"4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "8bit": {"load_in_8bit": True}}
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes here")


@pytest.fixture
def adapter(tiny_model, tmp_path):
    """A LoRA adapter with weights that change every logit, on a tiny Llama."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        return tmp_path / "adapter", model.eval()(IDS).logits


def test_merged_adapter_is_a_plain_checkpoint_with_the_adapters_logits(adapter, tiny_model, tmp_path):
    folder, wanted = adapter
    merge_adapter(folder, tmp_path / "merged")
    base = load_base(str(tmp_path / "merged"))
    with torch.inference_mode():
        torch.testing.assert_close(base.model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
        plain = load_base(str(tiny_model("llama"))).model(IDS).logits
    assert (wanted - plain).abs().max() > 0.5
    assert base.tokenizer("Once")["input_ids"]
    assert is_adapter(folder)
    assert not is_adapter(tmp_path / "merged")


def test_adapter_is_refused_where_a_whole_model_is_needed(adapter):
    with pytest.raises(ModelError, match="is a PEFT adapter"):
        load_base(str(adapter[0]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "has no adapter_model.safetensors",
        ),
        (lambda f: edit(f, base_model_name_or_path=None), "names no base model"),
        (lambda f: edit(f, base_model_name_or_path="/nowhere/base"), "not found: /nowhere/base"),
        (lambda f: edit(f, target_modules=["c_attn"]), "cannot be merged"),
    ],
)
def test_merge_adapter_refuses(spoil, message, adapter, tmp_path):
    spoil(adapter[0])
    with pytest.raises(Exception, match=message) as error:
        merge_adapter(adapter[0], tmp_path / "merged")
    assert type(error.value).__module__ == "llmrl.errors"


def edit(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture(scope="module", params=QUANTISED)
def quantised(request, stories_dir, tmp_path_factory):
    """Folder of a quantised checkpoint; 4 bits come in blocks of 64."""
    from transformers import AutoTokenizer, BitsAndBytesConfig

    source, folder = stories_dir.parent / "tiny_lm", tmp_path_factory.mktemp(request.param)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**QUANTISED[request.param]), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@needs_bitsandbytes
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("architecture", ["linear", "mlp", "transformer"])
def test_quantised_base_keeps_its_quantisation_under_a_head(
    architecture, merged, quantised, stories_dir, save_head, tmp_path
):
    """Loaded, given a head, and opened again: quantised weights, the head as it was saved, the base's logits scaled."""
    base = load_base(str(quantised))
    assert base.model.is_quantized
    head = save_head(quantised, tmp_path, architecture=architecture, merged=merged)["temperature"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(opened.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    with torch.inference_mode():
        out = base.model(IDS, output_hidden_states=True)
        full = AutoModelForCausalLM.from_pretrained(stories_dir.parent / "tiny_lm", dtype=torch.float32).eval()(IDS)
        tau = head(out.hidden_states[-1])
        assert opened.llmrl_heads["temperature"](out.hidden_states[-1]).equal(tau)
        assert tau.std() > 0.05
        torch.testing.assert_close(opened(IDS).logits, out.logits.float() * tau.exp(), rtol=1e-3, atol=1e-3)
    assert (out.logits - full.logits).abs().max() > 1e-3  # something was rounded

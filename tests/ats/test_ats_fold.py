"""A temperature folded into a plain checkpoint."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmrl.ats.fold import final_norm, fold_temperature, foldable, is_folded
from llmrl.base_model import load_base
from llmrl.errors import ModelError
from llmrl.fingerprints import weight_files

IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))
TAU = -0.7


def logits(folder, **kwargs):
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()
    assert not type(model).__name__.startswith("Llmrl")
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def test_folded_checkpoint_is_plain_and_has_the_scaled_logits(any_model, tmp_path):
    base = load_base(str(any_model))
    if "gemma2" in str(any_model):
        with pytest.raises(ModelError, match="caps its logits"):
            fold_temperature(base, TAU, tmp_path)
        return
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    fold_temperature(base, TAU, tmp_path)
    torch.testing.assert_close(logits(tmp_path), logits(any_model) * math.exp(TAU), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((any_model / "config.json").read_text())
    generation = "generation_config.json"
    assert (tmp_path / generation).read_bytes() == (any_model / generation).read_bytes()
    assert all(
        base.model.state_dict()[name].equal(value) for name, value in before.items()
    )  # the loaded base is as it was


def test_fold_changes_norm_and_output_bias_alone(tiny_model, tmp_path):
    fold_temperature(load_base(str(tiny_model("phi"))), TAU, tmp_path)
    old, new = load_file(tiny_model("phi") / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {name for name in old if not old[name].equal(new[name])} == {
        "model.final_layernorm.weight", "model.final_layernorm.bias", "lm_head.bias",
    }  # fmt: skip
    with (
        safe_open(str(tiny_model("phi") / "model.safetensors"), framework="pt") as one,
        safe_open(str(tmp_path / "model.safetensors"), framework="pt") as other,
    ):
        assert one.metadata() == other.metadata() == {"format": "pt"}  # what older transformers ask for


def without_prefix(model_dir, folder):
    """The GPT-2 of before: its checkpoint does not name the decoder."""
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): value for name, value in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return folder


def test_fold_finds_tensors_that_are_stored_without_the_decoders_name(tiny_model, tmp_path):
    base = without_prefix(tiny_model("gpt2"), tmp_path / "base")
    (tmp_path / "folded").mkdir()
    fold_temperature(load_base(str(base)), TAU, tmp_path / "folded")
    assert "ln_f.weight" in load_file(tmp_path / "folded" / "model.safetensors")
    torch.testing.assert_close(
        logits(tmp_path / "folded"), logits(tiny_model("gpt2")) * math.exp(TAU), rtol=1e-4, atol=1e-4
    )


def test_fold_refuses_a_checkpoint_that_does_not_hold_the_norm(tiny_model, tmp_path):
    base = load_base(str(tiny_model("llama")))
    (tmp_path / "folded").mkdir()
    with pytest.raises(ModelError, match=r"norm\.weight is not stored in .*gpt2"):
        fold_temperature(replace(base, folder=tiny_model("gpt2")), TAU, tmp_path / "folded")


def test_fold_of_norms_that_add_one(tmp_path, stories_tokenizer):
    """Gemma's norm multiplies by 1 + weight."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config)
    torch.nn.init.normal_(model.model.norm.weight, 0.0, 0.5)
    model.save_pretrained(tmp_path / "base")
    stories_tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "folded").mkdir()
    fold_temperature(load_base(str(tmp_path / "base")), TAU, tmp_path / "folded")
    torch.testing.assert_close(
        logits(tmp_path / "folded"), logits(tmp_path / "base") * math.exp(TAU), rtol=1e-4, atol=1e-4
    )
    old = load_file(tmp_path / "base" / "model.safetensors")["model.norm.weight"]
    new = load_file(tmp_path / "folded" / "model.safetensors")["model.norm.weight"]
    torch.testing.assert_close(1 + new, (1 + old) * math.exp(TAU), rtol=1e-5, atol=1e-6)


def test_fold_of_a_checkpoint_in_several_files(tiny_model, tmp_path, stories_tokenizer):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama")).save_pretrained(base, max_shard_size="60KB")
    stories_tokenizer.save_pretrained(base)
    (tmp_path / "folded").mkdir()
    fold_temperature(load_base(str(base)), TAU, tmp_path / "folded")
    assert [f.name for f in weight_files(tmp_path / "folded")] == [f.name for f in weight_files(base)]
    torch.testing.assert_close(logits(tmp_path / "folded"), logits(base) * math.exp(TAU), rtol=1e-4, atol=1e-4)


def test_fold_in_bfloat16_reports_its_rounding(tiny_model, tmp_path, stories_tokenizer):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.bfloat16).save_pretrained(base)
    stories_tokenizer.save_pretrained(base)
    (tmp_path / "folded").mkdir()
    error = fold_temperature(load_base(str(base)), TAU, tmp_path / "folded")
    assert 1e-4 < error < 2e-2
    assert {value.dtype for value in load_file(tmp_path / "folded" / "model.safetensors").values()} == {torch.bfloat16}
    wanted, found = logits(base, dtype="auto") * math.exp(TAU), logits(tmp_path / "folded", dtype="auto")
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < 2e-2


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_fold_of_a_base_in_another_dtype_writes_the_checkpoints_own(family, tiny_model, tmp_path):
    """Read in bfloat16 the norm has 8 bits; the float32 checkpoint keeps its 24."""
    error = fold_temperature(load_base(str(tiny_model(family)), dtype="bfloat16"), TAU, tmp_path)
    assert error < 2e-2  # in bfloat16, as it was computed
    old, new = load_file(tiny_model(family) / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = [name for name in old if not old[name].equal(new[name])]
    assert len(changed) == (1 if family == "llama" else 3)
    for name in changed:
        assert new[name].dtype == torch.float32
        torch.testing.assert_close(new[name], old[name] * math.exp(TAU), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(tmp_path), logits(tiny_model(family)) * math.exp(TAU), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ('{"fold_error": 1e-7, "llmrl_version": "0.1"}', True),
        ('{"fold_error": 0.0, "llmrl_version": "0.1"}', True),
        ('{"llmrl_version": "0.1"}', False),
        ('{"fold_error": 1e-7}', False),
        ('{"fold_error": null, "llmrl_version": "0.1"}', False),
        ("[]", False),
        ("{", False),
        (None, False),
    ],
)
def test_is_folded_goes_by_the_report(text, folded, tmp_path):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert is_folded(tmp_path) is folded


def test_final_norm_is_the_last_one_not_the_embeddings(stories_tokenizer):
    import transformers

    config = transformers.BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4)
    name, _ = final_norm(transformers.BloomForCausalLM(config))
    assert name == "transformer.ln_f"


def test_final_norm_is_the_decoders_whatever_else_the_model_has(tiny_model):
    model = load_base(str(tiny_model("llama"))).model
    model.projector = torch.nn.LayerNorm(32)  # as beside a vision tower
    name, _ = final_norm(model)
    assert name == "model.norm"


def test_model_without_a_final_norm_is_refused(tiny_model):
    base = load_base(str(tiny_model("llama")))
    base.model.model.norm = torch.nn.Identity()
    assert "no norm before its output layer" in foldable(base.model)


def test_logits_that_come_out_otherwise_are_refused(tiny_model, tmp_path, monkeypatch):
    base = load_base(str(shutil.copytree(tiny_model("llama"), tmp_path / "base")))
    # something after the norm that is not linear
    base.model.lm_head.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ModelError, match="has other logits"):
        fold_temperature(base, TAU, tmp_path)

import copy
import json
import pickle
import shutil

import pytest
import torch
from modeling_support import IDS, bare, load, logits_of, multiplier
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

import llmrl.modeling as modeling
from llmrl.errors import HeadMismatchError, ModelError
from llmrl.fingerprints import fingerprint_weights
from llmrl.heads import HEADS_FILE, HeadsConfig, HeadSpec, build_heads
from llmrl.modeling import LlmrlConfig, model_class_for, read_heads_config, save_heads_folder

# --- logits -----------------------------------------------------------------------------------------------------------


def test_from_pretrained_logits_are_the_bases_times_the_multiplier(any_model, save_head, tmp_path):
    base = bare(any_model)
    for merged in (False, True):
        folder = tmp_path / str(merged)
        heads = save_head(any_model, folder, merged=merged)
        model = load(folder)
        s = multiplier(base, heads["temperature"])
        assert s.std() > 0.1
        assert logits_of(model).dtype == torch.float32
        torch.testing.assert_close(logits_of(model).double(), logits_of(base).double() * s, rtol=1e-4, atol=1e-5)
        assert model.config.model_type == base.config.model_type
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llmrl"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_unfitted_head_is_the_base_bit_for_bit(dtype, any_model, save_head, tmp_path):
    save_head(any_model, tmp_path, zero=True)
    found = logits_of(load(tmp_path, dtype=dtype))
    assert found.equal(logits_of(bare(any_model, dtype=dtype)).float())


def test_from_pretrained_bfloat16_keeps_the_head_in_float32(llama, head_folders):
    base, model = load(llama, dtype=torch.bfloat16), load(head_folders["merged"], dtype=torch.bfloat16)
    head = model.llmrl_heads["temperature"]
    assert head.weight.dtype == torch.float32
    assert head.weight.equal(head_folders["heads"]["temperature"].weight)
    assert next(model.model.parameters()).dtype == torch.bfloat16
    expected = logits_of(base).double() * multiplier(base, head)
    torch.testing.assert_close(logits_of(model).double(), expected, rtol=1e-4, atol=1e-4)
    assert logits_of(model).argmax(-1).equal(logits_of(base).argmax(-1))


def test_forward_logits_to_keep(llama, head_folders):
    model = load(head_folders["head"])
    torch.testing.assert_close(logits_of(model, logits_to_keep=1), logits_of(model)[:, -1:])


def test_forward_positional_arguments_and_tuple(head_folders):
    model = load(head_folders["head"])
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.inference_mode():
        positional = model(IDS, mask).logits
        as_tuple = model(input_ids=IDS, attention_mask=mask, return_dict=False)
    assert positional.equal(logits_of(model, attention_mask=mask))
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0].equal(positional)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_forward_loss_is_cross_entropy_of_the_calibrated_logits(name, tiny_model, save_head, tmp_path):
    save_head(tiny_model(name), tmp_path)
    model = load(tmp_path)
    labels = IDS.clone()
    labels[:, :4] = -100
    with torch.inference_mode():
        output = model(input_ids=IDS, labels=labels)
    flat = output.logits[:, :-1].double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert output.logits.equal(logits_of(model))


def test_from_pretrained_copies_are_independent(head_folders):
    model = load(head_folders["head"])
    twin = copy.deepcopy(model)
    twin.llmrl_heads["temperature"].bias.fill_(-1.0)
    assert not logits_of(twin).equal(logits_of(model))
    torch.testing.assert_close(logits_of(model), logits_of(load(head_folders["head"])))


# --- generation -------------------------------------------------------------------------------------------------------


def generate(model, ids=IDS, **kwargs):
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    options |= {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None, **kwargs}
    with torch.inference_mode():
        return model.generate(input_ids=ids, **options)


def test_generate_greedy_ids_are_the_bases(any_model, save_head, tmp_path):
    save_head(any_model, tmp_path)
    assert generate(load(tmp_path)).sequences.equal(generate(bare(any_model)).sequences)


def test_generate_greedy_ids_are_the_bases_in_bfloat16(llama, head_folders):
    base, model = load(llama, dtype=torch.bfloat16), load(head_folders["head"], dtype=torch.bfloat16)
    assert generate(model, max_new_tokens=30).sequences.equal(generate(base, max_new_tokens=30).sequences)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_scores_are_the_calibrated_logits_of_the_whole_text(use_cache, any_model, save_head, tmp_path):
    save_head(any_model, tmp_path)
    model = load(tmp_path)
    found = generate(model, use_cache=use_cache)
    whole = logits_of(model, found.sequences)
    for step, score in enumerate(found.scores):
        torch.testing.assert_close(score, whole[:, IDS.shape[1] - 1 + step], rtol=1e-4, atol=1e-4)


def test_generate_samples_from_the_calibrated_distribution(llama, head_folders):
    base, model = load(llama), load(head_folders["merged"])
    prompt = IDS[:1, :6].expand(4000, -1)
    torch.manual_seed(0)
    found = generate(model, prompt, do_sample=True, top_k=0, max_new_tokens=1, output_scores=False)
    counts = torch.bincount(found.sequences[:, -1], minlength=512) / 4000
    z = logits_of(base, prompt[:1])[0, -1].double()
    s = multiplier(base, head_folders["heads"]["temperature"], prompt[:1])[0, -1]
    distance = [float((counts - (z * scale).softmax(-1)).abs().sum() / 2) for scale in (s, torch.ones(1))]
    assert distance[0] < 0.14
    assert distance[1] > distance[0] + 0.03


def test_generate_left_padding_changes_nothing(head_folders):
    model = load(head_folders["head"])
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[:1]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    plain, left = generate(model, IDS[:1]), generate(model, padded, attention_mask=mask)
    assert left.sequences[:, 5:].equal(plain.sequences)
    for a, b in zip(left.scores, plain.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- save and load again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["head", "merged", "sharded"])
def test_save_pretrained_and_reload_are_equal(kind, dtype, head_folders, tmp_path):
    model = load(head_folders[kind], dtype=dtype)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=dtype)
    assert logits_of(again).equal(logits_of(model))
    spec = read_heads_config(tmp_path)
    assert spec.merged
    assert spec.base.weights == fingerprint_weights(tmp_path)
    assert load_file(tmp_path / HEADS_FILE).keys() == load_file(head_folders[kind] / HEADS_FILE).keys()
    assert type(again).__name__ == "LlmrlLlamaForCausalLM"


def test_save_pretrained_in_several_files_lists_the_head_in_the_index(head_folders, tmp_path):
    model = load(head_folders["merged"])
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["llmrl_heads.temperature.weight"] == HEADS_FILE
    assert all((tmp_path / file).is_file() for file in index.values())
    assert logits_of(load(tmp_path)).equal(logits_of(model))


@pytest.mark.parametrize("name", ["gemma2", "cohere", "gpt2", "qwen2"])
def test_save_pretrained_tied_and_other_layouts(name, tiny_model, save_head, tmp_path):
    save_head(tiny_model(name), tmp_path / "head")
    model = load(tmp_path / "head")
    model.save_pretrained(tmp_path / "again")
    assert logits_of(load(tmp_path / "again")).equal(logits_of(model))


def test_save_heads_folder_merged_weights_are_the_bases_byte_for_byte(llama, head_folders):
    assert (head_folders["merged"] / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert not (head_folders["head"] / "model.safetensors").exists()
    index = json.loads((head_folders["sharded"] / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file for name, file in index.items() if name.startswith("llmrl_heads.")} == {HEADS_FILE}


def test_save_heads_folder_merged_folder_stands_alone(llama, save_head, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    save_head(base, tmp_path / "merged", merged=True)
    expected = logits_of(load(tmp_path / "merged"))
    shutil.rmtree(base)
    assert logits_of(load(tmp_path / "merged")).equal(expected)


def test_save_heads_folder_architecture_tells_vllm_what_to_serve(llama, tmp_path, save_head):
    save_head(llama, tmp_path / "temperature")
    assert json.loads((tmp_path / "temperature/config.json").read_text())["architectures"] == ["LlmrlLlamaForCausalLM"]
    reference = read_heads_config(tmp_path / "temperature")
    config = HeadsConfig({"reward": HeadSpec("reward", "linear", 32, 2)}, reference.base, "llama", "LlamaForCausalLM")
    (tmp_path / "reward").mkdir()
    save_heads_folder(tmp_path / "reward", build_heads(config), config, AutoTokenizer.from_pretrained(llama), llama)
    fields = json.loads((tmp_path / "reward/config.json").read_text())
    assert fields["architectures"] == ["LlmrlLlamaForSequenceClassification"]
    assert fields["id2label"] == {"0": "score_0", "1": "score_1"}
    # a head with scores of its own leaves the logits alone
    assert logits_of(load(tmp_path / "reward")).equal(logits_of(load(llama)))


def test_config_survives_auto_config_pickle_and_saving(head_folders, tmp_path):
    config = AutoConfig.from_pretrained(head_folders["merged"])
    assert type(config).__name__ == "LlmrlLlamaConfig"
    assert config.model_type == "llama"
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llmrl"
    assert AutoConfig.from_pretrained(tmp_path).llmrl == config.llmrl


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_from_pretrained_wrong_base_weights(llama, save_head, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    save_head(base, tmp_path / "head")
    other = load(base)
    with torch.no_grad():
        other.model.norm.weight[5] += 0.01
    other.save_pretrained(base)
    with pytest.raises(
        HeadMismatchError, match=r"the head in .*head was fitted on another base: the weights or .* in .*base differ"
    ):
        load(tmp_path / "head")


def test_from_pretrained_merged_folder_whose_weights_changed(head_folders, tmp_path):
    shutil.copytree(head_folders["merged"], tmp_path / "merged")
    model = load(head_folders["merged"])
    model.lm_head.weight.data += 0.01
    super(modeling.HeadsModelMixin, model).save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other/model.safetensors", tmp_path / "merged/model.safetensors")
    with pytest.raises(HeadMismatchError):
        load(tmp_path / "merged")


@pytest.mark.parametrize("where", ["{tmp}/gone/base", "nobody/no-such-model"])
def test_from_pretrained_missing_base_is_one_clear_error(where, llama, save_head, tmp_path):
    place = where.format(tmp=tmp_path)
    save_head(llama, tmp_path / "head", model=place)
    with pytest.raises(ModelError) as error:
        load(tmp_path / "head")
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"the base model of {tmp_path / 'head'} cannot be read at {place}: ")
    assert lines[1] == f"put it there, or change llmrl.base.model in {tmp_path / 'head' / 'config.json'}"


@pytest.mark.parametrize("merged", [False, True])
def test_from_pretrained_never_reads_a_pickle(merged, llama, save_head, tmp_path, monkeypatch):
    base = shutil.copytree(llama, tmp_path / "base")
    save_head(base, tmp_path / "head", merged=merged)
    source = tmp_path / ("head" if merged else "base")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    asked = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: asked.append(args) or pytest.fail("a pickle was read"))
    with pytest.raises((ModelError, OSError), match=r"model\.safetensors"):
        load(tmp_path / "head")
    with pytest.raises((ModelError, OSError), match=r"model\.safetensors"):
        load(tmp_path / "head", use_safetensors=False)  # asking for it does not help
    assert asked == []


def test_from_pretrained_attends_eagerly_where_attention_logits_are_capped(tiny_model, save_head, tmp_path):
    base = shutil.copytree(tiny_model("gemma2"), tmp_path / "base")
    fields = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**fields, "attn_logit_softcapping": 0.3}))
    for merged in (False, True):
        save_head(base, tmp_path / str(merged), merged=merged)
        model = load(tmp_path / str(merged))
        assert model.config._attn_implementation == "eager"
        assert logits_of(model).equal(logits_of(load(tmp_path / str(merged), attn_implementation="eager")))
        asked = load(tmp_path / str(merged), attn_implementation="sdpa")
        assert asked.config._attn_implementation == "sdpa"
        assert not torch.allclose(logits_of(asked), logits_of(model), atol=1e-3)


def test_save_heads_folder_dtype_is_the_one_the_heads_were_fitted_in(llama, head_folders, tmp_path):
    spec, tokenizer = read_heads_config(head_folders["merged"]), AutoTokenizer.from_pretrained(llama)
    for dtype, name in ((None, "float32"), ("bfloat16", "bfloat16")):
        folder = tmp_path / name
        folder.mkdir()
        save_heads_folder(folder, head_folders["heads"], spec, tokenizer, llama, dtype)
        fields = json.loads((folder / "config.json").read_text())
        assert fields["dtype"] == name
        assert "torch_dtype" not in fields
        model = load(folder)
        assert str(model.dtype) == f"torch.{name}"
        assert model.llmrl_heads["temperature"].weight.dtype == torch.float32


def test_save_heads_folder_copies_only_the_files_a_loader_reads(llama, save_head, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    shutil.copyfile(base / "model.safetensors", base / "consolidated.safetensors")
    save_head(base, tmp_path / "merged", merged=True)
    assert {path.name for path in (tmp_path / "merged").glob("*.safetensors")} == {"model.safetensors", HEADS_FILE}
    load(tmp_path / "merged")


def test_from_pretrained_without_the_head_file(head_folders, tmp_path):
    shutil.copytree(head_folders["merged"], tmp_path / "merged")
    (tmp_path / "merged" / HEADS_FILE).unlink()
    with pytest.raises(ModelError, match=r"not found: .*llmrl_heads\.safetensors"):
        load(tmp_path / "merged")


def test_llmrl_config_without_a_section():
    with pytest.raises(ModelError, match=r"config.json says model_type 'llmrl' but has no 'llmrl' section"):
        LlmrlConfig.from_dict({"model_type": "llmrl"})


def test_model_class_for_unknown_class():
    with pytest.raises(ModelError, match="has no class NopeForCausalLM: install one that has it"):
        model_class_for("NopeForCausalLM")


def test_modeling_makes_classes_by_name_and_no_others():
    assert modeling.LlmrlGPT2Config is modeling.LlmrlGPT2LMHeadModel.config_class
    with pytest.raises(AttributeError):
        _ = modeling.SomethingElse

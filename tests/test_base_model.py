import json
import pickle
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.base_model import (
    DEFAULT_MAX_LENGTH,
    check_model_folder,
    context_length,
    generate_greedy,
    load_base,
    load_tokenizer,
    reference_for,
)
from llmrl.errors import ModelError, UsageError
from llmrl.fingerprints import fingerprint_weights
from llmrl.modeling import read_heads_config

IDS = torch.arange(3, 20)[None]


@pytest.fixture
def copied(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    return folder


def test_load_base_is_frozen_and_knows_its_identity(stories_dir):
    base = load_base(str(stories_dir), device="cpu")
    assert base.architecture == "LlamaForCausalLM"
    assert base.folder == stories_dir
    assert base.model.dtype == torch.float32
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.reference.weights == fingerprint_weights(stories_dir)
    assert base.reference == reference_for(str(stories_dir), stories_dir, base.tokenizer)
    assert base.reference.revision is None


def test_load_base_remembers_an_absolute_path(stories_dir, monkeypatch):
    monkeypatch.chdir(stories_dir.parent)
    assert load_base("stories260k", device="cpu").reference.model == str(stories_dir)


def test_load_base_dtype(tiny_model):
    assert load_base(str(tiny_model("llama")), dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    with pytest.raises(UsageError, match=r"--dtype bfloat61: not a choice; did you mean 'bfloat16'\?"):
        load_base(str(tiny_model("llama")), dtype="bfloat61")


class Attack:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (open, (self.trace, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl", "model.ckpt"])
def test_load_base_refuses_pickled_weights_without_reading_them(name, copied, tmp_path):
    (copied / "model.safetensors").unlink()
    (copied / name).write_bytes(pickle.dumps(Attack(tmp_path / "trace")))
    with pytest.raises(ModelError) as error:
        load_base(str(copied), device="cpu")
    assert f"holds its weights as a pickle ({name}), which can run code when it is read; refused" in str(error.value)
    assert "save_pretrained" in str(error.value)
    assert not (tmp_path / "trace").exists()


def test_load_base_never_reads_a_pickle_beside_the_weights(copied, tmp_path):
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Attack(tmp_path / "trace")))
    load_base(str(copied), device="cpu")
    assert not (tmp_path / "trace").exists()


def test_load_base_without_weights(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights: expected \*\.safetensors"):
        load_base(str(copied), device="cpu")


def test_load_base_damaged_weights(copied):
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cannot load .*model: .+"):
        load_base(str(copied), device="cpu")


def test_load_base_file_instead_of_a_folder(copied):
    with pytest.raises(ModelError, match=r"model\.safetensors is a file; name the folder of a checkpoint"):
        load_base(str(copied / "model.safetensors"))


def test_load_base_folder_without_a_config(copied):
    (copied / "config.json").unlink()
    with pytest.raises(ModelError, match=r"is no model folder: it has no config\.json"):
        load_base(str(copied))


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "a/b/c"])
def test_load_base_unknown_path_is_never_a_hub_name(name):
    with pytest.raises(UsageError, match=f"not found: {name} \\(model\\)"):
        load_base(name)


def test_load_base_unknown_hub_name():
    with pytest.raises(ModelError, match="cannot load nobody/no-such-model: ") as error:
        load_base("nobody/no-such-model")
    assert len(str(error.value).splitlines()) == 1


def test_load_base_refuses_a_folder_with_heads(tiny_model, save_head, tmp_path):
    for merged in (False, True):
        save_head(tiny_model("llama"), tmp_path / str(merged), merged=merged)
        with pytest.raises(ModelError, match="already carries llmrl heads; name its base model"):
            load_base(str(tmp_path / str(merged)), device="cpu")


def test_load_base_without_heads_is_the_bare_base(tiny_model, save_head, tmp_path):
    folder = tiny_model("llama")
    save_head(folder, tmp_path / "merged", merged=True)
    base = load_base(str(tmp_path / "merged"), device="cpu", without_heads=True)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():
        assert base.model(IDS).logits.equal(plain(IDS).logits)
    expected = read_heads_config(tmp_path / "merged").base
    assert (base.reference.weights, base.reference.tokenizer) == (expected.weights, expected.tokenizer)


def test_load_tokenizer_missing_or_broken_is_a_model_error(copied, tmp_path):
    (copied / "tokenizer.json").write_text("{broken")
    for folder in (copied, tmp_path / "nothing"):
        with pytest.raises(ModelError, match=r"cannot load the tokenizer of .+: .+"):
            load_tokenizer(folder)


def test_check_model_folder_takes_a_checkpoint_in_several_files(copied):
    (copied / "model.safetensors").rename(copied / "model-00001-of-00002.safetensors")
    check_model_folder(copied)


def test_context_length_is_the_least_of_model_tokenizer_and_default(stories_dir):
    base = load_base(str(stories_dir), device="cpu")
    assert context_length(base.model, base.tokenizer) == 512
    base.tokenizer.model_max_length = 100
    assert context_length(base.model, base.tokenizer) == 100
    base.tokenizer.model_max_length = int(1e30)
    base.model.config.max_position_embeddings = 131_072
    assert context_length(base.model, base.tokenizer) == DEFAULT_MAX_LENGTH


def test_reference_for_is_json(stories_dir, stories_tokenizer):
    reference = reference_for("base", stories_dir, stories_tokenizer, "abc")
    assert json.loads(json.dumps(vars(reference)))["revision"] == "abc"


def test_load_base_device_that_is_none(stories_dir):
    for name in ("foo", "cuda:99"):
        with pytest.raises(UsageError, match=f"--device {name} cannot be used here: ") as error:
            load_base(str(stories_dir), device=name)
        assert len(str(error.value).splitlines()) == 1


def test_load_base_attends_eagerly_where_attention_logits_are_capped(tiny_model, tmp_path):
    """transformers' default attention leaves Gemma 2's cap out."""
    folder = shutil.copytree(tiny_model("gemma2"), tmp_path / "gemma2")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "attn_logit_softcapping": 0.3}))
    base = load_base(str(folder), device="cpu")
    assert base.model.config._attn_implementation == "eager"
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    other = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        assert base.model(IDS).logits.equal(eager(IDS).logits)
        assert not torch.allclose(other(IDS).logits, eager(IDS).logits, atol=1e-3)
    assert load_base(str(tiny_model("llama")), device="cpu").model.config._attn_implementation != "eager"


def test_generate_greedy_has_no_penalties_of_the_checkpoint(copied):
    stops = {"eos_token_id": [2, 7]}
    (copied / "generation_config.json").write_text(
        json.dumps(
            {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6, "no_repeat_ngram_size": 2, **stops}
        )
    )
    model = AutoModelForCausalLM.from_pretrained(copied).eval()
    assert model.generation_config.repetition_penalty == 1.3
    found = generate_greedy(model, IDS, 20)
    assert model.generation_config.repetition_penalty == 1.3  # still the caller's
    ids = IDS[0].tolist()
    with torch.inference_mode():
        while len(ids) < IDS.shape[1] + 20 and ids[-1] not in (2, 7):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert found == ids[IDS.shape[1] :]
    options = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    assert model.generate(IDS, **options)[0, IDS.shape[1] :].tolist() != found

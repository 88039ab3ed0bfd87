"""What a head knows its base by: fingerprints of weights and configuration, tokenizer, chat template."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from llmrl.errors import HeadMismatchError, ModelError
from llmrl.fingerprints import (
    check_same_base,
    check_weights,
    fingerprint_template,
    fingerprint_tokenizer,
    fingerprint_weights,
    weight_files,
)
from llmrl.heads import HEADS_FILE, BaseReference, HeadsConfig, HeadSpec

LINEAR = HeadSpec("temperature", "linear", 8)
SCALAR = HeadSpec("temperature", "scalar", 8)
REWARD = HeadSpec("reward", "linear", 8, outputs=3)
BASE = BaseReference("base", "sha256:w", "sha256:t", "sha256:c", revision="abc")
CONFIG = HeadsConfig({"temperature": LINEAR}, BASE, "llama", "LlamaForCausalLM", method="ats-linear")


def random_(head, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return head


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(200, 16, generator=generator),
        "norm": torch.randn(16, generator=generator).to(torch.bfloat16),
        "big": torch.randn(1100, 1000, generator=generator),
        "step": torch.tensor(3),
    }


def fingerprint(tmp_path, *shards):
    for old in tmp_path.glob("*.safetensors"):
        old.unlink()
    for number, shard in enumerate(shards):
        save_file(shard, tmp_path / f"model-{number}.safetensors")
    return fingerprint_weights(tmp_path)


def test_fingerprint_weights_does_not_depend_on_shards(weights, tmp_path):
    whole = fingerprint(tmp_path, weights)
    assert whole.startswith("sha256:")
    one, two = {k: weights[k] for k in ("norm", "big")}, {k: weights[k] for k in ("embed", "step")}
    assert fingerprint(tmp_path, one, two) == fingerprint(tmp_path, two, one) == whole


def changed(weights, name, change):
    tensor = weights[name].clone()
    return {**weights, name: change(tensor)}


def set_at(index, delta):
    def change(tensor):
        tensor[index] += delta
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("embed", set_at((100, 7), 1e-6)),
        ("embed", lambda t: t.reshape(100, 32)),
        ("embed", lambda t: t.T.contiguous().T.flip(0).contiguous()),
        ("norm", set_at(15, 0.1)),
        ("norm", lambda t: t.float()),
        ("step", lambda t: t + 1),
        ("big", lambda t: t + 1e-5),
        ("big", lambda t: t.to(torch.float16)),
        ("big", lambda t: t.flip(1).contiguous()),
    ],
)
def test_fingerprint_weights_sees_a_change(name, change, weights, tmp_path):
    assert fingerprint(tmp_path, changed(weights, name, change)) != fingerprint(tmp_path, weights)


def test_fingerprint_weights_sees_names(weights, tmp_path):
    renamed = {**weights, "other": weights["norm"]}
    del renamed["norm"]
    assert fingerprint(tmp_path, renamed) != fingerprint(tmp_path, weights)


def test_fingerprint_weights_reads_the_first_and_the_last_row_of_a_large_matrix(weights, tmp_path):
    assert weights["big"].numel() * 4 > 4 << 20
    plain = fingerprint(tmp_path, weights)
    for row in (0, 1099):
        assert fingerprint(tmp_path, changed(weights, "big", set_at((row, 500), 1e-3))) != plain


def test_fingerprint_weights_leaves_heads_out(weights, tmp_path):
    plain = fingerprint(tmp_path, weights)
    save_file({"llmrl_heads.temperature.bias": torch.ones(1)}, tmp_path / HEADS_FILE)
    assert fingerprint_weights(tmp_path) == plain
    assert fingerprint(tmp_path, {**weights, "llmrl_heads.temperature.bias": torch.ones(1)}) == plain


def test_fingerprint_weights_without_weights(tmp_path):
    with pytest.raises(ModelError, match=r"no weights in .*: expected \*\.safetensors"):
        fingerprint_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight"])
def test_fingerprint_weights_sees_one_row_of_a_large_embedding(name, tmp_path):
    embedding = torch.randn(2200, 500, generator=torch.Generator().manual_seed(1))
    assert embedding.numel() * 4 > 4 << 20
    plain = fingerprint(tmp_path, {name: embedding})
    for entry in (1, 1237, 2198):
        assert fingerprint(tmp_path, changed({name: embedding}, name, set_at((entry, 3), 1e-4))) != plain


def with_config(folder, weights, **fields):
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 1e4}, "use_cache": True}
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return fingerprint_weights(folder)


def test_fingerprint_weights_sees_the_configuration(weights, tmp_path):
    plain = with_config(tmp_path, weights)
    for field in (
        {"rope_parameters": {"rope_theta": 1e5}},
        {"rms_norm_eps": 1e-6},
        {"sliding_window": 16},
        {"final_logit_softcapping": 30.0},
        {"tie_word_embeddings": True},
    ):
        assert with_config(tmp_path, weights, **field) != plain, field
    (tmp_path / "config.json").unlink()
    assert fingerprint_weights(tmp_path) != plain


def test_fingerprint_weights_leaves_out_what_changes_no_number(weights, tmp_path):
    plain = with_config(tmp_path, weights)
    for field in (
        {"transformers_version": "9.9"},
        {"use_cache": False},
        {"torch_dtype": "float32"},
        {"dtype": "bfloat16"},
        {"_name_or_path": "elsewhere"},
        {"pad_token_id": 3, "eos_token_id": [2, 5]},
        {"model_type": "llmrl", "architectures": ["LlmrlLlamaForCausalLM"], "llmrl": {"format": 1}},
    ):
        assert with_config(tmp_path, weights, **field) == plain, field
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert fingerprint_weights(tmp_path) == plain


def test_fingerprint_weights_reads_the_files_a_loader_reads(weights, tmp_path):
    one, two = {k: weights[k] for k in ("norm", "big")}, {k: weights[k] for k in ("embed", "step")}
    save_file(one, tmp_path / "model-1.safetensors")
    save_file(two, tmp_path / "model-2.safetensors")
    names = dict.fromkeys(one, "model-1.safetensors") | dict.fromkeys(two, "model-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    indexed = fingerprint_weights(tmp_path)
    # the same weights once more in the layout of another program
    save_file({"norm.weight": weights["norm"]}, tmp_path / "consolidated.safetensors")
    assert fingerprint_weights(tmp_path) == indexed
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    (tmp_path / "single").mkdir()
    save_file(weights, tmp_path / "single" / "model.safetensors")
    save_file({"norm.weight": weights["norm"]}, tmp_path / "single" / "consolidated.safetensors")
    assert fingerprint_weights(tmp_path / "single") == indexed
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors, which its index names"):
        fingerprint_weights(tmp_path)


def edited_tokenizer(folder, tmp_path, edit):
    from transformers import AutoTokenizer

    files = {name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    edit(files["tokenizer.json"], files["tokenizer_config.json"])
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    return AutoTokenizer.from_pretrained(tmp_path)


def swap_two_tokens(tokenizer, _):
    vocabulary = tokenizer["model"]["vocab"]
    a, b = [token for token, index in vocabulary.items() if index in (300, 301)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


@pytest.mark.parametrize(
    "edit",
    [
        swap_two_tokens,
        lambda tokenizer, config: config.update(eos_token="<unk>"),
        lambda tokenizer, config: tokenizer.update(post_processor=None),
        lambda tokenizer, config: tokenizer.update(normalizer={"type": "Lowercase"}),
        # none of the probe texts shows these two
        lambda tokenizer, config: tokenizer["model"]["merges"].reverse(),
        lambda tokenizer, config: tokenizer["normalizer"]["normalizers"].append(
            {"type": "Replace", "pattern": {"String": "\u0103"}, "content": "a"}
        ),
    ],
    ids=["vocabulary", "special token", "no BOS", "normalizer", "merges", "rare letter"],
)
def test_fingerprint_tokenizer_sees_a_change(edit, stories_dir, stories_tokenizer, tmp_path):
    edited = edited_tokenizer(stories_dir, tmp_path, edit)
    assert fingerprint_tokenizer(edited) != fingerprint_tokenizer(stories_tokenizer)


def test_fingerprint_tokenizer_is_the_same_after_saving(stories_tokenizer, tmp_path):
    from transformers import AutoTokenizer

    stories_tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint_tokenizer(saved) == fingerprint_tokenizer(stories_tokenizer)
    assert fingerprint_template(saved) == fingerprint_template(stories_tokenizer)


def test_fingerprint_tokenizer_does_not_mind_padding_and_truncation(stories_dir, stories_tokenizer):
    tokenizer = copy.deepcopy(stories_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert fingerprint_tokenizer(tokenizer) == fingerprint_tokenizer(stories_tokenizer)


def test_fingerprint_template_sees_a_change():
    class Tokenizer:
        chat_template = None

    found = set()
    for template in (None, "{{ messages }}", "{{ messages }} ", {"default": "{{ messages }}"}):
        Tokenizer.chat_template = template
        found.add(fingerprint_template(Tokenizer()))
    assert len(found) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights": "x"}, "the base model's weights or configuration of other differ"),
        ({"tokenizer": "x"}, "the tokenizer of other differ"),
        ({"template": "x"}, "the chat template of other differ"),
        (
            {"weights": "x", "template": "y"},
            "the base model's weights or configuration and the chat template of other differ",
        ),
    ],
)
def test_check_same_base_names_what_differs(changes, named):
    with pytest.raises(HeadMismatchError) as error:
        check_same_base(replace(BASE, model="other", **changes), BASE, "DIR")
    assert named in str(error.value)


def test_check_same_base_does_not_mind_where_the_base_lies():
    check_same_base(replace(BASE, model="/elsewhere", revision=None), BASE, "DIR")


def test_check_weights(weights, tmp_path):
    found = fingerprint(tmp_path, weights)
    check_weights(tmp_path, replace(BASE, weights=found), "DIR")
    with pytest.raises(HeadMismatchError, match="the head in DIR was fitted on another base"):
        check_weights(tmp_path, BASE, "DIR")

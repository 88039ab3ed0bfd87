"""What of a text reaches the heads: cut at a length that was asked for, refused otherwise, and never confused in the cache."""

import json
import shutil

import pytest
import torch
from small_ensembles import ANSWERS, PROMPTS, random_ensemble

from llmrl.encoder import default_encoder
from llmrl.errors import DataError, ModelError, UsageError
from llmrl.hyre.export import export_ensemble
from llmrl.hyre.features import CausalFeatures, embed_pairs, open_features
from llmrl.hyre.pairs import Pair
from llmrl.hyre.train import held_out_rows

LONG = "the dog ran to the big tree and the cat sat on it " * 4
PAIRS = [Pair(PROMPTS[0], ANSWERS[0], ANSWERS[1], where="f:1"), Pair(PROMPTS[1], LONG, "No.", where="f:2")]


def test_the_beginning_of_a_long_text_is_cut_where_a_length_was_asked_for(tiny_model, capsys):
    base = open_features(str(tiny_model("llama")), max_length=12, dtype="float32")
    whole = base.base.tokenizer(LONG)["input_ids"]
    assert base.ids(LONG) == [whole[0], *whole[-11:]]  # the first token, <s>, stays
    assert len(base.ids("No.")) < 12
    base.cut = 0
    embed_pairs(base, PAIRS, "answer")
    assert "texts are longer than what is read of a text and were cut" in capsys.readouterr().err


def test_a_text_beyond_the_context_is_refused_by_its_line(tiny_model):
    base = open_features(str(tiny_model("llama")), dtype="float32")
    base.max_length = 30
    with pytest.raises(DataError, match=r"f:2: \d+ tokens, expected 1 to 30.*\n--max_length 30 cuts"):
        embed_pairs(base, PAIRS, "answer")


@pytest.mark.parametrize("name", ["llama", "encoder"])
def test_the_cache_knows_how_much_was_read(name, tiny_model, tmp_path, capsys):
    base = default_encoder() if name == "encoder" else str(tiny_model(name))

    def read(length):
        return embed_pairs(open_features(base, max_length=length), PAIRS, "answer", cache_dir=tmp_path)[0][1]

    whole, cut = read(None if name == "encoder" else 200), read(8)
    assert not torch.allclose(whole, cut, atol=1e-3)
    assert torch.equal(read(8), cut)
    assert capsys.readouterr().err.count("were cut") == 2  # said again where the vectors lay in the cache
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(read(8), cut)


def test_a_reward_model_made_of_a_causal_lm_gives_last_states(tiny_model, tmp_path):
    """Not mean-pooled vectors, as a sentence encoder's: its own score is not used."""
    ensemble, _ = random_ensemble(tiny_model("llama"), heads=1)
    folder = export_ensemble(ensemble, tmp_path / "served").folder
    for name in ("reward_ensemble.json", "reward_export.json", "llmrl_heads.safetensors", "README.md"):
        (folder / name).unlink()
    found = open_features(str(folder), dtype="float32")
    assert isinstance(found, CausalFeatures)
    plain = open_features(str(tiny_model("llama")), dtype="float32")
    assert torch.allclose(found.embed(ANSWERS), plain.embed(ANSWERS), atol=1e-5)


def test_what_is_neither_is_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "other")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": ["LlamaForTokenClassification"]}))
    with pytest.raises(ModelError, match="is a LlamaForTokenClassification: expected"):
        open_features(str(folder))
    for options in ({"dtype": "bfloat16"}, {"revision": "main"}):
        with pytest.raises(UsageError, match="leave out --dtype and --revision"):
            open_features(None, **options)


def test_a_local_base_is_known_by_its_absolute_path(tiny_model, tmp_path, monkeypatch):
    shutil.copytree(tiny_model("llama"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert open_features("./base").name == str(tmp_path / "base")


def test_no_group_is_held_out_as_a_whole():
    pairs = [Pair((("user", f"q{i}"),), "a", "b", group="many") for i in range(20)]
    pairs += [Pair((("user", "rare"),), "a", "b", group="rare")]
    for seed in range(30):
        held = held_out_rows(pairs, 0.5, seed)
        assert not held[-1]
        assert held.sum() >= 9

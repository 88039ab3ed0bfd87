"""recipes/leret_publish.py: the folder it writes opens in bfloat16, with prompt and tokenizer, and is half the size."""

import importlib
import sys
from pathlib import Path

import pytest
import search_world
import torch

from llmrl.errors import LlmrlError
from llmrl.leret.prompts import PromptFormat, SearchSetup, load_setup

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def publish(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    yield importlib.import_module("leret_publish").main
    sys.modules.pop("leret_publish")


def test_what_is_published_opens_as_it_was_trained_but_for_the_rounding(publish, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, out = tmp_path / "policy", tmp_path / "out"
    search_world.write_model(policy, steps=1)
    setup = SearchSetup(format=PromptFormat(instruction="Search."), hops=3, question_first=True, notes={"seed": "4"})
    setup.save(policy)
    assert publish(["--policy", str(policy), "--output_dir", str(out), "--seed", "4"]) == 0
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert all(after[name].equal(value.to(torch.bfloat16)) for name, value in before.items())
    assert load_setup(out) == setup
    texts = ["Where was the builder of Alder Dam born?", "[1] Äbel | x"]
    old, new = (AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] for folder in (policy, out))
    assert old == new
    card = (out / "README.md").read_text()
    assert "3 hops, 3 passages" in card
    assert "seed 4" in card


def test_a_folder_without_a_search_prompt_is_refused(publish, tmp_path):
    search_world.write_model(tmp_path / "policy", steps=1)
    with pytest.raises(LlmrlError, match=r"no search_prompt\.json"):
        publish(["--policy", str(tmp_path / "policy"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()

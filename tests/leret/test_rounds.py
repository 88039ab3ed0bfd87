"""A round: who explores what, what is trained on it, what is kept of a run that was killed."""

import pytest
from explore_world import QUESTIONS, prompt_text, say
from rounds_world import Trainers, rows
from run_world import Models, write_adapter

from llmrl.errors import RequestError, UsageError
from llmrl.leret import rounds, run
from llmrl.leret.options import LeretConfig
from llmrl.leret.prompts import load_setup, load_styles
from llmrl.leret.retriever import RetrieverError
from llmrl.leret.rounds import (
    Learner,
    explore_round,
    first_learner,
    stage_settings,
    train_round,
)


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

"""`llmrl leret eval`: the rows of the report, what stands beside what, and answers that are not asked for twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from explore_world import prompt_text, say
from run_world import SETUP, Models, opened, write_adapter, write_weights

from llmrl.errors import OutputError, RequestError, UsageError
from llmrl.leret import run as commands
from llmrl.leret.ask import EngineAsker
from llmrl.leret.evaluation import evaluate, systems_of
from llmrl.leret.prompts import PromptFormat, PromptStyle, load_setup
from llmrl.leret.retriever import RetrieverError
from llmrl.leret.rules import RULES

FACTS = {"corpus", "retriever", "retriever_fingerprint", "reward", "search", "models", "failed_prompts"}
REPORT = {"systems", "paired", "paired_by_hop", "paired_by_type", "questions", "excluded", "bootstrap"}


@pytest.fixture
def played(tmp_path, monkeypatch):
    """`played(models, **options)`: the report of an evaluation; `.models` is what was opened, `.said` what was printed."""

    def play(models=None, scripts=None, **options):
        play.models = Models(monkeypatch, **(scripts or {}))
        play.said = []
        run = opened(tmp_path / "in", play.said, bootstrap_draws=50, **options)
        rows = [("policy", run.config.model, None)] if models is None else models
        return evaluate(run, run.questions, rows, tmp_path / "eval", play.said.append)

    return play


def test_the_report_has_the_rows_and_keys_of_the_interface(played, tmp_path):
    report = played()
    assert list(report["systems"]) == ["question", "question-top", "policy"]
    for row in report["systems"].values():
        for metric in ("recall", "ap", "both", "mrr"):
            assert set(row[metric]) == {"value", "low", "high"}
            assert row[metric]["low"] <= row[metric]["value"] <= row[metric]["high"]
    assert list(report["paired"]) == ["policy - question", "policy - question-top"]
    assert set(report) == REPORT | FACTS
    assert report["systems"]["policy"]["both"]["value"] == 1
    assert report["search"] == {"hops": 2, "k": 3, "merge": "hop_order", "unseen_only": False, "question_first": False}
    assert json.loads((tmp_path / "eval" / "report.json").read_text()) == report
    outcomes = [json.loads(line) for line in (tmp_path / "eval" / "outcomes.jsonl").read_text().splitlines()]
    assert len(outcomes) == 30
    assert {row["system"] for row in outcomes} == set(report["systems"])
    assert "| policy" in (tmp_path / "eval" / "report.md").read_text()


def test_a_second_time_nothing_is_asked_again(played):
    first = played()
    assert len(played.models.asked) == 20
    assert played() == first
    assert played.models.asked == []


def test_rules_and_the_oracle_over_them_are_rows(played):
    report = played(rules=["all"])
    assert [name for name in report["systems"] if name.startswith("rule:")] == [f"rule:{name}" for name in RULES]
    assert "oracle-rule" in report["systems"]
    assert "policy - oracle-rule" in report["paired"]
    best = max(report["systems"][f"rule:{name}"]["recall"]["value"] for name in RULES)
    assert report["systems"]["oracle-rule"]["recall"]["value"] >= best


def test_without_a_model_every_rule_is_compared_with_the_question(played):
    report = played([], rules=["rest", "question"], policy="rules", model=None, few_shot_prompts=None, temperature=None)
    assert played.models.opened == []
    others = ("question-top", "rule:rest", "rule:question", "oracle-rule")
    assert list(report["paired"]) == [f"{name} - question" for name in others]
    with pytest.raises(UsageError, match="--rules names1: no such rule; did you mean 'names-1'"):
        played([], rules=["names1"], policy="rules", model=None, few_shot_prompts=None, temperature=None)


def test_further_prompts_are_rows_of_their_own(played, tmp_path):
    (tmp_path / "styles.json").write_text('[{"name": "shots", "instruction": "junk"}]')
    report = played(prompts=str(tmp_path / "styles.json"))
    assert list(report["systems"]) == ["question", "question-top", "policy", "policy[shots]"]
    assert report["systems"]["policy[shots]"]["recall"]["value"] == 0
    assert report["systems"]["policy[shots]"]["empty"] == 1


def test_the_report_of_a_training_run_holds_its_best_few_shot_style(tmp_path, monkeypatch):
    """A row of the model before training; the file has the best style first."""
    Models(monkeypatch)
    (tmp_path / "test.jsonl").write_text(
        '{"id": "t", "question": "where was the one of iris dam born", "gold_ids": ["d8"]}\n'
    )
    run = opened(tmp_path / "in", bootstrap_draws=50, test_questions=[str(tmp_path / "test.jsonl")])
    made = tmp_path / "in" / "out" / "round-0" / "few-shot"

    def trained(run, folder, say):
        made.mkdir(parents=True)
        shots = [PromptStyle("few-shot-3", "junk"), PromptStyle("few-shot-1", "person")]
        (made / "styles.json").write_text(json.dumps([shot.to_json() for shot in shots]))
        return run.config.model

    monkeypatch.setattr(commands, "run_rounds", trained)
    report = commands.train(run.config)
    assert list(report["systems"]) == ["question", "question-top", "policy", "base", "base[few-shot]"]
    assert "policy - base[few-shot]" in report["paired"]
    assert report["systems"]["base[few-shot]"]["recall"]["value"] == 0
    made.joinpath("styles.json").write_text("[]")
    assert commands._few_shot(tmp_path / "in" / "out") == []


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """`finished(published, *questions, scripts)`: the final report of a run whose best round is `published`, of two rounds."""

    def write_round(folder, setup, notes):
        for stage in ("sft", "preference"):
            final = folder / stage / "final"
            write_weights(final, 2 * int(folder.name[-1]) + (stage == "sft"))
            replace(setup, format=PromptFormat(instruction=f"{stage} of {folder.name}"), notes=notes).save(final)

    def published(number):
        def rounds(run, folder, say):
            for one in (0, 1):
                write_round(folder / f"round-{one}", run.setup, {"round": str(one)})
            policy = folder / "policy"
            shutil.rmtree(policy, ignore_errors=True)
            shutil.copytree(folder / f"round-{number}" / "preference" / "final", policy)
            return policy

        return rounds

    def finish(number, *questions, answer=say):
        finish.models = Models(monkeypatch, policy=answer, final=answer)
        monkeypatch.setattr(commands, "run_rounds", published(number))
        rows = [{"id": f"t{i}", "question": text, "gold_ids": ["d8"]} for i, text in enumerate(questions)]
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"bootstrap_draws": 20, "test_questions": [str(tmp_path / "test.jsonl")], "tuning": "full"}
        return commands.train(opened(tmp_path / "in", rounds=2, **options).config)

    return finish


ABOUT = "where was the one of iris dam born"


def test_the_final_report_shows_the_supervised_stage_of_the_published_round(finished, tmp_path):
    asked = []
    for number in (0, 1):
        finished(number, ABOUT, answer=lambda request: asked.append(prompt_text(request)) or "iris dam")
        assert any(f"sft of round-{number}" in text for text in asked)
        assert not any(f"sft of round-{1 - number}" in text for text in asked)
        asked.clear()


def test_the_final_report_is_made_anew_for_another_policy_or_other_questions_and_only_then(finished, tmp_path):
    first = finished(0, ABOUT, answer=lambda request: "iris dam")
    assert len(finished.models.asked) == 4 + 2  # policy and sft as told, base in its own way: two hops each
    assert finished(0, ABOUT, answer=lambda request: "iris dam") == first
    assert finished.models.asked == []
    second = finished(1, ABOUT, answer=lambda request: "zzz")  # what a further round may bring
    assert second["systems"]["policy"]["recall"]["value"] == 0
    assert len(finished.models.asked) == 6
    more = finished(1, ABOUT, "where was the other of iris dam born", answer=lambda request: "iris dam")
    assert more["questions"] == 2
    assert more["systems"]["policy"]["recall"]["value"] == 1
    (tmp_path / "in" / "out" / "test" / "made_of.json").unlink()  # of an earlier version, which did not say
    assert finished(1, ABOUT, answer=lambda request: "iris dam")["questions"] == 1


@pytest.mark.parametrize("where", ["headroom", "dev", "test", "eval"])
def test_prompts_that_failed_give_the_exit_code_of_failed_rows(where, tmp_path):
    files = {
        "headroom": ("round-1/headroom.json", {"failed_prompts": 2}, "train"),
        "dev": ("round-0/dev.json", {"failed_prompts": 1}, "train"),
        "test": ("test/report.json", {"failed_prompts": {"policy": {"failed": 1}, "base": {"failed": 0}}}, "train"),
        "eval": ("report.json", {"failed_prompts": {"policy": {"failed": 3}}}, "eval"),
    }
    name, said, action = files[where]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for content, found in ((said, True), ({}, False)):  # an earlier version did not count them
        (tmp_path / name).write_text(json.dumps(content))
        assert bool(commands.failed_prompts(action, tmp_path)) == found


def without_iris(request):
    if "iris" in prompt_text(request):
        raise RequestError("the prompt is too long")
    return say(request)


def test_prompts_without_an_answer_are_said_and_reported_row_by_row(played, tmp_path, capsys):
    (tmp_path / "styles.json").write_text('[{"name": "shots", "instruction": "person"}]')
    other = tmp_path / "other"
    other.mkdir()
    models = [("policy", str(tmp_path / "in" / "base"), None), ("other", str(other), None)]
    report = played(models, scripts={"base": without_iris}, prompts=str(tmp_path / "styles.json"))
    assert report["systems"]["policy"]["hops_used"]["value"] == 1.8
    first = "sampling: RequestError: the prompt is too long"
    assert report["failed_prompts"] == {
        "policy": {"failed": 1, "prompts": 19, "first": first},
        "policy[shots]": {"failed": 1, "prompts": 19, "first": first},
        "other": {"failed": 0, "prompts": 20, "first": ""},
        "other[shots]": {"failed": 0, "prompts": 20, "first": ""},
    }
    line = f"policy: 1 of 19 prompts got no answer ({first}); their searches ended there"
    assert f"llmrl: {line}\n" in capsys.readouterr().err
    assert f"\n{line}\n" in (tmp_path / "eval" / "report.md").read_text()
    again = played(models, scripts={"base": without_iris}, prompts=str(tmp_path / "styles.json"))
    assert again["failed_prompts"] == report["failed_prompts"]


@pytest.mark.parametrize(
    ("answer", "searches", "words"),
    [
        ("zzz", 20, "100.0% of 20 searches found nothing"),
        ("", 0, "- of 0 searches found nothing, no query for 10 questions"),
    ],
)
def test_a_row_that_finds_nothing_is_marked_and_said_and_the_others_go_on(
    played, tmp_path, capsys, answer, searches, words
):
    other = tmp_path / "other"
    other.mkdir()
    models = [("policy", str(tmp_path / "in" / "base"), None), ("other", str(other), None)]
    report = played(models, scripts={"base": lambda request: answer})
    systems = report["systems"]
    assert (systems["policy"]["mostly_empty"], systems["policy"]["searches"]) == (True, searches)
    assert not any(systems[name]["mostly_empty"] for name in ("question", "question-top", "other"))
    line = f"policy: {words}: this row says what it misses, and not how well it searches"
    assert capsys.readouterr().err == f"llmrl: {line}\n"
    assert line in (tmp_path / "eval" / "report.md").read_text()


def test_a_rule_that_finds_nothing_is_marked(played, monkeypatch, capsys):
    monkeypatch.setitem(RULES, "names-1", lambda question, passages: "")
    monkeypatch.setitem(RULES, "rest", lambda question, passages: "zzz")
    report = played([], rules=["all"], policy="rules", model=None, few_shot_prompts=None, temperature=None, hops=4)
    marked = [name for name, row in report["systems"].items() if row["mostly_empty"]]
    assert marked == ["rule:rest"]  # three of its four searches; the other one stops behind the question
    assert "llmrl: rule:rest: 75.0% of 40 searches found nothing" in capsys.readouterr().err


def test_a_model_is_asked_in_the_prompt_it_was_trained_with(played, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    replace(SETUP, format=PromptFormat(instruction="person")).save(other)
    base = str(tmp_path / "in" / "base")
    report = played([("policy", base, None), ("other", str(other), None)], model=base)
    outcomes = (tmp_path / "eval" / "outcomes.jsonl").read_text().splitlines()
    queries = {row["system"]: row["queries"] for row in map(json.loads, outcomes) if row["question_id"] == "q5"}
    assert queries["policy"] == ["foxglove dam", "freda born"]
    assert queries["other"] == ["freda born", "freda born"]
    assert list(report["paired"]) == ["policy - question", "policy - question-top", "policy - other"]


def test_k_above_the_corpus_and_one_hop_are_evaluated(played):
    report = played(k=500, hops=1)
    assert [len(row["by_hop"]) for row in report["systems"].values()] == [1, 1, 1]
    assert report["systems"]["question"]["recall"] == report["systems"]["question-top"]["recall"]


# --- which systems ----------------------------------------------------------------------------------------------------


def adapter_of(folder, base):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def test_an_adapter_brings_its_base_as_a_row(tmp_path):
    base = str(tmp_path / "in" / "base")
    adapter = adapter_of(tmp_path / "lora", base)
    expected = [("policy", base, adapter), ("base", base, None)]
    assert systems_of(opened(tmp_path / "in", adapter=adapter)) == expected
    assert systems_of(opened(tmp_path / "in", model=adapter)) == expected
    assert systems_of(opened(tmp_path / "in")) == [("policy", base, None)]


def test_an_adapter_is_not_used_on_another_model_than_its_own(tmp_path):
    base, other = write_weights(tmp_path / "in" / "base", 1), write_weights(tmp_path / "other", 2)
    adapter = write_adapter(tmp_path / "lora", other)
    complaint = (
        f"the adapter {adapter} was trained on {other}, whose weights differ from those of {base}: name the base"
    )
    with pytest.raises(UsageError, match=complaint):
        opened(tmp_path / "in", adapter=adapter)
    with pytest.raises(UsageError, match=complaint):
        systems_of(opened(tmp_path / "in", systems=[f"sft={adapter}"]))
    moved = write_adapter(tmp_path / "moved", shutil.copytree(base, tmp_path / "copy"))
    for _ in range(2):
        assert systems_of(opened(tmp_path / "in", adapter=moved))[0] == ("policy", base, moved)
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)  # nothing to compare with: what is given is believed
    with pytest.raises(
        UsageError, match=r"an adapter of .*copy, which is not there: --model NAME_OF_THE_BASE --adapter"
    ):
        systems_of(opened(tmp_path / "in", model=moved))


def test_further_systems_are_models_or_adapters(tmp_path):
    base = str(tmp_path / "in" / "base")
    adapter = adapter_of(tmp_path / "lora", "somewhere/else")
    rows = systems_of(opened(tmp_path / "in", systems=[f"sft={adapter}", f"same={base}"]))
    assert rows == [("policy", base, None), ("sft", base, adapter), ("same", base, None)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("folder", "expected NAME=FOLDER"),
        ("=folder", "expected NAME=FOLDER"),
        ("name=", "expected NAME=FOLDER"),
        ("question=folder", "the name 'question' is taken"),
        ("policy=folder", "the name 'policy' is taken"),
        ("../x=folder", "is a word, without / or a dot in front"),
        ("sft=./nowhere", "not found: ./nowhere"),
    ],
)
def test_a_system_that_cannot_be_a_row_is_refused(tmp_path, text, complaint):
    with pytest.raises(UsageError, match=complaint):
        systems_of(opened(tmp_path / "in", systems=[text]))


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_report_into_its_folder_and_refuses_another_model_there(tmp_path, monkeypatch):
    models = Models(monkeypatch)
    run = opened(tmp_path / "in", bootstrap_draws=50)
    report = commands.evaluate_policy(run.config)
    assert json.loads((tmp_path / "in" / "out" / "report.json").read_text()) == report
    assert commands.evaluate_policy(run.config) == report
    assert len(models.asked) == 20
    with pytest.raises(OutputError, match="holds a run with another models"):
        commands.evaluate_policy(opened(tmp_path / "in", systems=[f"b={run.config.model}"]).config)


def test_a_policy_trained_behind_the_question_is_played_behind_the_question(tmp_path, monkeypatch):
    Models(monkeypatch)
    run = opened(tmp_path / "in", bootstrap_draws=50)
    replace(SETUP, question_first=True).save(Path(run.config.model))
    assert load_setup(run.config.model).question_first
    again = opened(tmp_path / "in", bootstrap_draws=50)
    evaluate(again, again.questions, systems_of(again), tmp_path / "eval", print)
    outcomes = map(json.loads, (tmp_path / "eval" / "outcomes.jsonl").read_text().splitlines())
    first = {row["queries"][0] for row in outcomes if row["system"] == "policy"}
    assert first == {question.text for question in again.questions.questions}


def test_a_retriever_that_finds_nothing_ends_an_evaluation_with_the_count(played, monkeypatch):
    monkeypatch.setattr("llmrl.leret.bm25.BM25Retriever.search", lambda self, queries, k: [[] for _ in queries])
    with pytest.raises(RetrieverError, match="10 of the last 10 searches with bm25 came back empty"):
        played()


def test_thinking_is_switched_for_a_model_with_a_prompt_of_its_own(played, tmp_path):
    options = []
    setup = replace(SETUP, format=PromptFormat(instruction="name", template_options={"enable_thinking": True, "x": 1}))
    base = tmp_path / "in" / "base"
    base.mkdir(parents=True)
    setup.save(base)

    def answer(request):
        return say(request)

    def spy(self, engine, form, *args, **named):
        options.append(form.template_options)
        return real(self, engine, form, *args, **named)

    real = EngineAsker.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineAsker, "__init__", spy)
        played(scripts={"base": answer}, enable_thinking=False)
    assert options == [{"enable_thinking": False, "x": 1}]

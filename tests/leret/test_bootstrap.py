"""Few-shot styles: examples from one half of the set-aside questions, judged on the other, the same every time."""

import pytest
from explore_world import QUESTIONS, engine, explorer, prompt_text, say
from small_world import DAMS

from llmrl.leret.bootstrap import TRIED_PER_KEPT, bootstrap_styles, successes
from llmrl.leret.prompts import BARE, PromptFormat

MAKING, JUDGING = QUESTIONS[2:6], QUESTIONS[6:]
TEXTS = {question.text for question in MAKING}


def made(tmp_path, scripted=None, questions=MAKING + JUDGING, *, styles=1, demos=2, seed=0, does="name", **settings):
    form = PromptFormat(instruction=does)
    used = explorer(scripted, prompts=form, **settings)
    return bootstrap_styles(used, form, questions, tmp_path, styles=styles, demos=demos, seed=seed)


def watching(seen):
    def script(request):
        text = prompt_text(request)
        asked = text.rpartition("<|user|>")[2]
        seen.append((next(d for d in DAMS if f" {d} dam born" in asked), text.count("<|user|>") - 1, text))
        return say(request)

    return engine(script)


def test_examples_come_of_the_first_half_and_styles_are_judged_on_the_second(tmp_path):
    seen = []
    kept, line = made(tmp_path, watching(seen), styles=2)
    assert len(kept) == 2
    assert all(demo.question in TEXTS for style in kept for demo in style.demos)
    assert {dam for dam, demos, _ in seen if not demos} == set(DAMS[2:6])
    assert {dam for dam, demos, _ in seen if demos} == set(DAMS[6:])
    assert {demos for _, demos, _ in seen} == {0, 2}
    assert line.startswith(
        "few-shot: 4 examples from 4 questions, 8 styles tried on 4 others, AP 0.750 to 0.750, kept few-shot-"
    )


def test_an_example_shows_what_had_been_found_and_the_query_that_found_more(tmp_path):
    used = explorer()
    groups = used.explore(MAKING, [PromptFormat(instruction="name").bare], tmp_path)
    demos = {demo.question: demo for demo in successes(groups, MAKING, used)}
    demo = demos[QUESTIONS[5].text]
    assert demo.query == "freda born"  # of the last hop that found something missing
    assert demo.hop == 2
    assert demo.passages[0][1] == "foxglove dam was built by freda"


def test_a_query_that_found_nothing_new_is_no_example(tmp_path):
    used = explorer(prompts=PromptFormat(instruction="person"))
    groups = used.explore(MAKING, [PromptFormat(instruction="person").bare], tmp_path)
    assert {demo.hop for demo in successes(groups, MAKING, used)} == {1}  # the second time it finds the same


def test_gains_as_the_reward_give_the_same_examples(tmp_path):
    """A gain is not to be compared with what a context is worth."""
    found = []
    for reward in ("ap", "recall_gain", "marginal"):
        used = explorer(reward=reward)
        groups = used.explore(MAKING, [PromptFormat(instruction="name").bare], tmp_path / reward)
        found.append(successes(groups, MAKING, used))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4


def test_the_question_itself_is_nobodys_example(tmp_path):
    used = explorer(question_first=True, prompts=PromptFormat(instruction="junk"))
    groups = used.explore(MAKING, [PromptFormat(instruction="junk").bare], tmp_path)
    assert successes(groups, MAKING, used) == []


def test_too_few_examples_make_no_style_and_say_so(tmp_path):
    kept, line = made(tmp_path, does="junk")
    assert kept == ()
    assert line == "few-shot: 0 of 4 questions gave a query that found something, 2 are needed"


def test_the_styles_are_a_function_of_the_questions_and_the_seed(tmp_path):
    first, _ = made(tmp_path / "a")
    assert made(tmp_path / "b")[0] == first
    assert made(tmp_path / "c", seed=1)[0] != first

    def never(request):
        raise AssertionError("asked again")

    assert made(tmp_path / "a", engine(never))[0] == first


def test_the_styles_that_search_best_are_kept(tmp_path):
    """The scripted model only searches well when an example of chain 2 is before it."""

    def script(request):
        text = prompt_text(request)
        return say(request) if text.count("<|user|>") == 1 or DAMS[2] in text.rpartition("<|user|>")[0] else "zzz"

    kept, line = made(tmp_path, engine(script), styles=2)
    assert all(QUESTIONS[2].text in {demo.question for demo in style.demos} for style in kept)
    assert "AP 0.000 to 0.750" in line
    assert len({style.name for style in kept} | {BARE}) == 3


def test_four_times_as_many_styles_are_tried_as_are_kept(tmp_path):
    made(tmp_path, styles=1)
    assert len(list((tmp_path / "judge").iterdir())) == TRIED_PER_KEPT


@pytest.mark.parametrize("questions", [QUESTIONS[:2], QUESTIONS[:3]])
def test_two_questions_are_enough_to_ask(tmp_path, questions):
    kept, _ = made(tmp_path, questions=questions, demos=1, styles=1)
    assert [demo.question for style in kept for demo in style.demos] == [QUESTIONS[0].text]

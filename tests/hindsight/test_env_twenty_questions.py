"""Twenty questions: the search for the optimum against one that leaves nothing out, answers, logs."""

import random
import time
from functools import cache

import numpy as np
import pytest

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import twenty_questions as twenty
from llmrl.hindsight.envs.common import play
from llmrl.hindsight.envs.twenty_questions import ATTRIBUTES, CAP, HAS, OBJECTS, TwentyQuestions, best_action, question
from llmrl.rollout.environment import Environment
from llmrl.types import Message


def ask(environment, text):
    return environment.step(Message("assistant", text))


def reply(thing, about):
    return ask(TwentyQuestions({"object": thing}, 0), question(about))


def test_objects_can_be_told_apart():
    assert (len(OBJECTS), len(ATTRIBUTES)) == (20, 9)
    assert len(set(HAS.values())) == len(OBJECTS)
    assert not set(OBJECTS) & set(ATTRIBUTES)


def test_optimum_is_quick_and_the_expert_reaches_it():
    twenty._best.cache_clear()
    begun = time.perf_counter()
    best = twenty.optimum()
    assert time.perf_counter() - begun < 5
    played = [play(TwentyQuestions(row, 0), best_action, id=row["id"], task="twenty") for row in twenty.rows()]
    assert len({dialogue.id for dialogue in played}) == len(OBJECTS)
    assert all(dialogue.done for dialogue in played)
    assert sum(dialogue.total for dialogue in played) / len(OBJECTS) == pytest.approx(best, abs=1e-9)
    assert best == pytest.approx(-3.9, abs=1e-9)


def test_search_leaves_out_nothing_that_is_better():
    answers = {(thing, about): reply(thing, about) for thing in OBJECTS for about in (*ATTRIBUTES, *OBJECTS)}

    @cache
    def best(possible, left):
        """Try every text, also useless ones, with what the class answered."""
        if left == 0:
            return 0.0
        found = []
        for about in (*ATTRIBUTES, *possible, next(thing for thing in OBJECTS if thing not in possible)):
            groups, earned = {}, 0.0
            for thing in possible:
                step = answers[thing, about]
                earned += step.rewards["reward"]
                if not step.done:
                    groups.setdefault(step.messages[0].content, set()).add(thing)
            later = sum(len(group) * best(frozenset(group), left - 1) for group in groups.values())
            found.append((earned + later) / len(possible))
        return max(found)

    luck = random.Random(0)
    for _ in range(12):
        some = frozenset(luck.sample(OBJECTS, 7))
        for left in (1, 2, 3, 6):
            assert twenty._best(some, left)[0] == pytest.approx(best(some, left), abs=1e-9)


def test_optimum_is_what_a_table_of_all_subsets_gives():
    """Work out each of the 2^20 sets of possible objects, smaller sets first; the cap is too far off to matter."""
    count = len(OBJECTS)
    sets = np.arange(1 << count, dtype=np.int32)
    size = np.bitwise_count(sets).astype(np.int64)
    cost = np.zeros(1 << count)  # texts that were not free, summed over the objects of a set
    yes = [sum(1 << i for i, thing in enumerate(OBJECTS) if about in HAS[thing]) for about in ATTRIBUTES]
    for level in range(2, count + 1):
        these = sets[size == level]
        best = np.full(len(these), np.inf)
        for mask in yes:  # a question that splits nothing leaves a set of its own size, of which no cost is known yet
            a, b = these & mask, these & ~mask
            best = np.where((a > 0) & (b > 0), np.minimum(best, level + cost[a] + cost[b]), best)
        for i in range(count):
            rest = these & ~(1 << i)
            best = np.where(rest != these, np.minimum(best, level - 1 + cost[rest]), best)
        cost[these] = best
    assert twenty.optimum() == pytest.approx(-cost[-1] / count, abs=1e-9)
    for some in (
        np.random.default_rng(0).choice(sets[1:], size=400).tolist()
    ):  # where the most promising text is not the best
        possible = frozenset(thing for i, thing in enumerate(OBJECTS) if some >> i & 1)
        assert twenty._best(possible, CAP)[0] == pytest.approx(-cost[some] / len(possible), abs=1e-9)


def test_random_return_is_that_of_played_games():
    luck, texts = random.Random(0), [question(about) for about in (*ATTRIBUTES, *OBJECTS)]
    rows = twenty.rows() * 40
    totals = [play(TwentyQuestions(r, 0), lambda _: luck.choice(texts), id="x", task="").total for r in rows]
    # standard deviation of a game: 6.6
    assert twenty.random_return() == pytest.approx(sum(totals) / len(totals), abs=4 * 6.6 / len(totals) ** 0.5)


def test_answers():
    environment = TwentyQuestions({"object": "a bear"}, 0)
    assert isinstance(environment, Environment)
    for text, content in {"Is it an animal?": "Yes.", " is it  AN animal ": "Yes.", "Is it electric?": "No."}.items():
        step = ask(environment, text)
        assert (step.messages[0].content, step.rewards, step.done) == (content, {"reward": -1.0}, False)
    wrong = ask(environment, "Is it a horse?")
    assert (wrong.messages[0].content, wrong.rewards, wrong.done) == ("No.", {"reward": -1.0}, False)
    right = ask(environment, "Is it a bear?")
    assert (right.rewards, right.done, right.truncated) == ({"reward": 0.0}, True, False)


@pytest.mark.parametrize(
    "text", ["", "a bear", "Is it?", "Is it a dragon?", "Is it alive? Is it a bear?", "Is it bear?"]
)
def test_any_other_text_is_not_understood(text):
    environment = TwentyQuestions({"object": "a bear"}, 0)
    step = ask(environment, text)
    assert (step.messages[0].content, step.rewards) == ("I do not understand.", {"reward": -1.0})
    assert step.metadata["invalid"]
    assert not ask(environment, "Is it alive?").metadata["invalid"]


def test_after_twenty_texts_it_is_done():
    environment = TwentyQuestions({"object": "a bear"}, 0)
    steps = [ask(environment, "Is it alive?") for _ in range(CAP)]
    assert [step.done for step in steps] == [False] * (CAP - 1) + [True]
    assert not any(step.truncated for step in steps)
    environment = TwentyQuestions({"object": "a bear"}, 0)
    steps = [ask(environment, "Is it alive?") for _ in range(CAP - 1)] + [ask(environment, "Is it a bear?")]
    assert (steps[-1].done, steps[-1].truncated) == (True, False)


def test_read_believes_the_first_of_two_answers_that_differ():
    asked = [Message("assistant", question("an animal")), Message("user", "Yes.")]
    assert twenty.read(asked)[0] == {thing for thing in OBJECTS if "an animal" in HAS[thing]}
    assert twenty.read([*asked, asked[0], Message("user", "no")]) == (twenty.read(asked)[0], CAP - 2)
    assert twenty.read([*asked, Message("assistant", "Hm."), Message("user", "No.")])[0] == twenty.read(asked)[0]
    with pytest.raises(DataError, match="none is left"):
        best_action(asked * CAP)


def test_a_wrong_row_is_refused():
    with pytest.raises(DataError, match="row r: expected 'object' to be one of"):
        TwentyQuestions({"id": "r", "object": "a dragon"}, 0)


def test_logs_are_mediocre_dialogues_of_the_class():
    logs = twenty.logs(500, seed=1)
    assert logs == twenty.logs(500, seed=1)
    assert logs[:50] != twenty.logs(50, seed=2)
    assert len({dialogue.id for dialogue in logs}) == 500
    assert all(d.task == "twenty_questions" and Dialogue.from_json(d.to_json()) == d for d in logs)
    mean = sum(dialogue.total for dialogue in logs) / 500
    assert twenty.random_return() + 1 < mean < twenty.optimum() - 5
    repeats = early = late = 0
    for dialogue in logs:
        said = [dialogue.messages[i].content for i in dialogue.agent_turns]
        assert dialogue.done
        assert (len(said) == CAP) or dialogue.rewards[-2] == 0
        repeats += len(set(said)) < len(said)
        for i in dialogue.agent_turns:
            possible, about = twenty.read(dialogue.messages[:i])[0], twenty.parse(dialogue.messages[i].content)
            early += about in OBJECTS and len(possible) > 4
            late += about in ATTRIBUTES and len(possible) == 1
    assert min(repeats, early, late) > 100


def test_a_log_replays_from_its_provenance():
    for dialogue in twenty.logs(20, seed=0):
        texts = iter([dialogue.messages[i].content for i in dialogue.agent_turns])
        again = TwentyQuestions(dialogue.provenance["row"], dialogue.provenance["seed"])
        replayed = play(again, lambda _, texts=texts: next(texts), id="again", task="twenty_questions")
        assert (replayed.messages, replayed.rewards) == (dialogue.messages, dialogue.rewards)

"""The charity talk: its optimum by trying all acts in the class itself, its words, common luck, the gap in its logs."""

from collections import defaultdict
from itertools import product

import pytest

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import charity
from llmrl.hindsight.envs.charity import TYPES, Charity, best_action
from llmrl.hindsight.envs.charity_words import ACTS, KEY_WORDS, WORDS, heard, understand
from llmrl.hindsight.envs.common import normalised, play
from llmrl.rollout.environment import Environment
from llmrl.types import Message


def talk(wants, acts, seed=0, words="short"):
    """Return the steps of a talk in which the agent takes these acts, or says these texts."""
    environment = Charity({"type": wants, "words": words}, seed)
    said = [WORDS[words].acts[act][0] if act in ACTS else act for act in acts]
    return [environment.step(Message("assistant", text)) for text in said]


def total(steps):
    return sum(step.rewards["reward"] for step in steps)


def best_by_trying(types, acts, allowed):
    """Return the best that is still to come after `acts`, of users that answered alike so far; no rule is used but play."""
    found = []
    for act in allowed(types, acts):
        earned, alike = 0.0, defaultdict(list)
        for wants in types:
            step = talk(wants, [*acts, act])[-1]
            earned += step.rewards["reward"]
            if not step.done:
                alike[step.messages[0].content].append(wants)
        later = sum(len(group) * best_by_trying(group, [*acts, act], allowed) for group in alike.values())
        found.append((earned + later) / len(types))
    return max(found)


def test_optimum_is_what_trying_all_acts_finds():
    assert charity.optimum() == pytest.approx(1.80, abs=1e-9)
    assert best_by_trying(list(TYPES), [], lambda types, acts: ACTS) == pytest.approx(1.80, abs=1e-9)


def test_logged_optimum_is_that_of_acts_without_the_gap():
    def logged(types, acts):
        if len(types) == 1 and types[0] in acts:  # it helped
            return [act for act in ACTS if act not in (types[0], "ask")]
        if "ask" in acts:
            return [act for act in ACTS if act != "ask" and (act != "small" or types != ["small"])]
        return ACTS if not acts else ACTS[1:]

    # one warmth at most: guess, guess again, or ask first and do without the frugal
    assert charity.logged_optimum() == pytest.approx(0.55, abs=1e-9)
    assert best_by_trying(list(TYPES), [], logged) == pytest.approx(0.55, abs=1e-9)


@pytest.mark.parametrize("words", WORDS)
def test_expert_reaches_the_optimum_in_both_sets_of_words(words):
    rows = charity.rows(words)
    assert len({row["id"] for row in rows}) == 3
    for seed in range(5):
        played = [play(Charity(row, seed), best_action, id=row["id"], task="charity") for row in rows]
        assert all(dialogue.done for dialogue in played)
        assert sum(dialogue.total for dialogue in played) / 3 == pytest.approx(charity.optimum(), abs=1e-9)


def test_random_return_is_the_mean_over_all_sequences_of_acts():
    # a talk that ends early counts once for each way to go on, which is its probability
    totals = []
    for wants, acts in product(TYPES, product(ACTS, repeat=5)):
        environment, earned = Charity({"type": wants}, 0), 0.0
        for act in acts:
            step = environment.step(Message("assistant", WORDS["short"].acts[act][0]))
            earned += step.rewards["reward"]
            if step.done:
                break
        totals.append(earned)
    assert charity.random_return() == pytest.approx(sum(totals) / len(totals), abs=1e-9)


@pytest.mark.parametrize("wants", TYPES)
def test_rules(wants):
    other = next(act for act in TYPES if act != wants)
    assert isinstance(Charity({"type": wants}, 0), Environment)
    assert total(talk(wants, ["ask", wants, wants, "request"])) == pytest.approx(1.8)
    assert total(talk(wants, [wants, "request"])) == pytest.approx(0.9)
    assert total(talk(wants, ["request"])) == pytest.approx(-0.05)
    assert total(talk(wants, [wants, wants, wants, "request"])) == pytest.approx(1.8)  # a third appeal is a lost turn
    assert total(talk(wants, [other, "ask", wants, wants, "request"])) == pytest.approx(1.75)
    assert [step.done for step in talk(wants, [wants, other, "ask", other])] == [False, False, False, True]
    out_of_time = talk(wants, ["ask", wants, wants, "ask", "ask"])
    assert total(out_of_time) == pytest.approx(-0.25)
    assert [step.done for step in out_of_time] == [False] * 4 + [True]
    assert not out_of_time[-1].truncated
    replies = [step.metadata["reply"] for step in talk(wants, ["ask", wants, wants, other, "request"])]
    assert replies == [f"wants {wants}", "helped", "convinced", "annoyed", "gives 2"]


def test_nobody_understands_a_text_without_the_key_words_of_one_act():
    first, second = talk("story", ["blue", "a story of a small coin"])
    assert (first.metadata["invalid"], first.metadata["reply"], first.done) == (True, "annoyed", False)
    assert (second.metadata["invalid"], second.metadata["reply"], second.done) == (True, "leaves", True)
    assert total([first, second]) == pytest.approx(-0.1)
    (step,) = talk("story", ["well, STORY time"])
    assert (step.metadata["invalid"], step.metadata["off_template"], step.metadata["act"]) == (False, True, "story")
    (step,) = talk("story", ["hear the story of amina ."])
    assert not step.metadata["off_template"]


@pytest.mark.parametrize(("words", "sentences", "least", "most"), [("short", 2, 4, 6), ("long", 4, 8, 14)])
def test_every_sentence_of_the_agent_is_understood(words, sentences, least, most):
    for act in ACTS:
        texts = WORDS[words].acts[act]
        assert len(texts) == sentences
        for text in texts:
            assert understand(text, words) == (act, True)
            assert understand(f"{text} Oh!", words) == (act, False)  # by its key word alone
            assert least <= len(normalised(text).split()) <= most
    for reply, texts in WORDS[words].replies.items():
        assert len(texts) == 2
        assert all(heard(text) == (words, reply) for text in texts)
        assert all(least <= len(normalised(text).split()) <= most for text in texts)


def test_no_two_acts_or_replies_share_a_sentence_or_key_word():
    texts = [
        normalised(t) for w in WORDS.values() for group in (w.acts, w.replies) for ts in group.values() for t in ts
    ]
    assert len(texts) == len(set(texts))
    keys = [key for act in ACTS for key in KEY_WORDS[act]]
    assert len(keys) == len(set(keys))


def test_one_seed_gives_one_luck_whatever_is_said():
    def replies(seed, acts):
        texts = [step.messages[0].content for step in talk("facts", acts, seed)]
        return [next(ts.index(t) for ts in WORDS["short"].replies.values() if t in ts) for t in texts]

    one, other = ["ask", "facts", "facts", "story", "request"], ["facts", "story", "ask", "ask", "ask"]
    assert all(replies(seed, one) == replies(seed, other) for seed in range(20))
    assert len({tuple(replies(seed, one)) for seed in range(20)}) > 5
    openings = {Charity({"type": "facts"}, seed).observe()[0].content for seed in range(20)}
    assert openings == set(WORDS["short"].replies["opening"])


@pytest.mark.parametrize("words", WORDS)
def test_logs_are_mediocre_dialogues_of_the_class(words):
    logs = charity.logs(1000, seed=1, words=words)
    assert logs == charity.logs(1000, seed=1, words=words)
    assert logs[:50] != charity.logs(50, seed=2, words=words)
    assert len({dialogue.id for dialogue in logs}) == 1000
    assert all(dialogue.task == "charity" and dialogue.done for dialogue in logs)
    assert all(Dialogue.from_json(dialogue.to_json()) == dialogue for dialogue in logs[:50])
    mean = sum(dialogue.total for dialogue in logs) / 1000
    assert 0.0 < mean < 0.1
    # a talk has a standard deviation of 0.33
    assert charity.behaviour_return() == pytest.approx(0.05, abs=0.01)
    assert mean == pytest.approx(charity.behaviour_return(), abs=0.04)
    spoken = {dialogue.messages[i].content for dialogue in logs for i in dialogue.agent_turns}
    assert spoken == {text for texts in WORDS[words].acts.values() for text in texts}
    short = charity.logs(50, seed=1)
    assert [dialogue.rewards for dialogue in short] == [dialogue.rewards for dialogue in logs[:50]]


def test_logs_have_the_gap():
    helped_again = small_when_wanted = asked = 0
    for dialogue in charity.logs(2000, seed=3):
        acts = [understand(dialogue.messages[i].content, "short")[0] for i in dialogue.agent_turns]
        wants = dialogue.provenance["row"]["type"]
        assert dialogue.total < 1  # the optimum is 1.80 for each type
        helped_again += acts.count(wants) > 1
        small_when_wanted += wants == "small" and "ask" in acts and "small" in acts
        asked += "ask" in acts
    assert (helped_again, small_when_wanted) == (0, 0)
    assert 0 < asked / 2000 < 0.1


def test_a_log_replays_from_its_provenance():
    for dialogue in charity.logs(20, seed=0, words="long"):
        texts = iter([dialogue.messages[i].content for i in dialogue.agent_turns])
        again = Charity(dialogue.provenance["row"], dialogue.provenance["seed"])
        replayed = play(again, lambda _, texts=texts: next(texts), id="again", task="charity")
        assert (replayed.messages, replayed.rewards) == (dialogue.messages, dialogue.rewards)


def history(*turns):
    """Return messages in turns from the user on; keys of replies and acts stand for their first short sentence."""
    words = WORDS["short"]
    texts = [words.replies.get(t, (t,))[0] if i % 2 == 0 else words.acts.get(t, (t,))[0] for i, t in enumerate(turns)]
    return [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]


def test_best_act_after_histories_that_no_expert_makes():
    assert charity.best_act(history("opening")) == "ask"
    assert charity.best_act(history("opening", "facts", "annoyed")) == "ask"
    assert charity.best_act(history("opening", "small", "helped")) == "small"
    assert charity.best_act(history("opening", "ask", "wants story", "story", "convinced")) == "request"
    late = history("opening", "ask", "wants story", "ask", "wants story", "ask", "wants story", "story", "helped")
    assert charity.best_act(late) == "request"
    # a user that a model plays: an unknown sentence tells nothing, the later of two that differ is believed
    assert charity.best_act(history("Hm?", "ask", "Well, well.")) == "ask"
    assert charity.best_act(history("opening", "ask", "wants story", "facts", "helped")) == "facts"
    assert charity.best_act(history("opening", "ask", "wants story", "story", "annoyed")) == "story"


def test_nothing_is_best_after_the_end():
    for over in (("facts", "annoyed", "facts", "annoyed"), ("ask", "wants facts") * 5):
        with pytest.raises(DataError, match="the talk is over"):
            charity.best_act(history("opening", *over))


@pytest.mark.parametrize("row", [{}, {"type": "greedy"}, {"type": "facts", "words": "French"}])
def test_a_wrong_row_is_refused(row):
    with pytest.raises(DataError, match=r"expected '(type|words)' to be one of"):
        Charity(row, 0)

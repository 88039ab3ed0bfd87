import math
import random
from types import SimpleNamespace

import pytest
from sklearn.metrics import average_precision_score, ndcg_score

from llmrl.errors import DataError, UsageError
from llmrl.leret.rewards import (
    REWARDS,
    all_gold,
    answer_f1,
    answer_reward,
    ap_gain,
    as_reward,
    average_precision,
    exact_match,
    found_ranks,
    marginal,
    ndcg,
    recall,
    recall_gain,
    reciprocal_rank,
    reward_named,
)

A, B = frozenset({"a"}), frozenset({"b"})
GOLD = (A, B)
# all that a hop of three passages can look like with two gold documents: AP, recall, reciprocal rank
LEVELS = {
    "xyz": (0, 0, 0),
    "xya": (1 / 6, 1 / 2, 1 / 3),
    "xay": (1 / 4, 1 / 2, 1 / 2),
    "axy": (1 / 2, 1 / 2, 1),
    "xab": (7 / 12, 1, 1 / 2),  # (1/2 + 2/3) / 2
    "axb": (5 / 6, 1, 1),  # (1 + 2/3) / 2
    "abx": (1, 1, 1),
}


@pytest.mark.parametrize("context", LEVELS)
def test_rewards_of_two_gold_documents_in_three_passages(context):
    assert (average_precision(context, GOLD), recall(context, GOLD), reciprocal_rank(context, GOLD)) == pytest.approx(
        LEVELS[context]
    )
    swapped = context.translate(str.maketrans("ab", "ba"))
    assert average_precision(swapped, GOLD) == average_precision(context, GOLD)


def test_ap_has_seven_levels_at_two_gold_documents_and_three_passages():
    contexts = [(p, q, r) for p in "abxyz" for q in "abxyz" for r in "abxyz" if len({p, q, r}) == 3]
    assert sorted({round(average_precision(c, GOLD), 9) for c in contexts}) == [
        round(x, 9) for x in (0, 1 / 6, 1 / 4, 1 / 2, 7 / 12, 5 / 6, 1)
    ]


def test_all_gold_and_ndcg():
    assert [all_gold(c, GOLD) for c in ("axy", "xab", "")] == [0, 1, 0]
    second = 1 / math.log2(3)
    assert ndcg("abx", GOLD) == 1
    assert ndcg("axb", GOLD) == pytest.approx((1 + 0.5) / (1 + second))
    assert ndcg("a", GOLD) == pytest.approx(1 / (1 + second))  # one of two alone is not perfect
    assert ndcg("xyz", GOLD) == 0


@pytest.mark.parametrize("seed", range(20))
def test_ap_and_ndcg_equal_scikit_learn_where_everything_is_ranked(seed):
    rng = random.Random(seed)
    ranked = [f"p{i}" for i in range(rng.randint(3, 12))]
    relevant = set(rng.sample(ranked, rng.randint(1, len(ranked) - 1)))
    labels, scores = [name in relevant for name in ranked], [-i for i in range(len(ranked))]
    gold = tuple(frozenset({name}) for name in relevant)
    assert average_precision(ranked, gold) == pytest.approx(average_precision_score(labels, scores))
    assert ndcg(ranked, gold) == pytest.approx(ndcg_score([[float(x) for x in labels]], [scores]))


@pytest.mark.parametrize("seed", range(10))
def test_ap_equals_scikit_learn_scaled_by_what_was_found_where_the_rest_is_missing(seed):
    rng = random.Random(seed)
    ranked = [f"p{i}" for i in range(8)]
    found = rng.sample(ranked, 3)
    gold = tuple(frozenset({name}) for name in [*found, "missing", "missing too"])
    of_found = average_precision_score([name in found for name in ranked], [-i for i in range(8)])
    assert average_precision(ranked, gold) == pytest.approx(of_found * 3 / 5)


def test_a_gold_document_counts_once_at_its_first_acceptable_passage():
    chunks = (frozenset({"a1", "a2"}), B)
    assert found_ranks(["x", "a2", "a1", "b"], chunks) == [2, 4]
    assert average_precision(["a1", "a2", "b"], chunks) == pytest.approx((1 + 2 / 3) / 2)  # a2 takes up a rank
    assert recall(["a1", "a2"], chunks) == 0.5
    assert found_ranks(["b", "a1", "b"], chunks) == [2, 1]


def test_a_passage_that_is_two_gold_documents_is_one_relevant_passage():
    both = (frozenset({"a"}), frozenset({"a", "c"}))
    assert average_precision(["a", "x"], both) == 1
    assert average_precision(["x", "a"], both) == 0.5


@pytest.mark.parametrize("gold", [(), (A, frozenset())])
def test_rewards_refuse_questions_without_gold(gold):
    with pytest.raises(DataError, match="at least one gold document"):
        average_precision("abx", gold)


def test_gains_subtract_the_context_before():
    before, after = "axy", "axyb"
    assert ap_gain(after, GOLD, before) == pytest.approx((1 + 2 / 4) / 2 - 1 / 2)
    assert recall_gain(after, GOLD, before) == 0.5
    assert marginal(after, GOLD, before) == 1  # the one that was missing
    assert [gain(before, GOLD, before) for gain in (ap_gain, recall_gain, marginal)] == [0, 0, 0]
    assert ap_gain("xay", GOLD, "axy") == -0.25  # a distractor on top
    assert marginal("abxy", GOLD, "ab") == 0  # nothing was missing
    three = (*GOLD, frozenset({"c"}))
    assert marginal("axb", three, "ax") == pytest.approx(1 / 2)
    assert recall_gain("axb", three, "ax") == pytest.approx(1 / 3)


def test_reward_named_takes_every_name_with_the_same_arguments():
    assert set(REWARDS) == {"ap", "recall", "mrr", "ndcg", "all_gold", "ap_gain", "recall_gain", "marginal"}
    seen = {"before": "axy", "hits": ("b",), "question": None}
    values = {name: reward_named(name)("axyb", GOLD, **seen) for name in REWARDS}
    assert values["ap"] == 0.75
    assert values["ap_gain"] == 0.25
    assert values["marginal"] == 1
    assert reward_named("ap_gain")("axyb", GOLD) == 0.75  # from nothing
    assert all(isinstance(value, float) for value in values.values())


def test_reward_named_suggests_the_nearest():
    with pytest.raises(UsageError, match="unknown reward 'recal'; did you mean 'recall'"):
        reward_named("recal")


def test_as_reward_passes_what_the_function_names():
    assert as_reward(lambda ranked, gold: len(ranked))("abc", GOLD, before="a", hits="b", question="?") == 3.0
    assert as_reward(lambda ranked, gold, hits: len(hits))("abc", GOLD, hits="bc") == 2.0
    assert as_reward(lambda ranked, gold, **seen: len(seen))("abc", GOLD) == 3.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "a lot"])
def test_as_reward_refuses_what_is_no_finite_number(value):
    def broken(ranked, gold):
        return value

    with pytest.raises(DataError, match="reward 'broken' returned"):
        as_reward(broken)("abc", GOLD)


def test_answer_reward_scores_what_is_read_from_the_context():
    question = SimpleNamespace(id="q", answers=("The Eiffel Tower", "tour Eiffel"))
    texts = {"p": "the tower of Eiffel", "q": "eiffel tower!", "r": "Big Ben"}
    f1 = answer_reward(lambda question, ranked: texts[ranked[0]])
    exact = answer_reward(lambda question, ranked: texts[ranked[0]], score="exact_match")
    assert f1(["p"], (), question=question) == pytest.approx(2 * 2 / (3 + 2))
    assert [exact([name], (), question=question) for name in "pqr"] == [0, 1, 0]
    assert f1(["r"], (), question=question) == 0
    with pytest.raises(DataError, match="question x has no answers"):
        f1(["p"], (), question=SimpleNamespace(id="x", answers=()))
    with pytest.raises(UsageError, match="did you mean 'f1'"):
        answer_reward(lambda question, ranked: "", score="f2")


def test_answer_scores_normalise_as_squad_does():
    assert exact_match("  An apple. ", "apple") == 1
    assert exact_match("apple pie", "pie apple") == 0
    assert answer_f1("pie apple pie", "apple pie") == pytest.approx(2 * 2 / 5)
    assert answer_f1("the", "a") == 1  # both empty
    assert answer_f1("", "apple") == 0

from collections import Counter
from dataclasses import replace

import pytest
from small_world import HOP_1, QUESTION, candidate, hop_1, tried

from llmrl.errors import DataError, UsageError
from llmrl.leret.states import StateRule, is_solved, next_states, probabilities

BUCKET = StateRule()
# of the chi-square distribution with 2, 3 and 4 degrees of freedom, the value exceeded once in a thousand
CHI2_999 = {2: 13.82, 3: 16.27, 4: 18.47}


def candidates(*aps, **fields):
    return [candidate(ap, sample=i, **fields) for i, ap in enumerate(aps)]


def test_bucket_in_the_small_world():
    # the solved one is out; 1/2 is best: 1/2 + 0.5; then 1/4; three of AP 0 weigh nothing
    assert probabilities(hop_1().candidates, BUCKET) == pytest.approx([0.8, 0.2, 0, 0, 0, 0])


def test_bucket_weighs_levels_and_shares_them_out_evenly():
    tried_ = candidates(0, 1 / 6, 1 / 6, 1 / 4, 1 / 2, 1 / 2, 1 / 2, 1)
    # weights 0, 1/6, 1/4, 1/2 + 1/2: of 17/12
    expected = [0, 1 / 17, 1 / 17, 3 / 17, 4 / 17, 4 / 17, 4 / 17, 0]
    assert probabilities(tried_, BUCKET) == pytest.approx(expected)


def test_bucket_draws_evenly_where_zero_is_the_best_left():
    assert probabilities(candidates(0, 1, 0), BUCKET) == [0.5, 0, 0.5]


def test_bucket_takes_sums_of_fractions_in_any_order_as_one_level():
    first, second = 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1
    assert first != second
    assert probabilities(candidates(first, second), BUCKET) == [0.5, 0.5]


def test_top1_and_softmax():
    tried_ = candidates(0.2, 0.5, 0.5, 1)
    assert probabilities(tried_, StateRule("top1")) == [0, 0.5, 0.5, 0]
    cold = probabilities(tried_, StateRule("softmax", temperature=0.3))
    assert cold[0] / cold[1] == pytest.approx(2.718281828459045**-1)  # 0.3 apart at temperature 0.3
    assert cold[1] == cold[2]
    assert cold[3] == 0
    assert sum(cold) == pytest.approx(1)
    assert probabilities(tried_, StateRule("softmax", temperature=1e-3)) == pytest.approx([0, 0.5, 0.5, 0])


def test_beam_takes_the_best_contexts_and_one_candidate_of_each():
    tried_ = [
        candidate(0.5, sample=0, hits="ab"),
        candidate(0.5, sample=1, hits="ab"),  # another query, the same context
        candidate(0.25, sample=2, hits="ba"),
        candidate(0.25, sample=3, hits="cd"),
        candidate(0.1, sample=4, hits="ef"),
    ]
    assert probabilities(tried_, StateRule("beam", beam=1)) == [0.5, 0.5, 0, 0, 0]
    assert probabilities(tried_, StateRule("beam", beam=2)) == [0.5, 0.5, 0.5, 0.5, 0]  # a tie at the edge
    assert probabilities(tried_, StateRule("beam", beam=9)) == [0.5, 0.5, 1, 1, 1]
    first = set()
    for seed in range(30):
        chosen = next_states(tried_, StateRule("beam", beam=3), seed).open
        assert [c.ap for c in chosen] == [0.5, 0.25, 0.25]
        assert len({c.hits for c in chosen}) == 3
        first.add(chosen[0].sample)
    assert first == {0, 1}


@pytest.mark.parametrize(
    ("rule", "aps"),
    [
        (BUCKET, (0, 1 / 6, 1 / 4, 1 / 4, 1 / 2)),
        (StateRule("softmax", temperature=0.5), (0, 0.25, 0.5)),
        (StateRule("top1"), (0.1, 0.5, 0.5, 0.5)),
        (StateRule("beam", beam=2), (0.5, 0.25, 0.25, 0.25, 0)),
    ],
)
def test_next_states_draws_with_these_probabilities(rule, aps):
    tried_, draws = candidates(*aps), 4000
    counts = Counter(c.sample for seed in range(draws) for c in next_states(tried_, rule, seed).open)
    expected = [draws * p for p in probabilities(tried_, rule)]
    assert all(counts[i] == 0 for i, e in enumerate(expected) if e == 0)
    drawn = [i for i, e in enumerate(expected) if 0 < e < draws]
    chi2 = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in drawn)
    assert chi2 < CHI2_999[len(drawn) - 1]
    assert all(counts[i] == draws for i, e in enumerate(expected) if e == draws)


@pytest.mark.parametrize("name", ["bucket", "top1", "softmax", "beam"])
def test_next_states_does_not_depend_on_order_and_does_on_seed_question_and_hop(name):
    tried_, rule = candidates(*[0.5] * 12), StateRule(name, beam=1)
    first = [next_states(tried_, rule, seed).open for seed in range(20)]
    assert [next_states(tried_[::-1], rule, seed).open for seed in range(20)] == first
    assert len(set(first)) > 3
    elsewhere = [replace(c, state_before=replace(c.state_before, question_id="other")) for c in tried_]
    samples = [[c.sample for c in chosen] for chosen in first]
    assert [[c.sample for c in next_states(elsewhere, rule, seed).open] for seed in range(20)] != samples
    later = [replace(c, state_before=tried_[0].state_after) for c in tried_]
    assert [[c.sample for c in next_states(later, rule, seed).open] for seed in range(20)] != samples


@pytest.mark.parametrize("name", ["bucket", "top1", "softmax", "beam"])
def test_solved_and_stopped_are_never_drawn(name):
    solved, stopped = candidate(1.0), candidate(0.9, sample=1, hits=(), stopped=True)
    rule = StateRule(name)
    for seed in range(20):
        assert next_states([solved, stopped, candidate(0.0, sample=2)], rule, seed).open[0].sample == 2
    nothing = next_states([solved, stopped], rule, 0)
    assert (nothing.open, nothing.solved) == ((), None)
    assert probabilities([solved, stopped], rule) == [0, 0]
    assert next_states([], rule, 0).open == ()


def test_keep_solved_hands_over_one_solved_state_and_changes_nothing_else():
    tried_ = [*candidates(0.2, 0.5, 0.5, 1.0, 1.0), candidate(1.0, sample=9, hits=(), stopped=True)]
    kept = Counter()
    for seed in range(40):
        chosen = next_states(tried_, StateRule(keep_solved=True), seed)
        kept[chosen.solved.sample] += 1
        assert not is_solved(chosen.open[0])
    assert set(kept) == {3, 4}
    assert next_states(tried_[3:], StateRule(keep_solved=True), 0).open == ()


def test_next_states_of_the_small_world_leads_to_the_second_hop():
    drawn = {next_states(hop_1().candidates, BUCKET, seed).open[0].query for seed in range(60)}
    assert drawn == {QUESTION, "alder or foxglove dam"}
    state = tried(QUESTION).state_after
    assert state.hops == (HOP_1[QUESTION][0],)


def test_next_states_refuses_candidates_of_two_questions():
    other = [replace(c, state_before=replace(c.state_before, question_id="z")) for c in candidates(0.5)]
    with pytest.raises(DataError, match="one question and hop, got q hop 1 and z hop 1"):
        next_states(candidates(0.5) + other, BUCKET, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "buckets"}, "unknown state rule 'buckets'; did you mean 'bucket'"),
        ({"temperature": 0.0}, "temperature of the softmax rule"),
        ({"beam": 0}, "at least 1 context"),
    ],
)
def test_state_rule_refuses(fields, words):
    with pytest.raises(UsageError, match=words):
        StateRule(**fields)

"""Paired differences of returns, and values that cannot be right."""

import itertools
import json

import numpy as np
import pytest
from hindsight_models import dialogue

from llmrl.errors import DataError, UsageError
from llmrl.hindsight.calibration import ToGo, alarms, to_go_of
from llmrl.hindsight.compare import check_same, paired_difference, read_report, sign_flip_p
from llmrl.hindsight.encode import encode_dialogue, encode_parts
from llmrl.hindsight.small_model import word_tokenizer


def test_p_is_the_share_of_signs_that_differ_as_much():
    difference = np.array([1.0, 2.0, 0.5, -0.3, 1.2])
    means = [abs(np.mean(difference * signs)) for signs in itertools.product([1, -1], repeat=5)]
    exact = np.mean(np.array(means) >= abs(difference.mean()) - 1e-12)
    assert sign_flip_p(difference, 0) == pytest.approx(exact)  # few signs: all are tried


def test_what_both_met_alike_cancels():
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 5, 200)
    one, other = luck + 0.5 + rng.normal(0, 0.1, 200), luck
    found = paired_difference(one, other)
    assert found["value"] == pytest.approx(np.mean(one - other))
    assert 0.45 < found["low"] < found["value"] < found["high"] < 0.55
    assert found["p"] < 0.001
    shuffled = paired_difference(one, rng.permutation(other))
    assert shuffled["high"] - shuffled["low"] > 10 * (found["high"] - found["low"])


def test_equal_policies_do_not_differ():
    assert paired_difference([1.0, 2.0], [1.0, 2.0]) == {"value": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    rng = np.random.default_rng(1)
    ps = [paired_difference(*rng.normal(size=(2, 40)), seed=i)["p"] for i in range(60)]
    assert 0.35 < np.mean(ps) < 0.65


@pytest.mark.parametrize("others", [[], [1.0, 2.0]])
def test_returns_of_other_episodes_are_refused(others):
    with pytest.raises(DataError, match="the same episodes"):
        paired_difference([1.0], others)


REPORT = {
    "env": "maze",
    "variant": None,
    "user": None,
    "user_model": None,
    "seed": 0,
    "episodes": 3,
    "returns": [1, 2, 3],
    "policy": "p",
}


def test_a_report_is_read_and_compared_with_what_will_be_played(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT | {"greedy": True}), encoding="utf-8")
    assert check_same(read_report(tmp_path), REPORT) == REPORT
    with pytest.raises(UsageError, match="differ in variant None and long, seed 0 and 1"):
        check_same(REPORT, REPORT | {"variant": "long", "seed": 1})
    with pytest.raises(UsageError, match="expected a folder of llmrl hindsight eval"):
        read_report(tmp_path / "no")
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="expected a folder of llmrl hindsight eval"):
        read_report(tmp_path)


TALKS = [
    dialogue("a", "One.", "Two.", "Three.", "Four.", rewards=(1.0, 3.0)),
    dialogue("b", "One.", "Two.", rewards=(-2.0,)),
]
WORDS = word_tokenizer(m.content for talk in TALKS for m in talk.messages)


def test_what_the_tokens_learn_is_scaled_to_a_deviation_of_1():
    to_go = np.array([1 + 0.5 * 3, 3.0, -2.0])  # of each turn, at every token of it
    rows = [encode_dialogue(WORDS, talk) for talk in TALKS]
    tokens = [span.stop - span.start for row in rows for span in row.spans]
    values = np.repeat(to_go, tokens)
    found = to_go_of(rows, 0.5, "turn")
    assert found.scale == pytest.approx(1 / values.std())
    assert found.mean == pytest.approx(to_go.mean() * found.scale)  # a turn counts once, however long
    assert to_go_of([part for talk in TALKS for part in encode_parts(WORDS, talk, 1)], 0.5, "turn") == found


def test_what_can_be_earned_is_more_than_one_dialogue_did():
    """The best turn earned 3, the worst lost 2, and the longest dialogue has two of them."""
    found = to_go_of([encode_dialogue(WORDS, talk) for talk in TALKS], 1.0, "turn")
    assert (found.least, found.most) == pytest.approx((-4.0 * found.scale, 6.0 * found.scale))
    losses = [dialogue("c", "One.", "Two.", "Three.", "Four.", rewards=(-1.0, -3.0))]
    found = to_go_of([encode_dialogue(WORDS, talk) for talk in losses], 1.0, "turn")
    assert (found.least, found.most) == pytest.approx((-6.0 * found.scale, -1.0 * found.scale))


@pytest.mark.parametrize("reward", [4.0, 0.1, 0.7, -1e-3, 1000.0, 1e29])
def test_rewards_that_are_all_the_same_become_1(reward):
    """0.1 has no exact mean in binary: what its spread is made of is rounding."""
    rows = [encode_dialogue(WORDS, dialogue(f"d{i}", "One.", "Two.", rewards=(reward,))) for i in range(41)]
    assert to_go_of(rows, 1.0, "turn").scale == pytest.approx(1 / abs(reward))
    nothing = [encode_dialogue(WORDS, dialogue("a", "One.", "Two."))]
    assert to_go_of(nothing, 1.0, "turn").scale == 1.0


@pytest.mark.parametrize(
    ("value", "says"),
    [(-1.0, []), (0.2, []), (1.4, []), (-1.6, ["that was earned"]), (1.6, ["95% of all turns stay below"])],
)
def test_values_that_cannot_be_right(value, says):
    found = alarms(value, ToGo(scale=0.5, mean=-1.0, high=1.5, least=-4.0, most=3.0))
    assert [text in told for text, told in zip(says, found, strict=True)] == [True] * len(says)
    assert all(f"V is {value / 0.5:.3g} on average" in told for told in found)

"""Backups of small dialogues, by hand."""

import pytest

from llmrl.errors import DataError
from llmrl.hindsight.targets import NO_STATE, Span, backup

# tokens:  0 1   2 3 4   5 6   7 8   9
#          user  agent   user  agent end-of-world (a user's word after the last turn)
SPANS = (Span(2, 5, 1.0), Span(7, 9, 2.0))


def test_turn_backup_of_two_turns():
    found = backup(SPANS, last=9, done=True, discount=0.5)
    assert found.position == (1, 2, 3, 6, 7)
    assert found.turn == (0, 0, 0, 1, 1)
    # every token of the first turn learns from the state before the second one: the user's tokens are passed over
    assert found.next_position == (6, 6, 6, NO_STATE, NO_STATE)
    assert found.reward == (1.0, 1.0, 1.0, 2.0, 2.0)
    assert found.discount == (0.5,) * 5
    assert found.to_go == (2.0, 2.0, 2.0, 2.0, 2.0)  # 1 + .5 * 2, then 2
    assert found.value_position == (1, 6)  # where turns begin
    assert found.value_action == (2, 4)  # from the last token of each


def test_token_backup_of_two_turns():
    found = backup(SPANS, last=9, done=True, kind="token", discount=0.5)
    assert found.next_position == (2, 3, 6, 7, NO_STATE)
    assert found.reward == (0.0, 0.0, 1.0, 0.0, 2.0)
    assert found.discount == (1.0, 1.0, 0.5, 1.0, 0.5)  # gamma counts turns
    assert found.value_position == found.position
    assert found.value_action == (0, 1, 2, 3, 4)


def test_token_discount_in_both_backups():
    tokens = backup(SPANS, last=9, done=True, kind="token", discount=0.5, unit="token")
    assert tokens.discount == (0.5,) * 5
    turns = backup(SPANS, last=9, done=True, discount=0.5, unit="token")
    # two tokens to go before the reward at the first token of the first turn, then one more step to the next state
    assert turns.reward == (0.25, 0.5, 1.0, 1.0, 2.0)
    assert turns.discount == (0.125, 0.25, 0.5, 0.25, 0.5)
    # at the end of turn 0: 1 + .5^2 * 2; earlier tokens are discounted by the tokens between
    assert turns.to_go == tokens.to_go == (0.375, 0.75, 1.5, 1.0, 2.0)


@pytest.mark.parametrize("kind", ["turn", "token"])
def test_a_dialogue_that_was_cut_off_bootstraps_from_its_last_state(kind):
    found = backup(SPANS, last=9, done=False, kind=kind)
    assert found.next_position[-1] == 9
    assert backup(SPANS[:1], last=4, done=False, kind=kind).next_position[-1] == 4  # cut right after the agent spoke


@pytest.mark.parametrize("kind", ["turn", "token"])
@pytest.mark.parametrize("unit", ["turn", "token"])
def test_values_that_satisfy_the_backup_are_the_returns(kind, unit):
    """With one way through the dialogue, V of a state is what is to go at the action taken there."""
    spans = (Span(1, 4, 0.3), Span(6, 7, -1.0), Span(9, 13, 2.0))
    found = backup(spans, last=12, done=True, kind=kind, discount=0.9, unit=unit)
    value = dict(zip(found.position, found.to_go, strict=True))
    for reward, discount, after, to_go in zip(
        found.reward, found.discount, found.next_position, found.to_go, strict=True
    ):
        assert reward + discount * (value[after] if after != NO_STATE else 0.0) == pytest.approx(to_go)
    assert found.state_to_go == pytest.approx([value[position] for position in found.value_position])


@pytest.mark.parametrize("kind", ["turn", "token"])
@pytest.mark.parametrize("unit", ["turn", "token"])
def test_learning_from_the_targets_ends_at_the_returns(kind, unit):
    """Q of actions and V of states as a table, each set to what it learns from until nothing moves."""
    spans = (Span(1, 4, 0.3), Span(6, 7, -1.0), Span(9, 13, 2.0))
    found = backup(spans, last=12, done=True, kind=kind, discount=0.5, unit=unit)
    v = dict.fromkeys(found.value_position, 0.0)
    for _ in range(20):
        q = [
            reward + discount * (0.0 if after == NO_STATE else v[after])
            for reward, discount, after in zip(found.reward, found.discount, found.next_position, strict=True)
        ]
        for position, action, between in zip(
            found.value_position, found.value_action, found.value_discount, strict=True
        ):
            v[position] = between * q[action]
    assert q == pytest.approx(found.to_go)
    assert list(v.values()) == pytest.approx(found.state_to_go)
    if (kind, unit) == ("turn", "token"):  # by hand: turns of 3, 1 and 4 tokens
        third = 0.5**3 * 2.0
        second = -1.0 + 0.5 * third
        assert found.state_to_go == pytest.approx((0.25 * (0.3 + 0.5 * second), second, third))


@pytest.mark.parametrize(
    ("spans", "options", "words"),
    [
        ((), {}, "within 10 tokens"),
        ((Span(2, 11, 0.0),), {}, "within 10 tokens"),
        ((Span(2, 5, 0.0), Span(5, 6, 0.0)), {}, "touch"),
        (SPANS, {"kind": "word"}, "expected a backup"),
        (SPANS, {"discount": 1.5}, "from 0 to 1"),
    ],
)
def test_what_is_no_dialogue_is_refused(spans, options, words):
    with pytest.raises(DataError, match=words):
        backup(spans, last=9, done=True, **options)
    with pytest.raises(DataError, match="one token or more"):
        Span(3, 3, 0.0)
    with pytest.raises(DataError, match="after the first"):
        Span(0, 2, 0.0)  # no state before it

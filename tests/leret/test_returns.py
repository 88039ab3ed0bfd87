import pytest

from llmrl.errors import UsageError
from llmrl.leret.returns import future_return

FUTURES = [[0.3, 0.8], [0.6], []]  # two more hops, one, none (it stopped)


@pytest.mark.parametrize(
    ("how", "discount", "expected"),
    [
        ("greedy", 0.5, 0.5),
        ("best", 1.0, 0.8),
        ("mean", 1.0, (0.8 + 0.6 + 0.5) / 3),
        ("best", 0.5, 0.5),  # 0.25 * 0.8, 0.5 * 0.6, 0.5
        ("mean", 0.5, (0.2 + 0.3 + 0.5) / 3),
    ],
)
def test_future_return(how, discount, expected):
    assert future_return(0.5, FUTURES, how, discount) == pytest.approx(expected)


@pytest.mark.parametrize("how", ["greedy", "best", "mean"])
def test_future_return_of_the_last_hop_is_the_reward(how):
    assert future_return(0.5, [], how, 0.5) == 0.5


def test_future_return_refuses_unknown_words_and_discounts():
    with pytest.raises(UsageError, match="unknown returns 'bst'; did you mean 'best'"):
        future_return(0.5, [], "bst")
    with pytest.raises(UsageError, match="discount"):
        future_return(0.5, [], "best", 1.5)

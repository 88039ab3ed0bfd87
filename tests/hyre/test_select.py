import numpy as np
import pytest

from llmrl.errors import DataError
from llmrl.hyre.posterior import HyrePosterior, label_losses
from llmrl.hyre.select import _quantile_of_t, choose, leave_one_out

RNG = np.random.default_rng(1)


def test_leave_one_out_is_a_posterior_of_the_others():
    margins = RNG.normal(size=(6, 4)) * 2
    found = leave_one_out(label_losses(margins, np.ones(6)), margins, np.ones(6), 0.5)
    for i in range(6):
        posterior = HyrePosterior(4, beta=0.5)
        posterior.update(np.delete(margins, i, 0))
        assert found[i] == pytest.approx(-np.logaddexp(0, -posterior.predict(margins[i])), abs=1e-12)


def test_one_label_takes_the_default():
    choice = choose([[1.0, -1.0]])
    assert (choice.loss, choice.beta, choice.guarded, choice.error) == ("nll", 1.0, False, None)
    assert choose([[1.0, -1.0]], default=("zero_one", 3.0)).beta == 3.0


def test_no_label_is_refused():
    with pytest.raises(DataError, match="at least one label"):
        choose(np.zeros((0, 3)))


def test_a_sharper_posterior_is_chosen_where_one_head_is_always_right():
    margins = np.concatenate([np.full((40, 1), 4.0), RNG.normal(size=(40, 30))], 1) * 0.1
    choice = choose(margins)
    assert (choice.beta, choice.guarded) == (3.0, False)
    assert choice.gain > 0


def test_the_guard_falls_back_where_labels_contradict_each_other():
    """Two heads, and labels that each agree with one of them only: whoever follows the others is wrong."""
    margins = np.array([[3.0, -3.0], [-3.0, 3.0]] * 10)
    choice = choose(margins)
    assert (choice.beta, choice.guarded) == (0.0, True)
    assert choice.gain < 0


def test_the_guard_stays_out_where_labels_agree():
    assert not choose(np.array([[2.0, -1.0, 0.5]] * 5)).guarded


def test_two_labels_are_too_few_for_the_guard():
    choice = choose(np.array([[3.0, -3.0], [-3.0, 3.0]]))
    assert choice.gain < 0
    assert not choice.guarded


def test_labels_of_random_users_mostly_bring_the_guard_or_weak_weights():
    guarded = [choose(RNG.normal(size=(20, 50)) * 3 * RNG.choice([-1, 1], size=(20, 1))).guarded for _ in range(40)]
    assert np.mean(guarded) > 0.5


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (4, 2.776), (19, 2.093), (31, 2.040), (127, 1.979)])
def test_quantile_of_t(freedom, quantile):
    assert _quantile_of_t(freedom) == pytest.approx(quantile, abs=0.01)


def test_numbers_are_not_chosen_by_the_likelihood_of_labels():
    with pytest.raises(DataError, match="labels of 0 and 1"):
        choose(np.ones((3, 2)), candidates=(("squared", 1.0),))

import math

import pytest
import torch

from llmrl.errors import UsageError
from llmrl.leret.losses import (
    LogRatios,
    SequenceLogps,
    aligned_logps,
    dpo_loss,
    implied_margin,
    ipo_loss,
    log_ratios,
    preference_metrics,
    sequence_logps,
)

# log-ratios of two pairs: h is 3 - (-1) = 4 and -2 - 1 = -3; a token they are 3/3 + 1/2 = 1.5 and -2/4 - 1/1 = -1.5
RATIOS = LogRatios(torch.tensor([3.0, -2.0]), torch.tensor([-1.0, 1.0]), torch.tensor([3, 4]), torch.tensor([2, 1]))


def test_sequence_logps_sums_what_is_labelled():
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.6, 0.2, 0.2]])
    logits = (probabilities.log() + 3.0).repeat(2, 1, 1)  # softmax does not see the constant
    labels = torch.tensor([[0, 1, 2, 0], [-100, -100, 2, -100]])
    total, length = sequence_logps(logits, labels)
    # position t predicts token t + 1, so the first label counts nowhere
    assert total.tolist() == pytest.approx([math.log(0.25 * 0.7 * 0.3), math.log(0.7)])
    assert length.tolist() == [3, 1]


def test_aligned_logps_predict_at_their_own_position():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    shifted, aligned = sequence_logps(logits, labels), aligned_logps(logits[:, :-1], labels[:, 1:])
    assert shifted.total.tolist() == aligned.total.tolist()
    assert aligned.length.tolist() == [2, 4]
    nothing = aligned_logps(logits, torch.full((2, 5), -100))
    assert (nothing.total.tolist(), nothing.length.tolist()) == ([0, 0], [0, 0])


def test_sequence_logps_of_bfloat16_logits_are_float32():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 33, 11).bfloat16(), torch.randint(0, 11, (1, 33))
    total = sequence_logps(logits, labels).total
    exact = sequence_logps(logits.double(), labels).total
    assert total.dtype == torch.float32
    assert exact.dtype == torch.float64
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)


def test_log_ratios_subtract_the_reference():
    chosen = SequenceLogps(torch.tensor([-4.0]), torch.tensor([3]))
    rejected = SequenceLogps(torch.tensor([-9.0]), torch.tensor([2]))
    ratios = log_ratios(chosen, rejected, torch.tensor([-7.0]), torch.tensor([-8.0]))
    assert (ratios.chosen.item(), ratios.rejected.item(), ratios.difference.item()) == (3, -1, 4)
    assert (ratios.chosen_length.item(), ratios.rejected_length.item()) == (3, 2)


def test_ipo_sum_is_the_squared_distance_to_ten_nats():
    assert ipo_loss(RATIOS, 0.05, "sum").tolist() == pytest.approx([(4 - 10) ** 2, (-3 - 10) ** 2])
    assert ipo_loss(RATIOS, 0.125, "sum").tolist() == [0, 49]  # 4 nats are asked for


def test_ipo_mean_divides_each_log_ratio_by_its_own_length():
    assert ipo_loss(RATIOS, 0.05, "mean").tolist() == pytest.approx([(1.5 - 10) ** 2, (-1.5 - 10) ** 2])


def test_dpo_is_the_log_loss_of_preferring_the_chosen():
    assert dpo_loss(RATIOS, 0.5).tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.exp(1.5))])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_of_ipo_and_dpo_from_logits(reduction):
    torch.manual_seed(0)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, 0, 1], [-100, 4, 2, -100], [-100, 3, -100, -100]])
    logits = torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(2, 2, dtype=torch.float64)

    def losses(x):
        total, length = sequence_logps(x, labels)
        chosen, rejected = SequenceLogps(total[:2], length[:2]), SequenceLogps(total[2:], length[2:])
        ratios = log_ratios(chosen, rejected, *reference)
        return ipo_loss(ratios, 0.3, reduction), dpo_loss(ratios, 0.3)

    assert torch.autograd.gradcheck(losses, (logits,))


def test_ipo_descends_to_its_margin_and_dpo_beyond():
    def trained(loss):
        h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([h], lr=0.1)
        for _ in range(400):
            ratios = LogRatios(h, torch.zeros(1), torch.tensor([1]), torch.tensor([1]))
            optimizer.zero_grad()
            loss(ratios).sum().backward()
            optimizer.step()
        return h.item()

    assert trained(lambda r: ipo_loss(r, 0.25)) == pytest.approx(2)
    assert trained(lambda r: dpo_loss(r, 1.0)) > 3


def test_implied_margin_compares_the_two_reductions():
    assert implied_margin(0.05, "sum", 15) == pytest.approx((10, 2 / 3))
    assert implied_margin(0.75, "mean", 15) == pytest.approx((10, 2 / 3))
    assert implied_margin(0.05, "mean", 15) == pytest.approx((150, 10))  # what trl does with the paper's beta


def test_preference_metrics_are_means_over_the_batch():
    assert preference_metrics(RATIOS) == pytest.approx(
        {"accuracy": 0.5, "margin": 0.5, "margin_per_token": 0, "log_ratio_chosen": 0.5, "log_ratio_rejected": 0}
    )
    untrained = LogRatios(torch.zeros(2), torch.zeros(2), torch.tensor([3, 3]), torch.tensor([3, 3]))
    assert preference_metrics(untrained)["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ipo_loss(RATIOS, 0.0), "beta must be above 0, got 0.0"),
        (lambda: dpo_loss(RATIOS, -1.0), "beta must be above 0"),
        (lambda: ipo_loss(RATIOS, 0.1, "men"), "unknown ipo_reduction 'men'; did you mean 'mean'"),
        (lambda: implied_margin(0.05, "sum", 0), "mean length"),
    ],
)
def test_losses_refuse(call, words):
    with pytest.raises(UsageError, match=words):
        call()

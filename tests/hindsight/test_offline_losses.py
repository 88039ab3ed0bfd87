"""Losses by hand, and what they are minimised by."""

import pytest
import torch

from llmrl.hindsight.losses import awr_weights, cql_loss, dpo_loss, expectile_loss, polyak, q_loss, td_targets


def test_targets_by_hand_and_clipped():
    reward, discount, after = (
        torch.tensor([1.0, 0.0, -5.0]),
        torch.tensor([0.5, 1.0, 1.0]),
        torch.tensor([4.0, 3.0, 0.0]),
    )
    assert td_targets(reward, discount, after).tolist() == [3.0, 3.0, -5.0]
    assert td_targets(reward, discount, after, low=-2.0, high=2.5).tolist() == [2.5, 2.5, -2.0]
    value = torch.ones(1, requires_grad=True)
    assert not td_targets(reward[:1], discount[:1], value).requires_grad


def test_q_loss_sums_both_heads():
    assert q_loss(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([1.0, 4.0])).tolist() == [4.0, 8.0]


def test_expectile_loss_by_hand():
    found = expectile_loss(torch.tensor([2.0, -2.0, 0.0]), 0.9)
    assert found.tolist() == pytest.approx([3.6, 0.4, 0.0])
    assert expectile_loss(torch.tensor([2.0]), 0.5).item() == 2.0


@pytest.mark.parametrize("tau", [0.5, 0.8, 0.95])
def test_the_minimum_of_the_expectile_loss_is_the_expectile(tau):
    """Of 0 with probability 3/4 and 1 with 1/4 it is tau / (tau + 3 (1 - tau))."""
    values = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    v = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = expectile_loss(values - v, tau).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert v.item() == pytest.approx(tau / (tau + 3 * (1 - tau)), abs=1e-6)


def test_cql_is_cross_entropy_with_q_as_logits():
    q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = torch.tensor([0, 4, 2])
    wanted = torch.logsumexp(q, -1) - q[:, torch.arange(3), tokens]
    assert (cql_loss(q, tokens) - wanted.sum(0)).abs().max() < 1e-6
    cql_loss(q, tokens).sum().backward()
    assert (q.grad[:, torch.arange(3), tokens] < 0).all()  # the data's token is raised, all others are lowered
    assert q.grad.sum(-1).abs().max() < 1e-6


def test_awr_weights_by_hand():
    found = awr_weights(torch.tensor([0.0, 1.0, 100.0], requires_grad=True), 0.5)
    assert found.tolist() == pytest.approx([1.0, 7.389056, 20.0], rel=1e-5)
    assert not found.requires_grad


def test_dpo_loss_by_hand():
    policy, reference = torch.tensor([[-1.0], [-3.0]]), torch.tensor([[-2.0], [-2.5]])
    assert dpo_loss(policy, reference, 2.0).item() == pytest.approx(
        torch.nn.functional.softplus(torch.tensor(-3.0)).item()
    )
    assert dpo_loss(reference, reference, 2.0).item() == pytest.approx(0.693147, abs=1e-5)


def test_polyak_moves_targets_by_the_rate():
    target, online = [torch.zeros(3)], [torch.full((3,), 2.0)]
    polyak(target, online, 0.25)
    assert target[0].tolist() == [0.5] * 3
    polyak(target, online, 0.25)
    assert target[0].tolist() == [0.875] * 3
    assert online[0].tolist() == [2.0] * 3


def test_the_best_of_two_dialogues_is_put_together():
    """Logs A+1 D+0, B+0 C+1, B+0 D+0: no dialogue earned 2, and A then C would. Clipping must leave room for it."""
    from hindsight_models import dialogue

    from llmrl.hindsight.calibration import to_go_of
    from llmrl.hindsight.encode import encode_parts
    from llmrl.hindsight.small_model import word_tokenizer

    talks = [
        dialogue("1", "Go.", "A", "Again.", "D", rewards=(1.0, 0.0)),
        dialogue("2", "Go.", "B", "Again.", "C", rewards=(0.0, 1.0)),
        dialogue("3", "Go.", "B", "Again.", "D", rewards=(0.0, 0.0)),
    ]
    words = word_tokenizer(m.content for talk in talks for m in talk.messages)
    rows = [part for talk in talks for part in encode_parts(words, talk, 1)]
    to_go = to_go_of(rows, 1.0, "turn")
    turns = {
        (talk.messages[i - 1].content, talk.messages[i].content): talk.rewards[i] for talk in talks for i in (1, 3)
    }
    v = {"Go.": 0.0, "Again.": 0.0, None: 0.0}
    for _ in range(3):
        q = {
            (state, said): float(
                td_targets(
                    torch.tensor([reward * to_go.scale]), torch.ones(1),
                    torch.tensor([v["Again." if state == "Go." else None]]), to_go.least, to_go.most,
                )
            )
            for (state, said), reward in turns.items()
        }  # fmt: skip
        v |= {state: max(value for (s, _), value in q.items() if s == state) for state in ("Go.", "Again.")}
    assert q[("Go.", "A")] / to_go.scale == pytest.approx(2.0)
    assert q[("Go.", "B")] / to_go.scale == pytest.approx(1.0)

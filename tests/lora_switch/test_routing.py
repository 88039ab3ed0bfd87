"""Routes, gates and the balance loss against numbers worked out by hand."""

import math

import pytest
import torch

from llmrl.lora_switch.pack import pack, slice_rows
from llmrl.lora_switch.routing import balance_loss, choose, dense_gates, pooled, usage
from llmrl_kernels import routed_lora


def test_softmax_weights_are_renormalised():
    route = choose(torch.tensor([[0.0, math.log(3.0), math.log(9.0)]]), 2)
    assert route.ids.tolist() == [[2, 1]]
    assert route.ids.dtype == torch.int32
    torch.testing.assert_close(route.weights, torch.tensor([[0.75, 0.25]]))
    torch.testing.assert_close(route.probs, torch.tensor([[1.0, 3.0, 9.0]]) / 13)
    torch.testing.assert_close(dense_gates(route, 3), torch.tensor([[0.0, 0.25, 0.75]]))


def test_equal_logits_take_the_lower_numbers():
    route = choose(torch.zeros(3, 5), 2)
    assert route.ids.tolist() == [[0, 1]] * 3
    assert choose(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), 3).ids.tolist() == [[1, 2, 0]]


def test_hard_weights_are_even_and_carry_the_softmax_gradient():
    logits = torch.tensor([[0.3, -0.2, 1.0]], dtype=torch.float64, requires_grad=True)
    route = choose(logits, 1, "hard")
    assert route.weights.tolist() == [[1.0]]
    (gradient,) = torch.autograd.grad(route.weights.sum(), logits)
    p = logits.detach().softmax(-1)[0]
    expected = p[2] * (torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - p)
    torch.testing.assert_close(gradient[0], expected)
    torch.testing.assert_close(choose(logits, 2, "hard").weights, torch.full((1, 2), 0.5, dtype=torch.float64))


def test_gradient_reaches_the_chosen_logits_alone():
    logits = torch.tensor([[0.3, -0.2, 1.0, 0.9]], requires_grad=True)
    dense_gates(choose(logits, 2), 4)[0, 2].backward()
    assert (logits.grad[0] != 0).tolist() == [False, False, True, True]


def test_balance_loss_is_1_when_even_and_E_when_one_takes_all():
    even = choose(torch.eye(4) * 50, 1)
    assert float(balance_loss(even)) == pytest.approx(1.0)
    one = choose(torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 6), 1)
    assert float(balance_loss(one)) == pytest.approx(4.0)


def test_balance_loss_by_hand_and_its_gradient():
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    route = choose(logits, 1)
    p = logits.detach().softmax(-1).mean(0)
    loss = balance_loss(route)
    assert float(loss) == pytest.approx(float(2 * (2 / 3 * p[0] + 1 / 3 * p[1])))
    loss.backward()
    # expert 0 has too much: its logit is to fall everywhere
    assert (logits.grad[:, 0] > 0).all()


def test_balance_loss_counts_the_tokens_of_the_mask():
    logits = torch.tensor([[[5.0, 0.0], [0.0, 5.0], [9.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(balance_loss(choose(logits, 1), mask), balance_loss(choose(logits[:, :2], 1)))
    assert float(balance_loss(choose(logits, 1), torch.zeros_like(mask))) == 0.0


def test_usage_counts_choices():
    route = choose(torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]]), 2)
    assert usage(route, 3).tolist() == [1, 2, 1]
    assert usage(route, 3, torch.tensor([[1, 0]])).tolist() == [1, 1, 0]


def test_pooled_is_the_mean_of_what_the_mask_holds():
    states = torch.arange(12.0).view(1, 4, 3).to(torch.bfloat16)
    found = pooled(states, torch.tensor([[1, 1, 0, 0]]))
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.5, 2.5, 3.5]]
    assert pooled(states, torch.zeros(1, 4)).tolist() == [[0.0, 0.0, 0.0]]


def random_part(out, experts=3, rank=2, width=5):
    return torch.randn(experts, rank, width), torch.randn(out, experts * rank)


def lora(x, a, b, gates):
    """sum_e g_e B_e A_e x, expert by expert."""
    experts, rank, _ = a.shape
    return sum(gates[:, e, None] * (x @ a[e].T) @ b[:, e * rank : (e + 1) * rank].T for e in range(experts))


def test_pack_computes_the_parts_side_by_side():
    torch.manual_seed(0)
    parts = [random_part(4), random_part(2), random_part(3)]
    x, gates = torch.randn(7, 5), torch.rand(7, 3)
    expected = torch.cat([lora(x, a, b, gates) for a, b in parts], 1)
    a, b, slices = pack(parts)
    assert a.shape == (9, 2, 5)
    assert b.shape == (9, 6)  # no zeros between the parts
    assert slices == (4, 2, 3)
    torch.testing.assert_close(routed_lora(x, a, b, gates.repeat(1, 3), 1.0, slices=slices), expected)


@pytest.mark.parametrize(
    ("adapted", "slices"),
    [((0, 1, 0), (9,)), ((1, 0, 1), (6, 3)), ((0, 0, 1), (9,)), ((0, 1, 1), (6, 3)), ((1, 1, 0), (4, 5))],
)
def test_pack_leaves_rows_of_zeros_for_a_part_without_experts(adapted, slices):
    torch.manual_seed(0)
    outs = (4, 2, 3)
    parts = [random_part(out) if here else None for out, here in zip(outs, adapted, strict=True)]
    x, gates = torch.randn(7, 5), torch.rand(7, 3)
    a, b, found = pack(parts, outs)
    assert found == slices == slice_rows(outs, adapted)
    y = routed_lora(x, a, b, gates.repeat(1, sum(adapted)), 1.0, slices=found)
    expected = [
        torch.zeros(7, out) if part is None else lora(x, *part, gates) for part, out in zip(parts, outs, strict=True)
    ]
    torch.testing.assert_close(y, torch.cat(expected, 1))


def test_pack_refuses_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one part"):
        pack([None], [3])
    with pytest.raises(ValueError, match=r"expected parts with A \[3, 2, 5\]"):
        pack([random_part(4), random_part(4, rank=3)])
    with pytest.raises(ValueError, match=r"expected B \[3, 6\], got \[4, 6\]"):
        pack([random_part(4), None], [3, 4])

"""The mixture over the chosen experts alone, in plain torch: values, and what it refuses."""

import re

import pytest
import torch
from expert_inputs import DTYPES, SHAPES, assert_rounded_alike, layer_of, strided

from llmrl_kernels import (
    routed_expand_gathered,
    routed_expand_gathered_reference,
    routed_lora,
    routed_lora_gathered,
    routed_shrink_gathered,
    routed_shrink_gathered_reference,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathered_matches_reference(shape, dtype):
    one = layer_of(shape, dtype)
    u, h = routed_shrink_gathered(strided(one.x), one.A, one.ids, one.weights)
    expected_u, expected_h = routed_shrink_gathered_reference(one.x, one.A, one.ids, one.weights)
    assert_rounded_alike(u, expected_u)
    assert_rounded_alike(h, expected_h)
    for base in (None, strided(one.base)):
        y = routed_expand_gathered(u, one.B, one.ids, scale=0.7, base=base)
        assert_rounded_alike(y, routed_expand_gathered_reference(u, one.B, one.ids, scale=0.7, base=base))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gathered_is_the_dense_form(shape):
    one = layer_of(shape).moved(torch.Tensor.double)
    u, _ = routed_shrink_gathered(one.x, one.A, one.ids, one.weights)
    y = routed_expand_gathered(u, one.B, one.ids, scale=0.7, base=one.base)
    torch.testing.assert_close(y, routed_lora(one.x, one.A, one.B, one.gates, 0.7, base=one.base))


def test_gathered_reads_the_chosen_experts_alone():
    one = layer_of((4, 8, 6, 3, 2, 1))
    ids, weights = torch.tensor([[0], [2], [0], [1]], dtype=torch.int32), torch.ones(4, 1)
    one.A[1], one.B[:, 2:4] = torch.nan, torch.nan
    u, _ = routed_shrink_gathered(one.x, one.A, ids, weights)
    y = routed_expand_gathered(u, one.B, ids, scale=1.0)
    assert y[:3].isfinite().all()
    assert y[3].isnan().all()


def test_an_expert_chosen_twice_counts_twice():
    one = layer_of((2, 8, 6, 3, 2, 2)).moved(torch.Tensor.double)
    ids, weights = torch.tensor([[1, 1], [0, 2]], dtype=torch.int32), torch.tensor([[0.5, 0.25], [1.0, 1.0]])
    u, _ = routed_shrink_gathered(one.x, one.A, ids, weights)
    y = routed_expand_gathered(u, one.B, ids, scale=1.0)
    torch.testing.assert_close(y[0], 0.75 * (one.B[:, 2:4] @ (one.A[1] @ one.x[0])))


def test_no_tokens():
    one = layer_of((2, 8, 6, 3, 2, 2))
    u, h = routed_shrink_gathered(one.x[:0], one.A, one.ids[:0], one.weights[:0])
    assert u.shape == h.shape == (0, 2, 2)
    assert routed_expand_gathered(u, one.B, one.ids[:0], scale=1.0).shape == (0, 6)


ONE = layer_of((4, 8, 6, 3, 2, 1))
DOWN = {"x": ONE.x, "A": ONE.A, "ids": ONE.ids, "weights": ONE.weights}
UP = {"u": torch.zeros(4, 1, 2), "B": ONE.B, "ids": ONE.ids, "scale": 1.0, "base": ONE.base}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ids": ONE.ids.long()}, TypeError, "ids: expected int32, got torch.int64; cast them with ids.int()"),
        ({"ids": ONE.ids[:3]}, ValueError, "ids: expected [T, k] with T = 4 as in x and k >= 1, got [3, 1]"),
        ({"ids": ONE.ids + 3}, ValueError, "ids: expected 0 to 2, one of 3 experts, got"),
        ({"ids": ONE.ids - 3}, ValueError, "ids: expected 0 to 2, one of 3 experts, got -"),
        ({"weights": ONE.weights[:, 0]}, ValueError, "weights: expected [T, k] as of ids = [4, 1], got [4]"),
        ({"weights": ONE.weights.half()}, TypeError, "weights: expected float32, got torch.float16"),
        ({"A": ONE.A.half()}, TypeError, "A: expected torch.float32, the dtype of x, got torch.float16"),
        ({"A": ONE.A[..., 1:]}, ValueError, "A: expected [E, r, in] with in = 8 as in x, got [3, 2, 7]"),
        ({"x": ONE.x[None]}, ValueError, "x: expected [T, in] with no empty dimension, got [1, 4, 8]"),
        ({"A": ONE.A.clone().requires_grad_()}, ValueError, "routed_shrink_gathered has no gradient"),
    ],
)
def test_shrink_gathered_refuses_what_does_not_fit(changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        routed_shrink_gathered(**(DOWN | changes))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"B": ONE.B[:, :5]}, ValueError, "B: expected [out, E*r] with r = 2 as in u, got [6, 5]"),
        ({"ids": ONE.ids + 3}, ValueError, "ids: expected 0 to 2, one of 3 experts, got"),
        ({"ids": ONE.ids.expand(4, 2)}, ValueError, "ids: expected [T, k] as of u = [4, 1], got [4, 2]"),
        ({"base": ONE.base[:, :5]}, ValueError, "base: expected [T, out] = [4, 6], got [4, 5]"),
        ({"u": torch.zeros(4, 2)}, ValueError, "u: expected [T, k, r] with no empty dimension, got [4, 2]"),
        ({"base": ONE.base.bfloat16()}, TypeError, "base: expected torch.float32, the dtype of u, got torch.bfloat16"),
        ({"B": ONE.B.clone().requires_grad_()}, ValueError, "routed_expand_gathered has no gradient"),
    ],
)
def test_expand_gathered_refuses_what_does_not_fit(changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        routed_expand_gathered(**(UP | changes))


@pytest.mark.parametrize("base", [True, False])
def test_gradients_of_the_gathered_mixture_are_those_of_the_dense_one(base):
    torch.manual_seed(0)
    tokens, width, out, experts, rank = 7, 10, 6, 5, 3
    shapes = [(tokens, width), (experts, rank, width), (out, experts * rank), (tokens, 2)]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    under = torch.randn(tokens, out, dtype=torch.float64, requires_grad=True) if base else None
    ids = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)]).int()

    def gathered(x, a, b, weights):
        return routed_lora_gathered(x, a, b, ids, weights, 0.7, base=under)

    def dense(x, a, b, weights):
        gates = weights.new_zeros(tokens, experts).scatter(1, ids.long(), weights)
        return routed_lora(x, a, b, gates, 0.7, base=under)

    torch.testing.assert_close(gathered(*inputs), dense(*inputs))
    of = [*inputs, under] if base else inputs
    seed = torch.randn(tokens, out, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(gathered(*inputs), of, seed), torch.autograd.grad(dense(*inputs), of, seed), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(gathered, inputs)


def test_gradients_where_an_expert_is_chosen_twice():
    torch.manual_seed(0)
    shapes = [(3, 4), (3, 2, 4), (5, 6), (3, 3)]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ids = torch.tensor([[1, 1, 1], [0, 2, 0], [2, 1, 0]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x, a, b, weights: routed_lora_gathered(x, a, b, ids, weights, 0.7), inputs)


def test_gathered_under_autocast():
    one = layer_of((12, 8, 6, 3, 4, 2))
    A, B = one.A.clone().requires_grad_(), one.B.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        base = torch.nn.functional.linear(one.x, one.W)  # in bfloat16, as what a layer adds to
        y = routed_lora_gathered(one.x, A, B, one.ids, one.weights.bfloat16(), 0.5, base=base)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert A.grad.dtype == B.grad.dtype == torch.float32
    short, weights = one.moved(torch.Tensor.bfloat16), one.weights.bfloat16().float()
    assert y.equal(routed_lora_gathered(short.x, short.A, short.B, one.ids, weights, 0.5, base=base))
    long = one.moved(torch.Tensor.double)
    with torch.autocast("cpu", torch.bfloat16):
        assert routed_lora_gathered(long.x, long.A, long.B, one.ids, one.weights, 0.5).dtype == torch.float64

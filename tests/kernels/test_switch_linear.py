"""The linear layer of a decoding step with its experts, in plain torch; then its kernels, where they can run."""

import re
import sys

import pytest
import torch
from expert_inputs import DTYPES, SHAPES, assert_rounded_alike, layer_of, strided

from llmrl_kernels import SwitchWorkspace, routed_lora, switch_linear, switch_linear_reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_switch_linear_matches_reference(shape, dtype):
    one = layer_of((min(shape[0], 16), *shape[1:]), dtype)
    for bias in (None, one.bias):
        y = switch_linear(strided(one.x), one.W, one.A, one.B, one.gates, 0.7, bias=bias)
        assert_rounded_alike(y, switch_linear_reference(one.x, one.W, one.A, one.B, one.gates, 0.7, bias=bias))


def test_switch_linear_is_the_linear_layer_and_the_mixture():
    one = layer_of((4, 8, 6, 3, 2, 2)).moved(torch.Tensor.double)
    y = switch_linear(one.x, one.W, one.A, one.B, one.gates, 0.7, bias=one.bias)
    base = torch.nn.functional.linear(one.x, one.W, one.bias)
    torch.testing.assert_close(y, routed_lora(one.x, one.A, one.B, one.gates, 0.7, base=base))
    assert switch_linear(one.x[:0], one.W, one.A, one.B, one.gates[:0], 0.7).shape == (0, 6)


def test_switch_linear_expert_that_is_not_chosen_may_hold_nan():
    one = layer_of((2, 8, 6, 3, 2, 1))
    gates = torch.eye(3)[:2]
    one.A[1] = torch.nan
    y = switch_linear(one.x, one.W, one.A, one.B, gates, 1.0)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


ONE = layer_of((4, 8, 6, 3, 2, 1))
MANY = layer_of((17, 8, 6, 3, 2, 1))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": MANY.x, "gates": MANY.gates}, ValueError, "x: expected at most 16 tokens, got 17"),
        ({"W": ONE.W[:, :7]}, ValueError, "W: expected [out, in] with in as in x = [6, 8], got [6, 7]"),
        ({"A": ONE.A[0]}, ValueError, "A: expected [E, r, in] with in = 8 as in x, got [2, 8]"),
        ({"B": ONE.B[:, :5]}, ValueError, "B: expected [out, E*r] = [6, 6], got [6, 5]"),
        ({"bias": ONE.bias[:5]}, ValueError, "bias: expected [out] = [6], got [5]"),
        ({"gates": ONE.gates[:, :2]}, ValueError, "gates: expected [T, E] = [4, 3], got [4, 2]"),
        ({"gates": ONE.gates.half()}, TypeError, "gates: expected float32, got torch.float16"),
        ({"W": ONE.W.half()}, TypeError, "W: expected torch.float32, the dtype of x, got torch.float16"),
        ({"W": ONE.W.clone().requires_grad_()}, ValueError, "switch_linear has no gradient"),
        ({"fused": True, "backend": "torch"}, ValueError, "fused: expected the Triton kernel, got plain torch on cpu"),
    ],
)
def test_switch_linear_refuses_what_does_not_fit(changes, error, words):
    inputs = {"x": ONE.x, "W": ONE.W, "A": ONE.A, "B": ONE.B, "gates": ONE.gates, "scale": 1.0, "bias": ONE.bias}
    with pytest.raises(error, match=re.escape(words)):
        switch_linear(**(inputs | changes))


def test_workspace_begins_at_nothing_and_can_again():
    space = SwitchWorkspace(6, "cpu")
    space.counters.fill_(3)
    space.reset()
    assert space.counters.tolist() == [0, 0, 0]
    assert space.u.shape == (96,)


def test_switch_linear_triton_matches_reference():
    pytest.importorskip("triton", reason="the GPU path needs the package triton")
    from triton_places import PLACES, run_cases

    for where in PLACES:
        run_cases("triton_switch_linear.py", where)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA comes with its Linux wheels")
def test_switch_linear_triton_compiles_for_hopper():
    pytest.importorskip("triton", reason="the GPU path needs the package triton")
    from triton_places import compile_for_hopper

    results = compile_for_hopper("switch")
    assert [(one["element"], one["phase"]) for one in results] == [
        ("*bf16", 0),
        ("*bf16", 1),
        ("*bf16", 2),
        ("*fp32", 1),
    ]
    for one in results:
        assert one["machine"] > 0
        assert one["shared"] <= 227 * 1024
        assert (one["tensor_cores"] > 0) == (one["element"] == "*bf16")
        assert (
            (one["acquire"] > 0) == (one["release"] > 0) == (one["phase"] == 0)
        )  # who waits in two launches waits for ever

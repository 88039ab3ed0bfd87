"""The mixture of experts in plain torch: values, gradients, and what it refuses."""

import math
import re
import subprocess
import sys

import pytest
import torch
from expert_inputs import DTYPES, SHAPES, assert_rounded_alike, layer_of, strided

from llmrl_kernels import (
    routed_expand,
    routed_expand_reference,
    routed_lora,
    routed_lora_reference,
    routed_shrink,
    routed_shrink_reference,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrink_and_expand_match_reference(shape, dtype):
    one = layer_of(shape, dtype)
    u, h = routed_shrink(strided(one.x), one.A, one.gates)
    expected_u, expected_h = routed_shrink_reference(one.x, one.A, one.gates)
    assert_rounded_alike(u, expected_u)
    assert_rounded_alike(h, expected_h)
    for base in (None, one.base):
        y = routed_expand(u, one.B, scale=0.7, base=base)
        assert_rounded_alike(y, routed_expand_reference(u, one.B, scale=0.7, base=base))


def test_routed_lora_is_the_sum_over_the_chosen_experts():
    one = layer_of((5, 7, 6, 4, 3, 2)).moved(torch.Tensor.double)
    y = routed_lora(one.x, one.A, one.B, one.gates, 0.5, base=one.base)
    for t in range(5):
        expected = one.base[t].clone()
        for e, g in zip(one.ids[t].tolist(), one.weights[t].tolist(), strict=True):
            expected += 0.5 * g * (one.B[:, 3 * e : 3 * e + 3] @ (one.A[e] @ one.x[t]))
        torch.testing.assert_close(y[t], expected)


def test_gate_is_applied_before_rounding():
    """257 * 127/256 = 127.496 is 127.5 in bfloat16; of h, which is 256 there, it would be 127."""
    x, A = torch.ones(1, 257, dtype=torch.bfloat16), torch.ones(1, 1, 257, dtype=torch.bfloat16)
    u, h = routed_shrink(x, A, torch.tensor([[127 / 256]]))
    assert h.item() == 256.0
    assert u.item() == 127.5


def test_token_without_expert_keeps_its_base():
    one = layer_of((17, 40, 24, 3, 4, 2), torch.bfloat16)
    assert one.gates[-1].eq(0).all()
    y = routed_lora(one.x, one.A, one.B, one.gates, 2.0, base=one.base)
    assert y[-1].equal(one.base[-1])
    assert not y[0].equal(one.base[0])
    assert routed_lora(one.x, one.A, one.B, one.gates, 2.0)[-1].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_expert_that_is_not_chosen_may_hold_anything(bad):
    one = layer_of((4, 8, 6, 3, 2, 1))
    gates = torch.zeros(4, 3)
    gates[:3, 0], gates[3, 1] = 1.0, 1.0
    clean = routed_lora(one.x, one.A, one.B, gates, 1.0)
    one.A[1] = bad
    y = routed_lora(one.x, one.A, one.B, gates, 1.0)
    assert y[:3].equal(clean[:3])
    assert not y[3].isfinite().any()
    assert routed_lora_reference(one.x, one.A, one.B, gates, 1.0)[:3].isfinite().all()


def test_layers_packed_as_one_are_the_layers():
    one = layer_of((5, 7, 9, 4, 3, 2)).moved(torch.Tensor.double)
    A, gates = torch.cat([one.A, 2 * one.A, one.A + 1]), one.gates.repeat(1, 3)
    packed = routed_lora(one.x, A, one.B, gates, 0.5, base=one.base, slices=(4, 2, 3))
    alone = [routed_lora(one.x, a, b, one.gates, 0.5) for a, b in zip(A.split(4), one.B.split((4, 2, 3)), strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, 1) + one.base)
    u, _ = routed_shrink(one.x, A, gates, partial=True)
    assert packed.equal(routed_expand(u, one.B, scale=0.5, base=one.base, slices=(4, 2, 3)))


def test_expand_adds_the_parts_of_a_split_shrink():
    one = layer_of((5, 7, 9, 4, 3, 2), torch.bfloat16)
    u = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2))
    y = routed_expand(u, one.B, scale=0.5, base=one.base)
    assert y.equal(routed_expand(u.sum(0).bfloat16(), one.B, scale=0.5, base=one.base))
    with pytest.raises(TypeError, match=r"u: expected parts \[S, T, E\*r\] in float32, got torch.bfloat16"):
        routed_expand(u.bfloat16(), one.B, scale=0.5)
    with pytest.raises(TypeError, match=r"base: expected .*, the dtype of B"):
        routed_expand(u, one.B, scale=0.5, base=one.base.float())


def double_inputs():
    one = layer_of((3, 5, 4, 3, 2, 2)).moved(torch.Tensor.double)
    return [part.requires_grad_() for part in (one.x, one.A, one.B, one.gates.double(), one.base)]


def test_gradients_in_float64():
    """A row of gates is 0 throughout, and other gates are: their gradient is that of any gate."""
    x, A, B, gates, base = double_inputs()
    assert gates[-1].eq(0).all()

    def mixture(x, A, B, gates, base):
        return routed_lora(x, A, B, gates, 0.7, base=base)

    assert torch.autograd.gradcheck(mixture, (x, A, B, gates, base))
    assert torch.autograd.gradcheck(lambda *parts: routed_lora(*parts, 0.7), (x, A, B, gates))
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)
    ours, theirs = (
        torch.autograd.grad((form(x, A, B, gates, 0.7, base=base) * weights).sum(), (x, A, B, gates, base))
        for form in (routed_lora, routed_lora_reference)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_in_shorter_dtypes(dtype):
    one = layer_of((17, 40, 24, 5, 4, 2), dtype)
    slope = torch.randn(17, 24, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(form, parts):
        leaves = [part.clone().requires_grad_() for part in parts]
        return torch.autograd.grad(form(*leaves[:4], 0.7, base=leaves[4]), leaves, slope.to(leaves[4].dtype))

    parts = (one.x, one.A, one.B, one.gates, one.base)
    ours = gradients(routed_lora, parts)
    theirs = gradients(routed_lora_reference, [part.double() for part in parts])
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for a, b, part in zip(ours, theirs, parts, strict=True):
        assert a.dtype == part.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_gradients_go_only_where_they_are_asked_for():
    one = layer_of((5, 7, 6, 3, 2, 1))
    A = one.A.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        shapes = []
        y = routed_lora(one.x, A, one.B, one.gates, 1.0, base=one.base)
    y.sum().backward()
    assert A.grad.abs().sum() > 0
    assert sorted(shapes) == sorted([(5, 7), (3, 2, 7), (6, 6), (5, 3)])  # x, A, B, gates; h is of no use to A
    assert not routed_lora(one.x, one.A, one.B, one.gates, 1.0).requires_grad


def test_products_of_experts_are_not_kept():
    x, A, B, gates, base = double_inputs()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        routed_lora(x, A, B, gates, 1.0, base=base)
    assert sorted(shapes) == sorted(map(tuple, (x.shape, A.shape, B.shape, gates.shape, (3, 6))))


def test_second_derivative_is_refused():
    x, A, B, gates, _ = double_inputs()
    (slope,) = torch.autograd.grad(routed_lora(x, A, B, gates, 1.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_takes_leading_dimensions_and_any_strides():
    one = layer_of((12, 8, 6, 3, 4, 2))
    flat = routed_lora(one.x, one.A, one.B, one.gates, 0.5, base=one.base)
    batch = routed_lora(
        strided(one.x.view(3, 4, 8)), one.A, strided(one.B), one.gates.view(3, 4, 3), 0.5, base=one.base.view(3, 4, 6)
    )
    assert batch.shape == (3, 4, 6)
    torch.testing.assert_close(batch.flatten(0, 1), flat)
    torch.testing.assert_close(routed_lora(one.x[0], one.A, one.B, one.gates[0], 0.5, base=one.base[0]), flat[0])
    empty = routed_lora(one.x[:0].view(2, 0, 8), one.A, one.B, one.gates[:0].view(2, 0, 3), 0.5)
    assert empty.shape == (2, 0, 6)


def test_under_autocast():
    one = layer_of((12, 8, 6, 3, 4, 2))
    A, B = one.A.clone().requires_grad_(), one.B.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = routed_lora(one.x, A, B, one.gates.bfloat16(), 0.5, base=one.base)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert A.grad.dtype == B.grad.dtype == torch.float32
    short = one.moved(torch.Tensor.bfloat16)
    assert y.equal(routed_lora(short.x, short.A, short.B, one.gates.bfloat16().float(), 0.5, base=short.base))
    with torch.autocast("cpu", torch.bfloat16):
        x, A, B, gates, base = double_inputs()
        assert routed_lora(x, A, B, gates, 0.5, base=base).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    inputs = double_inputs()
    plain = torch.autograd.grad(twice(*inputs).square().sum(), inputs)
    y = torch.utils.checkpoint.checkpoint(twice, *inputs, use_reentrant=reentrant)
    y.square().sum().backward()
    for part, expected in zip(inputs, plain, strict=True):
        torch.testing.assert_close(part.grad, expected)


def twice(x, A, B, gates, base):
    y = routed_lora(x, A, B, gates, 0.5, base=base)
    return routed_lora(torch.cat([y, y[:, :1]], 1), A, B, gates, 0.5, base=y)


ONE = layer_of((4, 8, 6, 3, 2, 1))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"A": ONE.A[0]}, ValueError, "A: expected [E, r, in] with in = 8 as in x, got [2, 8]"),
        ({"A": ONE.A[..., :7]}, ValueError, "A: expected [E, r, in] with in = 8 as in x, got [3, 2, 7]"),
        ({"B": ONE.B[:, :5]}, ValueError, "B: expected [out, E*r] with E*r = 6, got [6, 5]"),
        (
            {"gates": ONE.gates[:, :2]},
            ValueError,
            "gates: expected [..., E], one a token of x and expert of A = [4, 3]",
        ),
        ({"base": ONE.base[:3]}, ValueError, "base: expected [..., out] = [4, 6], got [3, 6]"),
        ({"B": ONE.B.bfloat16()}, TypeError, "B: expected torch.float32, the dtype of x, got torch.bfloat16"),
        ({"base": ONE.base.double()}, TypeError, "base: expected torch.float32, the dtype of x, got torch.float64"),
        (
            {"gates": ONE.gates.half()},
            TypeError,
            "gates: expected float32, got torch.float16; cast it with gates.float()",
        ),
        ({"x": ONE.x.int()}, TypeError, "x: expected float32, bfloat16, float16 or float64, got torch.int32"),
        ({"A": ONE.A.to("meta")}, ValueError, "A: expected a tensor on cpu, the device of x, got meta"),
        ({"gates": ONE.gates.to("meta")}, ValueError, "gates: expected a tensor on cpu, the device of x, got meta"),
        ({"slices": (3, 3)}, ValueError, "B: expected [out, E*r] with 2*E*r = 6, got [6, 6]"),
        (
            {"B": ONE.B[:, :3], "slices": (3, 2)},
            ValueError,
            "slices: expected positive rows of B that add up to 6, got",
        ),
        (
            {"B": ONE.B[:, :3], "slices": (6, 0)},
            ValueError,
            "slices: expected positive rows of B that add up to 6, got",
        ),
        ({"A": ONE.A.clone().requires_grad_(), "slices": (6,)}, ValueError, "slices: expected tensors that ask for no"),
        ({"backend": "cuda"}, ValueError, "backend: expected 'auto', 'torch' or 'triton', got 'cuda'"),
    ],
)
def test_refuses_what_does_not_fit(changes, error, words):
    inputs = {"x": ONE.x, "A": ONE.A, "B": ONE.B, "gates": ONE.gates, "scale": 1.0, "base": ONE.base} | changes
    with pytest.raises(error, match=re.escape(words)):
        routed_lora(**inputs)


def test_kernel_needs_a_gpu_and_a_dtype_it_knows(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend 'triton' runs on a GPU, got tensors on cpu"):
        routed_shrink(ONE.x, ONE.A, ONE.gates, backend="triton")
    one = ONE.moved(torch.Tensor.double)
    with pytest.raises(ValueError, match=r"needs the package triton and .* got torch.float64"):
        routed_expand(one.base, one.B, scale=1.0, backend="triton")


def test_package_is_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; import llmrl_kernels as k; print(len(k.__all__), k.routed_lora.__name__)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.endswith("routed_lora\n"), ended.stderr


def test_halves_refuse_a_gradient():
    x = ONE.x.clone().requires_grad_()
    with pytest.raises(ValueError, match="routed_shrink has no gradient"):
        routed_shrink(x, ONE.A, ONE.gates)
    with torch.no_grad():
        u, _ = routed_shrink(x, ONE.A, ONE.gates)
    with pytest.raises(ValueError, match="routed_expand has no gradient"):
        routed_expand(u, ONE.B.clone().requires_grad_(), scale=1.0)

"""The kernels of the mixture against the references. Run by `test_routed_lora_triton.py` in a process of its own."""

import math

import pytest
import torch
from expert_inputs import DTYPES, SHAPES, assert_rounded_alike, layer_of, strided

from llmrl_kernels import (
    routed_expand,
    routed_expand_gathered,
    routed_expand_gathered_reference,
    routed_expand_reference,
    routed_lora,
    routed_lora_reference,
    routed_shrink,
    routed_shrink_gathered,
    routed_shrink_gathered_reference,
    routed_shrink_reference,
)
from llmrl_kernels.routed_gathered_triton import expand_gathered, shrink_gathered
from llmrl_kernels.triton_parts import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
CASES = [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[1], torch.bfloat16), (SHAPES[3], torch.float16)]


def layer(shape, dtype=torch.float32, **options):
    one = layer_of(shape, dtype, **options)
    return type(one)(**{name: part.to(DEVICE) for name, part in vars(one).items()})


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_dense_form_matches_reference(shape, dtype):
    one = layer(shape, dtype)
    u, h = routed_shrink(strided(one.x), one.A, strided(one.gates), backend="triton")
    expected_u, expected_h = routed_shrink_reference(one.x, one.A, one.gates)
    assert_rounded_alike(u, expected_u)
    assert_rounded_alike(h, expected_h)
    y = routed_expand(u, strided(one.B), scale=0.7, base=strided(one.base), backend="triton")
    assert_rounded_alike(y, routed_expand_reference(u, one.B, scale=0.7, base=one.base))


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_gathered_forms_match_reference(shape, dtype, few):
    one = layer((min(shape[0], 5), *shape[1:]) if few else shape, dtype)
    u, h = shrink_gathered(strided(one.x), one.A, one.ids, one.weights, few)
    expected_u, expected_h = routed_shrink_gathered_reference(one.x, one.A, one.ids, one.weights)
    assert_rounded_alike(u, expected_u)
    assert_rounded_alike(h, expected_h)
    y = expand_gathered(u, one.B, one.ids, 0.7, strided(one.base), few)
    assert_rounded_alike(y, routed_expand_gathered_reference(u, one.B, one.ids, scale=0.7, base=one.base))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paths_agree_bit_for_bit_where_sums_are_exact(dtype):
    """And the results are not exact in bfloat16, so that the rounding is held to as well."""
    one = layer((17, 40, 24, 3, 8, 2), dtype, exact=True)
    u, h = routed_shrink(one.x, one.A, one.gates, backend="triton")
    y = routed_expand(u, one.B, scale=0.5, base=one.base, backend="triton")
    chosen, alone = routed_shrink_gathered(one.x, one.A, one.ids, one.weights, backend="triton")
    z = routed_expand_gathered(chosen, one.B, one.ids, scale=0.5, base=one.base, backend="triton")
    other_u, other_h = routed_shrink(one.x, one.A, one.gates, backend="torch")
    assert u.equal(other_u)
    assert h.equal(other_h)
    assert y.equal(routed_expand(u, one.B, scale=0.5, base=one.base, backend="torch"))
    for ours, theirs in zip(
        (chosen, alone), routed_shrink_gathered(one.x, one.A, one.ids, one.weights, backend="torch"), strict=True
    ):
        assert ours.equal(theirs)
    assert z.equal(y)
    whole = routed_expand(u.float(), one.B.float(), scale=0.5, base=one.base.float(), backend="torch")
    if dtype == torch.bfloat16:
        assert not y.float().equal(whole)


def test_without_a_base():
    one = layer((17, 40, 24, 3, 8, 2))
    u, _ = routed_shrink(one.x, one.A, one.gates, backend="triton")
    assert_rounded_alike(
        routed_expand(u, one.B, scale=0.7, backend="triton"), routed_expand_reference(u, one.B, scale=0.7)
    )
    chosen, _ = routed_shrink_gathered(one.x, one.A, one.ids, one.weights, backend="triton")
    expected = routed_expand_gathered_reference(chosen, one.B, one.ids, scale=0.7)
    for few in (True, False):
        assert_rounded_alike(expand_gathered(chosen, one.B, one.ids, 0.7, None, few), expected)


def test_experts_that_are_not_chosen_may_hold_nan():
    one = layer((20, 40, 24, 3, 4, 1))
    ids, weights = torch.zeros(20, 1, dtype=torch.int32, device=DEVICE), torch.ones(20, 1, device=DEVICE)
    ids[3], ids[5], weights[5] = 1, 2, 0.0
    gates = torch.zeros(20, 3, device=DEVICE).scatter(1, ids.long(), weights)
    one.A[1:] = math.nan
    u, _ = routed_shrink(one.x, one.A, gates, backend="triton")
    bad = torch.arange(20, device=DEVICE) == 3
    assert u.isnan().any(1).equal(bad)
    one.B[:, 4:8] = math.nan
    for few in (True, False):
        u, _ = shrink_gathered(one.x, one.A, ids, weights, few)
        assert u.isnan().any(2)[:, 0].equal(bad)
        assert expand_gathered(u, one.B, ids, 1.0, None, few).isnan().any(1).equal(bad)


@pytest.mark.parametrize(("tokens", "few"), [(4, True), (18, False)])
def test_id_out_of_range_is_seen_in_its_row_alone(tokens, few):
    one = layer((tokens, 40, 24, 3, 4, 2))
    clean, _ = shrink_gathered(one.x, one.A, one.ids, one.weights, few)
    expected = expand_gathered(clean, one.B, one.ids, 1.0, None, few)
    for wrong in (3, -1):
        ids = one.ids.clone()
        ids[1, 1], ids[-1, 0] = wrong, wrong  # the last token's weights are 0
        u, _ = shrink_gathered(one.x, one.A, ids, one.weights, few)
        assert u[1, 1].isnan().all()
        assert u[-1, 0].isnan().all()
        assert u[1, 0].equal(clean[1, 0])
        y = expand_gathered(clean, one.B, ids, 1.0, None, few)
        bad = torch.zeros(tokens, dtype=torch.bool, device=DEVICE)
        bad[[1, -1]] = True
        assert y.isnan().all(1).equal(bad)
        torch.testing.assert_close(y[~bad], expected[~bad])


def test_gradients_are_those_of_the_reference():
    one = layer((17, 40, 24, 3, 4, 2))
    slope = torch.randn(17, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def gradients(form, **options):
        leaves = [part.clone().requires_grad_() for part in (one.x, one.A, one.B, one.gates, one.base)]
        y = form(*leaves[:4], 0.7, base=leaves[4], **options)
        return y, torch.autograd.grad(y, leaves, slope)

    y, ours = gradients(routed_lora, backend="triton")
    expected, theirs = gradients(routed_lora_reference)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_tokens():
    one = layer((2, 40, 24, 3, 4, 2))
    u, _ = routed_shrink(one.x[:0], one.A, one.gates[:0], backend="triton")
    assert routed_expand(u, one.B, scale=1.0, backend="triton").shape == (0, 24)
    u, _ = routed_shrink_gathered(one.x[:0], one.A, one.ids[:0], one.weights[:0], backend="triton")
    assert routed_expand_gathered(u, one.B, one.ids[:0], scale=1.0, backend="triton").shape == (0, 24)


def test_is_chosen_on_a_gpu_and_not_on_a_cpu():
    one = layer((3, 65, 24, 3, 4, 2))
    u, _ = routed_shrink(one.x, one.A, one.gates)
    named, _ = routed_shrink(one.x, one.A, one.gates, backend="torch" if INTERPRETED else "triton")
    assert u.equal(named)

"""The kernels of the mixture against the references. Run by `test_routed_lora_triton.py` in a process of its own."""

import math

import pytest
import torch
from expert_inputs import DTYPES, SHAPES, assert_rounded_alike, layer_of, strided

from llmrl_kernels import (
    block_sizes,
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
from llmrl_kernels.routed_lora_triton import shrink
from llmrl_kernels.triton_parts import INTERPRETED
from llmrl_kernels.tuning import force_sizes

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


def split_into(parts, tokens=1):
    """Have the shrink split its sums, whatever the rule says."""
    sizes = block_sizes("routed_shrink", tokens=tokens, device=torch.device(DEVICE))
    return force_sizes("routed_shrink", sizes | {"BLOCK_K": 64, "SPLIT": parts})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("width", "wanted", "parts"),
    [(333, 2, 2), (333, 5, 3), (333, 16, 6), (320, 4, 3), (40, 8, 1)],  # of 6, 6, 6, 5 and 1 blocks of 64 inputs
)
def test_split_sums_match_reference(width, wanted, parts, dtype):
    one = layer((3, width, 24, 3, 20, 2), dtype)
    expected_u, expected_h = routed_shrink_reference(one.x, one.A, one.gates)
    with split_into(wanted):
        split, none = routed_shrink(strided(one.x), one.A, strided(one.gates), partial=True, backend="triton")
        u, h = routed_shrink(one.x, one.A, one.gates, backend="triton")
        assert none is None
        assert split.shape == ((parts, 3, 60) if parts > 1 else (3, 60))
        assert split.dtype == (torch.float32 if parts > 1 else dtype)
        assert_rounded_alike(u, expected_u)
        assert_rounded_alike(h, expected_h)
        fused = routed_lora(one.x, one.A, one.B, one.gates, 0.7, base=one.base, backend="triton")
    assert_rounded_alike(fused, routed_expand_reference(u, one.B, scale=0.7, base=one.base))
    for form in (split, u):  # the parts are added in one order wherever that happens
        y = routed_expand(form, one.B, scale=0.7, base=one.base, backend="triton")
        assert y.equal(fused)
    if parts > 1:
        slow = routed_expand(split, one.B, scale=0.7, base=one.base, backend="torch")
        assert_rounded_alike(slow, fused)


@pytest.mark.parametrize("parts", [1, 4])
def test_bits_repeat_and_do_not_depend_on_the_batch(parts):
    one = layer((16, 333, 24, 3, 8, 2), torch.bfloat16)
    options = {"scale": 0.7, "backend": "triton"}
    with split_into(parts):
        whole = routed_lora(one.x, one.A, one.B, one.gates, base=one.base, **options)
        assert whole.equal(routed_lora(one.x, one.A, one.B, one.gates, base=one.base, **options))
        for first, last in ((0, 1), (3, 5), (9, 16)):
            some = slice(first, last)
            y = routed_lora(one.x[some], one.A, one.B, one.gates[some], base=one.base[some], **options)
            assert y.equal(whole[some])


def test_split_sums_in_training_are_those_of_inference():
    one = layer((3, 333, 24, 3, 8, 2), torch.bfloat16)
    A = one.A.clone().requires_grad_()
    with split_into(4):
        y = routed_lora(one.x, A, one.B, one.gates.requires_grad_(), 0.7, backend="triton")
        with torch.no_grad():
            assert y.equal(routed_lora(one.x, A, one.B, one.gates, 0.7, backend="triton"))


def test_split_sums_leave_out_experts_that_are_not_chosen():
    one = layer((2, 333, 24, 3, 4, 1))
    gates = torch.eye(3, device=DEVICE)[:2]
    one.A[1] = math.nan
    with split_into(3):
        y = routed_lora(one.x, one.A, one.B, gates, 1.0, backend="triton")
        assert shrink(one.x, one.A, gates, keep_h=False, partial=True)[0].shape == (3, 2, 12)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("slices", [(100, 20, 9), (64, 1, 64), (65, 64), (1, 128), (129,), ()], ids=str)
def test_layers_packed_as_one_read_their_own_columns(slices, parts):
    one, count = layer((5, 150, 129, 3, 20, 2)), len(slices) or 1
    A = torch.cat([one.A * (i + 1) for i in range(count)])
    gates = one.gates.repeat(1, count)
    with split_into(parts):
        y = routed_lora(one.x, A, strided(one.B), gates, 0.7, base=one.base, slices=slices, backend="triton")
    own = one.B.split(slices or (129,))
    expected = [routed_lora_reference(one.x, one.A * (i + 1), b, one.gates, 0.7) for i, b in enumerate(own)]
    assert_rounded_alike(y, torch.cat(expected, 1) + one.base)


def test_layers_packed_as_one_never_read_the_others():
    one = layer((2, 40, 48, 3, 4, 1))
    A, gates = torch.cat([one.A, torch.full_like(one.A, math.nan)]), one.gates.repeat(1, 2)
    y = routed_lora(one.x, A, one.B, gates, 0.7, slices=(20, 28), backend="triton")
    assert y[:, :20].isfinite().all()
    assert y[:, 20:].isnan().all()

"""The merge in plain torch: values, no drift, when it writes nothing, and what it refuses."""

import math
import re
from dataclasses import replace

import pytest
import torch
from expert_inputs import DTYPES, assert_rounded_alike, bits
from merge_inputs import merge_items, routes

from llmrl_kernels import MergeItem, MergePlan, merge_all, merge_all_reference, merge_snr, subtract_and_add
from llmrl_kernels.merge_all import InPlacePlan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (3, 2), (5, 3)])
def test_merge_matches_reference(experts, k, dtype):
    items = merge_items(experts, dtype)
    plan = MergePlan(items, top_k=k, scale=0.3)
    for ids, weights in routes(3, experts, k):
        plan.merge(ids, weights)
        for item, expected in zip(items, merge_all_reference(items, ids, weights, 0.3), strict=True):
            assert_rounded_alike(item.out, expected)


def test_merge_by_hand():
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    A = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # expert 0 reads the first feature, expert 1 the second
    B = torch.tensor([[10.0, 1.0], [20.0, 2.0]])  # column e
    item = MergeItem(base, torch.empty(2, 2), A, B)
    MergePlan([item], top_k=1, scale=2.0).merge([1], [0.5])
    assert item.out.tolist() == [[1.0, 3.0], [3.0, 6.0]]
    assert base.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_merge_rounds_once_into_the_dtype_of_out():
    base, A, B = torch.full((1, 1), 1.0), torch.ones(2, 1, 1), torch.ones(1, 2)
    item = MergeItem(base, torch.empty(1, 1, dtype=torch.bfloat16), A, B)
    half_unit = 2.0**-8  # of a bfloat16 next to 1: each alone is rounded away, both together are one unit
    MergePlan([item], top_k=2, scale=1.0).merge([0, 1], [half_unit, half_unit])
    assert item.out.item() == 1.0 + 2.0**-7


def test_chunks_do_not_show(monkeypatch):
    items = merge_items()
    MergePlan(items, top_k=2, scale=0.3).merge([4, 1], [0.5, 0.25])
    whole = [item.out.clone() for item in items]
    monkeypatch.setattr(merge_all, "CHUNK_ELEMENTS", 100)
    MergePlan(items, top_k=2, scale=0.3).merge([4, 1], [0.5, 0.25])
    for item, expected in zip(items, whole, strict=True):
        torch.testing.assert_close(item.out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_switches_leave_nothing_behind(dtype):
    """The update in place, by the same routes, does not come back: so this test can fail."""
    items = merge_items(4, dtype, layers=((24, 40, 4),))
    in_place = [replace(item, out=item.base.clone()) for item in items]
    plan = MergePlan(items, top_k=2, scale=0.1)
    before = None
    for ids, weights in routes(1000, 4, 2):
        plan.merge(ids, weights)
        subtract_and_add(in_place, before, (ids, weights), scale=0.1)
        before = (ids, weights)
    assert not items[0].out.equal(items[0].base)
    plan.merge([0, 1], [0.0, 0.0])
    subtract_and_add(in_place, before, None, scale=0.1)
    assert bits(items[0].base).eq(bits(torch.tensor(-0.0, dtype=dtype))).any()
    assert bits(items[0].out).equal(bits(items[0].base))
    assert not in_place[0].out.equal(items[0].base)
    drift = (in_place[0].out.double() - items[0].base.double()).norm() / items[0].base.double().norm()
    assert drift > {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-7}[dtype]


def test_subtract_and_add_is_a_merge_at_first():
    items = merge_items()
    MergePlan(items, top_k=2, scale=0.3).merge([4, 1], [0.5, 0.25])
    in_place = [replace(item, out=item.base.clone()) for item in items]
    subtract_and_add(in_place, None, ([0, 2], [1.0, 1.0]), scale=0.3)
    subtract_and_add(in_place, ([0, 2], [1.0, 1.0]), ([4, 1], [0.5, 0.25]), scale=0.3)
    for item, other in zip(items, in_place, strict=True):
        torch.testing.assert_close(other.out, item.out, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"ids: expected 0 to 4, one of 5 experts, got 5"):
        subtract_and_add(items, None, ([5], [1.0]), scale=1.0)


def test_subtract_and_add_does_not_read_an_expert_that_weighs_nothing():
    items = [replace(item, out=item.base.clone()) for item in merge_items(3)]
    for item in items:
        item.A[1] = math.nan
    subtract_and_add(items, ([1], [0.0]), ([0, 1], [0.5, 0.0]), scale=0.3)
    for item, expected in zip(items, merge_all_reference(items, [0], [0.5], 0.3), strict=True):
        torch.testing.assert_close(item.out, expected, rtol=1e-5, atol=1e-5)


def test_in_place_plan_takes_the_last_route_out_and_puts_the_next_in():
    items = [replace(item, out=item.base) for item in merge_items(3, exact=True)]
    clean = [replace(item, base=item.base.clone()) for item in items]
    plan = InPlacePlan(items, top_k=2, scale=0.5)
    assert plan.held() is None
    for ids, weights in (([0, 2], [1.0, 0.5]), ([2, 1], [0.5, 0.0]), ([1, 1], [0.5, 0.5]), ([1, 1], [0.5, 0.5])):
        plan.merge(ids, weights)
        assert plan.held() == (ids, weights)
        for item, expected in zip(items, merge_all_reference(clean, ids, weights, 0.5), strict=True):
            assert item.out.equal(expected)
    plan.invalidate()
    assert plan.held() is None


def test_in_place_plan_refuses_a_base_beside_out():
    items = merge_items(3)
    with pytest.raises(ValueError, match=re.escape("items[0].out: expected base itself, to be updated in place")):
        InPlacePlan(items, top_k=1, scale=1.0)
    shared = [MergeItem(item.base, item.base, item.A, item.B) for item in items]
    with pytest.raises(ValueError, match=re.escape("items[0].out and items[2].out: expected an out with memory")):
        InPlacePlan([shared[0], shared[1], shared[0]], top_k=1, scale=1.0)


def test_the_same_route_writes_nothing_until_invalidate():
    items = merge_items(3)
    plan = MergePlan(items, top_k=2, scale=1.0)
    plan.merge([0, 2], [0.5, 0.5])
    merged = [item.out.clone() for item in items]
    for item in items:
        item.A.mul_(2.0)
        item.out[0, 0] = 7.0
    plan.merge(torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0.5, 0.5]))
    assert all(item.out[0, 0] == 7.0 for item in items)
    plan.invalidate()
    plan.merge([0, 2], [0.5, 0.5])
    for item, old in zip(items, merged, strict=True):
        torch.testing.assert_close(item.out - item.base, 2.0 * (old - item.base), rtol=1e-4, atol=1e-4)
    plan.merge([0, 2], [0.5, 0.25])
    assert not items[0].out.equal(merged[0])


def test_an_expert_that_is_not_chosen_or_weighs_nothing_may_hold_nan():
    items = merge_items(3)
    for item in items:
        item.A[1] = math.nan
    plan = MergePlan(items, top_k=2, scale=1.0)
    plan.merge([0, 1], [0.5, 0.0])
    assert all(item.out.isfinite().all() for item in items)
    plan.merge([0, 1], [0.5, 0.5])
    assert all(item.out.isnan().all() for item in items)


@pytest.mark.parametrize("wrong", [3, -1])
def test_an_id_out_of_range_is_refused_or_seen(wrong):
    items = merge_items(3)
    plan = MergePlan(items, top_k=2, scale=1.0)
    for ids in ([0, wrong], torch.tensor([0, wrong], dtype=torch.int32)):
        with pytest.raises(ValueError, match=rf"ids: expected 0 to 2, one of 3 experts, got {wrong}"):
            plan.merge(ids, [0.5, 0.5])
    plan.merge([0, wrong], [0.5, 0.0], check=False)
    assert all(item.out.isnan().all() for item in items)


ITEM = merge_items(3, layers=((4, 6, 2),))[0]
SPACE = torch.zeros(100)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"out": torch.zeros(6, 4)}, ValueError, "items[1].out: expected [M, N] as of base = [4, 6], got [6, 4]"),
        ({"A": torch.zeros(2, 2, 6)}, ValueError, "items[1].A: expected [E, r, N], E as in items[0], N as in base"),
        ({"B": torch.zeros(4, 5)}, ValueError, "items[1].B: expected [M, E*r] = [4, 6], got [4, 5]"),
        ({"base": torch.zeros(6, 4).T}, ValueError, "items[1].base: expected a contiguous tensor, got strides (1, 4)"),
        ({"base": torch.zeros(4)}, ValueError, "items[1].base and A: expected [M, N] and [E, r, N]"),
        (
            {"out": torch.zeros(4, 6).half()},
            TypeError,
            "items[1].out: expected torch.float32, the dtype of items[0].out",
        ),
        ({"B": torch.zeros(4, 6).half()}, TypeError, "items[1].B: expected torch.float32, the dtype of items[0].A"),
        ({"A": torch.zeros(3, 2, 6).double()}, TypeError, "items[1].A: expected float32, bfloat16 or float16"),
        ({"A": torch.zeros(3, 2, 6, device="meta")}, ValueError, "items[1].A: expected a tensor on cpu"),
        ({"out": ITEM.base}, ValueError, "items[0].base and items[1].out: expected an out with memory of its own"),
        ({"out": ITEM.out}, ValueError, "items[0].out and items[1].out: expected an out with memory of its own"),
        (
            {"base": SPACE[:24].view(4, 6), "out": SPACE[23:47].view(4, 6)},
            ValueError,
            "items[1].base and items[1].out: expected an out with memory of its own",
        ),
        (
            {"B": SPACE[23:47].view(4, 6), "out": SPACE[:24].view(4, 6)},
            ValueError,
            "items[1].out and items[1].B: expected an out with memory of its own",
        ),
    ],
)
def test_plan_refuses_what_does_not_fit(changes, error, words):
    other = replace(ITEM, out=torch.empty(4, 6))
    with pytest.raises(error, match=re.escape(words)):
        MergePlan([ITEM, replace(other, **changes)], top_k=1, scale=1.0)


def test_plan_allows_neighbours_and_a_base_that_two_share():
    first = replace(ITEM, base=SPACE[:24].view(4, 6), out=SPACE[24:48].view(4, 6))
    second = replace(ITEM, base=SPACE[:24].view(4, 6), out=SPACE[48:72].view(4, 6))
    MergePlan([first, second], top_k=1, scale=1.0)


@pytest.mark.parametrize(
    ("ids", "weights", "error", "words"),
    [
        ([0], [1.0], ValueError, "ids: expected [k] = [2], got [1]"),
        ([0, 1], [1.0], ValueError, "weights: expected [k] = [2], got [1]"),
        (torch.tensor([0, 1]), [1.0, 1.0], TypeError, "ids: expected int32, got torch.int64; cast them with ids.int()"),
        ([0, 1], torch.ones(2).half(), TypeError, "weights: expected float32, got torch.float16"),
        (torch.zeros(2, dtype=torch.int32, device="meta"), [1.0, 1.0], ValueError, "ids: expected a tensor on cpu"),
    ],
)
def test_merge_refuses_what_does_not_fit(ids, weights, error, words):
    with pytest.raises(error, match=re.escape(words)):
        MergePlan([ITEM], top_k=2, scale=1.0).merge(ids, weights)


def test_plan_needs_items_and_a_route():
    with pytest.raises(ValueError, match="items: expected at least one, got none"):
        MergePlan([], top_k=1, scale=1.0)
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        MergePlan([ITEM], top_k=0, scale=1.0)


def test_merge_snr():
    base = torch.ones(4, dtype=torch.bfloat16)
    unit = 2.0**-7  # of a bfloat16 in [1, 2)
    assert merge_snr(base, torch.full((4,), unit)) == math.inf
    assert merge_snr(base, torch.full((4,), unit / 4)) == 1.0  # all of it is lost
    assert merge_snr(base, torch.full((4,), 1.25 * unit)) == 5.0  # a quarter of a unit of 1.25
    with pytest.raises(ValueError, match=re.escape("delta: expected the shape of base = [4], got [3]")):
        merge_snr(base, torch.zeros(3))

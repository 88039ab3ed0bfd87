"""The merge's kernel against the reference. Run by `test_merge_all_triton.py` in a process of its own."""

import math
from dataclasses import replace

import pytest
import torch
from expert_inputs import DTYPES, assert_rounded_alike, bits
from merge_inputs import LAYERS, merge_items, routes

from llmrl_kernels import MergeItem, MergePlan, merge_all_reference, merge_all_triton, tuning
from llmrl_kernels.merge_all import InPlacePlan
from llmrl_kernels.triton_parts import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"


def items_and_plan(experts, k, dtype=torch.float32, scale=0.3, **options):
    items = merge_items(experts, dtype, device=DEVICE, **options)
    return items, MergePlan(items, top_k=k, scale=scale, backend="triton")


def on_device(ids, weights):
    return ids.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize(
    ("experts", "k", "dtype"),
    [(1, 1, torch.float32), (3, 2, torch.float16), (5, 3, torch.float32), (5, 3, torch.bfloat16)],
    ids=str,
)
def test_matches_reference(experts, k, dtype):
    items, plan = items_and_plan(experts, k, dtype)
    for ids, weights in routes(1, experts, k):
        plan.merge(*on_device(ids, weights))
        for item, expected in zip(items, merge_all_reference(items, ids, weights, 0.3), strict=True):
            assert_rounded_alike(item.out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_beyond_a_block(dtype):
    items, plan = items_and_plan(2, 1, dtype, layers=((20, 30, 70), (9, 40, 33)))
    plan.merge([1], [0.5])
    for item, expected in zip(items, merge_all_reference(items, [1], [0.5], 0.3), strict=True):
        assert_rounded_alike(item.out, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_every_tile_finds_its_item(count):
    """Each item is written, and by its own numbers: their sizes differ, and so do their experts."""
    layers = [LAYERS[i % len(LAYERS)] for i in (2, 3, 2, 0, 2, 2, 3, 2, 2)[:count]]
    items, plan = items_and_plan(2, 1, layers=layers)
    assert plan._launch.tiles == sum(-(-m // 32) * -(-n // 32) for m, n, _ in layers) or not INTERPRETED
    plan.merge([1], [0.5])
    for item, expected in zip(items, merge_all_reference(items, [1], [0.5], 0.3), strict=True):
        assert_rounded_alike(item.out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paths_agree_bit_for_bit_where_sums_are_exact(dtype):
    items, plan = items_and_plan(3, 2, dtype, scale=0.5, exact=True, layers=((40, 65, 4), (33, 24, 20)))
    other = [replace(item, out=torch.empty_like(item.out)) for item in items]
    plain = MergePlan(other, top_k=2, scale=0.5, backend="torch")
    for ids, weights in (([0, 2], [1.0, 0.5]), ([2, 1], [0.5, 0.0]), ([1, 1], [0.5, 0.5])):
        plan.merge(ids, weights)
        plain.merge(ids, weights)
        expected = merge_all_reference(items, ids, weights, 0.5)
        for ours, theirs, reference in zip(items, other, expected, strict=True):
            assert bits(ours.out).equal(bits(theirs.out))
            assert bits(ours.out).equal(bits(reference))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_switches_leave_nothing_behind(dtype):
    items, plan = items_and_plan(4, 2, dtype, layers=((20, 30, 4),))
    for ids, weights in routes(20, 4, 2):
        plan.merge(*on_device(ids, weights))
    assert not items[0].out.equal(items[0].base)
    plan.merge([0, 1], [0.0, 0.0])
    assert bits(items[0].base).eq(bits(torch.tensor(-0.0, dtype=dtype, device=DEVICE))).any()
    assert bits(items[0].out).equal(bits(items[0].base))


def test_out_in_another_dtype():
    items = [
        MergeItem(item.base, torch.empty_like(item.base, dtype=torch.bfloat16), item.A.half(), item.B.half())
        for item in merge_items(3, layers=LAYERS[:1], device=DEVICE)
    ]
    MergePlan(items, top_k=1, scale=0.3, backend="triton").merge([2], [0.5])
    assert_rounded_alike(items[0].out, merge_all_reference(items, [2], [0.5], 0.3)[0])


def test_float32_experts_into_a_bfloat16_base():
    """As a weight update has them: one rounding, of the sum."""
    items = [
        MergeItem(item.base.bfloat16(), item.out.bfloat16(), item.A, item.B)
        for item in merge_items(1, layers=LAYERS[:2], device=DEVICE)
    ]
    MergePlan(items, top_k=1, scale=1.0, backend="triton").merge([0], [1.0])
    for item, expected in zip(items, merge_all_reference(items, [0], [1.0], 1.0), strict=True):
        assert_rounded_alike(item.out, expected)


def test_tiles_are_kept_by_rank_route_and_both_dtypes(monkeypatch):
    keys, sizes = [], merge_all_triton.block_sizes
    found = lambda op, *key, **rest: keys.append(tuning.entry_key(op, *key)) or sizes(op, *key, **rest)  # noqa: E731
    monkeypatch.setattr(merge_all_triton, "block_sizes", found)
    item = merge_items(3, layers=((4, 6, 16),), device=DEVICE)[0]
    half = replace(item, base=item.base.bfloat16(), out=item.out.bfloat16())
    MergePlan([half], top_k=2, scale=1.0, backend="triton")
    MergePlan([replace(half, A=item.A.bfloat16(), B=item.B.bfloat16())], top_k=1, scale=1.0, backend="triton")
    assert keys == ["merge_all/16/2/float32/bfloat16", "merge_all/16/1/bfloat16/bfloat16"]


def in_place_plan(experts, k, dtype=torch.float32, **options):
    items = [replace(one, out=one.base) for one in merge_items(experts, dtype, device=DEVICE, **options)]
    return items, [one.base.clone() for one in items], InPlacePlan(items, top_k=k, scale=0.5, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_takes_the_last_route_out_and_puts_the_next_in(dtype):
    """Sums that any dtype holds leave no drift: after any routes W is what a merge from the clean base writes."""
    items, clean, plan = in_place_plan(3, 2, dtype, exact=True, layers=((40, 65, 4), (33, 24, 3)))
    assert plan.held() is None
    for ids, weights in (([0, 2], [1.0, 0.5]), ([2, 1], [0.5, 0.0]), ([1, 1], [0.5, 0.5]), ([1, 1], [0.5, 0.5])):
        plan.merge(ids, weights)
        assert plan.held() == (ids, weights)
        from_clean = [replace(item, base=base) for item, base in zip(items, clean, strict=True)]
        for item, expected in zip(items, merge_all_reference(from_clean, ids, weights, 0.5), strict=True):
            assert item.out.equal(expected)


def test_in_place_drifts_as_a_baseline_should():
    items, clean, plan = in_place_plan(4, 2, torch.bfloat16, layers=((20, 30, 4),))
    for ids, weights in routes(10, 4, 2):
        plan.merge(*on_device(ids, weights))
    plan.merge([0, 1], [0.0, 0.0])
    assert not items[0].out.equal(clean[0])
    torch.testing.assert_close(items[0].out, clean[0], rtol=0.1, atol=0.1)
    plan.invalidate()
    assert plan.held() is None


def test_nan_of_any_kind_stays_nan_and_infinity_infinite():
    """Rounding by adding to the bits would carry the largest NaN over into the sign."""
    numbers = torch.tensor([[0x7FFFFFFF, 0x7F800001, -1, 0x7F800000, 0x7F7FFFFF]], dtype=torch.int32).view(
        torch.float32
    )
    base = numbers.to(DEVICE)
    A, B = torch.zeros(1, 1, 5, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    item = MergeItem(base, torch.zeros(1, 5, dtype=torch.bfloat16, device=DEVICE), A, B)
    MergePlan([item], top_k=1, scale=1.0, backend="triton").merge([0], [1.0])
    assert item.out.isnan().tolist() == [[True, True, True, False, False]]
    assert item.out[0, 3:].tolist() == [math.inf, math.inf]


def test_a_tensor_that_moved_is_noticed():
    items, plan = items_and_plan(1, 1, layers=LAYERS[2:3])
    plan.merge([0], [0.5])
    items[0].out.data = torch.empty_like(items[0].out)
    with pytest.raises(ValueError, match="items: expected tensors where they were, got one that moved"):
        plan.merge([0], [0.5])


def test_the_same_route_writes_nothing_until_invalidate():
    items, plan = items_and_plan(3, 2, layers=LAYERS[:2])
    assert plan._launch.programs < plan._launch.tiles  # so that a program has several, and each keeps its own mark
    plan.merge([0, 2], [0.5, 0.5])
    merged = [item.out.clone() for item in items]
    for item in items:
        item.A.mul_(2.0)
        item.out.fill_(7.0)
    plan.merge([0, 2], [0.5, 0.5])
    assert all(item.out.eq(7.0).all() for item in items)
    plan.invalidate()
    plan.merge([0, 2], [0.5, 0.5])
    for item, old in zip(items, merged, strict=True):
        torch.testing.assert_close(item.out - item.base, 2.0 * (old - item.base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ids", "weights"), [([0, 1], [0.5, 0.5]), ([0, 2], [0.5, 0.25]), ([2, 0], [0.25, 0.5])])
def test_any_part_of_a_route_that_changes_is_seen(ids, weights):
    items, plan = items_and_plan(3, 2, layers=LAYERS[:1])
    plan.merge([0, 2], [0.5, 0.5])
    plan.merge(ids, weights)
    assert_rounded_alike(items[0].out, merge_all_reference(items, ids, weights, 0.3)[0])


def test_an_expert_that_is_not_chosen_or_weighs_nothing_may_hold_nan():
    items, plan = items_and_plan(3, 2, layers=LAYERS[:2])
    for item in items:
        item.A[1] = math.nan
    plan.merge([0, 1], [0.5, 0.0])
    assert all(item.out.isfinite().all() for item in items)
    plan.merge([0, 1], [0.5, 0.5])
    assert all(item.out.isnan().all() for item in items)


@pytest.mark.parametrize("wrong", [3, -1, 2**30])
def test_an_id_out_of_range_is_seen(wrong):
    items, plan = items_and_plan(3, 2, layers=LAYERS[1:3], dtype=torch.bfloat16)
    plan.merge([0, wrong], [0.5, 0.0], check=False)
    assert all(item.out.isnan().all() for item in items)
    with pytest.raises(ValueError, match=f"got {wrong}"):
        plan.merge(torch.tensor([0, wrong], dtype=torch.int32, device=DEVICE), [0.5, 0.0], check=True)


def test_more_programs_than_one_and_tiles_of_another_size():
    with tuning.force_sizes("merge_all", {"BLOCK_M": 16, "BLOCK_N": 64, "OCCUPANCY": 7}):
        items, plan = items_and_plan(2, 1, layers=LAYERS[:2])
    plan.merge([1], [0.5])
    for item, expected in zip(items, merge_all_reference(items, [1], [0.5], 0.3), strict=True):
        assert_rounded_alike(item.out, expected)


def test_is_replayed_in_a_graph_with_other_routes():
    """On a GPU; elsewhere two launches from the same buffers stand for it."""
    items, plan = items_and_plan(3, 2, layers=LAYERS[:2])
    ids, weights = on_device(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0.5, 0.5]))
    plan.merge(ids, weights, check=False)  # compiles
    replay = lambda: plan.merge(ids, weights, check=False)  # noqa: E731
    if not INTERPRETED:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.merge(ids, weights, check=False)
        replay = graph.replay
    for new_ids, new_weights in routes(2, 3, 2):
        ids.copy_(new_ids)
        weights.copy_(new_weights)
        replay()
        for item, expected in zip(items, merge_all_reference(items, new_ids, new_weights, 0.3), strict=True):
            assert_rounded_alike(item.out, expected)

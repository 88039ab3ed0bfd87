"""Runs the tests of the mixture's Triton kernels where they can run, and compiles them for a GPU."""

import sys

import pytest

pytest.importorskip("triton", reason="the GPU path needs the package triton")

import torch
from triton_places import PLACES, compile_for_hopper, run_cases

from llmrl_kernels.routed_gathered_triton import token_blocks


@pytest.mark.parametrize("where", PLACES)
def test_routed_lora_triton_matches_reference(where):
    run_cases("triton_routed_lora.py", where)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA comes with its Linux wheels")
def test_routed_lora_triton_compiles_for_hopper():
    results = compile_for_hopper("routed")
    assert len(results) == 16
    for one in results:
        assert one["machine"] > 0
        assert one["shared"] <= 227 * 1024  # what a block has on Hopper
        products = "_few_" not in one["kernel"] and one["kernel"] != "_reduce_kernel"  # those are sums
        assert (one["tensor_cores"] > 0) == (products and one["element"] == "*bf16"), one
        if products:
            assert one["narrow"] == 0, one


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "block"), [(1, 1, 1, 16), (17, 5, 3, 4), (40, 3, 2, 16), (9, 8, 2, 1)]
)
def test_token_blocks(tokens, experts, k, block):
    """Every token once a slot, in blocks of one expert, in a table whose length no route changes."""
    g = torch.Generator().manual_seed(0)
    random = torch.randint(0, experts, (tokens, k), generator=g)
    for ids in (random, torch.zeros_like(random), torch.full_like(random, experts + 3), random - 1):
        order, table = token_blocks(ids.int(), experts, block)
        assert order.is_contiguous()
        assert table.shape == (k, -(-tokens // block) + experts + 1, 3)
        for slot in range(k):
            seen = []
            for expert, first, last in table[slot].tolist():
                assert 0 <= last - first <= block
                members = order[slot, first:last].tolist()
                assert all(
                    ids[t, slot] == expert or (expert == experts and not 0 <= ids[t, slot] < experts) for t in members
                )
                seen += members
            assert sorted(seen) == list(range(tokens))

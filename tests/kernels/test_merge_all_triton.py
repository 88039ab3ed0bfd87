"""Runs the tests of the merge's Triton kernel where they can run, and compiles it for a GPU."""

import sys

import pytest

pytest.importorskip("triton", reason="the GPU path needs the package triton")

from triton_places import PLACES, compile_for_hopper, run_cases


@pytest.mark.parametrize("where", PLACES)
def test_merge_all_triton_matches_reference(where):
    run_cases("triton_merge_all.py", where)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA comes with its Linux wheels")
def test_merge_all_triton_compiles_for_hopper():
    half, single, update, in_place = compile_for_hopper("merge")
    for one in (half, single, update, in_place):  # float32 experts too: a weight update has no others
        assert one["tensor_cores"] > 0
        assert 0 < one["machine"] < 128 * 1024
        assert one["shared"] <= 227 * 1024 // 2  # two programs a processor
    assert (single["element"], update["element"]) == ("*fp32", "*fp32")
    assert half["narrow"] == in_place["narrow"] == 0  # base, A and B come 16 bytes at a time
    assert single["tensor_cores"] == 6 * half["tensor_cores"]  # half as deep, and three products of parts

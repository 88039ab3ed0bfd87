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
    half, single = compile_for_hopper("merge")
    assert half["tensor_cores"] > 0
    assert half["narrow"] == 0  # base, A and B come 16 bytes at a time
    for one in (half, single):
        assert one["machine"] > 0
        assert one["shared"] <= 227 * 1024 // 2  # two programs a processor

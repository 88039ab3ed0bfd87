"""Tile sizes: which table is read, what stands in for one, and the command that measures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmrl_kernels import block_sizes, tuning

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "tune_lora_switch.py"
GPU = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU called Acme X-1 whose table would lie in the folder returned."""
    monkeypatch.setattr(tuning, "TUNED_FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_device_name", lambda device: "Acme X-1")
    tuning._table.cache_clear()
    yield tmp_path
    tuning._table.cache_clear()


def test_defaults_where_nobody_measured(card):
    sizes = block_sizes("routed_expand", 128, 4096, torch.bfloat16, tokens=16, device=GPU)
    assert sizes == tuning.DEFAULTS["routed_expand"][0][1]
    assert block_sizes("routed_expand", tokens=17, device=GPU) == tuning.DEFAULTS["routed_expand"][1][1]
    sizes["BLOCK_T"] = 0
    assert block_sizes("routed_expand", tokens=16, device=GPU)["BLOCK_T"] == 16


def test_a_measured_entry_is_taken_for_its_key_alone(card):
    measured = {"BLOCK_T": 32, "BLOCK_O": 256, "BLOCK_R": 16, "num_warps": 8, "num_stages": 4}
    table = {"entries": {"routed_expand/64/128/4096/bfloat16": measured}}
    (card / "acme-x-1.json").write_text(json.dumps(table))
    for tokens in (33, 64):
        assert block_sizes("routed_expand", 128, 4096, torch.bfloat16, tokens=tokens, device=GPU) == measured
    default = tuning.DEFAULTS["routed_expand"][1][1]
    assert block_sizes("routed_expand", 128, 4096, torch.bfloat16, tokens=65, device=GPU) == default
    assert block_sizes("routed_expand", 128, 4096, torch.float16, tokens=64, device=GPU) == default


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"entries": []}',
        '{"entries": {"unknown/1": {}}}',
        '{"entries": {"merge_all/16/16/bfloat16": {"BLOCK_M": 128}}}',
        '{"entries": {"merge_all/1": {"BLOCK_M": 0, "BLOCK_N": 1, "OCCUPANCY": 1, "num_warps": 1, "num_stages": 1}}}',
    ],
)
def test_a_broken_table_is_named(card, text):
    (card / "acme-x-1.json").write_text(text)
    with pytest.raises(ValueError, match=r"acme-x-1.json: expected a table of tile sizes, got .*; write it anew"):
        block_sizes("merge_all", device=GPU)


def test_the_interpreter_has_tiles_of_its_own():
    assert block_sizes("merge_all", device=torch.device("cpu")) == tuning.INTERPRETER["merge_all"]
    for op, forms in tuning.DEFAULTS.items():
        launch = {"num_warps", "num_stages"}
        assert all(sizes.keys() == tuning.INTERPRETER[op].keys() | launch for _, sizes in forms)
    with pytest.raises(ValueError, match=r"op: expected one of routed_shrink, .*, got 'merge'"):
        block_sizes("merge")


@pytest.mark.parametrize(("tokens", "bucket"), [(0, 16), (1, 16), (16, 16), (17, 32), (1000, 1024), (9999, 4096)])
def test_token_bucket(tokens, bucket):
    assert tuning.token_bucket(tokens) == bucket


def test_forced_sizes_end_with_their_block():
    before = block_sizes("merge_all")
    with tuning.force_sizes("merge_all", {"BLOCK_M": 1}):
        with tuning.force_sizes("merge_all", {"BLOCK_M": 2}):
            assert block_sizes("merge_all") == {"BLOCK_M": 2}
        assert block_sizes("merge_all") == {"BLOCK_M": 1}
    assert block_sizes("merge_all") == before


def test_no_table_is_shipped():
    assert not tuning.TUNED_FOLDER.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure here")
def test_tune_lora_switch_needs_a_gpu():
    ended = subprocess.run([sys.executable, str(BENCH)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("llmrl: expected a GPU to measure tile sizes on, got a machine without CUDA")
    assert ended.stderr.count("\n") == 1


def test_tune_lora_switch_begins_with_the_default_and_tries_known_sizes():
    spec = importlib.util.spec_from_file_location("bench_tune_lora_switch", BENCH)
    bench = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, bench)
        spec.loader.exec_module(bench)
    assert bench.CANDIDATES.keys() == tuning.DEFAULTS.keys()
    for op in bench.CANDIDATES:
        found = list(bench.candidates(bench.Job(op, op, None), 16))
        assert found[0] == tuning.default_sizes(op, 16)
        assert all(sizes.keys() == found[0].keys() for sizes in found)
        fixed = bench.candidates(bench.Job(op, op, None, ("num_warps",)), 16)
        assert {sizes["num_warps"] for sizes in fixed} == {found[0]["num_warps"]}

"""Tile sizes: which table is read, what stands in for one, and the command that measures."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmrl.errors import UsageError
from llmrl.lora_switch.layer import RouteSlot, SharedInput, SwitchLinear
from llmrl.lora_switch.pack import pack
from llmrl_kernels import (
    MergeItem,
    MergePlan,
    block_sizes,
    routed_expand_gathered,
    routed_lora,
    routed_shrink_gathered,
    switch_linear,
    tuning,
)

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
        '{"entries": {"routed_shrink/1": {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}}}',
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


@pytest.fixture(scope="module")
def bench():
    """kernels/bench/tune_lora_switch.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("bench_tune_lora_switch", BENCH)
    bench = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, bench)  # dataclasses look their module up
        spec.loader.exec_module(bench)
        yield bench


def test_tune_lora_switch_begins_with_the_default_and_tries_known_sizes(bench):
    assert bench.CANDIDATES.keys() == tuning.DEFAULTS.keys()
    for op in bench.CANDIDATES:
        found = list(bench.candidates(bench.Job(op, op, None), 16))
        assert found[0] == tuning.default_sizes(op, 16)
        assert all(sizes.keys() == found[0].keys() for sizes in found)
        assert max(sizes.get("BLOCK_T", 0) for sizes in found) <= 16
        fixed = bench.candidates(bench.Job(op, op, None, ("num_warps",)), 16)
        assert {sizes["num_warps"] for sizes in fixed} == {found[0]["num_warps"]}


@pytest.mark.parametrize("shape", ["4096", "x4096", "4096x", "4096x0", "4096x4096+", "ax4096", "4096x4096x2"])
def test_tune_lora_switch_refuses_what_is_no_shape(bench, shape):
    with pytest.raises(UsageError, match="--shapes: expected in x out such as 4096x11008 or 4096x4096"):
        bench.TuneConfig(shapes=[shape])


class Ignored:
    """A kernel that launches nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


@pytest.fixture
def looked_up(monkeypatch):
    """The keys that the ops look up, as on a GPU and with nothing computed."""
    pytest.importorskip("triton", reason="the GPU path needs the package triton")
    from llmrl_kernels import merge_all_triton, routed_gathered_triton, routed_lora_triton, switch_linear_triton

    keys = set()

    def sizes(op, *key, tokens=1, device=None):
        keys.add(tuning.entry_key(op, tuning.token_bucket(tokens), *key))
        return tuning.default_sizes(op, tokens)

    for module in (merge_all_triton, routed_lora_triton, switch_linear_triton, routed_gathered_triton):
        monkeypatch.setattr(module, "block_sizes", sizes)
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Ignored())
    for module in ("routed_lora", "routed_gathered", "switch_linear"):  # the package has functions of these names
        found = importlib.import_module(f"llmrl_kernels.{module}")
        monkeypatch.setattr(found, "use_triton", lambda backend, tensor: True)
    monkeypatch.setattr(routed_lora_triton, "processors", lambda device: 132)
    return keys


def seven_billion(outs, width):
    """Layers of a 7B with experts, in memory that nobody writes."""
    options = {"device": "meta", "dtype": torch.bfloat16}
    slot = RouteSlot()
    layers = [SwitchLinear(torch.nn.Linear(width, out, bias=False, **options), 8, 16, 1.0, slot) for out in outs]
    return [layer.to_empty(device="cpu").requires_grad_(False).eval() for layer in layers]


@pytest.mark.parametrize("tokens", [1, 8, 17, 64, 500, 5000])
def test_tune_lora_switch_measures_what_layers_of_a_7b_look_up(bench, looked_up, tokens):
    x_of = lambda width: torch.empty(tokens, width, dtype=torch.bfloat16)  # noqa: E731
    gates = torch.zeros(tokens, 8)
    shapes = (((4096,) * 3, 4096), ((4096,), 4096), ((11008,) * 2, 4096), ((4096,), 11008))
    for outs, width in shapes:
        layers, x = seven_billion(outs, width), x_of(width)
        for layer in layers:  # each alone, as in training
            routed_lora(x, layer.switch_A, layer.switch_B, gates, 1.0)
            u, _ = routed_shrink_gathered(x, layer.switch_A, gates[:, :2].int(), gates[:, :2])
            routed_expand_gathered(u, layer.switch_B, gates[:, :2].int(), scale=1.0)
            if tokens <= 16:
                switch_linear(x, layer.weight, layer.switch_A, layer.switch_B, gates, 1.0)
        if len(layers) > 1:
            shared = SharedInput(layers)  # transformers
            for layer in layers:
                layer._expanded(shared.products(layer, x, gates), x.new_empty(tokens, layer.out_features))
        a, b, slices = pack([(layer.switch_A, layer.switch_B) for layer in layers])  # vLLM
        routed_lora(x, a, b, gates.repeat(1, len(layers)), 1.0, slices=slices)
    measured = {job.key for job, _ in bench.all_jobs(bench.TuneConfig())}
    assert looked_up <= measured
    bucket = tuning.token_bucket(tokens)
    for key in ("routed_shrink/{}/384/4096", "routed_shrink/{}/256/4096", "routed_expand/{}/128/22016"):
        assert f"{key.format(bucket)}/bfloat16" in looked_up


def test_tune_lora_switch_measures_what_a_merge_looks_up(bench, looked_up, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    numbers = lambda *shape, dtype=torch.bfloat16: torch.zeros(*shape, dtype=dtype)  # noqa: E731
    for top_k, kind in ((2, torch.bfloat16), (1, torch.bfloat16), (1, torch.float32)):
        item = MergeItem(numbers(32, 48), numbers(32, 48), numbers(8, 16, 48, dtype=kind), numbers(32, 128, dtype=kind))
        MergePlan([item], top_k=top_k, scale=1.0, backend="triton")
    assert len(looked_up) == 3
    assert looked_up <= {job.key for job, _ in bench.all_jobs(bench.TuneConfig())}


def test_a_key_is_measured_once(bench):
    keys = [job.key for job, _ in bench.all_jobs(bench.TuneConfig())]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("columns", "width", "tokens", "block", "parts"),
    [
        (128, 4096, 1, 16, 16),  # 8 programs on 132 processors become 128
        (128, 4096, 16, 16, 16),
        (384, 4096, 1, 16, 8),
        (128, 11008, 1, 16, 16),
        (128, 1024, 1, 16, 4),  # no part of fewer than 256 inputs
        (128, 300, 1, 16, 1),
        (16 * 132, 4096, 1, 16, 1),
        (128, 4096, 17, 64, 8),
        (128, 4096, 64, 64, 4),
        (128, 4096, 17, 16, 1),  # two tiles of tokens
        (128, 4096, 65, 64, 1),
        (128, 4096, 5000, 4096, 1),
    ],
)
def test_sums_are_split_until_the_programs_fill_the_gpu(columns, width, tokens, block, parts):
    assert tuning.split_of(columns // 16, width, tokens, block, 132) == parts
    # what a token gets does not depend on the others
    assert tuning.split_of(columns // 16, width, min(4096, tuning.token_bucket(tokens)), block, 132) == parts


def test_a_table_may_leave_the_split_to_the_rule(card):
    measured = {"BLOCK_T": 16, "BLOCK_R": 16, "BLOCK_K": 128, "SPLIT": 0, "num_warps": 4, "num_stages": 2}
    (card / "acme-x-1.json").write_text(json.dumps({"entries": {"routed_shrink/16/128/4096/bfloat16": measured}}))
    assert block_sizes("routed_shrink", 128, 4096, torch.bfloat16, device=GPU) == measured

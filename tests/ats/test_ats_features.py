import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmrl.ats import output_layer as module
from llmrl.ats.data import Window
from llmrl.ats.extract import extract_features
from llmrl.ats.output_layer import OutputLayer, check_output_layer
from llmrl.errors import ModelError, OutputError
from llmrl_kernels import curve_knots

SCRIPT = Path(__file__).with_name("features_run.py")
NAMES = (
    "states", "offsets", "row", "window", "target", "gap", "mean_gap", "top_gap", "correct", "graded", "choice", "choices",
    "curve", "slope", "question", "unscored",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_processes(tiny_model, tmp_path_factory):
    """Two processes that extract the same windows; they start first and are waited for last."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    arguments = [str(tiny_model("llama")), str(folder / "cache"), str(folder / "features.safetensors")]
    process = subprocess.Popen(
        [*command, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, folder
    process.kill()
    process.wait()


def random_windows(count=12, seed=0, longest=40):
    """Windows of different lengths in which some tokens do not count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(2, longest, (1,), generator=generator))
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        scored = [False, True, *(torch.rand(length - 2, generator=generator) < 0.7).tolist()]
        found.append(Window(ids, scored, i, "w.txt", f"w.txt:{i + 1}"))
    return found


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def extract(model, windows, cache_dir, batch_size=4, fingerprint="base", sequences=False):
    return extract_features(
        model, windows, batch_size=batch_size, cache_dir=cache_dir, fingerprint=fingerprint, sequences=sequences
    )


def direct(model, windows):
    """Per scored token from the model's own forward, one window at a time: hidden state, logits, target, window."""
    hidden, logits, target, index = [], [], [], []
    for i, window in enumerate(windows):
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([window.token_ids]), output_hidden_states=True)
        for position, counts in enumerate(window.scored):
            if counts:
                hidden.append(output.hidden_states[-1][0, position - 1])
                logits.append(output.logits[0, position - 1])
                target.append(window.token_ids[position])
                index.append(i)
    return torch.stack(hidden), torch.stack(logits).double(), torch.tensor(target), torch.tensor(index)


def assert_features_are_the_models(model, windows, found, tolerance):
    hidden, z, target, index = direct(model, windows)
    top, argmax = z.max(-1)
    assert len(found) == sum(sum(w.scored) for w in windows)
    assert found.target.equal(target)
    assert found.window.equal(index)
    assert found.hidden.dtype == model.dtype
    torch.testing.assert_close(found.hidden, hidden, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        found.gap.double(), top - z.gather(1, target[:, None])[:, 0], rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(found.mean_gap.double(), top - z.mean(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        found.top_gap.double(), top - z.sort(-1).values[:, -5:].mean(-1), rtol=tolerance, atol=tolerance
    )
    sure = top - z.topk(2).values[:, 1] > 10 * tolerance
    assert sure.double().mean() > 0.5
    assert found.correct[sure].equal((argmax == target)[sure])
    knots = curve_knots()
    for k in (0, 34, len(knots) - 1):
        lse = ((z - top[:, None]) * knots[k].exp()).logsumexp(-1)
        torch.testing.assert_close(found.curve[:, k].double(), lse, rtol=tolerance, atol=10 * tolerance)


# --- the output layer -------------------------------------------------------------------------------------------------


def test_output_layer_gives_the_models_own_logits(any_model):
    model = load(any_model)
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(input_ids=ids, output_hidden_states=True)
        ours = OutputLayer.of(model).logits(output.hidden_states[-1].flatten(0, 1))
    assert output.logits.std() > 0.1
    torch.testing.assert_close(ours, output.logits.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_output_layer_reads_what_is_particular(tiny_model):
    assert OutputLayer.of(load(tiny_model("cohere"))).scale == 0.25
    assert OutputLayer.of(load(tiny_model("granite"))).scale == 0.25
    assert OutputLayer.of(load(tiny_model("gemma2"))).soft_cap == 1.5
    assert OutputLayer.of(load(tiny_model("phi"))).bias.abs().max() > 0.1
    assert OutputLayer.of(load(tiny_model("llama"))).bias is None


def test_check_output_layer_refuses_an_unknown_map(tiny_model):
    model = load(tiny_model("gemma2"))
    layer = OutputLayer.of(model)
    check_output_layer(model, layer, list(range(3, 40)))
    without_cap = OutputLayer(layer.weight, layer.bias, layer.scale, None)
    with pytest.raises(ModelError, match="Gemma2ForCausalLM computes its logits in a way llmrl does not know"):
        check_output_layer(model, without_cap, list(range(3, 40)))


# --- features ---------------------------------------------------------------------------------------------------------


def test_extract_features_are_the_models_own(any_model, tmp_path):
    model, windows = load(any_model), random_windows()
    assert_features_are_the_models(model, windows, extract(model, windows, tmp_path), 1e-4)


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_extract_features_bfloat16(name, tiny_model, tmp_path):
    model, windows = load(tiny_model(name), dtype=torch.bfloat16), random_windows()
    assert_features_are_the_models(model, windows, extract(model, windows, tmp_path, batch_size=1), 1e-2)


@pytest.fixture(scope="module")
def llama(tiny_model):
    return load(tiny_model("llama"))


def assert_same(found, expected, tolerance=0.0):
    for name in NAMES:
        a, b = getattr(found, name), getattr(expected, name)
        if tolerance and a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        else:
            assert a.equal(b), name


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_extract_features_do_not_depend_on_batch_and_padding(batch_size, llama, tmp_path):
    windows = random_windows()
    expected = extract(llama, windows, tmp_path / "a", batch_size=4)
    assert_same(extract(llama, windows, tmp_path / "b", batch_size=batch_size), expected, 1e-4)


def test_extract_features_do_not_depend_on_the_chunk(llama, tmp_path, monkeypatch):
    windows = random_windows()
    expected = extract(llama, windows, tmp_path / "a")
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 512 * 3)
    assert OutputLayer.of(llama).chunk() == 3
    assert_same(extract(llama, windows, tmp_path / "b"), expected, 1e-5)


def test_extract_features_nan_weights_name_the_row(tiny_model, tmp_path):
    model, windows = load(tiny_model("llama")), random_windows(count=5)
    with torch.no_grad():
        model.lm_head.weight[17, 3] = math.nan
    with pytest.raises(ModelError, match=r"logits are NaN or infinite on w\.txt:\d: its weights are damaged"):
        extract(model, windows, tmp_path)


def test_extract_features_nan_of_one_row_names_that_row(tiny_model, tmp_path):
    model, windows = load(tiny_model("llama")), random_windows(count=5)
    with torch.no_grad():
        model.model.embed_tokens.weight[501] = math.nan  # no other row has this token
    windows[3] = Window([5, 501, 7], [False, True, True], 3, "w.txt", "w.txt:4")
    with pytest.raises(ModelError, match=r"on w\.txt:4:"):
        extract(model, windows, tmp_path)


def test_token_features_select_and_of_windows(llama, tmp_path):
    found = extract(llama, random_windows(), tmp_path)
    part = found.of_windows([2, 7])
    assert set(part.window.tolist()) == {2, 7}
    inside = (found.window == 2) | (found.window == 7)
    assert part.gap.equal(found.gap[inside])
    assert part.hidden.equal(found.hidden[inside])
    assert len(part) == len(part.hidden) == len(part.curve)
    assert part.states is found.states  # the largest part is never copied


def test_extract_features_lora_is_the_models_own(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(load(tiny_model("llama")), LoraConfig(r=2, init_lora_weights=False)).eval()
    windows = random_windows()
    found = extract(model, windows, tmp_path / "lora")
    assert_features_are_the_models(model, windows, found, 1e-4)
    assert not found.gap.equal(extract(load(tiny_model("llama")), windows, tmp_path / "base").gap)


# --- whole windows ----------------------------------------------------------------------------------------------------


def test_extract_features_sequences_keeps_the_states_a_scored_token_can_see(llama, tmp_path):
    """All positions up to the one that predicts the last scored token; the numbers are those of the small layout."""
    windows = random_windows()
    windows[3] = Window([5, 6, 7, 8, 9], [False, False, True, False, False], 3, "w.txt", "w.txt:4")
    found = extract(llama, windows, tmp_path / "whole", sequences=True)
    assert found.has_sequences
    for i, window in enumerate(windows):
        states = found.states[found.offsets[i] : found.offsets[i + 1]]
        with torch.inference_mode():
            own = llama(input_ids=torch.tensor([window.token_ids]), output_hidden_states=True).hidden_states[-1][0]
        last = max(position for position, counts in enumerate(window.scored) if counts)
        assert len(states) == last
        torch.testing.assert_close(states, own[:last], rtol=1e-4, atol=1e-4)
        rows = found.row[found.window == i] - found.offsets[i]
        assert rows.tolist() == [position - 1 for position, counts in enumerate(window.scored) if counts]
    small = extract(llama, windows, tmp_path / "scored")
    assert not small.has_sequences
    assert found.hidden.equal(small.hidden)
    assert len(small.states) == len(small) < len(found.states)
    for name in set(NAMES) - {"states", "offsets", "row"}:
        torch.testing.assert_close(getattr(found, name), getattr(small, name), rtol=1e-5, atol=1e-5)


def test_extract_features_sequences_of_many_shards_are_joined(llama, tmp_path):
    windows = random_windows(count=150, longest=8)
    found = extract(llama, windows, tmp_path, sequences=True)
    assert len(list(tmp_path.glob("features-*"))) == 3
    assert len(found.offsets) == 151
    assert found.offsets[-1] == len(found.states)
    alone = extract(llama, windows[140:], tmp_path / "alone", sequences=True)
    late = found.of_windows(list(range(140, 150)))
    torch.testing.assert_close(late.hidden, alone.hidden, rtol=1e-4, atol=1e-4)
    assert (late.row - late.offsets[late.window]).equal(alone.row - alone.offsets[alone.window])


# --- shards -----------------------------------------------------------------------------------------------------------


def test_extract_features_resume_recomputes_what_is_missing_only(llama, tmp_path):
    windows = random_windows(count=150, longest=8)
    whole = extract(llama, windows, tmp_path)
    shards = sorted(tmp_path.glob("features-*.safetensors"))
    assert len(shards) == 3
    before = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    shards[1].unlink()
    calls = []
    hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        assert_same(extract(llama, windows, tmp_path), whole)
    finally:
        hook.remove()
    after = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    assert [after[s.name] == before[s.name] for s in shards] == [True, False, True]
    # 64 windows in batches of 4, and one forward that checks the output layer
    assert len(calls) == 16 + 1


def test_extract_features_reports_progress(llama, tmp_path):
    seen = []
    extract_features(
        llama,
        random_windows(count=70, longest=5),
        batch_size=16,
        cache_dir=tmp_path,
        fingerprint="base",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(64, 70), (70, 70)]


def test_extract_features_refuses_shards_of_another_run(llama, tmp_path):
    windows = random_windows(count=3)
    extract(llama, windows, tmp_path)
    other_ids = [Window([9, *windows[0].token_ids[1:]], windows[0].scored, 0, "w.txt", "w.txt:1"), *windows[1:]]
    other_mask = [
        Window(windows[0].token_ids, [False, True] + [False] * (len(windows[0].scored) - 2), 0, "", ""),
        *windows[1:],
    ]
    for changed in (
        {"windows": other_ids},
        {"windows": other_mask},
        {"windows": windows[:2]},
        {"windows": [replace(windows[0], grade=True), *windows[1:]]},
        {"windows": [replace(windows[0], choices=tuple(range(500))), *windows[1:]]},
        {"fingerprint": "other"},
        {"sequences": True},
    ):
        arguments = {"windows": windows, **changed}
        with pytest.raises(OutputError, match=r"unfinished run of another model.*\n--overwrite discards it"):
            extract(llama, cache_dir=tmp_path, **arguments)


def test_extract_features_full_disk_leaves_no_part_of_a_shard(llama, tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path):
        Path(path).write_bytes(b"part")
        raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            extract(llama, random_windows(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]
    assert len(extract(llama, random_windows(), tmp_path)) > 0


# --- several processes ------------------------------------------------------------------------------------------------


def test_extract_features_two_processes_equal_one(two_processes, tiny_model, tmp_path):
    spec = importlib.util.spec_from_file_location("features_run", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    alone = asdict(script.features(tiny_model("llama"), tmp_path))
    process, folder = two_processes
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    together = load_file(folder / "features.safetensors")
    assert set(together) == set(alone) == set(NAMES)
    for name in NAMES:
        assert together[name].equal(alone[name]), name
    assert len(alone["offsets"]) == 141
    assert len(list((folder / "cache").glob("features-*.safetensors"))) == 3

"""Guarantee 6 in one process: a killed and resumed run equals the uninterrupted one, bit for bit, on a real model."""

import json
import pickletools
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmrl.training import latest_checkpoint, read_metrics

# they hold the output folder's name, and its length
DIFFERING = {"training_args.json", "llmrl_checkpoint.json"}


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """Return `uninterrupted(**options)`, the folder of a run of 8 steps, made once for each set of options."""
    made = {}

    def get(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted")
            assert run(made[key], **options) == 0, log(made[key])
        return made[key]

    return get


def log(folder):
    return (Path(folder) / "log.txt").read_text(encoding="utf-8")


def visible(folder):
    return sorted(p.name for p in Path(folder).glob("checkpoint-*"))


def staged(folder):
    return sorted(p.name for p in Path(folder).glob(".*"))


def assert_same_run(folder, expected, checkpoint="checkpoint-8"):
    """Compare parameters, optimizer, scheduler, random states, log and trainer state byte for byte."""
    files = {p.name for p in (expected / checkpoint).iterdir()}
    assert {p.name for p in (folder / checkpoint).iterdir()} == files
    for name in sorted(files - DIFFERING):
        assert (folder / checkpoint / name).read_bytes() == (expected / checkpoint / name).read_bytes(), name
    assert (folder / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("trainer", ["trainer", "sft", "sft-lora", "dpo"])
def test_train_resumed_after_kill_equals_uninterrupted(run, uninterrupted, tmp_path, trainer):
    expected = uninterrupted(trainer=trainer)
    assert run(tmp_path, trainer=trainer, kill="after_save:4") == -9
    assert visible(tmp_path) == ["checkpoint-4"]
    assert run(tmp_path, trainer=trainer, resume=True) == 0, log(tmp_path)
    assert_same_run(tmp_path, expected)
    assert (tmp_path / "batches-0.jsonl").read_bytes() == (expected / "batches-0.jsonl").read_bytes()
    # the comparison is about something: training moved the weights, and the save fell between two logs
    weights = next((expected / "checkpoint-8").glob("*model.safetensors")).name
    first, last = (load_file(expected / f"checkpoint-{n}" / weights) for n in (4, 8))
    assert any((first[name] != last[name]).any() for name in first)
    assert [row["step"] for row in read_metrics(expected)] == [3, 6, 8]
    # the speed is that of the four steps this process took
    timing = read_metrics(tmp_path / "timings.jsonl")[-1]
    assert timing["train_steps_per_second"] * timing["train_runtime"] == pytest.approx(4, rel=0.02)


def test_train_resumed_across_epochs_with_accumulation_equals_uninterrupted(run, uninterrupted, tmp_path):
    # 5 steps an epoch: the kill comes in the second epoch, with two batches a step
    options = {"rows": 21, "batch": 2, "save_steps": 7, "arguments": {"gradient_accumulation_steps": 2}}
    expected = uninterrupted(**options)
    assert run(tmp_path, kill="after_save:7", **options) == -9
    assert run(tmp_path, resume=str(tmp_path / "checkpoint-7"), **options) == 0, log(tmp_path)
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize("place", ["in_save:8", "in_rename:8"])
def test_save_killed_half_way_leaves_no_checkpoint(run, uninterrupted, tmp_path, place):
    assert run(tmp_path, kill=place) == -9
    assert visible(tmp_path) == ["checkpoint-4"]
    assert staged(tmp_path) == [".checkpoint-8.tmp"]
    (tmp_path / ".checkpoint-6.tmp").mkdir()  # of a save that this run will not do again
    assert run(tmp_path, resume="latest") == 0, log(tmp_path)
    assert staged(tmp_path) == []
    assert_same_run(tmp_path, uninterrupted(trainer="trainer"))


def test_save_on_a_full_disk_leaves_no_checkpoint(run, uninterrupted, tmp_path):
    assert run(tmp_path, fail="in_save:8") == 1
    assert "llmrl: disk full while writing rank_0.safetensors" in log(tmp_path)
    assert visible(tmp_path) == ["checkpoint-4"]
    assert staged(tmp_path) == []
    assert run(tmp_path, resume=True) == 0, log(tmp_path)
    assert_same_run(tmp_path, uninterrupted(trainer="trainer"))


def test_train_resumed_at_the_end_takes_no_step(run, uninterrupted, tmp_path):
    expected = uninterrupted(trainer="trainer")
    assert run(tmp_path) == 0
    assert run(tmp_path, resume=True) == 0, log(tmp_path)
    assert len((tmp_path / "batches-0.jsonl").read_text().splitlines()) == 8
    assert_same_run(tmp_path, expected)


def test_train_with_nothing_to_resume_starts_at_step_0(run, uninterrupted, tmp_path):
    assert run(tmp_path, resume=True) == 0, log(tmp_path)
    assert_same_run(tmp_path, uninterrupted(trainer="trainer"))


def test_train_keeps_best_checkpoint_and_patience_over_a_kill(run, uninterrupted, tmp_path):
    # a learning rate under which the loss explodes at once: step 1 stays the best, patience 3 ends the run at step 4
    options = {
        "save_steps": 1,
        "learning_rate": 3.0,
        "patience": 3,
        "arguments": {
            "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True,
            "metric_for_best_model": "loss", "greater_is_better": False,
        },
    }  # fmt: skip
    expected = uninterrupted(**options)
    assert run(tmp_path, kill="after_save:3", **options) == -9
    assert visible(tmp_path) == ["checkpoint-1", "checkpoint-3"]
    assert run(tmp_path, resume=True, **options) == 0, log(tmp_path)
    assert visible(tmp_path) == visible(expected) == ["checkpoint-1", "checkpoint-4"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")
    best, final = (load_file(tmp_path / n / "model.safetensors") for n in ("checkpoint-1", "final"))
    assert all((best[name] == final[name]).all() for name in best)
    assert not (tmp_path / "final" / "training_args.bin").exists()


def test_save_writes_no_pickle(uninterrupted):
    for trainer in ("trainer", "sft-lora"):
        files = [p for p in uninterrupted(trainer=trainer).rglob("*") if p.is_file()]
        assert {p.suffix for p in files if "checkpoint-" in str(p.parent.name)} <= {
            ".json",
            ".safetensors",
            ".md",
            ".jinja",
        }
        assert [p for p in files if is_pickle(p.read_bytes())] == []


def is_pickle(content):
    """Tell by the bytes: a zip, as torch.save writes, or an opcode stream that a STOP ends."""
    if content[:2] == b"PK":
        return True
    try:
        return content[:1] == b"\x80" and any(op.name == "STOP" for op, _, _ in pickletools.genops(content))
    except ValueError:
        return False


def test_train_refuses_a_checkpoint_with_a_pickle(run, tmp_path):
    assert run(tmp_path, max_steps=8, kill="after_save:4") == -9
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"anything")
    assert run(tmp_path, resume=True) == 1
    printed = [line for line in log(tmp_path).splitlines() if line.startswith("llmrl:")]
    assert len(printed) == 1
    assert "checkpoint-4/optimizer.pt is a pickle" in printed[0]
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"  # refused, not passed over for an older one


def test_train_leaves_sharded_state_to_transformers(run, uninterrupted, tmp_path):
    assert run(tmp_path, sharded=True, kill="after_save:4") == -9
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    assert run(tmp_path, resume=True) == 1
    assert "was saved with FSDP or DeepSpeed and this run is without" in log(tmp_path)
    assert run(tmp_path, sharded=True, resume=True) == 0, log(tmp_path)
    for name in ("checkpoint-8/model.safetensors", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (uninterrupted(trainer="trainer") / name).read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_steps": 10}, "max_steps was 8 and is 10 now"),
        ({"batch": 2}, "global_batch_size was 4 and is 2 now"),
        ({"arguments": {"seed": 1}}, "seed was 0 and is 1 now; data_seed was 0 and is 1 now"),
    ],
)
def test_train_refuses_a_checkpoint_of_another_run(run, uninterrupted, tmp_path, changed, message):
    checkpoint = uninterrupted(trainer="trainer") / "checkpoint-4"
    assert run(tmp_path, resume=str(checkpoint), **changed) == 1
    assert message in log(tmp_path)

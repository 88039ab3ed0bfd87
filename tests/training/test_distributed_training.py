"""Guarantee 6 over processes: 1 and 2 see the same global batches and end with equal parameters; 2 resume exactly."""

import json
from itertools import groupby

import pytest
from safetensors.torch import load_file

# 100 rows are 12 global batches of 8 and a rest: 20 steps go on into the second epoch
TWENTY = {"max_steps": 20, "save_steps": 20, "rows": 100, "dropout": 0.0, "learning_rate": 1e-4}
RESUMED = {"trainer": "sft", "batch": 2}


@pytest.fixture(scope="module")
def folders(run, torchrun, tmp_path_factory):
    """Make every run that nobody kills; two processes start once for all of theirs."""
    root = tmp_path_factory.mktemp("processes")
    alone = {"one": {"trainer": "trainer"}, "one-sft": {"trainer": "sft"}}
    for name, options in alone.items():
        assert run(root / name, batch=8, processes=1, **options, **TWENTY) == 0, (root / name / "log.txt").read_text()
    together = {
        "two": {**TWENTY, "processes": 2},
        "two-sft": {**TWENTY, "processes": 2, "trainer": "sft"},
        "two-per-rank": {**TWENTY, "processes": 2, "arguments": {"average_tokens_across_devices": False}},
        "uninterrupted": {**RESUMED, "processes": 2},
    }
    code, output = torchrun([{"output_dir": str(root / name), **options} for name, options in together.items()])
    assert code == 0, output
    assert "processes: 2 (gloo, rank 0 on cpu)" in output
    return root


def global_batches(folder, processes):
    """Return step by step the rows all processes saw, in the order of a single process."""
    steps = []
    for rank in range(processes):
        records = [json.loads(line) for line in (folder / f"batches-{rank}.jsonl").read_text().splitlines()]
        grouped = groupby(records, key=lambda record: record["step"])
        steps.append([[row for record in group for row in record["rows"]] for _, group in grouped])
    return [[row for part in parts for row in part] for parts in zip(*steps, strict=True)]


def largest_difference(one, two):
    """Return the largest |a - b| / |a| over the parameters, norms over a whole parameter."""
    a, b = (load_file(folder / "checkpoint-20" / "model.safetensors") for folder in (one, two))
    return max(((a[name] - b[name]).norm() / a[name].norm()).item() for name in a)


@pytest.mark.parametrize("trainer", ["", "-sft"])
def test_train_on_1_and_2_processes_sees_the_same_global_batches(folders, trainer):
    one, two = global_batches(folders / f"one{trainer}", 1), global_batches(folders / f"two{trainer}", 2)
    assert len(one) == 20
    assert one == two
    assert len({tuple(row) for batch in one[:12] for row in batch}) == 96  # no row twice in an epoch
    lengths = [len(row) for batch in one for row in batch]
    assert max(lengths) > 10 * min(lengths)


@pytest.mark.parametrize("trainer", ["", "-sft"])
def test_train_on_1_and_2_processes_gives_the_same_parameters(folders, trainer):
    assert largest_difference(folders / f"one{trainer}", folders / f"two{trainer}") < 1e-5


def test_train_with_a_mean_per_process_would_be_noticed(folders):
    assert largest_difference(folders / "one", folders / "two-per-rank") > 1e-3


@pytest.mark.parametrize("place", ["after_save:4", "in_save:8"])
def test_train_on_2_processes_resumed_after_kill_equals_uninterrupted(folders, run, tmp_path, place):
    assert run(tmp_path, ranks=2, processes=2, kill=place, slow="in_save:4", **RESUMED) == -9
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4"]
    assert run(tmp_path, ranks=2, processes=2, resume=True, **RESUMED) == 0, (tmp_path / "log.txt").read_text()
    expected = folders / "uninterrupted"
    names = {p.name for p in (expected / "checkpoint-8").iterdir()} - {"training_args.json", "llmrl_checkpoint.json"}
    assert {"optimizer.safetensors", "rank_0.safetensors", "rank_1.safetensors"} <= names
    for name in sorted(names):
        assert (tmp_path / "checkpoint-8" / name).read_bytes() == (expected / "checkpoint-8" / name).read_bytes(), name
    assert (tmp_path / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_train_refuses_a_checkpoint_of_another_number_of_processes(folders, run, tmp_path):
    checkpoint = folders / "uninterrupted" / "checkpoint-4"
    assert run(tmp_path, trainer="sft", batch=4, resume=str(checkpoint)) == 1
    printed = (tmp_path / "log.txt").read_text()
    assert "world_size was 2 and is 1 now" in printed
    assert "global_batch_size" not in printed

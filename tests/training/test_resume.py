"""Which folder a run resumes from, and which are refused."""

import pytest

from llmrl.errors import CheckpointError
from llmrl.training import latest_checkpoint, resolve_resume
from llmrl.training.resume import compare_runs, remove_leftovers, seal_checkpoint


def make(folder, step, **facts):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"0" * step)
    seal_checkpoint(checkpoint, {"step": step, "world_size": 1, "max_steps": 20, "sharded": False, **facts})
    return checkpoint


def test_latest_checkpoint_counts_in_numbers_and_passes_over_broken_ones(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    make(tmp_path, 2)
    newest = make(tmp_path, 10)
    assert latest_checkpoint(tmp_path) == newest
    (newest / "model.safetensors").write_bytes(b"0" * 9)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "llmrl_checkpoint.json").unlink()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("asked", [None, False])
def test_resolve_resume_starts_anew_when_not_asked(tmp_path, asked):
    make(tmp_path, 2)
    assert resolve_resume(tmp_path, asked) is None


@pytest.mark.parametrize("asked", [True, "latest"])
def test_resolve_resume_takes_the_newest(tmp_path, asked):
    assert resolve_resume(tmp_path, asked) is None
    make(tmp_path, 2)
    assert resolve_resume(tmp_path, asked) == str(tmp_path / "checkpoint-2")


def test_resolve_resume_names_what_is_wrong_with_a_path(tmp_path):
    checkpoint = make(tmp_path, 4)
    assert resolve_resume(tmp_path, checkpoint) == str(checkpoint)
    with pytest.raises(CheckpointError, match=r"not found: .*checkpoint-5; there is checkpoint-4"):
        resolve_resume(tmp_path, str(tmp_path / "checkpoint-5"))
    with pytest.raises(CheckpointError, match=r"no llmrl_checkpoint.json.*giving it as the model"):
        resolve_resume(tmp_path, str(tmp_path))
    (checkpoint / "model.safetensors").write_bytes(b"0")
    with pytest.raises(CheckpointError, match=r"model.safetensors has 1 bytes, not 4"):
        resolve_resume(tmp_path, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"incomplete: model.safetensors is missing"):
        resolve_resume(tmp_path, checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state_0.pth", "training_args.bin", "sub/state.PKL"])
@pytest.mark.parametrize("listed", [True, False])
def test_resolve_resume_refuses_a_pickle(tmp_path, name, listed):
    checkpoint = make(tmp_path, 4)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"")
    if listed:
        seal_checkpoint(checkpoint, {"step": 4})
    for asked in (str(checkpoint), True):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle.*delete it, or convert") as caught:
            resolve_resume(tmp_path, asked)
        assert len(str(caught.value).splitlines()) == 1


def test_resolve_resume_refuses_sharded_state_in_a_run_that_is_not(tmp_path):
    checkpoint = make(tmp_path, 4, sharded=True)
    with pytest.raises(CheckpointError, match="saved with FSDP or DeepSpeed and this run is without"):
        resolve_resume(tmp_path, checkpoint)
    assert resolve_resume(tmp_path, checkpoint, sharded=True) == str(checkpoint)
    with pytest.raises(CheckpointError, match="saved without FSDP or DeepSpeed and this run is with:"):
        resolve_resume(tmp_path, make(tmp_path, 5), sharded=True)


def test_compare_runs_says_what_differs(tmp_path):
    checkpoint = make(tmp_path, 4)
    compare_runs(checkpoint, {"world_size": 1, "max_steps": 20, "unknown": 3})
    with pytest.raises(CheckpointError, match="world_size was 1 and is 2 now; max_steps was 20 and is 40 now"):
        compare_runs(checkpoint, {"world_size": 2, "max_steps": 40})


def test_remove_leftovers_takes_staging_folders_only(tmp_path):
    make(tmp_path, 4)
    for name in (".checkpoint-8.tmp", ".checkpoint-4.old", ".checkpoint-4.old-ab12", ".cache", "checkpoint-8.tmp"):
        (tmp_path / name).mkdir()
    assert remove_leftovers(tmp_path) == [".checkpoint-4.old", ".checkpoint-4.old-ab12", ".checkpoint-8.tmp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".cache", "checkpoint-4", "checkpoint-8.tmp"]

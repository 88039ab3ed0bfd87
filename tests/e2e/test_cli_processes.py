"""Two processes: one result that is the one of a single process, and a refusal where there is nothing to share out."""

import json

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

# every head; windows enough for a shard of features each
OPTIONS = (
    *("--method", "all", "--max_length", "33", "--max_tokens", "3000", "--batch_size", "8"),
    *("--bootstrap_draws", "50", "--quiet"),
)


@pytest.fixture(scope="module")
def alone(llmrl, book, stories_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert llmrl("calibrate", stories_dir, "--data", book, "--output_dir", folder, *OPTIONS).code == 0
    return folder


@pytest.fixture
def torchrun(process):
    """`torchrun(...)` -> (exit code, output) of two processes."""

    def run(*words):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "llmrl.cli"]
        ended = process(*launch, *words)
        return ended.code, ended.out + ended.err

    return run


def leaves(value, path=""):
    """Path -> number, text or None."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in items for key, leaf in leaves(part, f"{path}/{name}").items()}
    return {path: value}


def fits(folder):
    """What every epoch of every fit gave."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_calibrate_on_two_processes_gives_the_heads_of_one(torchrun, alone, book, stories_dir, tmp_path, read_json):
    out = tmp_path / "out"
    code, text = torchrun("calibrate", stories_dir, "--data", book, "--output_dir", out, *OPTIONS)
    assert code == 0, text
    assert {"vector", "ats-linear", "ats-mlp", "ats-transformer"} <= {record["method"] for record in fits(out)}
    for found, wanted in ((fits(out), fits(alone)), (read_json(out / "report.json"), read_json(alone / "report.json"))):
        assert leaves(found) == pytest.approx(leaves(wanted), abs=1e-5)
    heads = (load_file(folder / "llmrl_heads.safetensors") for folder in (out, alone))
    assert_close(*heads, rtol=0, atol=1e-5)
    assert (out / "config.json").read_bytes() == (alone / "config.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verify_on_two_processes_is_refused(torchrun, alone, book, tmp_path):
    out = tmp_path / "verified"
    code, text = torchrun("calibrate", "--verify", alone, "--data", book, "--output_dir", out)
    assert code == 1
    assert "llmrl: expected 1 process, got 2." in text
    assert "FileNotFoundError" not in text
    assert not out.exists()


def test_calibrate_world_size_without_a_launcher(llmrl, book, stories_dir, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    ended = llmrl("calibrate", stories_dir, "--data", book, "--output_dir", tmp_path / "out", *OPTIONS)
    assert ended.code == 1
    text = ended.refusal()
    assert text.startswith("llmrl: WORLD_SIZE says 4 processes, but no launcher set the rest (")
    assert "unset WORLD_SIZE" in text
    assert list(tmp_path.iterdir()) == []

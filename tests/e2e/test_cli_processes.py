"""Two processes: one result that is the one of a single process, and a refusal where there is nothing to share out."""

import pytest

OPTIONS = ("--max_length", "33", "--method", "temperature", "--bootstrap_draws", "50", "--batch_size", "8", "--quiet")


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


def test_calibrate_on_two_processes_gives_the_result_of_one(torchrun, alone, book, stories_dir, tmp_path):
    out = tmp_path / "out"
    code, text = torchrun("calibrate", stories_dir, "--data", book, "--output_dir", out, *OPTIONS)
    assert code == 0, text
    for name in ("report.json", "llmrl_heads.safetensors", "config.json"):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name
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

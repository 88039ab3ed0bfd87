"""Ctrl-C, kill -9 and a full disk: one line, nothing half-written, nothing lost that was finished."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

# windows of 33 tokens: many shards, so that a signal after the first one comes in the middle
OPTIONS = ("--max_length", "33", "--method", "temperature", "--bootstrap_draws", "50", "--batch_size", "4")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def run(llmrl, book, stories_dir):
    return lambda out, *options: llmrl(
        "calibrate", stories_dir, "--data", book, "--output_dir", out, *OPTIONS, *options
    )


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert run(folder).code == 0
    return (folder / "report.json").read_bytes()


@pytest.fixture
def written_shards(monkeypatch):
    """Names of the shards that this process computes from now on."""
    from llmrl.ats import extract

    names, real = [], extract._write_shard
    monkeypatch.setattr(extract, "_write_shard", lambda path, part: names.append(path.name) or real(path, part))
    return names


def shards(partial):
    """Finished shards by name, with the time they were written."""
    return {path.name: path.stat().st_mtime_ns for path in partial.glob("features-*.safetensors")}


def stop_in_the_middle(out, book, model, number, *options):
    """Start the command as a user would, send a signal once a new shard is there; return (code, stderr)."""
    partial = out.with_name(out.name + ".partial")
    before = len(shards(partial)) if partial.exists() else 0
    command = [sys.executable, "-m", "llmrl.cli", "calibrate", str(model), "--data", str(book)]
    command += ["--output_dir", str(out), *OPTIONS, "--quiet", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while len(shards(partial)) <= before:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        return process.returncode, err
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_calibrate_interrupted_goes_on_where_it_was(
    run, book, stories_dir, uninterrupted, written_shards, tmp_path, calibrate
):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    code, err = stop_in_the_middle(out, book, stories_dir, signal.SIGINT)
    assert code == 130, err
    assert err == "llmrl: interrupted: finished parts are kept; the same command goes on (--resume_from_checkpoint)\n"
    first = shards(partial)
    assert first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]  # and no OUT
    assert {path.name for path in partial.iterdir()} == {"manifest.json", *first}

    # killed without a chance to tidy up
    code, err = stop_in_the_middle(out, book, stories_dir, signal.SIGKILL, "--resume_from_checkpoint")
    assert code == -signal.SIGKILL, err
    second = shards(partial)
    assert len(second) > len(first)
    assert {name: second[name] for name in first} == first  # not computed again
    assert not out.exists()

    ended = run(out, "--resume_from_checkpoint")
    assert ended.code == 0, ended.err
    total = int(max(written_shards)[len("features-") :].split(".")[0]) + 1
    assert len(second) < total, "the signals came too late to show anything"
    assert sorted([*written_shards, *second]) == [f"features-{i:05d}.safetensors" for i in range(total)]
    assert (out / "report.json").read_bytes() == uninterrupted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    again = run(out, "--resume_from_checkpoint")
    assert again.code == 1
    assert "is complete, nothing to resume" in again.refusal()
    assert (out / "report.json").read_bytes() == uninterrupted


def test_calibrate_goes_on_without_being_asked(run, uninterrupted, written_shards, monkeypatch, tmp_path):
    from llmrl.ats import extract

    out = tmp_path / "out"
    interrupt_after(monkeypatch, extract, written_shards, 2)
    assert run(out).code == 130
    kept = list(written_shards)
    monkeypatch.undo()
    written = record_shards(monkeypatch, extract)
    assert run(out).code == 0
    assert not set(kept) & set(written)
    assert (out / "report.json").read_bytes() == uninterrupted


def interrupt_after(monkeypatch, extract, written, count):
    real = extract._write_shard

    def write(path, part):
        real(path, part)
        if len(written) == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(extract, "_write_shard", write)


def record_shards(monkeypatch, extract):
    names, real = [], extract._write_shard
    monkeypatch.setattr(extract, "_write_shard", lambda path, part: names.append(path.name) or real(path, part))
    return names


def test_calibrate_refuses_to_go_on_with_another_run(run, book, llmrl, stories_dir, monkeypatch, tmp_path):
    from llmrl.ats import extract

    out, other = tmp_path / "out", tmp_path / "other.txt"
    interrupt_after(monkeypatch, extract, record_shards(monkeypatch, extract), 1)
    assert run(out).code == 130
    monkeypatch.undo()
    before = shards(tmp_path / "out.partial")
    other.write_text(book.read_text()[::-1])
    argv = ["calibrate", stories_dir, "--data", other, "--output_dir", out, *OPTIONS]
    ended = llmrl(*argv, "--resume_from_checkpoint")
    assert ended.code == 1
    text = ended.refusal()
    assert "holds the unfinished run of another model, data set or setting" in text
    assert "--overwrite discards it" in text
    assert shards(tmp_path / "out.partial") == before
    assert not out.exists()
    assert llmrl(*argv, "--overwrite").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "out"]


@pytest.mark.parametrize("stage", ["fits", "saving", "publishing"])
def test_calibrate_interrupted_later_keeps_the_features(stage, run, uninterrupted, monkeypatch, tmp_path):
    from llmrl.ats import calibrate, extract

    target = {"fits": "fit_and_score", "saving": "save_and_check", "publishing": "publish_folder"}[stage]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, target, interrupt)
    out = tmp_path / "out"
    assert run(out).code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    monkeypatch.undo()
    written = record_shards(monkeypatch, extract)
    assert run(out, "--resume_from_checkpoint").code == 0
    assert written == []
    assert (out / "report.json").read_bytes() == uninterrupted


def fill_disk(monkeypatch, when):
    """From the call on for which `when(path)` holds, files end in the middle."""
    import safetensors.torch

    real = safetensors.torch.save_file

    def save_file(tensors, filename, *args, **kwargs):
        if when(os.fspath(filename)):
            with open(filename, "wb") as f:
                f.write(b"half a file")
            raise FULL
        real(tensors, filename, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)


def test_calibrate_on_a_full_disk_keeps_finished_shards(run, uninterrupted, monkeypatch, tmp_path):
    from llmrl.ats import extract

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    fill_disk(monkeypatch, lambda path: "features-00002" in path)
    ended = run(out)
    assert ended.code == 1
    text = ended.refusal()
    assert "disk full" in text
    assert "--resume_from_checkpoint" in text
    kept = shards(partial)
    assert {path.name for path in partial.iterdir()} == {"manifest.json", *kept}
    assert len(kept) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    monkeypatch.undo()
    written = record_shards(monkeypatch, extract)
    assert run(out, "--resume_from_checkpoint").code == 0
    assert written
    assert not kept.keys() & set(written)
    assert (out / "report.json").read_bytes() == uninterrupted


def test_calibrate_on_a_full_disk_while_saving_writes_nothing(run, monkeypatch, tmp_path, contents):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text('{"selected": "an earlier run"}')
    before = contents(out)
    fill_disk(monkeypatch, lambda path: "llmrl_heads" in path)
    ended = run(out, "--overwrite")
    assert ended.code == 1
    assert "disk full" in ended.refusal()
    assert contents(out) == before  # the earlier result stays until the new one is whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_calibrate_at_a_file_size_limit(book, stories_dir, tmp_path):
    """The system itself cuts a write short."""
    code = (
        "import resource, sys\n"
        "from llmrl.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    argv = ["calibrate", str(stories_dir), "--data", str(book), "--output_dir", str(out), *OPTIONS, "--quiet"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "disk full" in done.stderr
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert not out.exists()


def test_calibrate_partial_of_another_version_of_the_base(run, stories_dir, llmrl, book, monkeypatch, tmp_path):
    from safetensors.torch import load_file, save_file

    from llmrl.ats import extract

    base = shutil.copytree(stories_dir, tmp_path / "base")
    argv = ["calibrate", base, "--data", book, "--output_dir", tmp_path / "out", *OPTIONS]
    interrupt_after(monkeypatch, extract, record_shards(monkeypatch, extract), 1)
    assert llmrl(*argv).code == 130
    monkeypatch.undo()
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    ended = llmrl(*argv, "--resume_from_checkpoint")
    assert ended.code == 1
    assert "another model, data set or setting" in ended.refusal()

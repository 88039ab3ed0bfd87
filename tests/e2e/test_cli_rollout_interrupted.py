"""`llmrl rollout` killed, interrupted, on a full disk and on two processes: the bytes of a run that nothing disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

ROWS = 24
OPTIONS = ("--batch_size", "1", "--max_tokens", "24", "--n", "2")


@pytest.fixture(scope="module")
def prompts(jsonl, tmp_path_factory):
    rows = [{"id": f"r{i}", "prompt": f"Once there were {i} dogs"} for i in range(ROWS)]
    return jsonl(tmp_path_factory.mktemp("data") / "p.jsonl", rows)


@pytest.fixture(scope="module")
def run(rollout, prompts):
    return lambda out, *options: rollout(prompts, out, *OPTIONS, *options)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert run(out).code == 0
    return out.read_bytes()


@pytest.fixture
def sampled(monkeypatch):
    """Ids of the rows that this process samples from now on."""
    from llmrl.rollout import run

    ids, real = [], run._send
    monkeypatch.setattr(
        run, "_send", lambda engine, i, row, *rest: ids.append(row["id"]) or real(engine, i, row, *rest)
    )
    return ids


def kept(out):
    """Ids of the finished rows, in order of completion."""
    shards = sorted((out.parent / f".{out.name}.run" / "shards").glob("*.jsonl"))
    lines = [line for path in shards for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return [json.loads(line)["row_id"] for line in lines]


def command(model, prompts, out, *options):
    words = ["rollout", "--model", model, "--prompts", prompts, "--output", out, "--rollout_backend", "transformers"]
    return [sys.executable, "-m", "llmrl.cli", *map(str, words), *OPTIONS, *options]


def stop_after(count, number, argv, out):
    """Start the command as a user would and send a signal once `count` rows are kept; return (code, stderr)."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while len(kept(out)) < count:
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


def test_rollout_killed_and_interrupted_goes_on_to_the_same_bytes(
    run, prompts, stories_dir, uninterrupted, sampled, tmp_path
):
    out = tmp_path / "out.jsonl"
    argv = command(stories_dir, prompts, out, "--quiet")
    code, _ = stop_after(random.randint(1, 5), signal.SIGKILL, argv, out)
    assert code == -signal.SIGKILL
    first = kept(out)
    assert not out.exists()
    code, err = stop_after(len(first) + 2, signal.SIGINT, argv, out)
    assert code == 130
    second = kept(out)
    assert second[: len(first)] == first
    words = f"{len(second)} of {ROWS} rows are finished and kept; the same command goes on with the rest"
    assert err == f"llmrl: interrupted: {words}\n"
    code, err = stop_after(len(second) + 2, signal.SIGTERM, argv, out)
    assert code == 143
    third = kept(out)
    assert len(third) < ROWS, "the signals came too late to show anything"

    ended = run(out)
    assert ended.code == 0, ended.err
    assert f"{len(third)} of {ROWS} rows were done before" in ended.out
    assert f"{ROWS - len(third)} rows and {len(third)} done before: " in ended.out
    assert sorted([*third, *sampled]) == sorted(f"r{i}" for i in range(ROWS))  # nothing twice
    assert out.read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def interrupt_after(monkeypatch, count):
    """Raise KeyboardInterrupt once `count` rows are kept."""
    from llmrl.rollout.shards import ShardWriter

    real = ShardWriter.write

    def write(self, *args, **options):
        real(self, *args, **options)
        if self.written == count:
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "write", write)


def test_rollout_refuses_to_go_on_as_another_run(
    run, rollout, prompts, chat_model, jsonl, uninterrupted, monkeypatch, tmp_path
):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert run(out).code == 130
    before = kept(out)
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": "else"}])
    for options, name in (
        (("--seed", "1"), "seed was 0, is 1"),
        (("--n", "1"), "n was 2, is 1"),
        (("--temperature", "0.5"), "sampling.temperature was 1.0, is 0.5"),
        (("--stop", "."), "sampling.stop was [], is ['.']"),
        (("--max_model_len", "100"), "max_model_len was None, is 100"),
        (("--model", chat_model), "template was"),
        (("--prompts", other), "rows.count was 24, is 1"),
        (("--dtype", "bfloat16"), "dtype was"),
    ):
        ended = run(out, *options)
        assert ended.code == 1
        assert name in ended.refusal()
        assert "--overwrite starts anew" in ended.refusal()
    assert kept(out) == before
    assert run(out).code == 0
    assert out.read_bytes() == uninterrupted
    assert run(out).code == 1  # it is finished: nothing is sampled over it
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        ended = run(out, "--overwrite")
    assert "the same command without --overwrite goes on" in ended.refusal()
    assert run(out).code == 0
    assert out.read_bytes() == uninterrupted


def test_rollout_greedy_goes_on_in_other_batches(rollout, prompts, monkeypatch, tmp_path):
    options = ("--temperature", "0", "--max_tokens", "20", "--batch_size", "7")
    assert rollout(prompts, tmp_path / "whole.jsonl", *options).code == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 11)
        assert rollout(prompts, tmp_path / "out.jsonl", *options).code == 130
    assert rollout(prompts, tmp_path / "out.jsonl", *options).code == 0
    whole, resumed = [
        [[s["token_ids"] for s in json.loads(line)["samples"]] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("whole.jsonl", "out.jsonl")
    ]
    assert whole == resumed


def test_rollout_killed_between_export_and_the_end(run, uninterrupted, sampled, monkeypatch, tmp_path):
    from llmrl.rollout import run as module

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(module, "scan_shards", lambda folder: {})  # what follows the export
        patch.setattr(module, "remove_run", lambda folder: None)
        assert run(out).code == 0
    assert (tmp_path / ".out.jsonl.run").is_dir()
    sampled.clear()
    ended = run(out)
    assert (ended.code, sampled) == (0, [])
    assert f"0 rows and {ROWS} done before" in ended.out
    assert out.read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_rollout_at_a_file_size_limit(run, prompts, stories_dir, uninterrupted, sampled, tmp_path):
    """The system itself cuts a write short; with room again the run goes on."""
    out = tmp_path / "out.jsonl"
    code = (
        "import resource, sys\n"
        "from llmrl.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    argv = command(stories_dir, prompts, out, "--quiet")
    done = subprocess.run([sys.executable, "-c", code, *argv[3:]], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "File too large; free some space and run the same command again" in done.stderr
    assert len(done.stderr.splitlines()) <= 3
    before = kept(out)
    assert 0 < len(before) < ROWS
    assert f"The {len(before)} records before it are kept" in done.stderr
    assert run(out).code == 0
    assert sorted([*before, *sampled]) == sorted(f"r{i}" for i in range(ROWS))
    assert out.read_bytes() == uninterrupted


def test_rollout_on_a_full_disk_at_the_export(run, uninterrupted, monkeypatch, tmp_path):
    import errno

    from llmrl.rollout import run as module

    out = tmp_path / "out.jsonl"

    def full(folder, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module, "export_records", full)
        ended = run(out)
    assert ended.code == 1
    assert f"disk full while writing {out}: free some space; the same command goes on" in ended.refusal()
    assert f"{ROWS} of {ROWS} rows are finished" in ended.refusal()
    assert run(out).code == 0
    assert out.read_bytes() == uninterrupted


def test_rollout_on_two_processes_gives_the_bytes_of_one(process, prompts, stories_dir, uninterrupted, run, tmp_path):
    out = tmp_path / "out.jsonl"
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "--",
        "llmrl.cli",
    ]  # torchrun would take --n for its own
    ended = process(*launch, *command(stories_dir, prompts, out)[3:])
    assert ended.code == 0, ended.out + ended.err
    assert ended.out.count(f"{ROWS} rows: {2 * ROWS} samples, ") == 1  # one says it, for both
    assert out.read_bytes() == uninterrupted
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]

"""The folder of unfinished work beside the output of `llmrl rollout`: who may write there, and what is removed when."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llmrl.errors import EngineError, OutputError
from llmrl.rollout import run as module
from llmrl.rollout.run_folder import lock_run

ROWS = [{"id": f"r{i}", "prompt": f"Once there were {i} dogs"} for i in range(6)]


@pytest.fixture
def prompts(jsonl, tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "p.jsonl", ROWS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / ".out.jsonl.run"


@pytest.fixture
def unfinished(rollout, prompts, out, folder, monkeypatch):
    """A run that was interrupted after two rows; the bytes of its files."""
    from llmrl.rollout.shards import ShardWriter

    real = ShardWriter.write

    def write(self, *args, **options):
        real(self, *args, **options)
        if self.written == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", write)
        patch.setattr(module, "_UNDER_WAY", 2)
        ended = rollout(prompts, out, "--quiet")
    assert ended.code == 130, ended.err
    assert (folder / "run.json").exists()
    return files(folder)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(out):
    return [json.loads(line)["id"] for line in out.read_text().splitlines()]


def hold(out):
    """A process at work on the output: it has the lock, and says so."""
    code = (
        "import sys, time, pathlib\n"
        "from llmrl.rollout.run_folder import lock_run\n"
        "with lock_run(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", code, str(out.with_name(f".{out.name}.run"))]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_rollout_refuses_an_output_that_another_process_writes(
    options, rollout, prompts, out, folder, unfinished, monkeypatch
):
    with hold(out) as process, monkeypatch.context() as patch:
        patch.setattr(module, "open_engine", lambda *args, **options: pytest.fail("too late"))
        patch.setattr(module, "read_facts", lambda *args, **options: pytest.fail("too late"))
        ended = rollout(prompts, out, *options)
        process.kill()
    assert ended.code == 1
    words = f"{folder} is being written by another process (process {process.pid} on "
    assert words in ended.refusal()
    assert f"which holds {folder}.lock: wait for it, or choose another --output" in ended.refusal()
    assert files(folder) == unfinished
    assert rollout(prompts, out, *options).code == 0  # a killed process holds nothing
    assert os.listdir(out.parent) == ["out.jsonl"]


def test_rollout_overwrite_beside_a_run_at_work_costs_it_nothing(process, rollout, prompts, out, stories_dir):
    words = ["rollout", "--model", stories_dir, "--prompts", prompts, "--output", out, "--overwrite"]
    words += ["--rollout_backend", "transformers", "--batch_size", "1", "--max_tokens", "24", "--n", "4"]
    argv = [sys.executable, "-m", "llmrl.cli", *map(str, words)]
    shards = out.with_name(f".{out.name}.run") / "shards"
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        end = time.monotonic() + 120
        while not any(path.stat().st_size for path in shards.glob("*.jsonl")):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < end
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)  # it is in the middle for as long as it takes
        try:
            ended = rollout(prompts, out, "--overwrite")
        finally:
            first.send_signal(signal.SIGCONT)
        said, err = first.communicate(timeout=120)
    assert ended.code == 1
    assert "is being written by another process" in ended.refusal()
    assert first.returncode == 0, err
    assert f"{len(ROWS)} rows: " in said
    assert ids(out) == [row["id"] for row in ROWS]


@pytest.mark.parametrize("stop", [EngineError("no server answers at :8000"), KeyboardInterrupt()])
def test_rollout_overwrite_keeps_old_work_until_the_engine_is_open(
    stop, rollout, prompts, out, folder, unfinished, monkeypatch
):
    def fail(*args, **options):
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_engine", fail)
        ended = rollout(prompts, out, "--overwrite", "--seed", "1")
    assert ended.code == (1 if isinstance(stop, EngineError) else 130)
    assert "nothing is replaced yet; the same command starts anew" in ended.refusal()
    assert files(folder) == unfinished
    ended = rollout(prompts, out)
    assert ended.code == 0
    assert "2 of 6 rows were done before" in ended.out


def test_rollout_overwrite_keeps_old_work_when_the_rows_cannot_be_a_run(rollout, prompts, out, folder, unfinished):
    prompts.write_text('{"prompt": "a", "deep": ' + "[" * 700 + "]" * 700 + "}\n")
    ended = rollout(prompts, out, "--overwrite")
    assert ended.code == 1
    assert "row 0 (0): expected what JSON can hold" in ended.refusal()
    assert files(folder) == unfinished


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    ("name", "content"), [("notes.txt", "mine"), ("run.json", '{"mine": 1}'), ("run.json", "[1"), ("shards/x", "mine")]
)
def test_rollout_refuses_a_folder_that_is_not_a_runs(name, content, options, rollout, prompts, out, folder):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text(content)
    ended = rollout(prompts, out, *options)
    assert ended.code == 1
    words = f"{folder} is not the folder of a run and holds {name.split('/')[0]}: unfinished work would lie there"
    assert words in ended.refusal()
    assert (folder / name).read_text() == content
    assert not out.exists()


def test_rollout_refuses_a_file_where_its_folder_would_be(rollout, prompts, out, folder):
    folder.write_text("mine")
    for options in ((), ("--overwrite",)):
        assert f"{folder} is no folder" in rollout(prompts, out, *options).refusal()
    assert folder.read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.txt", "shards/notes.txt"])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_rollout_removes_only_what_it_wrote(name, options, rollout, prompts, out, folder, unfinished):
    (folder / name).write_text("mine")
    (folder / ".run.json.x7").write_text("{")  # a write that was killed
    ended = rollout(prompts, out, *options)
    assert ended.code == 0, ended.err
    assert files(folder) == {name: b"mine"}
    assert f"llmrl: left {folder}, which holds {name.split('/')[0]}: not of the run" in ended.err
    assert ids(out) == [row["id"] for row in ROWS]


def test_rollout_takes_an_empty_folder(rollout, prompts, out, folder):
    folder.mkdir()
    (folder / ".run.json.x7").write_text("{")
    assert rollout(prompts, out).code == 0
    assert os.listdir(out.parent) == ["out.jsonl"]


def test_lock_run_that_is_removed_while_another_one_opens_it_is_taken_anew(tmp_path, monkeypatch):
    """The second one opens the file, the first one removes it and ends, the second one locks what has no name."""
    import fcntl

    from llmrl.rollout import run_folder

    folder, real, first = tmp_path / ".x.run", fcntl.flock, lock_run(tmp_path / ".x.run")

    def flock(fd, how):
        if (folder.parent / ".x.run.lock").stat().st_size:
            first.__exit__(None, None, None)
        return real(fd, how)

    first.__enter__()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder.fcntl, "flock", flock)
        second = lock_run(folder)
        second.__enter__()
    with pytest.raises(OutputError, match="is being written by another process"), lock_run(folder):
        pass
    second.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_lock_run_lets_one_of_many_in_at_a_time(tmp_path):
    inside, most, entered = 0, 0, 0

    def work():
        nonlocal inside, most, entered
        for _ in range(200):
            try:
                with lock_run(tmp_path / ".x.run"):
                    inside += 1
                    most, entered = max(most, inside), entered + 1
                    time.sleep(0.0005)
                    inside -= 1
            except OutputError:
                time.sleep(0.0002)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered > 4


def test_lock_run_works_where_there_are_no_locks(tmp_path, monkeypatch):
    from llmrl.rollout import run_folder

    def flock(fd, how):
        raise OSError(95, "not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with lock_run(tmp_path / ".x.run"), lock_run(tmp_path / ".x.run"):
        pass
    assert list(tmp_path.iterdir()) == []

import os
import signal
import subprocess
import sys

import pytest

from llmrl import errors
from llmrl.errors import did_you_mean, explain, nearest, run_command


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(("returned", "code"), [(0, 0), (None, 0), (3, 3)])
def test_run_command_returns_the_commands_code(returned, code, capsys):
    assert run_command(lambda: returned) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("LlmrlError", 1), ("UsageError", 2), ("ConfigError", 2), ("DataError", 1), ("ModelError", 1),
        ("HeadMismatchError", 1), ("OutputError", 1), ("CheckpointError", 1), ("VersionError", 1),
        ("DistributedError", 1), ("RequestError", 1), ("EngineError", 1), ("UnansweredError", 1), ("SyncError", 1),
    ],
)  # fmt: skip
def test_run_command_exit_code_of_every_error(kind, code, capsys):
    assert run_command(raising(getattr(errors, kind)("what is wrong"))) == code
    assert capsys.readouterr() == ("", "llmrl: what is wrong\n")


def test_errors_of_the_tree_are_all_tested():
    kinds = {
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LlmrlError)
    }
    assert len(kinds) == 14


def test_run_command_prints_at_most_three_lines_and_no_traceback(capsys):
    assert run_command(raising(errors.DataError("one\ntwo\nthree\nfour"))) == 1
    assert capsys.readouterr().err == "llmrl: one\n       two\n       three\n"


def test_run_command_error_that_nobody_foresaw(capsys):
    assert run_command(raising(ZeroDivisionError("division by zero\nmore\nand more"))) == 1
    error = capsys.readouterr().err
    assert error == "llmrl: ZeroDivisionError: division by zero\n       set LLMRL_DEBUG=1 for the traceback\n"


def test_run_command_error_without_words(capsys):
    assert run_command(raising(AssertionError())) == 1
    assert capsys.readouterr().err.startswith("llmrl: AssertionError: \n")


def test_run_command_interrupted(capsys):
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == (
        "llmrl: interrupted: finished parts are kept; the same command goes on (--resume_from_checkpoint)\n"
    )


def test_run_command_terminated_cleans_up_and_exits_143(tmp_path):
    code = (
        "import sys, time\nfrom llmrl.errors import run_command\nfrom llmrl.files import staging_folder\n"
        "def command():\n"
        "    with staging_folder(sys.argv[1]) as staging:\n"
        "        (staging / 'half').write_text('x')\n"
        "        print('ready', flush=True)\n        time.sleep(60)\n"
        "sys.exit(run_command(command))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    assert [path.name for path in tmp_path.iterdir()] == [".out.tmp"]
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM == 143
    assert err.startswith("llmrl: interrupted: ")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errors.DataError("bad row"), ZeroDivisionError("x")])
def test_run_command_debug_keeps_the_traceback(error, capsys, monkeypatch):
    monkeypatch.setenv("LLMRL_DEBUG", "1")
    assert run_command(raising(error)) == 1
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert "in command" in text
    monkeypatch.setenv("LLMRL_DEBUG", "0")
    run_command(raising(error))
    assert "Traceback" not in capsys.readouterr().err


def test_run_command_leaves_system_exit_alone():
    with pytest.raises(SystemExit):
        run_command(raising(SystemExit(0)))


def test_run_command_reader_that_went_away(tmp_path):
    code = (
        "import sys\nfrom llmrl.errors import run_command\n"
        "def command():\n    for _ in range(100000):\n        print('x' * 100)\n"
        "sys.exit(run_command(command))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)
    )
    assert process.stdout.readline() == b"x" * 100 + b"\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 0
    process.stderr.close()


def torch_out_of_memory():
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def cpu_allocation_failure():
    import torch

    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error


def failed_safetensors_write():
    from safetensors import SafetensorError

    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OSError(28, "No space left on device", "out/x.bin"), "disk full while writing out/x.bin: free some space"),
        (lambda: OSError(28, "No space left on device"), "disk full: free some space and run again"),
        (lambda: PermissionError(13, "Permission denied", "/data/x"), "no permission for /data/x: choose another folder"),
        (MemoryError, "out of memory (RAM): lower --max_tokens or --batch_size"),
        (cpu_allocation_failure, "out of memory (RAM): lower --max_tokens or --batch_size"),
        (torch_out_of_memory, "out of memory on the accelerator: lower --batch_size"),
        (lambda: RuntimeError("CUDA error: out of memory"), "out of memory on the accelerator: lower --batch_size"),
        (failed_safetensors_write, "disk full"),
    ],
)  # fmt: skip
def test_explain_names_the_cause_and_what_to_change(make, message, capsys):
    error = make()
    assert explain(error).startswith(message)
    assert run_command(raising(error)) == 1
    assert capsys.readouterr().err.startswith(f"llmrl: {message}")


def test_explain_knows_nothing_about_other_errors():
    assert explain(ValueError("x")) is None
    assert explain(OSError(2, "No such file", "x")) is None


def test_nearest_and_did_you_mean():
    known = {"temperature": 1, "linear": 2}
    assert nearest("temprature", known) == "temperature"
    assert nearest("zzz", known) is None
    assert did_you_mean("temprature", known) == "; did you mean 'temperature'?"
    assert did_you_mean("zzz", known) == "; valid: linear, temperature"

"""Counting processes, imports that stay light, and accelerate's config files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.errors import DistributedError
from llmrl.training import check_processes, is_main_process, rank, world_size
from llmrl.training import distributed as distributed_module

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "recipes" / "accelerate"
LAUNCH_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # vLLM, which other tests open in this process, leaves a process group of one behind
    monkeypatch.setattr(distributed_module, "_process_group", lambda: None)


def python(code, **variables):
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env={**clean, **variables}, capture_output=True, text=True, timeout=60
    )


def test_world_size_and_rank_come_from_the_launcher(monkeypatch):
    assert (world_size(), rank(), is_main_process()) == (1, 0, True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (world_size(), rank(), is_main_process()) == (4, 3, False)


def test_check_processes_announces_once_and_returns_the_number(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert check_processes(1) == 1
    assert capsys.readouterr().out == "processes: 1 (rank 0 on cpu)\n"
    assert check_processes(announce=False) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert check_processes(2) == 2
    assert capsys.readouterr().out == ""


def test_check_processes_names_torchrun_when_the_number_is_wrong(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(
        DistributedError, match=r"expected 2 processes, got 1: accelerate launch .*\n.*torchrun --nproc_per_node 2 "
    ):
        check_processes(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match=r"expected 1 process, got 2\.\n.*python "):
        check_processes(1)


def test_check_processes_notices_that_accelerate_started_one_process_of_two(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPO)!r})\nfrom llmrl.training import check_processes\ncheck_processes()"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(CONFIGS / "cpu2.yaml"),
        str(script),
    ]
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "accelerate launch starts a single process on a CPU" in done.stderr
    assert "torchrun --nproc_per_node 2 script.py" in done.stderr


def test_import_is_light():
    done = python(
        "import sys, llmrl.training\n"
        "from llmrl.training import write_run_files, check_processes, latest_checkpoint, resolve_resume\n"
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'matplotlib') if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_run_files_and_processes_work_without_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from llmrl.training import check_processes, write_run_files\n"
        f"check_processes(1); write_run_files({str(tmp_path)!r}, {{'seed': 0}})"
    )
    done = python(code)
    assert done.stdout == "processes: 1 (rank 0 on cpu)\n", done.stderr
    assert (tmp_path / "env.json").exists()


@pytest.mark.parametrize("name", ["cpu2", "ddp", "fsdp2", "deepspeed-zero3"])
def test_accelerate_config_holds_known_keys_only(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))  # refuses an unknown key at the top
    kinds = {"cpu2": "MULTI_CPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed-zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[name]
    assert config.num_processes == 2
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= options

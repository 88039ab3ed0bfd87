"""recipes/lora_switch.py and its YAML file: every file is there, and two processes train what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from http_server import free_port
from safetensors.torch import load_file

from llmrl.config import parse_config
from llmrl.lora_switch.options import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "recipes/lora_switch/four-tasks.yaml"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def run(folder, *launch):
    options = ("--config", CONFIG, "--max_steps", "3", "--max_length", "96", "--output_dir", str(folder))
    held = str(folder.parent / "held.jsonl")
    # without the balance loss, which each process takes of its own rows
    more = ("--test_data", held, "--batch_size", "8", "--micro_batch_size", "4", "--balance_coef", "0")
    command = [sys.executable, *launch, "recipes/lora_switch.py", *options, *more]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_recipe_on_one_process_and_on_two(tmp_path):
    settings = parse_config(TrainConfig, ["--config", str(ROOT / CONFIG)], prog="test", description="")
    assert all((ROOT / name).is_file() for name in (*settings.data, *settings.test_data))
    held = {"task": "stories", "prompt": "Once upon a time there was a", "completion": "little girl."}
    (tmp_path / "held.jsonl").write_text(json.dumps(held) + "\n")
    assert "processes: 1" in run(tmp_path / "one")
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port")
    assert "processes: 2 (gloo, rank 0 on cpu)" in run(tmp_path / "two", *launch, str(free_port()))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * max(float(one[name].norm()), 1.0), name
    assert any(torch.any(one[name] != 0) for name in one if name.endswith("switch_B"))

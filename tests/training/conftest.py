"""Starts sft_run.py: single-process runs from one server that forks, several processes with torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sft_run.py")
# one thread: two processes on two cores, and equal sums on both sides of a comparison
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
ENVIRONMENT.pop("WORLD_SIZE", None)


@pytest.fixture(scope="session")
def run():
    """Return `run(output_dir, **options) -> exit code`; what the run printed is in output_dir/log.txt."""
    server = subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )

    def start(output_dir, **options):
        server.stdin.write(json.dumps({"output_dir": str(output_dir), **options}) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield start
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="session")
def torchrun():
    """Return `torchrun([options, ...]) -> (exit code, output)`, two processes with gloo."""

    def start(runs):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
        done = subprocess.run(
            [*command, json.dumps(runs)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
        )
        return done.returncode, done.stdout + done.stderr

    return start

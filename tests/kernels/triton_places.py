"""Where the tests of a Triton kernel run: each place is a process of its own, because Triton decides when it is imported
whether it interprets (`TRITON_INTERPRET=1`, on the CPU) or compiles for a GPU."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
PLACES = ["interpreter", "gpu"] if torch.cuda.is_available() else ["interpreter"]


def run_cases(cases, where):
    """Run the tests in the file `cases`; all of them have to pass, and none may be skipped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if where == "interpreter":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", str(HERE / cases)]
    ended = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    assert "passed" in ended.stdout
    assert "skipped" not in ended.stdout


@functools.cache
def _hopper():
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(HERE / "hopper_experts.py")]
        ended = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads(ended.stdout)


def compile_for_hopper(op):
    """Return what `hopper_experts.py` says of the kernels of an op; it runs once for all of them."""
    return _hopper()[op]

"""The core runs with torch, transformers and safetensors alone: calibrate works where nothing else of the stack is there."""

import gzip
import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ABSENT = ("accelerate", "datasets", "peft", "trl", "matplotlib", "vllm", "sklearn", "pandas", "pyarrow")


def dependency_closure(names):
    """Return the distributions that pip would install for `names`, without extras."""
    found, open_names = {}, list(names)
    while open_names:
        name = open_names.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = distribution(name)
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                open_names.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def core_only(tmp_path_factory):
    """A folder to import from that holds links to torch, transformers, safetensors and what they need, and llmrl."""
    site = tmp_path_factory.mktemp("site")
    for found in dependency_closure(["torch", "transformers", "safetensors"]).values():
        for entry in {file.parts[0] for file in found.files if file.parts[0] != ".."}:
            if not (site / entry).exists() and entry != "__pycache__":
                (site / entry).symlink_to(found.locate_file(entry))
    (site / "llmrl").symlink_to(ROOT / "llmrl")
    (site / "llmrl_kernels").symlink_to(ROOT / "kernels" / "llmrl_kernels")
    return site


def run(core_only, *arguments):
    # -S: no site-packages; PYTHONPATH is then all there is beside the standard library
    environment = {**os.environ, "PYTHONPATH": str(core_only)}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_calibrate_runs_on_torch_and_transformers_alone(tmp_path, core_only):
    probe = f"import importlib.util as u; print([n for n in {ABSENT!r} if u.find_spec(n)])"
    assert run(core_only, "-c", probe).stdout.strip() == "[]"
    book = gzip.decompress((ROOT / "examples" / "text" / "wizard_of_oz.txt.gz").read_bytes()).decode()
    (tmp_path / "book.txt").write_text(book[:20_000])
    out = tmp_path / "out"
    argv = [str(ROOT / "examples" / "stories260k"), "--data", str(tmp_path / "book.txt"), "--output_dir", str(out)]
    done = run(core_only, "-m", "llmrl.cli", "calibrate", *argv, "--max_length", "65", "--bootstrap_draws", "50")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "report.json").read_text())["greedy_identical"] is True
    # the one thing that needs matplotlib is left out, and said so
    assert not (out / "plots" / "reliability.png").exists()
    assert "pip install matplotlib" in done.stdout

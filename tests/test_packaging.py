"""The wheel as a stranger gets it: built from a clean copy, installed into an environment that holds nothing else."""

import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from llmrl import __version__
from llmrl.vllm_compat import REQUIRED

ROOT = Path(__file__).resolve().parents[1]
# the environment of the build and of the fresh interpreter: nothing of this process may leak in
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VLLM_PLUGINS")}


def run(*command, cwd, ok=(0,)):
    out = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=CLEAN, cwd=cwd, check=False)
    assert out.returncode in ok, f"{command}\n{out.stdout[-2000:]}\n{out.stderr[-2000:]}"
    return out


def copy_checkout(target):
    """Copy what is tracked, or would be: built files and environments of the checkout stay behind."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive has no git
        skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
        shutil.copytree(ROOT, target, ignore=skip)
        return
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with the sdist, and the wheel that was built out of that sdist and nothing else."""
    folder = tmp_path_factory.mktemp("packaging")
    copy_checkout(folder / "checkout")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "checkout")
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """An environment with the wheel and nothing else, not even pip; returns the folder of its scripts."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet"]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def names_in(path):
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def library(dist):
    """Every file of the library that was there to build from, by its place in a wheel."""
    checkout = dist.parent / "checkout"
    roots = {"llmrl": checkout / "llmrl", "llmrl_kernels": checkout / "kernels" / "llmrl_kernels"}
    return {
        f"{package}/{path.relative_to(root)}"
        for package, root in roots.items()
        for path in root.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


def test_wheel_holds_the_library_and_nothing_else(dist, wheel):
    names = names_in(wheel)
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == library(dist)
    assert {"llmrl/py.typed", "llmrl_kernels/py.typed"} <= inside
    info = f"llmrl-{__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/entry_points.txt"} <= names


def test_wheel_states_version_license_and_windows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        stated = email.message_from_bytes(archive.read(f"llmrl-{__version__}.dist-info/METADATA"))
        entries = archive.read(f"llmrl-{__version__}.dist-info/entry_points.txt").decode()
    assert stated["Version"] == __version__
    assert stated["License-Expression"] == "Apache-2.0"
    needed = [r for r in stated.get_all("Requires-Dist") if "extra ==" not in r]
    # a wheel orders the bounds of a window as it likes
    windows = dict(re.fullmatch(r"([A-Za-z0-9_-]+)(.+)", r).groups() for r in needed)
    assert {n: set(w.split(",")) for n, w in windows.items()} == {n: set(w.split(",")) for n, w in REQUIRED.items()}
    assert "llmrl = llmrl.cli:main" in entries
    assert "[vllm.general_plugins]\nllmrl = llmrl.serving.plugin:register" in entries


def test_sdist_holds_what_a_build_needs(dist):
    (path,) = dist.glob("*.tar.gz")
    names = names_in(path)
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE", "PKG-INFO"} <= names
    assert {f"kernels/{name}" if name.startswith("llmrl_kernels/") else name for name in library(dist)} <= names


def test_llmrl_runs_in_an_empty_environment(fresh, tmp_path):
    assert "doctor" in run(fresh / "llmrl", "--help", cwd=tmp_path).stdout
    out = run(fresh / "python", "-c", "import llmrl; print(llmrl.__version__, llmrl.__file__)", cwd=tmp_path).stdout
    version, file = out.split()
    assert version == __version__
    assert Path(file).is_relative_to(fresh.parent)


def test_llmrl_doctor_names_what_to_install_in_an_empty_environment(fresh, tmp_path):
    out = run(fresh / "llmrl", "doctor", cwd=tmp_path, ok=(1,)).stdout
    for name, window in REQUIRED.items():
        row = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert row.split(maxsplit=3) == [name, "none", window, f"pip install '{name}{window}'"]
    assert "vllm plugin   registered" in out


def test_llmrl_doctor_passes_beside_its_dependencies(fresh, tmp_path):
    (site,) = (fresh.parent / "lib").glob("python*/site-packages")
    link = site / "dependencies.pth"
    link.write_text("\n".join(dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])))
    try:
        out = run(fresh / "llmrl", "doctor", cwd=tmp_path).stdout
    finally:
        link.unlink()
    assert all(f"{name} " in out for name in REQUIRED)
    assert not any("pip install" in line and "(optional)" not in line for line in out.splitlines()[:14])

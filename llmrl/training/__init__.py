"""Functions, one mixin and callbacks that compose into transformers.Trainer and trl's trainers without forking them.

Names load on first use: `import llmrl.training` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.training.checkpoint import SafeCheckpoints, safe
    from llmrl.training.distributed import check_processes, is_main_process, rank, world_size
    from llmrl.training.metrics import MetricsCallback, read_metrics
    from llmrl.training.reproducible import reproducible_arguments
    from llmrl.training.resume import latest_checkpoint, resolve_resume
    from llmrl.training.run import write_model_card, write_run_files
    from llmrl.training.run_callback import RunFilesCallback

_MODULES = {
    "MetricsCallback": "metrics",
    "RunFilesCallback": "run_callback",
    "SafeCheckpoints": "checkpoint",
    "check_processes": "distributed",
    "is_main_process": "distributed",
    "latest_checkpoint": "resume",
    "rank": "distributed",
    "read_metrics": "metrics",
    "reproducible_arguments": "reproducible",
    "resolve_resume": "resume",
    "safe": "checkpoint",
    "world_size": "distributed",
    "write_model_card": "run",
    "write_run_files": "run",
}

__all__ = [
    "MetricsCallback",
    "RunFilesCallback",
    "SafeCheckpoints",
    "check_processes",
    "is_main_process",
    "latest_checkpoint",
    "rank",
    "read_metrics",
    "reproducible_arguments",
    "resolve_resume",
    "safe",
    "world_size",
    "write_model_card",
    "write_run_files",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)

"""Progress and numbers of runs that are not a transformers.Trainer: a bar, metrics.jsonl, and the trackers of accelerate."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmrl.errors import UsageError
from llmrl.files import to_json
from llmrl.training.distributed import is_main_process

TIMINGS_FILE = "timings.jsonl"  # apart from the numbers, because clock times differ between equal runs


@contextmanager
def progress_bar(title: str, total: int, *, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield `advance(done, total)`, which moves a bar on stderr; silent when quiet or not the main process."""
    from tqdm import tqdm

    off = quiet or not is_main_process()
    # a log file gets a line every ten seconds instead of a redrawn one
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, desc=title, unit=unit, disable=off, mininterval=interval, dynamic_ncols=True) as bar:
        yield lambda done, total: bar.update(done - bar.n) and None


class MetricsLog:
    """Appends one JSON object a line to a file and, when asked for, to a tracker that accelerate knows."""

    def __init__(self, path: Path, report_to: str, run_dir: Path) -> None:
        self._path = path
        self._accelerator: Any = None
        if report_to != "none":
            self._accelerator = _start_tracker(report_to, run_dir)

    def write(self, values: dict[str, Any], *, step: int) -> None:
        """Append `values`; NaN and infinities become null."""
        line = json.dumps(to_json(values), allow_nan=False)
        with self._path.open("a", encoding="utf-8") as f:
            f.write(line + "\n")
        if self._accelerator is not None:
            prefix = "/".join(str(v) for v in values.values() if isinstance(v, str))
            numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, float)}
            self._accelerator.log(numbers, step=step)

    def close(self) -> None:
        """Flush the tracker."""
        if self._accelerator is not None:
            self._accelerator.end_training()


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed, before any work is done.

    Raises:
        UsageError: with what to install.
    """
    if name == "none":
        return
    missing = [package for package in (name, "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"--report_to {name} needs a package that is not installed: pip install {' '.join(missing)}")


def _start_tracker(name: str, run_dir: Path) -> Any:
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=name, project_dir=str(run_dir))
    accelerator.init_trackers("runs")
    return accelerator

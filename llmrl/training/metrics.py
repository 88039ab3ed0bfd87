"""metrics.jsonl: one JSON object a line, `step` and `epoch` first, then the numbers trainer.log() was given.

Clock times would differ between two equal runs, so they go to timings.jsonl. On resume the file is written anew from
the log inside the checkpoint: it then equals the file of a run without the interruption, byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrl.errors import DataError
from llmrl.files import to_json, write_text
from llmrl.training.tracking import TIMINGS_FILE

METRICS_FILE = "metrics.jsonl"
_TIMING_SUFFIXES = ("_runtime", "_per_second", "_time", "_per_second_per_gpu")


class MetricsCallback(TrainerCallback):
    """Appends every log to metrics.jsonl in the output folder, on the main process only."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file: empty for a new run, the checkpoint's log for a resumed one."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            for name, timings in ((METRICS_FILE, False), (TIMINGS_FILE, True)):
                write_text(folder / name, "".join(_line(entry, timings) for entry in state.log_history))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero and logs:
            entry = {**logs, "step": state.global_step, "epoch": logs.get("epoch", state.epoch)}
            for name, timings in ((METRICS_FILE, False), (TIMINGS_FILE, True)):
                line = _line(entry, timings)
                if line:
                    with open(Path(args.output_dir) / name, "a", encoding="utf-8") as f:
                        f.write(line)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Read a metrics file, or the one in an output folder; a last line cut off by a kill is left out.

    Raises:
        DataError: the file is missing, or a line before the last is not a JSON object.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"not found: {path}; a run writes it into its --output_dir")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is not a JSON object: {line[:80]!r}") from error
        rows.append(row)
    return rows


def _line(entry: dict[str, Any], timings: bool) -> str:
    """Return one line with the numbers of `entry` that are timings, or those that are not; "" when there are none."""
    entry = to_json(entry)
    numbers = {
        key: value
        for key, value in sorted(entry.items())  # the checkpoint's log has lost the order
        if key not in ("step", "epoch")
        and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
        and key.endswith(_TIMING_SUFFIXES) is timings
    }
    if not numbers:
        return ""
    row = {"step": entry.get("step"), "epoch": entry.get("epoch"), **numbers}
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"

"""Trainers of models that say themselves what training changes: whole batches of rows, and checkpoints of that alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from llmrl.training.resume import compare_runs
from llmrl.training.whole_batches import WholeBatchTrainer

WEIGHTS = "model.safetensors"  # as Trainer calls it


class TrainedStateTrainer(WholeBatchTrainer):
    """Base of trainers whose model has `trained_state() -> dict` and `load_trained_state(dict)`."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=self.model.trained_state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        compare_runs(resume_from_checkpoint, self.run_facts)  # before tensors of another shape are met
        self.model.load_trained_state(load_file(Path(resume_from_checkpoint) / WEIGHTS))

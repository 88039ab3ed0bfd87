"""Trainers of models that say themselves what training changes: whole batches of rows, and checkpoints of that alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.utils.data import Sampler

from llmrl.training.batches import WholeBatches
from llmrl.training.checkpoint import SafeCheckpoints
from llmrl.training.resume import compare_runs

WEIGHTS = "model.safetensors"  # as Trainer calls it


class TrainedStateTrainer(SafeCheckpoints):
    """Base of trainers whose model has `trained_state() -> dict` and `load_trained_state(dict)`.

    Attributes:
        run_facts: what a checkpoint must agree on with the run that goes on from it.
    """

    run_facts: dict[str, Any]

    @property
    def rows_a_step(self) -> int:
        """Rows of a global batch: of all processes and forwards."""
        return self.args.per_device_train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return WholeBatches(len(train_dataset or self.train_dataset), self.rows_a_step, self.args.data_seed)

    def _facts(self) -> dict[str, Any]:
        return {**super()._facts(), **self.run_facts}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=self.model.trained_state())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        compare_runs(resume_from_checkpoint, self.run_facts)  # before tensors of another shape are met
        self.model.load_trained_state(load_file(Path(resume_from_checkpoint) / WEIGHTS))

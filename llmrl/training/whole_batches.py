"""Trainers that deal out whole global batches, and whose checkpoints know which run they are of."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler

from llmrl.training.batches import WholeBatches
from llmrl.training.checkpoint import SafeCheckpoints


class WholeBatchTrainer(SafeCheckpoints):
    """Mixin before a trainer: rows dealt out by `WholeBatches`, and facts of the run in every checkpoint.

    Attributes:
        run_facts: what a checkpoint must agree on with the run that goes on from it, beside world size and steps.
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

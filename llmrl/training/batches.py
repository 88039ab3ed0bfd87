"""Whole global batches in one order, whatever the number of processes and of forwards a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from llmrl.rollout.seeds import derive_seed


class WholeBatches(Sampler[int]):
    """Row numbers of an epoch in an order drawn from (seed, epoch), as many as fill whole global batches.

    With gradient accumulation the loader's own drop_last counts forwards, not steps, and an epoch would end in a smaller step
    on one process and not on two.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed, self.epoch = rows, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; the trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        return iter(torch.randperm(self.rows, generator=generator)[: len(self)].tolist())

"""Settings of a run that trains a backbone, and what they mean to transformers' TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments

from llmrl.errors import UsageError
from llmrl.hyre.options import TrainConfig
from llmrl.training.distributed import check_launch, split_batch
from llmrl.training.reproducible import command_arguments

TUNINGS = ("lora", "full")


@dataclass(frozen=True)
class BackboneSettings:
    """How a backbone is trained; a step is one update with `batch_size` pairs over all processes.

    Attributes:
        tuning: "lora" or "full".
        lora_r: rank of the adapter, whose scale is 2.
        learning_rate: of the backbone.
        heads_lr: of the heads, which begin at their optimum and only follow.
        epochs: passes over the pairs; what is left of a pass after whole batches is left out of it.
        batch_size: pairs a step over all processes.
        micro_batch_size: most pairs in memory at once on a process; None: its whole share of a step.
        warmup: share of the steps over which both rates rise from 0; after it they fall along a cosine.
        seed: of the order of pairs and of a new adapter.
        save_steps: steps between checkpoints; the last two are kept.
        logging_steps: steps between lines of metrics.jsonl.
        autocast: compute in bfloat16 on weights of another type.
        report_to: "none", "tensorboard", "wandb" or "trackio".
        quiet: no bars and no prints.

    Raises:
        UsageError: a value out of its range.
    """

    tuning: str = "lora"
    lora_r: int = 16
    learning_rate: float = 1e-4
    heads_lr: float = 3e-3
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch_size: int | None = None
    warmup: float = 0.05
    seed: int = 0
    save_steps: int = 100
    logging_steps: int = 10
    autocast: bool = False
    report_to: str = "none"
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.tuning not in TUNINGS:
            raise UsageError(f"expected tuning out of {', '.join(TUNINGS)}, got {self.tuning!r}")
        for name in ("lora_r", "batch_size", "micro_batch_size", "save_steps", "logging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.heads_lr < math.inf or not 0 <= self.warmup < 1:
            raise UsageError(
                f"expected heads_lr of at least 0 and warmup from 0 to 1, got {self.heads_lr} and {self.warmup}"
            )

    def share(self) -> tuple[int, int]:
        """Return (pairs a forward on one process, forwards a step).

        Raises:
            UsageError: the processes cannot share a batch evenly.
        """
        return split_batch(self.batch_size, self.micro_batch_size)

    def steps(self, pairs: int) -> int:
        """Return the number of steps of a run over so many pairs.

        Raises:
            UsageError: they do not fill one batch.
        """
        if pairs < self.batch_size:
            raise UsageError(f"{pairs} pairs are fewer than --batch_size {self.batch_size}: lower it")
        return max(1, math.ceil(self.epochs * (pairs // self.batch_size)))


def settings_of(config: TrainConfig) -> BackboneSettings:
    """Return the settings that options of `llmrl hyre train` ask for; a GPU computes in bfloat16 unless they name a type."""
    bfloat16 = config.dtype == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return BackboneSettings(
        tuning=config.tuning,
        lora_r=config.lora_r,
        learning_rate=config.base_lr,
        heads_lr=config.lr,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=config.seed,
        save_steps=config.save_steps,
        autocast=bfloat16,
        report_to=config.report_to,
        quiet=config.quiet,
    )


def training_arguments(work_dir: Path, settings: BackboneSettings, pairs: int, heads: int) -> TrainingArguments:
    """Return the arguments of the trainer.

    Raises:
        UsageError: a batch larger than the data.
        DistributedError: processes that would each train alone, or one that would split batches over several GPUs.
    """
    size, forwards = settings.share()
    steps = settings.steps(pairs)
    arguments = TrainingArguments(
        **command_arguments(
            output_dir=str(work_dir),
            seed=settings.seed,
            max_steps=steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=forwards,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(settings.warmup * steps),
            max_grad_norm=float(heads),  # 1 for a head: the loss is a sum over them
            bf16=settings.autocast,
            save_steps=settings.save_steps,
            logging_steps=min(settings.logging_steps, steps),
            report_to=settings.report_to,
            disable_tqdm=settings.quiet,
        )
    )
    check_launch(arguments)
    return arguments

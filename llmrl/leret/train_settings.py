"""Settings that supervised and preference training share, and what they mean to transformers' TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from llmrl.errors import UsageError, did_you_mean
from llmrl.leret.preference_data import LONG_ROWS

OPTIMIZERS = {"adamw": "adamw_torch", "rmsprop": "rmsprop"}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
TUNINGS = ("lora", "full")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class TrainSettings:
    """How a stage is trained; a step is one update with `batch_size` rows or pairs, over all processes.

    Args:
        learning_rate: after the warm-up.
        batch_size: rows (pairs) a step over all processes.
        epochs: passes over the rows; what is left of a pass after whole batches is left out of it.
        max_steps: steps, in place of epochs.
        micro_batch_size: most rows (pairs) in memory at once on a process; gradients add up to `batch_size`.
        optimizer: "adamw", or the paper's "rmsprop".
        schedule: of the learning rate after the warm-up: "constant" (the paper), "linear", "cosine".
        warmup_steps: steps over which it rises from 0.
        max_grad_norm: gradients are scaled down to this norm.
        weight_decay: of both optimizers.
        tuning: "lora" or "full"; an adapter that is given goes on being trained and keeps its own rank.
        lora_r: rank of a new adapter.
        lora_alpha: scale times rank.
        lora_dropout: in supervised training; preferences are trained without any dropout.
        max_length: most tokens of a row; None is the model's context. Longer rows are never cut.
        long_rows: "refuse", or "drop" to leave longer rows out and say so.
        dtype: of the weights. "auto" is float32 on a CPU; on a GPU float32 under bfloat16 autocast for full training (a
            step of 1e-7 is lost in bfloat16 weights), and as stored for the frozen base of LoRA.
        gradient_checkpointing: less memory, more time.
        seed: of the order of rows and of a new adapter.
        save_steps: steps between checkpoints; the last two are kept.
        logging_steps: steps between lines of metrics.jsonl.
        report_to: "none", "tensorboard", "wandb" or "trackio".
        quiet: no bars and no prints.

    Raises:
        UsageError: a value out of its range.
    """

    learning_rate: float = 2e-5
    batch_size: int = 16
    epochs: float = 1
    max_steps: int | None = None
    micro_batch_size: int = 16
    optimizer: str = "adamw"
    schedule: str = "constant"
    warmup_steps: int = 10
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    tuning: str = "lora"
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    max_length: int | None = None
    long_rows: str = "refuse"
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_steps: int = 100
    logging_steps: int = 10
    report_to: str = "none"
    quiet: bool = False

    def __post_init__(self) -> None:
        words = {
            "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "tuning": TUNINGS, "long_rows": LONG_ROWS, "dtype": DTYPES,
        }  # fmt: skip
        for name, valid in words.items():
            if getattr(self, name) not in valid:
                raise UsageError(
                    f"{name}: {getattr(self, name)!r} is not a choice{did_you_mean(getattr(self, name), valid)}"
                )
        least = dict.fromkeys(
            ("batch_size", "micro_batch_size", "lora_r", "lora_alpha", "save_steps", "logging_steps"), 1
        )
        for name, number in {**least, "warmup_steps": 0, "seed": 0, "weight_decay": 0, "lora_dropout": 0}.items():
            if getattr(self, name) < number:
                raise UsageError(f"{name} must be at least {number}, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "epochs", "max_steps", "max_length"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be above 0, got {value}")

    def to_json(self) -> dict[str, Any]:
        """Return every setting by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def steps_of(settings: TrainSettings, rows: int) -> int:
    """Return the number of steps of a run over `rows` rows.

    Raises:
        UsageError: there are fewer rows than one batch.
    """
    if rows < settings.batch_size:
        raise UsageError(f"{rows} rows are fewer than batch_size {settings.batch_size}: lower it to {rows} or less")
    return settings.max_steps or max(1, math.ceil(settings.epochs * (rows // settings.batch_size)))


def split_batch(settings: TrainSettings, processes: int) -> tuple[int, int]:
    """Return (rows a forward on one process, forwards a step), whose product with `processes` is `batch_size`.

    Raises:
        UsageError: the processes cannot share the batch evenly.
    """
    if settings.batch_size % processes:
        raise UsageError(
            f"batch_size {settings.batch_size} cannot be shared by {processes} processes: use a multiple of it"
        )
    share = settings.batch_size // processes
    forwards = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= settings.micro_batch_size)
    return share // forwards, forwards


def training_arguments(settings: TrainSettings, output_dir: str, rows: int, *, autocast: bool) -> dict[str, Any]:
    """Return keyword arguments for TrainingArguments or SFTConfig.

    Args:
        settings: of the stage.
        output_dir: of its checkpoints.
        rows: number of training rows.
        autocast: compute in bfloat16 on weights of another type.
    """

    from llmrl.training.distributed import world_size
    from llmrl.training.reproducible import command_arguments

    size, forwards = split_batch(settings, world_size())
    return command_arguments(
        output_dir=output_dir,
        seed=settings.seed,
        max_steps=steps_of(settings, rows),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=forwards,
        learning_rate=settings.learning_rate,
        optim=OPTIMIZERS[settings.optimizer],
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=autocast,
        save_steps=settings.save_steps,
        logging_steps=settings.logging_steps,
        report_to=settings.report_to,
        disable_tqdm=settings.quiet,
        ddp_find_unused_parameters=None,  # as the trainer decides
    )

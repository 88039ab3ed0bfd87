"""What options of a training run mean to transformers' TrainingArguments."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from llmrl.errors import UsageError
from llmrl.hindsight.options import TrainConfig
from llmrl.training.distributed import check_launch, split_batch
from llmrl.training.reproducible import command_arguments

WARMUP = 0.05  # share of the steps over which the rates rise from 0; after it they fall along a cosine
_LAST = 0.05  # of the rate, at the end


def learning_rates(config: TrainConfig, parameters: int) -> tuple[float, float]:
    """Return the learning rates of the trunks and of the heads.

    Args:
        config: what is None is chosen.
        parameters: of the model.
    """
    rate = config.lr
    if rate is None and config.tuning == "lora":
        rate = 2e-4
    if rate is None:
        rate = next(
            (lr for size, lr in ((2e6, 2e-3), (2e7, 5e-4), (2e8, 1e-4), (2e9, 2e-5)) if parameters < size), 1e-5
        )
    return rate, config.heads_lr if config.heads_lr is not None else max(rate, 1e-3)


def steps_of(config: TrainConfig, rows: int) -> int:
    """Return the number of steps of a run over so many dialogues.

    Raises:
        UsageError: they do not fill one batch.
    """
    if rows < config.batch_size:
        raise UsageError(f"{rows} dialogues are fewer than --batch_size {config.batch_size}: lower it")
    return config.max_steps or max(1, math.ceil(config.epochs * (rows // config.batch_size)))


def training_arguments(config: TrainConfig, work_dir: Path, rows: int, learning_rate: float) -> TrainingArguments:
    """Return the arguments of the trainer.

    Raises:
        UsageError: a batch larger than the data.
        DistributedError: processes that would each train alone, or one that would split batches over several GPUs.
    """
    size, forwards = split_batch(config.batch_size, config.micro_batch_size)
    steps = steps_of(config, rows)
    bfloat16 = config.dtype == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    arguments = TrainingArguments(
        **command_arguments(
            output_dir=str(work_dir),
            seed=config.seed,
            max_steps=steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=forwards,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": _LAST},
            warmup_steps=math.ceil(WARMUP * steps),
            bf16=bfloat16,
            save_steps=config.save_steps,
            logging_steps=min(20, steps),
            report_to=config.report_to,
            disable_tqdm=config.quiet,
        )
    )
    check_launch(arguments)
    return arguments

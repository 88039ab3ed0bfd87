"""Supervised training on the best query of each state, under the bare prompt: context distillation (arXiv 2410.23214, sec. 4).

trl's SFTTrainer does the work, on token ids and a loss mask that stand in sft.jsonl. Nothing is encoded again and nothing cut.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl.leret.policy_files import open_policy
from llmrl.leret.preference_data import SftRow, fingerprint_rows, read_sft_rows
from llmrl.leret.stage import (
    TrainResult,
    choose_rows,
    model_card,
    prepare_stage,
    run_stage,
    silence,
)
from llmrl.leret.train_settings import TrainSettings, training_arguments
from llmrl.training.distributed import check_launch


def train_sft(
    model: Any,
    rows: Path | str | Sequence[SftRow],
    output_dir: Path | str,
    *,
    settings: TrainSettings | None = None,
    tokenizer: Any = None,
    base: Path | str | None = None,
    facts: Mapping[str, Any] | None = None,
    resume: str | bool | None = None,
) -> TrainResult:
    """Train a model, or a LoRA adapter, to write the completions of `rows`; the loss is the mean over completion tokens.

    Args:
        model: a folder of a model or of a PEFT adapter, a hub name, or a model in memory (with `tokenizer`).
        rows: sft.jsonl, or its rows.
        output_dir: gets checkpoints, metrics.jsonl, and at the end `final/`.
        settings: see TrainSettings; None is its defaults.
        tokenizer: of a model in memory.
        base: of the folder of an adapter; None is the base that it names.
        facts: for the model card: base, corpus, retriever, reward.
        resume: "latest", True or a checkpoint goes on from there; None starts anew.

    Returns:
        The folder that was saved, and the last numbers.

    Raises:
        DataError: a bad row, by line; rows that are too long; ids outside the vocabulary.
        UsageError: settings that exclude each other, a batch larger than the data, something not found.
        OutputError: `output_dir` holds checkpoints and `resume` is None.
        CheckpointError: the checkpoint belongs to another run or to other rows.
        ModelError: the model cannot be loaded, or what was saved does not load again.
    """
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from llmrl.training.metrics import MetricsCallback
    from llmrl.training.run_callback import RunFilesCallback

    settings = settings or TrainSettings()
    output_dir = prepare_stage(output_dir, settings, resume)
    rows = read_sft_rows(rows) if isinstance(rows, str | Path) else rows
    policy = open_policy(model, settings, tokenizer, base)
    kept, left_out, settings = choose_rows(rows, policy, settings)
    if settings.quiet:
        disable_progress_bars()
    arguments = training_arguments(settings, str(output_dir), len(kept), autocast=policy.autocast)
    # without max_length trl cuts nothing
    arguments = SFTConfig(**arguments, max_length=None, packing=False, completion_only_loss=True)
    check_launch(arguments)
    facts = dict(facts or {})
    trainer = _trainer_class()(
        model=policy.model,
        args=arguments,
        train_dataset=Dataset.from_list([_columns(row) for row in kept]),
        processing_class=policy.tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),  # the mask hides it
        callbacks=[MetricsCallback(), RunFilesCallback({"stage": "sft", **settings.to_json(), "facts": facts})],
    )
    trainer.run_facts = {"stage": "sft", "data": fingerprint_rows(kept)}
    if settings.quiet:
        silence(trainer)
    summary = "Trained to write the search query that retrieved best, the supervised stage of LeReT (arXiv 2410.23214)."
    card = model_card(policy, "Search policy, supervised stage", summary, facts, settings)
    return run_stage(trainer, policy, output_dir, card, resume, left_out)


@functools.cache
def _trainer_class() -> Any:
    from trl import SFTTrainer

    from llmrl.training.whole_batches import WholeBatchTrainer

    def no_card(self: Any, *args: Any, **kwargs: Any) -> None:
        """Write no card of trl's at every checkpoint: ours goes beside the final weights."""

    return type("LeretSFTTrainer", (WholeBatchTrainer, SFTTrainer), {"create_model_card": no_card})


def _columns(row: SftRow) -> dict[str, list[int]]:
    return {
        "input_ids": [*row.prompt_ids, *row.completion_ids],
        "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.completion_ids),
    }

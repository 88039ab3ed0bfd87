"""What both stages of LeReT share: refusals before anything is loaded, rows that fit, training and saving, the model card."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from llmrl.base_model import context_length
from llmrl.errors import DistributedError, OutputError
from llmrl.leret.policy_files import Policy, save_policy
from llmrl.leret.preference_data import Row, check_vocabulary, fit_to_length
from llmrl.leret.train_settings import TrainSettings, steps_of
from llmrl.training.distributed import check_processes, is_main_process, world_size
from llmrl.training.resume import list_checkpoints
from llmrl.training.tracking import check_tracker

logger = logging.getLogger(__name__)


def check_fresh(output_dir: Path | str, resume: str | bool | None) -> None:
    """Refuse a folder that holds checkpoints when the run is not asked to go on from them.

    Raises:
        OutputError: says how to go on.
    """
    found = list_checkpoints(output_dir)
    if found and not resume:
        raise OutputError(
            f"{output_dir} holds {found[-1].name} of an earlier run: go on with resume_from_checkpoint=latest, "
            "or name another folder"
        )


@dataclass(frozen=True)
class TrainResult:
    """What a stage ended with.

    Args:
        folder: the trained model or adapter.
        steps: updates taken since step 0.
        rows: rows (pairs) trained on.
        left_out: one line on rows that were too long, "" when there were none.
        metrics: last value of every number in metrics.jsonl.
    """

    folder: Path
    steps: int
    rows: int
    left_out: str
    metrics: dict[str, float]


def run_stage(
    trainer: Any, policy: Policy, output_dir: Path, card: dict[str, Any], resume: str | bool | None, left_out: str
) -> TrainResult:
    """Train, save `<output_dir>/final`, and return the result; the last part of both stages, on every process."""
    trainer.train(resume_from_checkpoint=resume)
    found = {
        key: value
        for row in trainer.state.log_history
        for key, value in row.items()
        if isinstance(value, int | float)
        and key not in ("step", "epoch", "total_flos")
        and not key.endswith(("_runtime", "_per_second"))
    }
    metrics = dict(sorted(found.items()))  # the log that a checkpoint brings back has lost the order
    steps, rows = trainer.state.global_step, len(trainer.train_dataset)
    shown = [("training rows", rows), ("steps", steps), *metrics.items()]
    card = {**card, "body": f"{card['body']}\n\n## Training\n\n{_table(shown)}"}
    folder = save_policy(trainer, policy, output_dir, card)
    return TrainResult(folder, steps, rows, left_out, metrics)


def model_card(
    policy: Policy, title: str, summary: str, facts: Mapping[str, Any], settings: TrainSettings
) -> dict[str, Any]:
    """Return arguments of `write_model_card`.

    Args:
        policy: what is trained.
        title: first heading.
        summary: one paragraph.
        facts: what the caller knows: corpus fingerprint, retriever, reward, ...; `base` replaces the name of the base.
        settings: of the stage.
    """
    facts = dict(facts)
    base = facts.pop("base", policy.base_name)
    load = "AutoPeftModelForCausalLM" if policy.is_lora else "AutoModelForCausalLM"
    package = "peft" if policy.is_lora else "transformers"
    options = [
        (k, v) for k, v in settings.to_json().items() if k not in ("report_to", "quiet", "save_steps", "logging_steps")
    ]
    body = f"## Use\n\n    from {package} import {load}\n    model = {load}.from_pretrained(FOLDER)\n"
    body += "\nPrompts are rendered with the chat template in this folder, the one of training.\n"
    body += f"\n## Data\n\n{_table(facts.items())}\n" if facts else ""
    body += f"\n## Settings\n\n{_table(options)}"
    tags = ["leret", "retrieval", *(["peft", "lora"] if policy.is_lora else [])]
    return {"title": title, "base_model": base, "summary": summary, "body": body, "tags": tags}


def prepare_stage(output_dir: Path | str, settings: TrainSettings, resume: str | bool | None) -> Path:
    """Check folder, tracker and processes before anything is loaded; return the folder.

    Raises:
        OutputError: the folder holds checkpoints and the run is not asked to go on from them.
        UsageError: the tracker is not installed.
        DistributedError: fewer processes than were asked for.
    """
    check_tracker(settings.report_to)
    check_processes(announce=not settings.quiet)
    if world_size() > 1 and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("1", "true"):
        # the reference is computed before FSDP hands out the weights, and all but one process would hold zeros
        raise DistributedError(
            "fsdp_cpu_ram_efficient_loading leaves the weights out of all processes but one: set it to false in the launch file"
        )
    output_dir = Path(output_dir).expanduser()
    check_fresh(output_dir, resume)
    output_dir.mkdir(parents=True, exist_ok=True)
    return output_dir


def choose_rows(rows: Sequence[Row], policy: Policy, settings: TrainSettings) -> tuple[list[Row], str, TrainSettings]:
    """Return the rows that fit the model, a line on those left out, and the settings; see `fit_to_length`, `check_vocabulary`.

    Where long rows are dropped, a batch is no larger than what is left of them.
    """
    check_vocabulary(rows, policy.bare.get_input_embeddings().weight.shape[0])
    longest = context_length(policy.bare, policy.tokenizer)
    if settings.max_length is not None:
        longest = min(
            settings.max_length, getattr(policy.bare.config, "max_position_embeddings", None) or settings.max_length
        )
    kept, left_out = fit_to_length(rows, longest, settings.long_rows)
    if settings.long_rows == "drop" and world_size() <= len(kept) < settings.batch_size:
        settings = replace(settings, batch_size=len(kept) // world_size() * world_size())
    steps = steps_of(settings, len(kept))
    if is_main_process():
        if not settings.quiet:
            print(batches_line(settings, len(kept), steps), flush=True)
        if left_out:
            logger.warning("%s", left_out)
        if settings.warmup_steps >= steps:
            logger.warning(
                "the learning rate rises over %d warm-up steps and the run has %d: lower warmup_steps",
                settings.warmup_steps,
                steps,
            )
    return kept, left_out, settings


def batches_line(settings: TrainSettings, rows: int, steps: int) -> str:
    """Return what a run over the rows is: its steps, and what whole batches leave out of each pass over the rows."""
    rest = rows % settings.batch_size
    left_out = f"; each epoch leaves out another {rest} of them, for batches are whole" if rest else ""
    return f"{rows} rows, {steps} steps of {settings.batch_size}{left_out}"


def silence(trainer: Any) -> None:
    """Take the printing callbacks off a trainer."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {key} | {f'{value:.6g}' if isinstance(value, float) else value} |" for key, value in rows]
    return "\n".join(["| | |", "| --- | --- |", *lines])

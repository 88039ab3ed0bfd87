"""`llmrl hindsight forward`: a model of the user in logged dialogues, to play on with; trl's SFT of a LoRA adapter.

A model that is told to play a user is friendlier than people are (arXiv 2605.09808 measures what that costs); one that learnt
from them is the better choice. It learns the user's turns alone, each dialogue as the user lived it, and where a dialogue came
to its end also that it is over. A share of the dialogues is left out of training: on these `regenerate` compares it
with people.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llmrl.base_model import BaseModel, context_length, default_device, load_base
from llmrl.config import to_flat
from llmrl.errors import DataError, ModelError, UsageError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.hindsight.datasets import read_files
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.model import make_trainable
from llmrl.hindsight.regeneration.opening import USER_FILE
from llmrl.hindsight.regeneration.options import ForwardConfig
from llmrl.hindsight.regeneration.prompts import END, USER
from llmrl.rollout.logged import encode_messages
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.users import users_view
from llmrl.training.distributed import check_launch, check_processes, is_main_process, split_batch
from llmrl.training.resume import check_checkpoints, train_from
from llmrl.training.run import write_model_card, write_run_files
from llmrl.training.tracking import check_tracker
from llmrl.types import Message

Row = dict[str, list[int]]
_WARMUP = 0.05


def lived_by_user(dialogue: Dialogue, persona: str = USER, end: str = END) -> list[Message]:
    """Return a dialogue as its user lived it, with what they say at its end, if it came to one.

    Args:
        dialogue: system messages and tools are between the agent and its world.
        persona: the system message.
        end: said at the end, behind the user's last words or alone.
    """
    messages = users_view(dialogue.messages, persona)
    if not dialogue.done:
        return messages
    last = messages[-1]
    if last.role == AGENT:
        return [*messages[:-1], Message(AGENT, f"{last.content} {end}")]
    return [*messages, Message(AGENT, end)]


def encode_users(tokenizer: Any, dialogues: Sequence[Dialogue], longest: int) -> tuple[list[Row], dict[str, int]]:
    """Return a row of ids and mask for each dialogue that the model can read, and how many it cannot, by reason."""
    rows, left_out = list[Row](), dict[str, int]()
    for dialogue in dialogues:
        reason = None
        if "regenerated" in dialogue.provenance:  # what models said is not what users say
            reason = "regenerated"
        elif not any(message.role == "user" for message in dialogue.messages):
            reason = "the user says nothing"
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        try:
            turns = encode_messages(tokenizer, lived_by_user(dialogue))
        except DataError:
            reason = "cannot be written by this model"
        else:
            row = {
                "input_ids": [token for turn in turns for token in turn.token_ids],
                "completion_mask": [mask for turn in turns for mask in turn.loss_mask],
            }
            if len(row["input_ids"]) > longest:
                reason = "too long"
            else:
                rows.append(row)
        if reason is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
    return rows, left_out


def train(config: ForwardConfig) -> dict[str, Any]:
    """Train the adapter, write its folder, and return the report; call it on every process.

    Raises:
        DataError: too few dialogues.
        UsageError: options that do not fit.
        OutputError: the folder, or checkpoints of an earlier run, hold something.
        ModelError: the model cannot be read, or what was saved is not what was trained.
    """
    started = time.monotonic()
    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    work_dir = folder.with_name(f"{folder.name}.training")
    check_tracker(config.report_to)
    check_processes(announce=False)
    check_checkpoints(work_dir, config.resume_from_checkpoint, overwrite=config.overwrite)
    read = read_files(config.data, config.data_format)
    base = load_base(config.model, dtype="auto" if torch.cuda.is_available() else "float32", revision=config.revision)
    longest = context_length(base.model, base.tokenizer, config.max_length)
    order = sorted(read.dialogues, key=lambda d: derive_seed(config.seed, "held out", d.id))
    cut = max(1, round(config.held_out * len(order)))
    rows, left_out = encode_users(base.tokenizer, order[cut:], longest)
    unseen, _ = encode_users(base.tokenizer, order[:cut], longest)
    if not rows or not unseen:
        raise DataError(
            f"{len(order)} dialogues leave {len(rows)} to train on and {len(unseen)} held out; expected some of each"
        )
    shown = is_main_process() and not config.quiet
    if shown:
        aside = "".join(f", {count} {reason}" for reason, count in left_out.items())
        print(f"{read.summary()}: {len(rows)} to train on, {cut} held out{aside}", flush=True)
    base.model.to(default_device())
    before = nll(base.model, unseen)
    trainer = _trainer(config, base, rows, work_dir)
    check_processes(announce=shown)
    train_from(trainer, config.resume_from_checkpoint)
    if not trainer.is_world_process_zero():
        return {}
    report = {
        "dialogues": {"train": len(rows), "held_out": cut, "left_out": left_out, "kept_aside": len(read.refused)},
        "held_out_nll": {"before": before, "after": nll(trainer.model, unseen)},
        "steps": trainer.state.global_step,
        "seconds": time.monotonic() - started,
    }
    _save(config, folder, trainer, base.tokenizer, report, [dialogue.id for dialogue in order[:cut]], read)
    shutil.rmtree(work_dir)
    if shown:
        found = report["held_out_nll"]
        print(
            f"{report['steps']} steps, {report['seconds']:.0f} s; held-out users' words: {found['before']:.3f} -> "
            f"{found['after']:.3f} nats a token\n{folder}",
            flush=True,
        )
    return report


@torch.no_grad()
def nll(model: Any, rows: Sequence[Row]) -> float:
    """Return the mean negative log-likelihood of the tokens under the mask, in nats a token."""
    was_training = model.training
    model.eval()
    device, total, count = next(model.parameters()).device, 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        mask = torch.tensor(row["completion_mask"], device=device)[1:].bool()
        losses = torch.nn.functional.cross_entropy(
            model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:], reduction="none"
        )
        total, count = total + float(losses[mask].sum()), count + int(mask.sum())
    model.train(was_training)
    return total / count


def _trainer(config: ForwardConfig, base: BaseModel, rows: Sequence[Row], work_dir: Path) -> Any:
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, ProgressCallback
    from trl import SFTConfig
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from llmrl.training.metrics import MetricsCallback
    from llmrl.training.reproducible import command_arguments
    from llmrl.training.run_callback import RunFilesCallback

    if len(rows) < config.batch_size:
        raise UsageError(f"{len(rows)} dialogues are fewer than --batch_size {config.batch_size}: lower it")
    disable_progress_bars()
    steps = config.max_steps or max(1, math.ceil(config.epochs * (len(rows) // config.batch_size)))
    size, forwards = split_batch(config.batch_size, config.micro_batch_size)
    arguments = SFTConfig(
        **command_arguments(
            output_dir=str(work_dir), seed=config.seed, max_steps=steps, per_device_train_batch_size=size,
            gradient_accumulation_steps=forwards, learning_rate=config.lr, lr_scheduler_type="cosine",
            warmup_steps=math.ceil(_WARMUP * steps), save_steps=config.save_steps, logging_steps=min(10, steps),
            report_to=config.report_to, disable_tqdm=config.quiet, ddp_find_unused_parameters=None,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(), gradient_checkpointing=False,
        ),
        max_length=None, packing=False, completion_only_loss=True,
    )  # fmt: skip
    check_launch(arguments)
    model = make_trainable(base.model, "lora", config.lora_r, config.seed)
    model.train()
    trainer = _trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=base.tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),  # the mask hides it
        callbacks=[MetricsCallback(), RunFilesCallback(to_flat(config))],
    )
    digest = hashlib.sha256(json.dumps([base.reference.weights, list(rows)]).encode()).hexdigest()
    trainer.run_facts = {"run": f"sha256:{digest[:32]}"}
    if config.quiet:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
    return trainer


@functools.cache
def _trainer_class() -> Any:
    from trl import SFTTrainer

    from llmrl.training.whole_batches import WholeBatchTrainer

    class UserTrainer(WholeBatchTrainer, SFTTrainer):
        """trl's SFT on whole global batches, with checkpoints that resume exactly."""

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Write no card of trl's at every checkpoint: ours goes beside the final weights."""

    return UserTrainer


def _save(
    config: ForwardConfig,
    folder: Path,
    trainer: Any,
    tokenizer: Any,
    report: dict[str, Any],
    held_out: list[str],
    read: Any,
) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from llmrl.rollout.adapters import WEIGHTS, check_adapter

    with staging_folder(folder) as staging:
        trainer.model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        check_adapter(staging)  # what vLLM would refuse
        live = get_peft_model_state_dict(trainer.model, save_embedding_layers=False)
        saved = load_file(staging / WEIGHTS)
        if saved.keys() != live.keys() or any(not torch.equal(saved[k], live[k].cpu()) for k in live):
            raise ModelError(
                "what was saved differs from what was trained: the disk or the file system is at fault, run again"
            )
        read.write_aside(staging / "kept_aside.jsonl")
        write_json(staging / USER_FILE, {"persona": USER, "held_out": held_out})
        write_json(staging / "report.json", report)
        write_run_files(staging, to_flat(config))
        found = report["held_out_nll"]
        write_model_card(
            staging,
            title="Model of the users in dialogues",
            base_model=config.model,
            summary=(
                f"A LoRA adapter that speaks as the users of {report['dialogues']['train']} logged dialogues: "
                f"{found['after']:.3f} nats a token on held-out ones, {found['before']:.3f} before training."
            ),
            body=f"\n## Use\n\n    llmrl hindsight regenerate --data LOGS.jsonl --output new.jsonl --forward {folder.name}\n",
            tags=["user-simulation", "peft", "lora"],
        )
        for name in ("metrics.jsonl", "timings.jsonl"):
            if (Path(trainer.args.output_dir) / name).is_file():
                shutil.copyfile(Path(trainer.args.output_dir) / name, staging / name)
        publish_folder(staging, folder)

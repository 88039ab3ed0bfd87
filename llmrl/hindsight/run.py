"""`llmrl hindsight train`: logged dialogues in, a policy out that is better than what is in the logs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback

from llmrl.base_model import BaseModel, context_length, default_device, load_base
from llmrl.config import to_flat
from llmrl.errors import DistributedError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.hindsight.batches import DialogueCollator, check_packing, examples_of
from llmrl.hindsight.calibration import ToGo, alarms, to_go_of
from llmrl.hindsight.datasets import read_files
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.encode import Encoded, encode_dialogues, without_copies
from llmrl.hindsight.model import DialogueModel, make_trainable
from llmrl.hindsight.objective import VALUED, Objective
from llmrl.hindsight.options import TrainConfig
from llmrl.hindsight.policy_folder import ASIDE, STALE, save_policy, value_spec
from llmrl.hindsight.preferences import PairCollator, add_reference, pair_examples, turn_pairs
from llmrl.hindsight.settings import learning_rates, training_arguments
from llmrl.hindsight.trainer import DialogueTrainer
from llmrl.training.distributed import check_processes, is_main_process
from llmrl.training.metrics import MetricsCallback, read_metrics
from llmrl.training.resume import check_checkpoints, train_from
from llmrl.training.run import write_model_card, write_run_files
from llmrl.training.run_callback import RunFilesCallback
from llmrl.training.tracking import check_tracker
from llmrl.value_heads import ValueHead, initialise_values

# the others learn from what whole dialogues earned, so that a copy that ends otherwise says something new
_EACH_ONCE = ("ilql", "bc")
_PROBE = 256  # tokens; logits over a large vocabulary are compared on a CPU


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as the options say, write the policy's folder, and return the report; call it on every process.

    Raises:
        DataError: dialogues that cannot be learnt from.
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
    base = load_base(config.model, dtype=_dtype(config), revision=config.revision)
    longest = context_length(base.model, base.tokenizer, config.max_length)
    shown = is_main_process() and not config.quiet
    rows, read = encode_dialogues(base.tokenizer, read, longest, config.window, progress=shown)
    if shown:
        print(read.summary(), flush=True)
        _tell_cut_off(config, read.dialogues)
    used = best(rows, config.share) if config.method == "filtered-bc" else rows
    copies = 0
    if config.method in _EACH_ONCE:
        used, copies = without_copies(rows, read.dialogues)
        if copies and shown:
            print(
                f"{copies} turns are copies of other dialogues', from before an edit: read, and not learnt again",
                flush=True,
            )
    to_go = to_go_of(used, config.discount, config.discount_unit)
    trainer = _trainer(config, base, used, to_go, work_dir)
    check_processes(announce=not config.quiet)  # with their group, which the trainer's arguments started
    train_from(trainer, config.resume_from_checkpoint)
    if not trainer.is_world_process_zero():
        return {}
    last = _last(work_dir)
    report = {
        "method": config.method,
        "dialogues": {
            "read": len(read.dialogues),
            "kept_aside": len(read.refused),
            "kept_aside_by_reason": dict(Counter(reason for _, reason, _, _ in read.refused)),
            "cut_off": sum(dialogue.truncated for dialogue in read.dialogues),
            "used": len({row.id for row in used}),
            "copied_turns": copies,
        },
        "returns": _summary(list({row.id: row.total for row in rows}.values())),
        "reward_scale": to_go.scale,
        "steps": trainer.state.global_step,
        "last": last,
        "alarms": alarms(last["value"], to_go) if "value" in last else [],
        "seconds": time.monotonic() - started,
    }
    with staging_folder(folder) as staging:
        read.write_aside(staging / ASIDE)
        _write(staging, folder.name, config, trainer.model, base.tokenizer, _probe(used), report)
        for name in ("metrics.jsonl", "timings.jsonl"):
            if (work_dir / name).is_file():
                shutil.copyfile(work_dir / name, staging / name)
        publish_folder(staging, folder, stale=STALE)
    shutil.rmtree(work_dir)
    for alarm in report["alarms"]:
        print(f"llmrl: {alarm}", file=sys.stderr, flush=True)
    if not config.quiet:
        learnt = report["dialogues"]["used"]
        print(f"{config.method} on {learnt} dialogues, {report['steps']} steps, {report['seconds']:.0f} s", flush=True)
        print(folder, flush=True)
    return report


def _probe(rows: Sequence[Encoded]) -> list[int]:
    """Return ids of a dialogue to compare logits on."""
    return max((list(row.input_ids[: min(row.lengths[0], _PROBE)]) for row in rows[:32]), key=len)


def _tell_cut_off(config: TrainConfig, dialogues: Sequence[Dialogue]) -> None:
    cut = sum(dialogue.truncated for dialogue in dialogues)
    if cut and config.method not in ("ilql", "bc"):
        print(
            f"{cut} of {len(dialogues)} dialogues were cut off: {config.method} takes what they earned up to there for all "
            "that they would have earned; ilql bootstraps",
            flush=True,
        )


def _write(
    staging: Path,
    name: str,
    config: TrainConfig,
    model: DialogueModel,
    tokenizer: Any,
    probe: list[int],
    report: dict[str, Any],
) -> None:
    """Write the policy, which is compared on `probe`, and what there is to say about it."""
    saved = save_policy(
        model,
        tokenizer,
        staging,
        steered=config.method in VALUED,
        scale=report["reward_scale"],
        beta=config.beta,
        support=config.support,
        probe=probe,
        window=config.window,
        backup=config.backup,
    )
    report["difference"] = saved.difference
    write_json(staging / "report.json", report)
    write_run_files(staging, to_flat(config))
    _card(staging, name, config, report)


def best(rows: Sequence[Encoded], share: float) -> list[Encoded]:
    """Return the rows of the dialogues of the highest returns, in their order; of equal ones the first."""
    totals = {row.id: row.total for row in rows}
    kept = set(sorted(totals, key=lambda one: -totals[one])[: max(1, round(share * len(totals)))])
    return [row for row in rows if row.id in kept]


def _dtype(config: TrainConfig) -> str:
    """A step of 1e-4 is lost in a bfloat16 weight: what is trained as a whole, or on a CPU, is float32."""
    if config.dtype != "auto" or (config.tuning == "lora" and torch.cuda.is_available()):
        return config.dtype
    return "float32"


def _trainer(
    config: TrainConfig, base: BaseModel, rows: Sequence[Encoded], to_go: ToGo, work_dir: Path
) -> DialogueTrainer:
    objective = Objective(
        config.method,
        config.expectile,
        config.cql,
        config.value_weight,
        config.awr_temperature,
        config.dpo_beta,
        to_go.least,
        to_go.most,
    )
    head = None
    if objective.needs_values:
        head = ValueHead(value_spec(base.model, config.head, config.head_size))
        initialise_values(head, torch.Generator().manual_seed(config.seed))
        if config.method == "awr":  # V alone is learnt
            for parameter in head.q_parameters():
                parameter.requires_grad_(False)
    size = sum(p.numel() for p in base.model.parameters())
    model = DialogueModel(make_trainable(base.model, config.tuning, config.lora_r, config.seed), head, config.trunk)
    model.check_logits(_probe(rows))
    examples, collator = _data(config, model, rows, to_go.scale)
    rate, heads_rate = learning_rates(config, size)
    options = to_flat(config)
    trainer = DialogueTrainer(
        model=model,
        args=training_arguments(config, work_dir, len(examples), rate),
        train_dataset=examples,
        data_collator=collator,
        callbacks=[MetricsCallback(), RunFilesCallback(options)],
        objective=objective,
        heads_lr=heads_rate,
        polyak=config.polyak,
        tokens=float(np.mean([len(e["backup"].position) for e in examples])) if config.method != "dpo" else 1.0,
        states=float(np.mean([len(e["backup"].value_position) for e in examples])) if config.method != "dpo" else 1.0,
        run_facts={"run": _fingerprint(rows, base, options)},
    )
    if trainer._sharded:
        raise DistributedError(
            "policy and values are trained without FSDP and DeepSpeed: take them out of the launch file, or use torchrun"
        )
    if config.quiet:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
    return trainer


def _data(
    config: TrainConfig, model: DialogueModel, rows: Sequence[Encoded], scale: float
) -> tuple[list[dict[str, Any]], Any]:
    """Return what is dealt out, and how it is collated."""
    if config.method != "dpo":
        examples = examples_of(rows, config.backup, config.discount, config.discount_unit, scale)
        collator = DialogueCollator(packing=config.packing)
        if config.packing:
            check_packing(model, examples)
        return examples, collator
    pairs = pair_examples(turn_pairs(rows, config.discount, config.discount_unit))
    add_reference(model, pairs, config.micro_batch_size or config.batch_size, default_device())
    return pairs, PairCollator()


def _fingerprint(rows: Sequence[Encoded], base: BaseModel, options: dict[str, Any]) -> str:
    """Return a hash of all that decides what a run ends with; when checkpoints are written decides nothing."""
    free = {
        "save_steps", "report_to", "quiet", "micro_batch_size", "overwrite", "resume_from_checkpoint", "output_dir", "data",
        "model", "beta", "support",
    }  # fmt: skip
    identity = [base.reference.weights, base.reference.tokenizer, base.reference.template]
    digest = hashlib.sha256(json.dumps([identity, {k: v for k, v in options.items() if k not in free}]).encode())
    for row in rows:
        spans = [(span.start, span.stop, span.reward) for span in row.spans]
        digest.update(json.dumps([row.id, row.input_ids, spans, row.done]).encode())
    return "sha256:" + digest.hexdigest()[:32]


def _summary(totals: Sequence[float]) -> dict[str, float]:
    values = np.array(totals)
    return {"mean": float(values.mean()), "least": float(values.min()), "most": float(values.max())}


def _last(work_dir: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in read_metrics(work_dir):
        found |= {key: value for key, value in row.items() if isinstance(value, int | float)}
    return found


def _card(staging: Path, name: str, config: TrainConfig, report: dict[str, Any]) -> None:
    summary = (
        f"A policy for dialogues, trained by {config.method} on {report['dialogues']['used']} logged dialogues of a mean "
        f"return of {report['returns']['mean']:.3g}."
    )
    separate = config.trunk == "separate" and config.method in VALUED
    serve = "" if separate else f"    llmrl serve {name}\n"
    reads = f"\nIt reads the last {config.window} exchanges: ask it with no more messages.\n" if config.window else ""
    body = f"""
## Use

{serve}    llmrl hindsight eval --policy {name} --env ENV --episodes 200 --output_dir report
{reads}"""
    write_model_card(
        staging, title="Dialogue policy", base_model=config.model, summary=summary, body=body, tags=["offline-rl"]
    )

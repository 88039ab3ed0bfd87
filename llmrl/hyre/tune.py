"""A run that trains heads and backbone together: from pairs and their frozen features to an ensemble on a base of its own.

Checkpoints, metrics.jsonl and, at the end, `final/` (`llmrl.hyre.tuned_folder`) lie in a work folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback

from llmrl.errors import DataError, DistributedError
from llmrl.hyre.backbone import (
    EnsembleRewardModel,
    EnsembleTrainer,
    Objective,
    RewardPairCollator,
    make_trainable,
    unfold,
)
from llmrl.hyre.diversity import HeadPlan
from llmrl.hyre.ensemble import RewardEnsemble
from llmrl.hyre.features import CausalFeatures
from llmrl.hyre.fit import FitSettings, HeadShape, Pairs, TrainedHeads, feature_scale, fit_heads
from llmrl.hyre.pairs import Pair
from llmrl.hyre.tune_settings import BackboneSettings, training_arguments
from llmrl.hyre.tuned_folder import FINAL, save_trained
from llmrl.training.distributed import check_processes
from llmrl.training.metrics import MetricsCallback
from llmrl.training.resume import check_checkpoints, train_from
from llmrl.training.run_callback import RunFilesCallback
from llmrl.training.tracking import check_tracker, progress_bar


def work_folder(folder: Path) -> Path:
    """Return where a run that will write `folder` keeps its checkpoints: beside it, until it is whole."""
    return folder.with_name(f"{folder.name}.training")


def check_start(work_dir: Path, settings: BackboneSettings, resume: str | None, *, overwrite: bool) -> None:
    """Refuse what would fail later, before features are computed.

    Raises:
        OutputError: checkpoints of an earlier run, and the run was asked neither to go on nor to start anew.
        CheckpointError: the checkpoint to go on from is not there or not whole.
        DistributedError: another number of processes than was asked for.
        UsageError: a batch that the processes cannot share, a tracker that is not installed.
    """
    check_tracker(settings.report_to)
    check_processes(announce=False)
    settings.share()
    check_checkpoints(work_dir, resume, overwrite=overwrite)


def train_backbone(
    base: CausalFeatures,
    pairs: Sequence[Pair],
    reads: str,
    examples: Pairs,
    plan: HeadPlan,
    work_dir: Path,
    *,
    shape: HeadShape | None = None,
    fit: FitSettings | None = None,
    settings: BackboneSettings | None = None,
    resume: str | None = None,
    overwrite: bool = False,
) -> RewardEnsemble | None:
    """Train K heads and the LM below them; call it on every process.

    Args:
        base: the LM; it is changed, and of no use afterwards.
        pairs: N.
        reads: "answer" or "dialogue", see `llmrl.hyre.features.embed_pairs`.
        examples: the pairs' features on the base as it is, and their margins.
        plan: which pairs each head sees, and its sign.
        work_dir: gets checkpoints, metrics.jsonl and at the end `final/`.
        shape: of the heads.
        fit: of the heads' start; l2, center and seed hold for all of the training.
        settings: of the training.
        resume: "latest" or a checkpoint goes on from there; None starts anew.
        overwrite: remove the checkpoints of an earlier run.

    Returns:
        The ensemble in `work_dir/final`, as it was read back; None on all processes but the first.

    Raises:
        OutputError, UsageError, DistributedError, CheckpointError: see `check_start` and `training_arguments`; also FSDP or
            DeepSpeed, and a checkpoint of another run.
        DataError: a text longer than the base reads.
        ModelError: what was saved does not score as what was trained.
    """
    shape, fit, settings = shape or HeadShape(), fit or FitSettings(), settings or BackboneSettings()
    check_start(work_dir, settings, resume, overwrite=overwrite)
    arguments = training_arguments(work_dir, settings, len(pairs), len(plan.names))
    check_processes(announce=not settings.quiet)
    # clusters of features may differ by a rounding between machines: the first process's plan holds for all
    plan = replace(plan, rows=broadcast(torch.from_numpy(plan.rows).to(arguments.device)).cpu().numpy())
    with progress_bar("heads", fit.steps, unit="step", quiet=settings.quiet) as advance:
        heads = start_heads(examples, plan, shape, fit, advance)
    model = EnsembleRewardModel(make_trainable(base.base.model, settings.tuning, settings.lora_r, settings.seed), heads)
    rows = encode_pairs(base, pairs, reads, examples.margin, plan)
    options = {"base": base.name, "reads": reads, **asdict(shape), **asdict(fit), **asdict(settings)}
    trainer = EnsembleTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=RewardPairCollator(),
        callbacks=[MetricsCallback(), RunFilesCallback(options)],
        objective=Objective(torch.from_numpy(plan.signs), fit.l2, fit.center),
        heads_lr=settings.heads_lr,
        run_facts={"run": _fingerprint(rows, plan, [*base.identity, reads], shape, fit, settings)},
    )
    _train(trainer, settings, resume)
    if not trainer.is_world_process_zero():
        return None
    return save_trained(model, base, rows, pairs, reads, plan, work_dir / FINAL)


def _train(trainer: EnsembleTrainer, settings: BackboneSettings, resume: str | None) -> None:
    if trainer._sharded:
        raise DistributedError(
            "heads and backbone are trained without FSDP and DeepSpeed: take them out of the launch file, or use torchrun"
        )
    if settings.quiet:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
    train_from(trainer, resume)


def start_heads(
    examples: Pairs,
    plan: HeadPlan,
    shape: HeadShape,
    fit: FitSettings,
    advance: Callable[[int, int], None] | None = None,
) -> TrainedHeads:
    """Return heads in training at the optimum on cached features, with the scale of these features."""
    folded = fit_heads(examples, plan, shape, fit, advance=advance)
    shift, scale = feature_scale(examples)
    heads = TrainedHeads(plan.rows.shape[0], examples.chosen.shape[1], shape, shift, scale, fit.seed)
    unfold(folded, heads)
    return heads


def encode_pairs(
    base: CausalFeatures, pairs: Sequence[Pair], reads: str, margin: Tensor | None, plan: HeadPlan
) -> list[dict[str, Any]]:
    """Return the data set: ids of both texts, N times the weights of each head `[K]`, and the margin.

    Raises:
        DataError: a text longer than the base reads, see `CausalFeatures.ids`.
    """
    weights = torch.from_numpy(len(pairs) * plan.rows.T).contiguous()
    made = []
    for i, pair in enumerate(pairs):
        row: dict[str, Any] = {"weights": weights[i], "margin": 0.0 if margin is None else float(margin[i])}
        for side in ("chosen", "rejected"):
            text = base.text(pair.prompt if reads == "dialogue" else (), getattr(pair, side))
            try:
                row[side] = base.ids(text)
            except DataError as error:
                raise DataError(f"{pair.where}: {side}: {error}") from None
        made.append(row)
    return made


def _fingerprint(
    rows: Sequence[dict[str, Any]],
    plan: HeadPlan,
    identity: Sequence[str],
    shape: HeadShape,
    fit: FitSettings,
    settings: BackboneSettings,
) -> str:
    """Return a hash of all that decides what a run ends with; when checkpoints are written decides nothing."""
    free = ("save_steps", "logging_steps", "report_to", "quiet", "micro_batch_size")
    options = [asdict(shape), asdict(fit), {k: v for k, v in asdict(settings).items() if k not in free}]
    digest = hashlib.sha256(json.dumps([list(identity), options]).encode())
    for row in rows:
        digest.update(json.dumps([row["chosen"], row["rejected"], row["margin"]]).encode())
    digest.update(plan.rows.tobytes() + plan.signs.tobytes())
    return "sha256:" + digest.hexdigest()[:32]

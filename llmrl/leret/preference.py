"""Preference training on pairs of queries: IPO as in the paper (summed log-ratios), IPO as in trl (averaged), or DPO.

Chosen and rejected go through the model in one forward; the reference is a table (reference.py), so no second model is loaded.
A step's loss is the mean over the pairs of its global batch, however many processes and forwards share it:

    loss = 1 / pairs * sum_i l(log-ratios of pair i)      losses.py; arXiv 2410.23214, sec. 4; arXiv 2310.12036, eq. 17

Dropout is off, as in trl: the reference was computed without it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from llmrl.errors import UsageError, did_you_mean
from llmrl.leret.collate import PairCollator
from llmrl.leret.losses import (
    REDUCTIONS,
    dpo_loss,
    implied_margin,
    ipo_loss,
    log_ratios,
    preference_metrics,
)
from llmrl.leret.pair_forward import completion_logps
from llmrl.leret.policy_files import open_policy
from llmrl.leret.preference_data import PairRow, fingerprint_rows, read_pairs
from llmrl.leret.reference import REFERENCES, reference_logps
from llmrl.leret.stage import (
    TrainResult,
    choose_rows,
    model_card,
    prepare_stage,
    run_stage,
    silence,
)
from llmrl.leret.train_settings import TrainSettings, training_arguments
from llmrl.training.distributed import check_launch, is_main_process
from llmrl.training.whole_batches import WholeBatchTrainer

LOSSES = ("ipo", "dpo")
# more than this for one token is a beta that belongs to the other reduction, not a wish
_ABSURD_PER_TOKEN = 3.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objective:
    """What preference training minimises.

    Args:
        loss: "ipo" or "dpo".
        beta: tau of IPO, or beta of DPO.
        reduction: of IPO: "sum" over a query's tokens (the paper), or "mean" (trl).

    Raises:
        UsageError: an unknown word, or beta not above 0.
    """

    loss: str = "ipo"
    beta: float = 0.05
    reduction: str = "sum"

    def __post_init__(self) -> None:
        for name, valid in (("loss", LOSSES), ("reduction", REDUCTIONS)):
            if getattr(self, name) not in valid:
                raise UsageError(
                    f"{name}: {getattr(self, name)!r} is not a choice{did_you_mean(getattr(self, name), valid)}"
                )
        if not self.beta > 0:
            raise UsageError(f"beta must be above 0, got {self.beta}")

    @property
    def target(self) -> dict[str, float]:
        """The margin IPO asks for, under the name of the metric it is to be compared with; DPO asks for none."""
        if self.loss == "dpo":
            return {}
        return {"target_margin" if self.reduction == "sum" else "target_margin_per_token": 1 / (2 * self.beta)}

    def describe(self, mean_length: float) -> tuple[str, str]:
        """Return one line on the margin at queries of `mean_length` tokens, and a warning, "" when there is none."""
        if self.loss == "dpo":
            return f"dpo, beta {self.beta:g}: no target margin; the loss falls as long as the margin grows", ""
        total, per_token = implied_margin(self.beta, self.reduction, mean_length)
        parts = [f"{_short(total)} nats a pair", f"{_short(per_token)} nats a token"]
        first, second = parts if self.reduction == "sum" else reversed(parts)
        line = f"ipo ({self.reduction}), beta {self.beta:g}: target {first}, {second} at {mean_length:.0f} tokens"
        if per_token <= _ABSURD_PER_TOKEN:
            return line, ""
        warning = f"{per_token:.1f} nats a token is more than training can or should reach"
        if self.reduction == "mean":
            same = self.beta * mean_length
            warning += f": the paper's beta belongs to reduction=sum, with mean the same margin is beta {same:.2g}"
        return line, f"{warning}; raise beta"


class PreferenceTrainer(WholeBatchTrainer):
    """Trainer of an Objective on batches of PairCollator with reference log-probabilities in them.

    Attributes:
        objective: what is minimised; set before training.
    """

    objective: Objective = Objective()
    loss_is_scaled_for_ga = True
    checkpoint_attributes = (*WholeBatchTrainer.checkpoint_attributes, "_sums")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, float] = {}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the forwards of a step, and the pairs of all of them on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(len(batch["ref_chosen"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(pairs, reduction="sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return this forward's share of the loss of the global batch."""
        chosen, rejected = completion_logps(model, inputs)
        ratios = log_ratios(chosen, rejected, inputs["ref_chosen"], inputs["ref_rejected"])
        objective = self.objective
        if objective.loss == "ipo":
            losses = ipo_loss(ratios, objective.beta, objective.reduction)
        else:
            losses = dpo_loss(ratios, objective.beta)
        means = {
            **preference_metrics(ratios),
            "logps_chosen": chosen.total.detach().mean().item(),
            "logps_rejected": rejected.total.detach().mean().item(),
        }
        for name, value in {**means, "pairs": 1.0}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * len(losses)
        # DDP averages gradients over processes; the loss is divided by the pairs of all of them
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add means over the pairs since the last log, over all processes."""
        if self._sums:
            names = sorted(self._sums)
            sums = torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=self.args.device)
            totals = dict(zip(names, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
            pairs = totals.pop("pairs")
            logs = {**logs, **{name: total / pairs for name, total in totals.items()}, **self.objective.target}
            self._sums = {}
        super().log(logs, start_time)


def train_preference(
    model: Any,
    pairs: Path | str | Sequence[PairRow],
    output_dir: Path | str,
    *,
    settings: TrainSettings | None = None,
    objective: Objective | None = None,
    reference: str = "sft",
    tokenizer: Any = None,
    base: Path | str | None = None,
    facts: Mapping[str, Any] | None = None,
    resume: str | bool | None = None,
) -> TrainResult:
    """Train a model, or a LoRA adapter, to prefer the chosen completion of each pair.

    Args:
        model: a folder of a model or of a PEFT adapter (what the supervised stage left), a hub name, or a model in memory
            (with `tokenizer`).
        pairs: pairs.jsonl, or its rows.
        output_dir: gets reference.safetensors, checkpoints, metrics.jsonl, and at the end `final/`.
        settings: see TrainSettings; None is its defaults.
        objective: see Objective; None is the paper's.
        reference: "sft", the model as it is given, or "base", with its adapter switched off.
        tokenizer: of a model in memory.
        base: of the folder of an adapter; None is the base that it names.
        facts: for the model card: base, corpus, retriever, reward.
        resume: "latest", True or a checkpoint goes on from there; `model` must be what the run began with.

    Returns:
        The folder that was saved, and the last numbers.

    Raises:
        DataError, UsageError, OutputError, ModelError: as `train_sft`.
        CheckpointError: pairs, model or objective are not those the run began with.
    """
    from llmrl.training.metrics import MetricsCallback
    from llmrl.training.run_callback import RunFilesCallback

    settings, objective = settings or TrainSettings(), objective or Objective()
    if reference not in REFERENCES:
        raise UsageError(f"reference: {reference!r} is not a choice{did_you_mean(reference, REFERENCES)}")
    output_dir = prepare_stage(output_dir, settings, resume)
    pairs = read_pairs(pairs) if isinstance(pairs, str | Path) else pairs
    policy = open_policy(model, settings, tokenizer, base)
    rows, left_out, settings = choose_rows(pairs, policy, settings)
    _announce(objective, rows, settings.quiet)
    disable_dropout(policy.model)
    arguments = TrainingArguments(**training_arguments(settings, str(output_dir), len(rows), autocast=policy.autocast))
    check_launch(arguments)
    options = {"stage": "preference", **asdict(objective), "reference": reference, **settings.to_json()}
    facts = dict(facts or {})
    trainer = PreferenceTrainer(
        model=policy.model,
        args=arguments,
        processing_class=policy.tokenizer,
        data_collator=PairCollator(),
        callbacks=[MetricsCallback(), RunFilesCallback({**options, "facts": facts})],
    )
    trainer.objective = objective
    trainer.run_facts = {**asdict(objective), "reference": reference, "data": fingerprint_rows(rows)}
    trainer.train_dataset = with_reference(trainer, rows, reference, resumed=bool(resume), quiet=settings.quiet)
    if settings.quiet:
        silence(trainer)
    summary = "Trained to prefer search queries that retrieved better, by LeReT (arXiv 2410.23214)."
    facts = {**facts, "loss": objective.loss, "beta": objective.beta, "reference": reference}
    if objective.loss == "ipo":
        facts["reduction"] = objective.reduction
    card = model_card(policy, "Search policy", summary, facts, settings)
    return run_stage(trainer, policy, output_dir, card, resume, left_out)


def with_reference(
    trainer: PreferenceTrainer, rows: Sequence[PairRow], reference: str, *, resumed: bool = False, quiet: bool = False
) -> list[dict[str, Any]]:
    """Return the trainer's data set: every pair with its log-probabilities under the reference; see `reference_logps`."""

    def score(model: Any, batch: dict[str, Tensor]) -> Tensor:
        with trainer.compute_loss_context_manager():
            chosen, rejected = completion_logps(model, batch)
        return torch.cat([chosen.total, rejected.total])

    table = reference_logps(
        trainer.model.to(trainer.args.device), rows, trainer.args.output_dir, reference=reference, score=score,
        device=trainer.args.device, collator=trainer.data_collator, resumed=resumed, quiet=quiet,
    )  # fmt: skip
    columns = zip(rows, table.chosen.tolist(), table.rejected.tolist(), strict=True)
    return [{"row": row, "ref_chosen": chosen, "ref_rejected": rejected} for row, chosen, rejected in columns]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, of its attention too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _short(nats: float) -> str:
    return f"{nats:.1f}" if nats >= 1 else f"{nats:.2f}"


def _announce(objective: Objective, rows: Sequence[PairRow], quiet: bool) -> None:
    if not is_main_process():
        return
    lengths = [len(ids) for row in rows for ids in (row.chosen_ids, row.rejected_ids)]
    line, warning = objective.describe(sum(lengths) / len(lengths))
    if not quiet:
        print(line, flush=True)
    if warning:
        logger.warning("%s", warning)

"""The trainer of every method: dialogues or pairs of turns in, exact checkpoints, slow copies that move after each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from llmrl.errors import LlmrlError
from llmrl.hindsight.objective import Objective, sums_of
from llmrl.hindsight.preferences import pair_losses
from llmrl.training.trained_state import TrainedStateTrainer


class DialogueTrainer(TrainedStateTrainer):
    """Trainer of a `DialogueModel` on batches of `DialogueCollator`.

    Args:
        objective: what is minimised.
        heads_lr: learning rate of the value heads.
        polyak: rate at which the slow copies follow, a step.
        tokens, states: means over the data of a dialogue's tokens of the agent, and of its states where V is learnt.
        run_facts: what a checkpoint must agree on with the run that goes on from it.
    """

    optimizer: torch.optim.Optimizer | None
    loss_is_scaled_for_ga = True
    checkpoint_attributes = (*TrainedStateTrainer.checkpoint_attributes, "_sums")

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        heads_lr: float,
        polyak: float,
        tokens: float,
        states: float,
        run_facts: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.heads_lr, self.run_facts = objective, heads_lr, run_facts or {}
        self.tokens, self.states = tokens, states
        self._sums: dict[str, Tensor] | None = None
        self.add_callback(_MoveTarget(self.model, polyak))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return AdamW without decay, with a rate for the trunks and one for the heads."""
        if self.optimizer is None:
            heads = [p for n, p in self.model.named_parameters() if n.startswith("head.") and p.requires_grad]
            own = {id(p) for p in heads}
            trunks = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
            groups = [{"params": trunks, "lr": self.args.learning_rate}]
            groups += [{"params": heads, "lr": self.heads_lr}] if heads else []
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return this forward's share of the loss of the global batch."""
        if self.objective.method == "dpo":
            losses, watched = pair_losses(model, self.model, inputs, self.objective.dpo_beta)
            self._add(watched)
            return losses.sum() * self.args.world_size / self.rows_a_step
        found = sums_of(model, self.model, inputs, self.objective)
        self._add({**found.watched, "q_loss": found.q, "v_loss": found.v, "cql_loss": found.cql})
        # DDP averages gradients over processes: so their number stands above, and that of dialogues is of all of them
        share = self.args.world_size / self.rows_a_step
        values = found.q / self.tokens + found.v / self.states + self.objective.cql * found.cql / self.tokens
        return share * (found.policy / self.tokens + self.objective.value_weight * values)

    @torch.no_grad()
    def _add(self, sums: dict[str, Tensor]) -> None:
        new = {name: value.detach().double().cpu() for name, value in sums.items()}
        self._sums = new if self._sums is None else {name: self._sums[name] + value for name, value in new.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add means since the last log on all processes: losses, and V beside what was earned, which it should stay near."""
        if self._sums is not None:
            names = sorted(self._sums)
            total = torch.stack([self._sums[name] for name in names]).to(self.args.device)
            total = self.accelerator.reduce(total, reduction="sum").cpu()
            if not bool(total.isfinite().all()):
                raise LlmrlError(
                    f"the loss is not finite at step {self.state.global_step}: the training has diverged; begin anew with a "
                    "lower --lr or --heads_lr"
                )
            logs = {**logs, **_means(dict(zip(names, total.tolist(), strict=True)))}
            self._sums = None
        super().log(logs, start_time)


class _MoveTarget(TrainerCallback):
    def __init__(self, model: Any, rate: float) -> None:
        self.model, self.rate = model, rate

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Move the slow copies after an update."""
        self.model.move_target(self.rate)


def _means(sums: dict[str, float]) -> dict[str, float]:
    tokens, states = sums["tokens"], sums.get("states", 0.0)
    found = {"policy_nll": sums["policy_nll"] / tokens}
    if "pairs" in sums:
        found["pairs_right"] = sums["pairs_right"] / sums["pairs"]
    if states:
        found |= {name: sums[name] / states for name in ("value", "earned", "q", "v_loss") if name in sums}
        found["value_above_earned"] = found["value"] - found["earned"]
    if "q" in sums:
        found |= {"q_loss": sums["q_loss"] / tokens, "cql_loss": sums["cql_loss"] / tokens}
    return found

"""K reward heads and the causal LM below them, trained together: the LM by a LoRA adapter or as a whole.

    loss = 1/B sum_i sum_k N w_ki l_ki + l2/2 |heads|^2

over the B pairs of a global batch, out of N. l_ki is the loss of head k on pair i (`llmrl.hyre.fit.row_losses`, plus centring),
w_k what the head sees (`HeadPlan`, which sums to 1), so the expectation over batches is the objective that heads on cached
features have. It is a sum over heads, not a mean: no head learns slower because there are more of them.

Heads first, then the backbone: training begins with heads fitted to the frozen features. What reaches the backbone is the
error of each head times its weights; random heads would send it K random directions and large errors at that, and tear
features that are good before the heads have found out what to ask of them (arXiv 2202.10054 measures it for one head).

Priors read the features without a gradient, as in arXiv 2107.08924: the backbone would learn to undo them. Dropout is off,
so that training begins where the frozen fit ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.base_model import bare_model
from llmrl.errors import CheckpointError
from llmrl.heads_forward import decoder_of, states_of
from llmrl.hyre.fit import Pairs, TrainedHeads, row_losses
from llmrl.hyre.metrics import disagreement
from llmrl.reward_heads import RewardHead
from llmrl.training.trained_state import TrainedStateTrainer


class EnsembleRewardModel(nn.Module):
    """K scores of the last token's state after the final norm, `[B, T] -> [B, K]`.

    Args:
        backbone: a causal LM of transformers, or peft's model around one; what is trained of it has requires_grad.
        heads: K heads in training, on features as `llmrl.hyre.features.last_states` gives them.
    """

    def __init__(self, backbone: Any, heads: TrainedHeads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads
        self._decoder = [decoder_of(bare_model(backbone))]  # in a list: it is no second submodule

    def train(self, mode: bool = True) -> EnsembleRewardModel:
        """Switch the heads only: the backbone stays in evaluation mode, without dropout of any kind."""
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last states `[B, H]` in float32 of rows that are padded on the right."""
        decoder = self._decoder[0]
        states = states_of(decoder, decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False))
        last = attention_mask.sum(1).to(states.device) - 1
        return states[torch.arange(len(states), device=states.device), last].float()

    def scores(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return scores `[B, K]`; the heads compute in float32 whatever the backbone computes in."""
        features = self.features(input_ids, attention_mask)
        with torch.autocast(features.device.type, enabled=False):
            return head_scores(self.heads, features)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return `scores`."""
        return self.scores(input_ids, attention_mask)

    def trained_state(self) -> dict[str, Tensor]:
        """Return by name what training changes, and the heads whole: all that a checkpoint needs beside the base."""
        changed = {name: p for name, p in self.named_parameters() if p.requires_grad}
        heads = {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        return {name: value.detach().contiguous() for name, value in {**changed, **heads}.items()}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Take what `trained_state` returned.

        Raises:
            CheckpointError: it is of another model or of other heads.
        """
        own = self.trained_state()
        other = [name for name in own if name not in state or state[name].shape != own[name].shape]
        other += [name for name in state if name not in own]
        if other:
            raise CheckpointError(
                f"the checkpoint is of another model or of other heads ({other[0]}): resume with the options it was made with"
            )
        self.load_state_dict(state, strict=False)


def make_trainable(model: Any, tuning: str, lora_r: int, seed: int) -> Any:
    """Return a causal LM of which only what its hidden states depend on is trained: an output embedding of its own is not.

    Args:
        model: a causal LM, which is changed.
        tuning: "full", or "lora" for an adapter of scale 2 on all linear layers.
        lora_r: its rank.
        seed: of its start.
    """
    model.requires_grad_(False)
    if tuning == "lora":
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        set_seed(seed)
        config = LoraConfig(
            r=lora_r, lora_alpha=2 * lora_r, lora_dropout=0.0, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
        )  # fmt: skip
        model = get_peft_model(model, config)
    read = {id(parameter) for parameter in decoder_of(bare_model(model)).parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in read and (tuning == "full" or "lora_" in name))
    return model


def head_scores(heads: TrainedHeads, features: Tensor) -> Tensor:
    """Return scores `[N, K]` of raw features; through the priors no gradient reaches the features."""
    scaled = (features - heads.shift) * heads.scale
    return heads.trained(scaled) + heads.frozen(scaled.detach())


@torch.no_grad()
def unfold(head: RewardHead, heads: TrainedHeads) -> None:
    """Give heads in training the scores of a folded head: the inverse of `TrainedHeads.fold`.

    Of an epinet, whose indices can be fewer than what they are mixed from, the smallest parameters with these scores are taken.

    Args:
        head: what `fit_heads` returned.
        heads: made with the same shape, scale and seed, hence with the same priors and indices.
    """
    shift, scale, hidden = heads.shift, heads.scale, heads.shape.hidden
    linear = head.weight / scale - (heads.prior_weight if heads.prior == "linear" else 0)
    heads.weight.copy_(linear[: len(heads.weight)])
    heads.bias.copy_((head.bias + head.weight @ shift)[: len(heads.bias)])
    if heads.shape.kind == "mlp":
        inner = head.own_weight[:, :hidden]
        heads.inner.copy_(inner / scale)
        heads.inner_bias.copy_(head.own_bias[:, :hidden] + inner @ shift)
        heads.out.copy_(head.own_out[:, :hidden])
    if heads.shape.kind == "epinet":
        inner = head.shared_weight[:hidden]
        heads.inner.copy_(inner / scale)
        heads.out.copy_(_solve(heads.index, head.shared_out[:, :hidden]))
        ones = torch.ones(len(heads.index), 1)
        mixed = _solve(torch.cat([heads.index, ones], 1), head.shared_bias[:, :hidden] + inner @ shift)
        heads.inner_index.copy_(mixed[:-1].T)
        heads.inner_bias.copy_(mixed[-1])


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return (torch.linalg.pinv(matrix.double()) @ right.double()).float()


@dataclass(frozen=True)
class Objective:
    """The loss above.

    Attributes:
        signs: `[K]`, see `HeadPlan`.
        l2: on what is trained of the heads, but for biases.
        center: coefficient of (r(chosen) + r(rejected))^2.
    """

    signs: Tensor
    l2: float = 1e-3
    center: float = 0.0

    def losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
        """Return `[B, K]` of scores `[B, K]` each and margins `[B]`."""
        pairs = Pairs(chosen, rejected, margin)  # of which row_losses reads the margin alone
        losses = row_losses(pairs, chosen, rejected, self.signs.to(chosen.device), slice(None))
        return losses + self.center * (chosen + rejected) ** 2 if self.center else losses

    def penalty(self, heads: TrainedHeads) -> Tensor:
        """Return the l2 term."""
        squares = [(p**2).sum() for name, p in heads.named_parameters() if not name.endswith("bias")]
        return self.l2 / 2 * torch.stack(squares).sum()


class RewardPairCollator:
    """Collates {"chosen", "rejected": ids, "weights": `[K]`, "margin": float} for one forward: B chosen, then B rejected."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids and attention_mask `[2B, T]` padded on the right, weights `[B, K]` and margin `[B]`."""
        rows = [example[side] for side in ("chosen", "rejected") for example in examples]
        input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)  # the mask hides what pads
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row)
            attention_mask[i, : len(row)] = 1
        weights = torch.stack([example["weights"] for example in examples])
        margin = torch.tensor([example["margin"] for example in examples], dtype=torch.float32)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "weights": weights, "margin": margin}


class EnsembleTrainer(TrainedStateTrainer):
    """Trainer of an EnsembleRewardModel on batches of RewardPairCollator.

    Args:
        objective: what is minimised.
        heads_lr: learning rate of the heads; `args.learning_rate` is that of the backbone.
        run_facts: what a checkpoint must agree on with the run that goes on from it.
    """

    optimizer: torch.optim.Optimizer | None
    loss_is_scaled_for_ga = True
    checkpoint_attributes = (*TrainedStateTrainer.checkpoint_attributes, "_sums")

    def __init__(
        self, *args: Any, objective: Objective, heads_lr: float, run_facts: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective, self.heads_lr, self.run_facts = objective, heads_lr, run_facts or {}
        # pairs do not see the bias: its gradient is rounding, of which Adam makes whole steps
        self.model.heads.bias.requires_grad_(objective.center > 0)
        self._sums: Tensor | None = None  # of each head: rows, loss, right ones; then disagreement and pairs

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return AdamW with a learning rate for the backbone and one for the heads; what decays is in the loss."""
        if self.optimizer is None:
            backbone = [p for p in self.model.backbone.parameters() if p.requires_grad]
            groups = [
                {"params": backbone, "lr": self.args.learning_rate},
                {"params": [p for p in self.model.heads.parameters() if p.requires_grad], "lr": self.heads_lr},
            ]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return this forward's share of the loss of the global batch."""
        chosen, rejected = model(inputs["input_ids"], inputs["attention_mask"]).chunk(2)
        losses = self.objective.losses(chosen, rejected, inputs["margin"])
        self._count(chosen - rejected, losses, inputs["weights"])
        # DDP averages gradients over processes: so their number stands above, and that of pairs is of all of them
        share = self.args.world_size / self.rows_a_step
        penalty = self.objective.penalty(self.model.heads) / self.args.gradient_accumulation_steps
        return share * (losses * inputs["weights"]).sum() + penalty

    @torch.no_grad()
    def _count(self, margins: Tensor, losses: Tensor, weights: Tensor) -> None:
        turned = self.objective.signs.to(margins.device) * margins
        right = (turned > 0).float() + 0.5 * (turned == 0).float()
        differ = disagreement(margins.float().cpu().numpy()) * len(margins)
        columns = [weights, weights * losses, weights * right]
        sums = torch.cat([column.double().sum(0).cpu() for column in columns])
        sums = torch.cat([sums, torch.tensor([differ, len(margins)], dtype=torch.float64)])
        self._sums = sums if self._sums is None else self._sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add, of the pairs since the last log on all processes, each head's loss and accuracy on what it sees (mean, least and
        most over the heads) and how often two heads disagree.
        """  # fmt: skip
        if self._sums is not None:
            total = self.accelerator.reduce(self._sums.to(self.args.device), reduction="sum").cpu()
            logs = {**logs, **_head_metrics(total)}
            self._sums = None
        super().log(logs, start_time)


def _head_metrics(sums: Tensor) -> dict[str, float]:
    heads = (len(sums) - 2) // 3
    weight, loss, right = sums[:-2].view(3, heads)
    seen = weight > 0  # a head may have seen nothing of so few pairs
    found = {"disagreement": (sums[-2] / sums[-1]).item()}
    for name, column in (("head_loss", loss), ("head_accuracy", right)):
        means = column[seen] / weight[seen]
        if len(means):
            found |= {f"{name}_{kind}": getattr(means, kind)().item() for kind in ("mean", "min", "max")}
    return found

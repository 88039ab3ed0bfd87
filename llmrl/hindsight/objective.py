"""What a method minimises, on the states of one batch of dialogues: the loss, and the numbers worth watching.

    bc, filtered-bc    cross entropy of the agent's tokens (of the best dialogues)
    ilql               cross entropy, and Q, V and CQL losses by Bellman backup (arXiv 2206.11871)
    mc                 cross entropy, and Q and V towards what was really earned from there on
    awr                cross entropy weighted by exp((earned - V) / temperature), and V towards what was earned
                       (arXiv 1910.00177)
    dpo                pairs of turns: `llmrl.hindsight.preferences`

Sums over tokens are divided by a constant, the mean number of tokens of a batch: a token weighs the same in every batch, on
one process and on several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmrl.errors import UsageError
from llmrl.hindsight.losses import awr_weights, cql_loss, expectile_loss, q_loss, td_targets
from llmrl.hindsight.model import DialogueModel
from llmrl.hindsight.targets import NO_STATE

METHODS = ("ilql", "mc", "bc", "filtered-bc", "awr", "dpo")
VALUED = ("ilql", "mc")  # their policy is steered by Q when it decodes


@dataclass(frozen=True)
class Objective:
    """Settings of the loss.

    Attributes:
        method: see above.
        expectile: tau of V; above .5 V leans to the best that was seen. Only "ilql" uses it.
        cql: weight of the CQL loss.
        value_weight: of Q, V and CQL losses beside the policy's.
        awr_temperature: in units of scaled rewards.
        dpo_beta: of `llmrl.hindsight.preferences`.
        low, high: what can be earned from a state on, at least and at most: targets are clipped to it.
    """

    method: str = "ilql"
    expectile: float = 0.9
    cql: float = 0.0
    value_weight: float = 1.0
    awr_temperature: float = 0.5
    dpo_beta: float = 0.1
    low: float = -torch.inf
    high: float = torch.inf

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"expected a method out of {', '.join(METHODS)}, got {self.method!r}")
        if not self.low <= self.high:
            raise UsageError(f"expected low below high, got {self.low} and {self.high}")
        if (
            not 0 < self.expectile < 1
            or not self.cql >= 0
            or not self.value_weight >= 0
            or not self.awr_temperature > 0
        ):
            raise UsageError(
                f"expected an expectile between 0 and 1, cql and value_weight of 0 or more and a temperature above 0, got "
                f"{self.expectile}, {self.cql}, {self.value_weight} and {self.awr_temperature}"
            )

    @property
    def needs_values(self) -> bool:
        """Whether there is a value head in training."""
        return self.method in (*VALUED, "awr")


@dataclass(frozen=True)
class Sums:
    """Sums over a batch: `policy` over tokens, `q` and `cql` over tokens, `v` over states; `watched` for people."""

    policy: Tensor
    q: Tensor
    v: Tensor
    cql: Tensor
    watched: dict[str, Tensor]


def sums_of(forward: Any, model: DialogueModel, batch: dict[str, Tensor], objective: Objective) -> Sums:
    """Return the sums of losses over a batch.

    Args:
        forward: the model, or what wraps it to share gradients between processes.
        model: itself.
        batch: of `llmrl.hindsight.batches.DialogueCollator`.
        objective: what is summed.
    """
    states = forward(**batch)
    with torch.autocast(states.policy.device.type, enabled=False):
        nll = functional.cross_entropy(model.logits(states.policy), batch["token"], reduction="none")
        zero = nll.new_zeros(())
        watched = {"policy_nll": nll.detach().sum(), "tokens": nll.new_tensor(float(len(nll)))}
        if not objective.needs_values or model.head is None:
            return Sums(nll.sum(), zero, zero, zero, watched)
        v = model.head.v(states.value)
        if objective.method == "awr":
            to_go = _state_to_go(batch)
            weights = awr_weights((to_go - v)[_states_of_actions(batch)], objective.awr_temperature)
            watched |= _watched(v, batch, None)
            return Sums((weights * nll).sum(), zero, (v - to_go).square().sum(), zero, watched)
        q = model.head.q_of(states.action, batch["token"])
        target = _target(model, states.after, batch, objective)
        v_errors = _v_errors(model, states.action, v, batch, objective)
        cql = cql_loss(model.head.q(states.action), batch["token"]).sum() if objective.cql else zero
        watched |= _watched(v, batch, q)
        return Sums(nll.sum(), q_loss(q, target).sum(), v_errors.sum(), cql, watched)


@torch.no_grad()
def _target(model: DialogueModel, after: Tensor, batch: dict[str, Tensor], objective: Objective) -> Tensor:
    if objective.method == "mc":
        return batch["to_go"]
    assert model.head is not None
    later = model.head.v(after) * (batch["next_position"] != NO_STATE)
    return td_targets(batch["reward"], batch["discount"], later, objective.low, objective.high)


def _v_errors(
    model: DialogueModel, action: Tensor, v: Tensor, batch: dict[str, Tensor], objective: Objective
) -> Tensor:
    chosen = batch["value_action"]
    if objective.method == "mc":
        return (v - _state_to_go(batch)).square()
    assert model.target is not None
    with torch.no_grad():
        slow = model.target.q_of(action[chosen], batch["token"][chosen]).amin(0)
    return expectile_loss(batch["value_discount"] * slow - v, objective.expectile)


def _state_to_go(batch: dict[str, Tensor]) -> Tensor:
    """Return what was earned from each state on where V is learnt, `[M]`."""
    return batch["to_go"][batch["value_action"]] * batch["value_discount"]


def _states_of_actions(batch: dict[str, Tensor]) -> Tensor:
    """Return, for every action, the last state before or at it where V is learnt: the beginning of its turn, or itself."""
    return torch.searchsorted(batch["value_position"], batch["position"], right=True) - 1


@torch.no_grad()
def _watched(v: Tensor, batch: dict[str, Tensor], q: Tensor | None) -> dict[str, Tensor]:
    """Return sums over states where V is learnt: V, what was earned from there on, and Q of what was done."""
    chosen = batch["value_action"]
    found = {"value": v.sum(), "earned": _state_to_go(batch).sum(), "states": v.new_tensor(float(len(v)))}
    return found if q is None else {**found, "q": q[:, chosen].amin(0).sum()}

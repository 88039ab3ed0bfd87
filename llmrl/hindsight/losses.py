"""Losses of offline RL on the tokens of dialogues: pure functions of tensors.

Q     sum over both heads of (Q_i(s, a) - y)^2,  y = r + gamma V(s'), clipped to what can be earned
V     expectile: |tau - 1(u < 0)| u^2,  u = min_i Q'_i(s, a) - V(s), Q' slow copies of Q  (arXiv 2110.06169, eq. 5)
CQL   log sum_a exp Q_i(s, a) - Q_i(s, a of the data)  (arXiv 2006.04779), cross entropy with Q as logits
AWR   cross entropy of the data's tokens, weighted by exp((return - V) / temperature)  (arXiv 1910.00177)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def td_targets(
    reward: Tensor, discount: Tensor, next_value: Tensor, low: float = -torch.inf, high: float = torch.inf
) -> Tensor:
    """Return r + gamma V(s'), clipped to [low, high], without a gradient.

    Args:
        reward, discount, next_value: `[N]`; next_value is 0 where nothing comes after.
        low, high: what the rest of a dialogue can earn at least and at most.
    """
    return (reward + discount * next_value).clamp(low, high).detach()


def q_loss(q: Tensor, target: Tensor) -> Tensor:
    """Return the squared error `[N]`, summed over heads, of Q `[2, N]` and targets `[N]`."""
    return (q - target).square().sum(0)


def expectile_loss(difference: Tensor, tau: float) -> Tensor:
    """Return |tau - 1(u < 0)| u^2 of differences u = Q - V, elementwise; tau .5 is half the squared error."""
    return torch.where(difference < 0, 1 - tau, tau) * difference.square()


def cql_loss(q: Tensor, tokens: Tensor) -> Tensor:
    """Return log sum exp Q - Q(a) `[N]`, summed over heads.

    Args:
        q: `[2, N, V]`.
        tokens: `[N]`, the data's.
    """
    flat = functional.cross_entropy(q.flatten(0, 1), tokens.repeat(len(q)), reduction="none")
    return flat.unflatten(0, q.shape[:2]).sum(0)


def awr_weights(advantage: Tensor, temperature: float, largest: float = 20.0) -> Tensor:
    """Return exp(advantage / temperature), at most `largest`, without a gradient."""
    return (advantage.detach() / temperature).exp().clamp(max=largest)


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return -log sigmoid(beta (margin of the policy - margin of the reference)) `[P]` (arXiv 2305.18290, eq. 7).

    Args:
        policy, reference: `[2, P]`, summed log-probabilities of the better and of the worse turn.
        beta: how close the policy stays to the reference.
    """
    margin = (policy[0] - policy[1]) - (reference[0] - reference[1])
    return functional.softplus(-beta * margin)


@torch.no_grad()
def polyak(target: list[Tensor], online: list[Tensor], rate: float) -> None:
    """Move targets towards what is trained: target += rate (online - target)."""
    for slow, fast in zip(target, online, strict=True):
        slow.lerp_(fast.to(slow.dtype), rate)

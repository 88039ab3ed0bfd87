"""Which experts a token gets: pure functions on tensors, the same in training, generation and vLLM."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """The chosen experts of T tokens, or of one sequence a row."""

    ids: Tensor
    """`[..., k]` int32, by falling logit; of equal logits the lower number comes first."""
    weights: Tensor
    """`[..., k]` float32, sums to 1."""
    probs: Tensor
    """`[..., E]` float32: the softmax over all experts, for the balance loss."""


def choose(logits: Tensor, top_k: int, gate: str = "softmax") -> Route:
    """Choose `top_k` experts a row.

    The order is fixed by a stable sort, so that equal logits lead to the same experts on every device.

    Args:
        logits: `[..., E]`; taken in float32 (float64 stays).
        top_k: 1 to E.
        gate: "softmax": weights are the softmax over the chosen logits, which is the softmax over all experts,
            renormalised. "hard": 1 / top_k each, with the gradient of the softmax weights (straight through).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    probs = logits.softmax(-1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if gate == "hard":
        chosen = probs.gather(-1, order[..., :top_k])
        # one expert renormalised to 1 would have no gradient: its own probability carries it
        weights = torch.full_like(chosen, 1.0 / top_k) + (chosen - chosen.detach())
    else:
        weights = ordered[..., :top_k].softmax(-1)
    return Route(order[..., :top_k].to(torch.int32), weights, probs)


def dense_gates(route: Route, num_experts: int) -> Tensor:
    """Return gates `[..., E]`: each expert's weight, 0 where it was not chosen; differentiable in the weights."""
    empty = route.weights.new_zeros(*route.weights.shape[:-1], num_experts)
    return empty.scatter(-1, route.ids.long(), route.weights)


def balance_loss(route: Route, mask: Tensor | None = None) -> Tensor:
    """Return E sum_e f_e P_e (Fedus et al. 2022, eq. 4): f the share of choices that fell on e, P its mean probability.

    1 where all experts are used alike, E where one takes everything. Only P carries a gradient.

    Args:
        route: of `[..., T]` tokens.
        mask: `[..., T]`, true for the tokens that count; all of them without one.
    """
    experts = route.probs.shape[-1]
    probs, ids = route.probs.reshape(-1, experts), route.ids.reshape(-1, route.ids.shape[-1]).long()
    counts = torch.zeros_like(probs).scatter_add_(1, ids, torch.ones_like(ids, dtype=probs.dtype))
    if mask is None:
        total = float(len(probs))
    else:
        kept = mask.reshape(-1, 1).to(probs.dtype)
        counts, probs, total = counts * kept, probs * kept, kept.sum().clamp_min(1.0)
    share = counts.sum(0) / (total * ids.shape[-1])
    return experts * (share.detach() * probs.sum(0) / total).sum()


def rms_normed(states: Tensor) -> Tensor:
    """Return `[..., H]` in float32 with a mean square of 1 a row; rows of zeros stay."""
    states = states.float()
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-12)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Return the mean `[B, H]` in float32 of the states `[B, T, H]` where the mask `[B, T]` holds; zeros for an empty row."""
    kept = mask.to(torch.float32).unsqueeze(-1)
    return (states.float() * kept).sum(1) / kept.sum(1).clamp_min(1.0)


def usage(route: Route, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Return how many of the choices fell on each expert, `[E]` float32: whole numbers."""
    ids = route.ids.reshape(-1, route.ids.shape[-1]).long()
    ids = ids if mask is None else ids[mask.reshape(-1).bool()]
    return torch.bincount(ids.reshape(-1), minlength=num_experts).float()

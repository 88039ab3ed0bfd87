"""Reward heads: K scores of one hidden state, as one tensor operation for all K.

    score_k(h) = w_k . h + b_k + sum_j a_kj relu(u_kj . h + c_kj)

"linear" is the first two terms. "mlp" adds hidden units, of two sorts: `intermediate_size` that each head has for itself, and
`shared_size` whose u_j all heads share, with a bias and an output weight of each head's own. That is enough for whatever is
trained: a frozen prior network is more hidden units, and an epinet at K fixed draws z_k is shared units, because
u_j . h + v_j . z_k is u_j . h plus a number of head k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llmrl.heads import HeadSpec


class RewardHead(nn.Module):
    """K linear scores of a pooled hidden state, `[..., H] -> [..., K]`."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.zeros(spec.outputs, spec.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(spec.outputs, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return scores `[..., K]` in float32."""
        weight = self.weight.to(hidden.device, torch.float32)
        return nn.functional.linear(hidden.float(), weight, self.bias.to(hidden.device, torch.float32))


class RewardMLPHead(RewardHead):
    """K linear scores plus those of hidden units, `[..., H] -> [..., K]`."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        heads, width, own, shared = spec.outputs, spec.hidden_size, spec.intermediate_size, spec.shared_size
        if own:
            self.own_weight = nn.Parameter(torch.zeros(heads, own, width, dtype=torch.float32))
            self.own_bias = nn.Parameter(torch.zeros(heads, own, dtype=torch.float32))
            self.own_out = nn.Parameter(torch.zeros(heads, own, dtype=torch.float32))
        if shared:
            self.shared_weight = nn.Parameter(torch.zeros(shared, width, dtype=torch.float32))
            self.shared_bias = nn.Parameter(torch.zeros(heads, shared, dtype=torch.float32))
            self.shared_out = nn.Parameter(torch.zeros(heads, shared, dtype=torch.float32))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return scores `[..., K]` in float32."""
        scores = super().forward(hidden)
        hidden, device = hidden.float(), hidden.device
        if self.spec.intermediate_size:
            inner = hidden @ self.own_weight.to(device).flatten(0, 1).T
            inner = inner.unflatten(-1, self.own_bias.shape) + self.own_bias.to(device)
            scores = scores + (inner.relu() * self.own_out.to(device)).sum(-1)
        if self.spec.shared_size:
            inner = (hidden @ self.shared_weight.to(device).T).unsqueeze(-2) + self.shared_bias.to(device)
            scores = scores + (inner.relu() * self.shared_out.to(device)).sum(-1)
        return scores


def build_reward_head(spec: HeadSpec) -> RewardHead:
    """Return a fresh head whose scores are all zero."""
    return RewardHead(spec) if spec.architecture == "linear" else RewardMLPHead(spec)

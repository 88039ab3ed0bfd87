"""Q and V heads on the hidden states of a causal LM, and how they steer its next token.

A `ValueHead` holds two Q functions over the vocabulary and one V, so that a dialogue can be learnt from (`llmrl.hindsight`) and
served: the policy is pi_beta(a | s) exp(beta min_i Q_i(s, a)), normalised over the tokens that the behaviour policy pi_beta
supports (arXiv 2206.11871; V is the same for all tokens and drops out).

Three shapes of Q: `linear` (H -> vocabulary), `low_rank` (H -> r -> vocabulary) and `mlp` (H -> r, ReLU, -> vocabulary). The
first two have no biases, as output embeddings have none, so that they fold into one (`fold_values`). The last layer starts
at zero, so the policy starts as pi_beta whatever beta is. Everything is float32 whatever the base's dtype. V is linear in the
hidden state, or, of `mlp`, in r hidden units of its own.

The matrices are plain parameters, not `nn.Linear`: programs that quantise a model or put LoRA into it go by its linear layers.
This file needs torch alone, so that a checkpoint can carry it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Q_HEADS = 2


class ValueHead(nn.Module):
    """Two Q functions and a V.

    Args:
        spec: a `llmrl.heads.HeadSpec`: `outputs` is the size of the vocabulary, `intermediate_size` r of "low_rank" and "mlp".
    """

    reads_sequence = False

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.spec = spec
        self.beta, self.support = float(spec.beta), float(spec.support)  # of what is served: may be set at any time
        inner = spec.hidden_size if spec.architecture == "linear" else spec.intermediate_size
        self.q_weight = _zeros(Q_HEADS, spec.outputs, inner)
        if spec.architecture != "linear":
            self.down_weight = _zeros(Q_HEADS, inner, spec.hidden_size)
        if spec.architecture == "mlp":
            self.q_bias, self.down_bias = _zeros(Q_HEADS, spec.outputs), _zeros(Q_HEADS, inner)
            self.v_down_weight, self.v_down_bias = _zeros(inner, spec.hidden_size), _zeros(inner)
        self.v_weight = _zeros(1, inner if spec.architecture == "mlp" else spec.hidden_size)
        self.v_bias = _zeros(1)

    def _read(self, hidden: Tensor) -> Tensor:
        """Return what the last layer of each Q reads, `[2, ..., r]`."""
        x = hidden.to(self.q_weight.device).float()
        if self.spec.architecture == "linear":
            return x.expand(Q_HEADS, *x.shape)
        inner = torch.stack([functional.linear(x, weight.float()) for weight in self.down_weight])
        if self.spec.architecture == "low_rank":
            return inner
        return (inner + self.down_bias.float().view(Q_HEADS, *[1] * (x.ndim - 1), -1)).relu()

    def q(self, hidden: Tensor) -> Tensor:
        """Return Q of every token, `[2, ..., V]`, of hidden states `[..., H]`."""
        read = self._read(hidden)
        q = torch.stack([functional.linear(x, w.float()) for x, w in zip(read, self.q_weight, strict=True)])
        if self.spec.architecture != "mlp":
            return q
        return q + self.q_bias.float().view(Q_HEADS, *[1] * (hidden.ndim - 1), -1)

    def q_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return Q of one token a state, `[2, N]`, of states `[N, H]` and tokens `[N]`; the vocabulary is not swept."""
        q = (self._read(hidden) * self.q_weight[:, tokens].float()).sum(-1)
        return q + self.q_bias[:, tokens].float() if self.spec.architecture == "mlp" else q

    def v(self, hidden: Tensor) -> Tensor:
        """Return V, `[...]`, of hidden states `[..., H]`."""
        x = hidden.to(self.v_bias.device).float()
        if self.spec.architecture == "mlp":
            x = functional.linear(x, self.v_down_weight.float(), self.v_down_bias.float()).relu()
        return functional.linear(x, self.v_weight.float(), self.v_bias.float())[..., 0]

    def steer(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Return the policy's logits `[..., V]` of the base's; see `steer`."""
        return steer(logits, self.q(hidden).amin(0) if self.beta else None, self.beta, self.support)

    def q_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of Q: those that a slow copy follows."""
        return [p for name, p in self.named_parameters() if not name.startswith("v_")]


def steer(logits: Tensor, q: Tensor | None, beta: float, support: float) -> Tensor:
    """Return the logits of pi_beta exp(beta Q) over the tokens that pi_beta supports, `[..., V]` float32.

    Where a token was never an action, Q is what it started as, and with negative returns that is better than all the data has:
    without the filter, those tokens are what is chosen.

    Args:
        logits: `[..., V]`, of pi_beta.
        q: `[..., V]`, min over heads; None where beta is 0.
        beta: 0 is pi_beta itself, filtered.
        support: a token stays if its probability is at least this share of the likeliest one's; 0 keeps all.
    """
    logits = logits.float()
    steered = logits if q is None else logits + beta * q.to(logits.device)
    if support <= 0:
        return steered
    floor = logits.max(-1, keepdim=True).values + math.log(support)
    return steered.masked_fill(logits < floor, -torch.inf)


def initialise_values(head: ValueHead, generator: torch.Generator) -> None:
    """Draw the inner layers of a fresh head, normal with variance 1 / inputs; Q and V stay 0, as the last layers are zero."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name in ("down_weight", "v_down_weight"):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def fold_values(lm_head: Tensor, head: ValueHead, beta: float) -> Tensor:
    """Return an output embedding `[V, H]` whose logits are those of pi_beta plus beta times the mean of both Q.

    Args:
        lm_head: `[V, H]`, of the base.
        head: of the shape linear or low_rank: the mean of two such heads is one matrix; the min is none.
        beta: for good.
    """
    weight = head.q_weight.double()
    if head.spec.architecture == "low_rank":
        weight = weight @ head.down_weight.double()
    return (lm_head.double() + beta * weight.mean(0).to(lm_head.device)).to(lm_head.dtype)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32))

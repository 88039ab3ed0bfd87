"""Ratios of a policy to the sampler that drew its tokens, and when they may be formed.

With behaviour logprobs b_t and new logprobs p_t of the sampled tokens the ratio is exp(p_t - b_t). It is an importance
weight only if b is the distribution the token was drawn from: all of it (no top-p, top-k or min-p, which put zero where
p does not), and at the temperature it was drawn at. p must be taken at that temperature too, or the ratio differs from 1
before anything was learnt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmrl.errors import ConfigError
from llmrl.types import SamplingConfig


def tempered_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at the given ids.

    Args:
        logits: `[..., V]`.
        token_ids: `[...]`.
        temperature: Above 0.

    Returns:
        `[...]` in float32.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature: expected a number above 0, got {temperature}; greedy samples have no ratio")
    scaled = logits.float() / temperature
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(scaled, dim=-1)


def log_ratios(
    new_logprobs: Tensor,
    behaviour_logprobs: Tensor,
    sampling: SamplingConfig,
    *,
    new_temperature: float,
    behaviour_temperature: float = 1.0,
) -> Tensor:
    """Return log(new / behaviour) of sampled tokens, `[...]`.

    Args:
        new_logprobs: Of the policy that is trained.
        behaviour_logprobs: Of the sampler. Engines record them at temperature 1, whatever the tokens were drawn at.
        sampling: How the tokens were drawn.
        new_temperature: That the new logprobs were taken at.
        behaviour_temperature: That the behaviour logprobs were taken at.

    Raises:
        ConfigError: The samples were truncated or greedy, or a temperature is not the one they were drawn at.
    """
    sampling.require_full_support()
    drawn = sampling.temperature
    if not new_temperature == behaviour_temperature == drawn:
        raise ConfigError(
            f"the tokens were drawn at temperature {drawn:g}, the new logprobs are of {new_temperature:g} and those of the "
            f"sampler of {behaviour_temperature:g}; sample at 1, or take both with tempered_logprobs(..., {drawn:g})"
        )
    return new_logprobs - behaviour_logprobs

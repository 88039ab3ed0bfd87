"""A world whose temperatures are known: hidden states, an output layer, and targets drawn from the tempered softmax."""

from dataclasses import dataclass

import pytest
import torch

from llmrl.ats.features import TokenFeatures
from llmrl.ats.output_layer import OutputLayer
from llmrl_kernels import curve_knots, lse_curve


@dataclass
class World:
    features: TokenFeatures
    layer: OutputLayer
    logits: torch.Tensor


def world_features(layer, hidden, target, windows):
    """Features of tokens in windows of equal length, each token predicted by the state at its own index."""
    tokens = len(hidden)
    z = layer.logits(hidden)
    top, argmax = z.max(-1)
    curve, slope = lse_curve(z, curve_knots())
    window = torch.arange(tokens) * windows // tokens
    return TokenFeatures(
        states=hidden,
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(window).cumsum(0)]),
        row=torch.arange(tokens),
        window=window,
        target=target,
        gap=top - z.gather(1, target[:, None])[:, 0],
        mean_gap=top - z.mean(-1),
        top_gap=top - z.topk(5).values.mean(-1),
        correct=argmax == target,
        graded=torch.zeros(tokens, dtype=torch.bool),
        choice=torch.full((tokens,), -1),
        choices=torch.empty(0, 0, dtype=torch.long),
        curve=curve,
        slope=slope,
    )


@pytest.fixture(scope="session")
def make_world():
    """Return `make_world(log_scale, ...)`: targets ~ softmax(exp(log_scale(hidden)) * logits)."""

    def make(log_scale, tokens=8192, vocabulary=24, width=8, windows=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(99)) * (8 / width) ** 0.5
        layer = OutputLayer(weight, None, 1.0, None)
        hidden = torch.randn(tokens, width, generator=generator)
        z = layer.logits(hidden)
        probabilities = (z * log_scale(hidden).exp()[:, None]).softmax(-1)
        target = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        return World(world_features(layer, hidden, target, windows), layer, z)

    return make

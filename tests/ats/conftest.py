"""A world whose temperatures are known: hidden states, an output layer, and targets drawn from the tempered softmax."""

from dataclasses import dataclass

import pytest
import torch

from llmrl.ats.features import OutputLayer, TokenFeatures
from llmrl_kernels import curve_knots, lse_curve


@dataclass
class World:
    features: TokenFeatures
    layer: OutputLayer
    logits: torch.Tensor


@pytest.fixture(scope="session")
def make_world():
    """Return `make_world(log_scale, ...)`: targets ~ softmax(exp(log_scale(hidden)) * logits)."""

    def make(log_scale, tokens=8192, vocabulary=24, width=8, windows=64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(99))
        layer = OutputLayer(weight, None, 1.0, None)
        hidden = torch.randn(tokens, width, generator=generator)
        z = layer.logits(hidden)
        probabilities = (z * log_scale(hidden).exp()[:, None]).softmax(-1)
        target = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        top, argmax = z.max(-1)
        curve, slope = lse_curve(z, curve_knots())
        features = TokenFeatures(
            hidden=hidden,
            gap=top - z.gather(1, target[:, None])[:, 0],
            correct=argmax == target,
            target=target,
            window=torch.arange(tokens) * windows // tokens,
            curve=curve,
            slope=slope,
        )
        return World(features, layer, z)

    return make

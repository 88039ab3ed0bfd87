"""Inputs for the tests of `scaled_lse_sweep`, and what each of its paths is held to."""

import math

import torch

from llmrl_kernels import LseSweep, scaled_lse_sweep, scaled_lse_sweep_reference

DIFFERENTIABLE = LseSweep._fields[:5]
# every option at once, a -inf bias at both ends and in the middle; for V >= 10
EVERYTHING = ("bias", "logit_scale", "soft_cap", "vocab_size")


def sweep_inputs(tokens, width, vocab, *, dtype=torch.float32, options=(), seed=0):
    """Return (arguments, keywords).

    Hidden states and weights are multiples of 1/16 below 1, so a product is exact in float32 in whatever order it is summed,
    and half precision rounds it the same way everywhere: paths differ in nothing but what they do with the logits.
    """
    g = torch.Generator().manual_seed(seed)

    def sixteenths(*shape):
        return (torch.randint(-15, 16, shape, generator=g) / 16).to(dtype)

    real = vocab - 7 if "vocab_size" in options else vocab
    labels = torch.randint(0, real, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < 0.2] = -100
    keywords = {}
    if "bias" in options:
        keywords["bias"] = sixteenths(vocab).float() * 4
        keywords["bias"][[0, real // 2, real - 1]] = -math.inf
        labels[torch.isin(labels, torch.tensor([0, real // 2, real - 1]))] = 1
    if "logit_scale" in options:
        keywords["logit_scale"] = 0.625
    if "soft_cap" in options:
        keywords["soft_cap"] = 3.0
    if "vocab_size" in options:
        keywords["vocab_size"] = real
    log_scale = torch.randn(tokens, generator=g) * 1.5
    return (sixteenths(tokens, width), sixteenths(vocab, width), log_scale, labels), keywords


def with_gradients(sweep, arguments, keywords):
    """Return the outputs and, for each differentiable one, the gradient of a weighted sum in tau."""
    hidden, weight, log_scale, labels = arguments
    log_scale = log_scale.clone().requires_grad_()
    outputs = sweep(hidden, weight, log_scale, labels, **keywords)
    weights = torch.linspace(-1, 2, len(labels), device=labels.device)
    gradients = {
        name: torch.autograd.grad((getattr(outputs, name) * weights).sum(), log_scale, retain_graph=True)[0]
        for name in DIFFERENTIABLE
    }
    return outputs, gradients


def assert_matches_reference(arguments, keywords, *, backend, rtol=1e-5, atol=1e-5):
    """Hold values, gradients and argmax to the float64 definition."""
    outputs, gradients = with_gradients(scaled_lse_sweep, arguments, {**keywords, "backend": backend})
    expected, slopes = with_gradients(scaled_lse_sweep_reference, arguments, keywords)
    for name in LseSweep._fields:
        ours, theirs = getattr(outputs, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    for name in DIFFERENTIABLE:
        assert gradients[name].isfinite().all()
        torch.testing.assert_close(
            gradients[name], slopes[name], rtol=rtol, atol=5 * atol, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )
    return outputs

"""Vector scaling (Guo et al., 2017, sec. 4.2) of a whole vocabulary: logits times a vector plus a vector, fitted by NLL.

The curve cannot help here, so the logits are computed again, a chunk of tokens at a time. The gradient is written out: with
q = softmax(a z + b) and the target's one-hot row y, dNLL/db = q - y and dNLL/da = (q - y) z, summed over tokens. So nothing
of the size tokens times vocabulary outlives its chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmrl.ats.features import TokenFeatures
from llmrl.ats.fit import FitRecord
from llmrl.ats.fit_heads import BATCH_TOKENS, one_cycle
from llmrl.ats.metrics import Predictions
from llmrl.ats.output_layer import LogitsChunk, OutputLayer
from llmrl.heads import HeadSpec
from llmrl.logits_heads import VectorHead

EPOCHS = 4
MIN_STEPS = 80  # small data sets get more epochs
LEARNING_RATE = 0.1
_FLOOR = -1e30  # stands for -inf, so that 0 * z is 0 and not NaN


def fit_vector(
    layer: OutputLayer,
    fit: TokenFeatures,
    validation: TokenFeatures,
    *,
    start: float,
    seed: int,
    on_epoch: Callable[[FitRecord], None] = lambda record: None,
) -> VectorHead:
    """Fit `logits * scale + bias`; the epoch with the least validation NLL is kept.

    Args:
        layer: the base's output layer.
        fit: tokens to fit on.
        validation: tokens that pick the epoch.
        start: log s of the scalar that the fit starts at.
        seed: of the order of the tokens.
        on_epoch: called with each epoch's record.

    Returns:
        The head, float32, on the CPU.
    """
    head = VectorHead(HeadSpec("vector", "vector", fit.states.shape[1], outputs=layer.weight.shape[0]))
    head.requires_grad_(False).to(layer.weight.device).scale.fill_(torch.tensor(start).exp().item())
    optimizer = torch.optim.Adam([head.scale, head.bias], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    best = (_mean_nll(head, layer, validation), head.scale.clone(), head.bias.clone())
    on_epoch(FitRecord(0, _mean_nll(head, layer, fit), best[0]))
    epochs = max(EPOCHS, math.ceil(MIN_STEPS / math.ceil(len(fit) / BATCH_TOKENS)))
    for epoch in range(1, epochs + 1):
        batches = torch.randperm(len(fit), generator=generator).split(BATCH_TOKENS)
        total = 0.0
        for i, tokens in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * one_cycle((epoch - 1 + i / len(batches)) / epochs)
            loss, head.scale.grad, head.bias.grad = nll_gradient(head, layer, fit, tokens)
            optimizer.step()
            total += loss * len(tokens)
        score = _mean_nll(head, layer, validation)
        on_epoch(FitRecord(epoch, total / len(fit), score))
        if score < best[0]:
            best = (score, head.scale.clone(), head.bias.clone())
    head.scale.copy_(best[1])
    head.bias.copy_(best[2])
    return head.cpu()


@torch.no_grad()
def nll_gradient(
    head: VectorHead, layer: OutputLayer, features: TokenFeatures, tokens: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Return the mean NLL of the tokens at the indices `tokens`, and its gradients `[V]` in scale and bias."""
    scale, bias = torch.zeros_like(head.scale), torch.zeros_like(head.bias)
    total = 0.0
    for chunk in features.logits(layer, tokens):
        z = chunk.logits.clamp_min_(_FLOOR)
        log_q = _scaled(head, chunk).log_softmax(-1)
        total -= log_q.gather(1, chunk.target[:, None]).double().sum().item()
        error = log_q.exp_()
        error[torch.arange(len(error), device=error.device), chunk.target] -= 1
        ids = slice(None) if chunk.ids is None else chunk.ids
        bias[ids] += error.sum(0)
        scale[ids] += error.mul_(z).sum(0)
    return total / len(tokens), scale / len(tokens), bias / len(tokens)


def _scaled(head: VectorHead, chunk: LogitsChunk) -> Tensor:
    if chunk.ids is None:
        return head(chunk.logits)
    return chunk.logits * head.scale[chunk.ids] + head.bias[chunk.ids]


@torch.no_grad()
def _mean_nll(head: VectorHead, layer: OutputLayer, features: TokenFeatures) -> float:
    total = 0.0
    for chunk in features.logits(layer):
        log_q = _scaled(head, chunk).log_softmax(-1)
        total -= log_q.gather(1, chunk.target[:, None]).double().sum().item()
    return total / len(features)


@torch.no_grad()
def predict_vector(head: VectorHead, layer: OutputLayer, features: TokenFeatures) -> Predictions:
    """Return the predictions of vector scaling, which can say other tokens than the base does."""
    head = head.to(layer.weight.device)
    confidence = torch.empty(len(features), dtype=torch.float64)
    nll, correct = torch.empty_like(confidence), features.correct.clone()
    for chunk in features.logits(layer):
        top, argmax = (log_q := _scaled(head, chunk).log_softmax(-1)).max(-1)
        target = log_q.gather(1, chunk.target[:, None])[:, 0]
        graded = features.graded[chunk.tokens]
        nll[chunk.tokens] = -target.double().cpu()
        # of a graded answer the confidence is that of the token said, and the grade stands
        confidence[chunk.tokens] = torch.where(graded, target.cpu(), top.cpu()).double().exp()
        right = (argmax == chunk.target).cpu()
        correct[chunk.tokens] = torch.where(graded, correct[chunk.tokens], right)
    return Predictions(confidence.numpy(), correct.numpy(), nll.numpy(), features.window.numpy())

"""Fitting temperatures on cached features: one number by search, a linear head by AdamW.

The linear head sees standardised features and starts at the best single temperature for its own loss, so that it can only
be better than that on the data it is fitted on; the epoch with the least validation loss is kept, epoch 0 included. The
standardisation is folded into weight and bias at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmrl.ats.features import TokenFeatures
from llmrl.ats.losses import calibration_loss
from llmrl.ats.metrics import expected_calibration_error
from llmrl.heads import MAX_LOG_SCALE, MIN_LOG_SCALE, HeadSpec, TemperatureHead
from llmrl_kernels import lse_interpolate

EPOCHS = 10
BATCH_TOKENS = 4096
MIN_STEPS = 300  # small data sets get more epochs
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class FitRecord:
    """One epoch of a fit."""

    epoch: int
    fit_loss: float
    validation_loss: float


def curve_loss(loss: str, features: TokenFeatures, log_scale: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the per-token loss at `log_scale` `[M]` of the tokens `rows` (None: all), through the curve; differentiable."""
    lse = lse_interpolate(features.curve, features.slope, log_scale, rows)
    picked = slice(None) if rows is None else rows
    return calibration_loss(loss, lse, log_scale, features.gap[picked], features.correct[picked])


def fit_temperature(features: TokenFeatures, loss: str) -> float:
    """Return the log s in [-3, log 10] that minimises the mean loss; `loss` is one of LOSSES, or "ece"."""
    if len(features) == 0:
        return 0.0

    def score(log_scale: float) -> float:
        constant = torch.full((len(features),), log_scale)
        if loss == "ece":
            lse = lse_interpolate(features.curve, features.slope, constant)
            confidence = torch.exp(-lse.clamp_min(0.0)).double().numpy()
            return expected_calibration_error(confidence, features.correct.numpy())
        return curve_loss(loss, features, constant).double().mean().item()

    # NLL is convex in s; ECE and the top-label loss are not everywhere, so a grid comes first
    grid = torch.linspace(MIN_LOG_SCALE, MAX_LOG_SCALE, 54).tolist()
    best = min(grid, key=score)
    step = grid[1] - grid[0]
    for _ in range(4):
        fine = [best + step * (k / 4 - 1) for k in range(9)]
        best = min((min(max(x, MIN_LOG_SCALE), MAX_LOG_SCALE) for x in fine), key=score)
        step /= 4
    return best


def fit_linear(
    fit: TokenFeatures,
    validation: TokenFeatures,
    *,
    loss: str,
    seed: int,
    on_epoch: Callable[[FitRecord], None] = lambda record: None,
) -> TemperatureHead:
    """Fit tau = w.h + b.

    Args:
        fit: tokens to fit on.
        validation: tokens whose loss picks the epoch.
        loss: one of LOSSES.
        seed: of the order of the tokens.
        on_epoch: called with each epoch's record.

    Returns:
        A head for the raw hidden states, float32.
    """
    mean, deviation = _moments(fit.hidden)
    start = fit_temperature(fit, loss)
    weight = nn.Parameter(torch.zeros(fit.hidden.shape[1]))
    bias = nn.Parameter(torch.tensor(start))

    def log_scales(hidden: Tensor) -> Tensor:
        return (_standardise(hidden, mean, deviation) @ weight + bias).clamp(MIN_LOG_SCALE, MAX_LOG_SCALE)

    def mean_loss(features: TokenFeatures) -> float:
        with torch.no_grad():
            scales = torch.cat([log_scales(part) for part in features.hidden.split(65536)])
            return curve_loss(loss, features, scales).double().mean().item()

    steps_per_epoch = max(1, math.ceil(len(fit) / BATCH_TOKENS))
    epochs = max(EPOCHS, math.ceil(MIN_STEPS / steps_per_epoch))
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    best = (mean_loss(validation), weight.detach().clone(), bias.detach().clone())
    on_epoch(FitRecord(0, mean_loss(fit), best[0]))
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(fit), generator=generator).split(BATCH_TOKENS):
            value = curve_loss(loss, fit, log_scales(fit.hidden[batch]), batch).mean()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            total += value.item() * len(batch)
        score = mean_loss(validation)
        on_epoch(FitRecord(epoch, total / len(fit), score))
        if score < best[0]:
            best = (score, weight.detach().clone(), bias.detach().clone())
    return _fold(best[1], best[2], mean, deviation)


def scalar_head(log_scale: float, hidden_size: int) -> TemperatureHead:
    """Return a head that multiplies every logit by exp(log_scale)."""
    head = TemperatureHead(HeadSpec("temperature", "scalar", hidden_size))
    with torch.no_grad():
        head.bias.fill_(log_scale)
    return head.requires_grad_(False)


def shuffle_hidden(features: TokenFeatures, seed: int) -> TokenFeatures:
    """Return the same tokens with their hidden states dealt out at random: what a head can do without reading them."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return TokenFeatures(**{**vars(features), "hidden": features.hidden[order]})


def head_log_scales(head: TemperatureHead, hidden: Tensor, block: int = 65536) -> Tensor:
    """Return log s `[N]` of a head on hidden states `[N, H]`."""
    with torch.inference_mode():
        return torch.cat([head(part)[:, 0] for part in hidden.split(block)])


def _moments(hidden: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.zeros(hidden.shape[1], dtype=torch.float64)
    square = torch.zeros_like(mean)
    for part in hidden.split(8192):
        mean += part.double().sum(0)
        square += part.double().square().sum(0)
    mean /= len(hidden)
    deviation = (square / len(hidden) - mean.square()).clamp_min(0).sqrt()
    # a constant feature says nothing; dividing by its rounding noise would let it say something
    deviation[deviation < 1e-6 * mean.abs().clamp_min(1e-6)] = math.inf
    return mean.float(), deviation.float()


def _standardise(hidden: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return (hidden.float() - mean) / deviation


def _fold(weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor) -> TemperatureHead:
    head = TemperatureHead(HeadSpec("temperature", "linear", weight.shape[0]))
    raw = weight / deviation
    with torch.no_grad():
        assert head.weight is not None
        head.weight.copy_(raw[None])
        head.bias.copy_((bias.double() - raw.double() @ mean.double()).float())
    return head.requires_grad_(False)

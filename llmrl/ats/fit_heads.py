"""Fitting a head that reads hidden states, by AdamW on cached features.

A head sees standardised states and starts at the best single temperature for its own loss, so that it can only be better
than that on the data it is fitted on. The epoch with the least validation loss is kept, epoch 0 included; the fit stops when
there has been no better one for a while, and at the end `shrink` takes back what was learnt by heart. A linear head has its
standardisation folded into weight and bias, the others keep it in `scale` and `shift`. Heads that read sequences, and losses
of whole windows, are fitted on batches of whole windows, the rest on batches of tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.ats.features import TokenFeatures
from llmrl.ats.fit import FitRecord, curve_loss, fit_temperature, line_search, tokens_of_loss
from llmrl.ats.losses import SMOOTHING, Loss
from llmrl.ats.run_heads import batch_log_scales, head_log_scales, window_batches
from llmrl.heads import HeadSpec
from llmrl.logits_heads import MAX_LOG_SCALE, MIN_LOG_SCALE, TemperatureHead, build_logits_head, initialise

ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
EPOCHS = 5
MIN_STEPS = 100  # small data sets get more epochs
PATIENCE = 0.5  # of all epochs, without a better one
BATCH_TOKENS = 4096  # or positions, for a head that reads windows: 16 windows of 256
MAX_NORM = 1.0
LEARNING_RATES = {"linear": 2e-2, "mlp": 6e-3, "transformer": 4e-3}
RATE_WIDTH = 64  # of the model these rates were measured on


@dataclass(frozen=True)
class Fit:
    """A fitted head, the loss it was fitted by, the epoch that was kept of how many, and the factor of `shrink`."""

    head: TemperatureHead
    loss: Loss
    best_epoch: int
    epochs: int
    shrink: float


def fit_head(
    spec: HeadSpec,
    fit: TokenFeatures,
    validation: TokenFeatures,
    *,
    loss: Loss,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[FitRecord], None] = lambda record: None,
) -> Fit:
    """Fit a "linear", "mlp" or "transformer" temperature head.

    Args:
        spec: shape of the head; see `llmrl.ats.head_spec.spec_for`.
        fit: tokens to fit on.
        validation: tokens whose loss picks the epoch.
        loss: what is minimised.
        seed: of the inner matrices and of the order of the batches.
        device: where the head computes; the features stay where they are.
        on_epoch: called with each epoch's record.

    Returns:
        A head for the raw hidden states, float32, on the CPU.
    """
    fit, validation = tokens_of_loss(loss, fit), tokens_of_loss(loss, validation)
    generator = torch.Generator().manual_seed(seed)
    head = _fresh_head(spec, fit, loss, generator).to(device)
    batches = _batches(head, fit, loss, generator)
    epochs = max(EPOCHS, math.ceil(MIN_STEPS / len(batches)))
    optimizer = _optimizer(head, spec)
    best = (0, mean_loss(loss, validation, head), copy.deepcopy(head.state_dict()))
    alpha = loss.alpha if loss.name in SMOOTHING else None
    on_epoch(FitRecord(0, mean_loss(loss, fit, head), best[1], alpha))
    for epoch in range(1, epochs + 1):
        total = _train_epoch(head, fit, loss, batches, optimizer, (epoch - 1) / epochs, 1 / epochs)
        score = mean_loss(loss, validation, head)
        on_epoch(FitRecord(epoch, total, score, alpha))
        if score < best[1]:
            best = (epoch, score, copy.deepcopy(head.state_dict()))
        elif epoch - best[0] >= PATIENCE * epochs:
            break
        batches = _batches(head, fit, loss, generator)
    head.load_state_dict(best[2])
    factor = shrink(head, fit, validation, loss)
    fitted = head.cpu().folded() if isinstance(head, _LinearInFit) else head.cpu()
    return Fit(fitted.requires_grad_(False), loss, best[0], epochs, factor)


def fit_head_tuned(
    spec: HeadSpec, fit: TokenFeatures, validation: TokenFeatures, *, loss: Loss, **arguments: Any
) -> Fit:
    """Fit a head as `fit_head` does; of a smoothing loss with the alpha of ALPHAS that suits a linear head best.

    The smoothing losses of two alphas are no common scale, so the validation part's top-label Brier score decides. What alpha
    sets is how sure the head is on the whole, which a linear head shows in a fraction of the time of the others.
    """
    if loss.name not in SMOOTHING:
        return fit_head(spec, fit, validation, loss=loss, **arguments)
    linear, brier = HeadSpec(spec.kind, "linear", spec.hidden_size), Loss("top_label_brier")
    others = {**arguments, "on_epoch": lambda record: None}
    tried = [fit_head(linear, fit, validation, loss=replace(loss, alpha=alpha), **others) for alpha in ALPHAS]
    best = min(tried, key=lambda found: mean_loss(brier, validation, found.head))
    return fit_head(spec, fit, validation, loss=best.loss, **arguments)


def mean_loss(loss: Loss, features: TokenFeatures, head: TemperatureHead) -> float:
    """Return the mean loss of a head on all tokens of `features`."""
    return curve_loss(loss, features, head_log_scales(head, features)).double().mean().item()


# --- the loop ---------------------------------------------------------------------------------------------------------


def _batches(head: TemperatureHead, features: TokenFeatures, loss: Loss, generator: torch.Generator) -> list[Tensor]:
    if not head.reads_sequence and not loss.of_windows:
        return list(torch.randperm(len(features), generator=generator).split(BATCH_TOKENS))
    windows = len(features.window.unique_consecutive())
    return list(window_batches(features, torch.randperm(windows, generator=generator), BATCH_TOKENS))


def _optimizer(head: TemperatureHead, spec: HeadSpec) -> torch.optim.AdamW:
    rate = LEARNING_RATES[spec.architecture]
    # a step of Adam moves every weight by the rate, and tau by the rate times the root of the width or more: what suits 64
    # features throws tau across its whole range with thousands
    wide = min(1.0, (RATE_WIDTH / spec.hidden_size) ** 0.5)
    groups = [
        {"params": [p for p in head.parameters() if p.requires_grad and p.dim() > 1],
         "rate": rate * wide},
        {"params": [p for p in head.parameters() if p.requires_grad and p.dim() == 1], "rate": rate},
    ]  # fmt: skip
    return torch.optim.AdamW(groups, lr=rate, weight_decay=0.0)


def _train_epoch(
    head: TemperatureHead,
    features: TokenFeatures,
    loss: Loss,
    batches: list[Tensor],
    optimizer: torch.optim.Optimizer,
    begin: float,
    length: float,
) -> float:
    """Take a step on each batch; `begin` and `length` place the epoch in the whole fit. Return the mean loss."""
    total = count = 0.0
    for i, tokens in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * one_cycle(begin + length * i / len(batches))
        values = curve_loss(loss, features, batch_log_scales(head, features, tokens), tokens)
        optimizer.zero_grad()
        values.mean().backward()
        nn.utils.clip_grad_norm_(head.parameters(), MAX_NORM)
        optimizer.step()
        total += values.detach().double().sum().item()
        count += len(values)
    return total / count


def one_cycle(progress: float, warmup: float = 0.3) -> float:
    """Return the learning rate at `progress` in [0, 1) as a part of its peak: up from 1/25 and down to 0 along cosines."""
    if progress < warmup:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warmup)) / 2
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def shrink(head: TemperatureHead, fit: TokenFeatures, validation: TokenFeatures, loss: Loss) -> float:
    """Draw a fitted head's tau towards its mean, as far as the validation part asks for; return the factor.

    Where a head was fitted it knows the answers, so it spreads its temperatures further than new text bears out. In
    tau' = mean + factor (tau - mean) + offset the factor, 0 to 1, is fitted on the validation part alone. The offset is fitted
    on both parts: the few windows of a validation part do not know the mean temperature well. Both go into the last layer.
    """
    taus = [head_log_scales(head, part) for part in (fit, validation)]
    mean = taus[1].mean()

    def mean_loss_at(factor: float, offset: float, parts: slice) -> float:
        values = [
            curve_loss(loss, part, (mean + factor * (tau - mean) + offset).clamp(MIN_LOG_SCALE, MAX_LOG_SCALE))
            for part, tau in list(zip((fit, validation), taus, strict=True))[parts]
        ]
        return torch.cat(values).double().mean().item()

    factor = line_search(lambda factor: mean_loss_at(factor, 0.0, slice(1, 2)), 0.0, 1.0, 11)
    offset = line_search(lambda offset: mean_loss_at(factor, offset, slice(0, 2)), -0.5, 0.5, 11)
    assert head.weight is not None
    with torch.no_grad():
        head.weight.mul_(factor)
        head.bias.copy_(mean + factor * (head.bias - mean) + offset)
    return factor


# --- where a fit starts -----------------------------------------------------------------------------------------------


class _LinearInFit(TemperatureHead):
    """A linear head on standardised states, for the time of its fit."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(spec.hidden_size))
        self.shift = nn.Parameter(torch.zeros(spec.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.read_out(hidden.to(self.bias.device).float() * self.scale + self.shift)

    def folded(self) -> TemperatureHead:
        """Return the head that gives the same tau for raw hidden states."""
        head = TemperatureHead(self.spec)
        assert self.weight is not None
        assert head.weight is not None
        with torch.no_grad():
            head.weight.copy_(self.weight * self.scale)
            head.bias.copy_((self.bias.double() + self.weight.double()[0] @ self.shift.double()).float())
        return head


def _fresh_head(spec: HeadSpec, fit: TokenFeatures, loss: Loss, generator: torch.Generator) -> Any:
    head: Any = _LinearInFit(spec) if spec.architecture == "linear" else build_logits_head(spec)
    initialise(head, generator)
    mean, deviation = _moments(fit, whole_windows=head.reads_sequence)
    with torch.no_grad():
        head.bias.fill_(fit_temperature(fit, loss))
        head.scale.copy_(1 / deviation)
        head.shift.copy_(-mean / deviation)
    head.scale.requires_grad_(False)
    head.shift.requires_grad_(False)
    return head


def _moments(features: TokenFeatures, whole_windows: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, `[H]` float32, of the states a head will see."""
    rows = features.row
    if whole_windows:
        spans = [(int(features.offsets[w]), int(features.offsets[w + 1])) for w in features.window.unique_consecutive()]
        rows = torch.cat([torch.arange(start, end) for start, end in spans])
    mean = torch.zeros(features.states.shape[1], dtype=torch.float64)
    square = torch.zeros_like(mean)
    for part in rows.split(8192):
        states = features.states[part].double()
        mean += states.sum(0)
        square += states.square().sum(0)
    mean /= len(rows)
    deviation = (square / len(rows) - mean.square()).clamp_min(0).sqrt()
    # a constant feature says nothing; dividing by its rounding noise would let it say something
    deviation[deviation < 1e-6 * mean.abs().clamp_min(1e-6)] = math.inf
    return mean.float(), deviation.float()

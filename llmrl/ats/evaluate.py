"""Fit every method on one split and score all of them on its test slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmrl.ats.features import OutputLayer, TokenFeatures, exact_lse
from llmrl.ats.fit import FitRecord, fit_linear, fit_temperature, head_log_scales, scalar_head, shuffle_hidden
from llmrl.ats.losses import nll
from llmrl.ats.metrics import Predictions, compare_methods, point_metrics, reliability_curve
from llmrl.ats.options import LINEAR, NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE
from llmrl.ats.splits import Split
from llmrl.heads import TemperatureHead
from llmrl_kernels import lse_interpolate

SELECTED_BY = "brier on validation"


@dataclass(frozen=True)
class SeedResult:
    """Everything one seed gave: heads, scores with intervals, paired differences, and the choice made on validation."""

    seed: int
    heads: dict[str, TemperatureHead]
    methods: dict[str, dict[str, dict[str, float]]]
    differences: dict[str, dict[str, dict[str, float]]]
    validation: dict[str, dict[str, float]]
    best: str
    tokens: dict[str, int]
    reliability: dict[str, Any]
    test_windows: list[int]


def fit_and_score(
    features: TokenFeatures,
    split: Split,
    layer: OutputLayer,
    *,
    methods: list[str],
    loss: str,
    seed: int,
    draws: int,
    on_epoch: Callable[[str, FitRecord], None] = lambda method, record: None,
) -> SeedResult:
    """Fit on `split.fit`, choose on `split.validation`, report `split.test`, which nothing was tuned on."""
    parts = {
        "fit": features.of_windows(split.fit),
        "validation": features.of_windows(split.validation),
        "test": features.of_windows(split.test),
    }
    # a generator of its own for each part: the same permutation on two parts of one length would be a coincidence
    shuffled = {name: shuffle_hidden(part, 3 * seed + i) for i, (name, part) in enumerate(parts.items())}
    heads = {}
    for name in methods:
        source = shuffled if name == SHUFFLED else parts
        heads[name] = _fit(name, source, loss, seed, on_epoch)
    scales = {
        part: {
            name: head_log_scales(heads[name], (shuffled if name == SHUFFLED else parts)[part].hidden)
            for name in methods
        }
        for part in ("validation", "test")
    }
    validation = {name: point_metrics(_from_curve(parts["validation"], scales["validation"][name])) for name in methods}
    candidates = [name for name in methods if name != SHUFFLED]  # a control cannot be served
    best = min(candidates, key=lambda name: validation[name]["brier"])
    predictions = predict(parts["test"], layer, scales["test"])
    scores, differences = compare_methods(predictions, seed=seed, draws=draws, pairs=pairs_of(methods))
    return SeedResult(
        seed=seed,
        heads=heads,
        methods=scores,
        differences=differences,
        validation=validation,
        best=best,
        tokens={name: len(part) for name, part in parts.items()},
        reliability={name: reliability_curve(p) for name, p in predictions.items()},
        test_windows=split.test,
    )


def predict(features: TokenFeatures, layer: OutputLayer, log_scales: dict[str, torch.Tensor]) -> dict[str, Predictions]:
    """Return each method's predictions from the model's logits (not from the curve)."""
    lse = exact_lse(layer, features, log_scales)
    return {name: _predictions(features, lse[name], scale) for name, scale in log_scales.items()}


def pairs_of(methods: list[str]) -> list[tuple[str, str]]:
    """Return the differences worth reporting: each fitted method against the base and against the scalars."""
    pairs = []
    for reference in (NONE, TEMPERATURE, TEMPERATURE_ECE):
        pairs += [(name, reference) for name in methods if name not in (NONE, reference) and reference in methods]
    return [(a, b) for a, b in pairs if not (a == TEMPERATURE and b == TEMPERATURE_ECE)]


def _fit(
    name: str,
    parts: dict[str, TokenFeatures],
    loss: str,
    seed: int,
    on_epoch: Callable[[str, FitRecord], None],
) -> TemperatureHead:
    fit, width = parts["fit"], parts["fit"].hidden.shape[1]
    if name == NONE:
        return scalar_head(0.0, width)
    if name == TEMPERATURE:
        return scalar_head(fit_temperature(fit, "nll"), width)
    if name == TEMPERATURE_ECE:
        return scalar_head(fit_temperature(fit, "ece"), width)
    assert name in (LINEAR, SHUFFLED)
    return fit_linear(fit, parts["validation"], loss=loss, seed=seed, on_epoch=lambda record: on_epoch(name, record))


def _from_curve(features: TokenFeatures, log_scale: torch.Tensor) -> Predictions:
    return _predictions(features, lse_interpolate(features.curve, features.slope, log_scale), log_scale)


def _predictions(features: TokenFeatures, lse: torch.Tensor, log_scale: torch.Tensor) -> Predictions:
    return Predictions(
        confidence=torch.exp(-lse.double().clamp_min(0.0)).numpy(),
        correct=features.correct.numpy(),
        nll=nll(lse.double(), log_scale.double(), features.gap.double()).numpy(),
        window=features.window.numpy().astype(np.int64),
    )

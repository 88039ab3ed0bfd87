"""Fit every method on one split and score all of them on its test slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrl.ats.features import TokenFeatures, exact_lse
from llmrl.ats.fit import FitRecord, fit_temperature, scalar_head, shuffle_hidden
from llmrl.ats.fit_heads import fit_head_tuned
from llmrl.ats.fit_vector import fit_vector, predict_vector
from llmrl.ats.head_spec import spec_for
from llmrl.ats.losses import SMOOTHING, Loss, nll
from llmrl.ats.metrics import Predictions, compare_methods, point_metrics, reliability_curve
from llmrl.ats.options import LINEAR, NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE
from llmrl.ats.output_layer import OutputLayer
from llmrl.ats.run_heads import head_log_scales
from llmrl.ats.splits import Split
from llmrl.errors import UsageError, did_you_mean
from llmrl.heads import HeadSpec
from llmrl.logits_heads import TemperatureHead, VectorHead
from llmrl_kernels import lse_interpolate

MLP, TRANSFORMER, VECTOR, ORACLE = "ats-mlp", "ats-transformer", "vector", "oracle-group"
ARCHITECTURES = {LINEAR: "linear", MLP: "mlp", TRANSFORMER: "transformer", SHUFFLED: "linear"}
METHODS = (NONE, TEMPERATURE, TEMPERATURE_ECE, VECTOR, *ARCHITECTURES, ORACLE)
# a control and a bound cannot be served; a vector changes the text, so it is taken by name only
NOT_SELECTABLE = (SHUFFLED, ORACLE, VECTOR)
SELECTED_BY = "brier on validation"


@dataclass(frozen=True)
class SeedResult:
    """Everything one seed gave: heads, scores with intervals, paired differences, and the choice made on validation.

    `heads` has no "oracle-group", which is no head but a bound fitted on the test slice itself; `fits` says of each
    head that was trained by which loss, with which alpha (smoothing only), and which epoch of how many was kept.
    """

    seed: int
    heads: dict[str, nn.Module]
    methods: dict[str, dict[str, dict[str, float]]]
    differences: dict[str, dict[str, dict[str, float]]]
    validation: dict[str, dict[str, float]]
    best: str
    tokens: dict[str, int]
    reliability: dict[str, Any]
    test_windows: list[int]
    fits: dict[str, dict[str, Any]]


def fit_and_score(
    features: TokenFeatures,
    split: Split,
    layer: OutputLayer,
    *,
    methods: list[str],
    loss: str,
    seed: int,
    draws: int,
    config: Any = None,
    aggregate: str = "mean",
    sources: list[str] | None = None,
    on_epoch: Callable[[str, FitRecord], None] = lambda method, record: None,
) -> SeedResult:
    """Fit on `split.fit`, choose on `split.validation`, report `split.test`, which nothing was tuned on.

    Args:
        features: of all windows; with the states of whole windows if a transformer is among the methods.
        split: windows of each part.
        layer: the base's output layer.
        methods: names out of METHODS, the rows of the table.
        loss: of the heads that read hidden states, one of `llmrl.ats.losses.LOSSES`; scalars and vector have their own.
        seed: of the fits, the control and the bootstrap.
        draws: of the bootstrap.
        config: the base's transformers configuration, for the sizes of MLP and transformer.
        aggregate: of the loss "answer".
        sources: file of each window, the groups of "oracle-group".
        on_epoch: called with the method and the record of each epoch.
    """
    parts = {name: features.of_windows(getattr(split, name)) for name in ("fit", "validation", "test")}
    # a generator of its own for each part: the same permutation on two parts of one length would be a coincidence
    shuffled = {name: shuffle_hidden(part, 3 * seed + i) for i, (name, part) in enumerate(parts.items())}
    heads: dict[str, nn.Module] = {}
    fits: dict[str, dict[str, Any]] = {}
    fitting = _Fitting(layer, config, Loss(loss, aggregate=aggregate), seed, on_epoch)
    for name in (name for name in methods if name != ORACLE):
        heads[name], fits[name] = fitting.fit(name, shuffled if name == SHUFFLED else parts)
    validation: dict[str, dict[str, float]] = {}
    for name, head in heads.items():
        source = shuffled if name == SHUFFLED else parts
        validation[name] = point_metrics(_on_validation(head, layer, source["validation"]))
    scales = {
        name: head_log_scales(head, (shuffled if name == SHUFFLED else parts)["test"])
        for name, head in heads.items()
        if isinstance(head, TemperatureHead)
    }
    if ORACLE in methods:
        scales[ORACLE] = oracle_log_scales(parts["test"], sources)
    predictions = predict(parts["test"], layer, scales)
    for name in methods:
        if isinstance(head := heads.get(name), VectorHead):
            predictions[name] = predict_vector(head, layer, parts["test"])
    predictions = {name: predictions[name] for name in methods}
    scores, differences = compare_methods(predictions, seed=seed, draws=draws, pairs=pairs_of(methods))
    return SeedResult(
        seed=seed,
        heads=heads,
        methods=scores,
        differences=differences,
        validation=validation,
        best=min((n for n in heads if n not in NOT_SELECTABLE), key=lambda name: validation[name]["brier"]),
        tokens={name: len(part) for name, part in parts.items()},
        reliability={name: reliability_curve(p) for name, p in predictions.items()},
        test_windows=split.test,
        fits={name: record for name, record in fits.items() if record},
    )


def predict(features: TokenFeatures, layer: OutputLayer, log_scales: dict[str, Tensor]) -> dict[str, Predictions]:
    """Return the predictions of each method that is a temperature, from the model's logits (not from the curve)."""
    lse = exact_lse(layer, features, log_scales)
    return {name: _predictions(features, lse[name], scale) for name, scale in log_scales.items()}


def oracle_log_scales(features: TokenFeatures, sources: list[str] | None) -> Tensor:
    """Return log s `[N]`: for each file the temperature that fits these very tokens best.

    A bound: what knowing the file, and its answers, would give a scalar. Nothing like it can be served.
    """
    if sources is None:
        raise ValueError("oracle-group needs `sources`, the file of each window")
    names = sorted(set(sources))
    group = torch.tensor([names.index(source) for source in sources])[features.window]
    result = torch.zeros(len(features))
    for number in group.unique().tolist():
        result[group == number] = fit_temperature(features.select(group == number), Loss("nll"))
    return result


def pairs_of(methods: list[str]) -> list[tuple[str, str]]:
    """Return the differences worth reporting: each fitted method against the base and against the scalars."""
    pairs = []
    for reference in (NONE, TEMPERATURE, TEMPERATURE_ECE):
        pairs += [
            (name, reference) for name in methods if name not in (NONE, ORACLE, reference) and reference in methods
        ]
    return [(a, b) for a, b in pairs if not (a == TEMPERATURE and b == TEMPERATURE_ECE)]


@dataclass(frozen=True)
class _Fitting:
    layer: OutputLayer
    config: Any
    loss: Loss
    seed: int
    on_epoch: Callable[[str, FitRecord], None]

    def fit(self, name: str, parts: dict[str, TokenFeatures]) -> tuple[nn.Module, dict[str, Any]]:
        """Return the head of one method, and what is worth saying about how it was fitted."""
        fit, validation = parts["fit"], parts["validation"]
        width = fit.states.shape[1]
        if name == NONE:
            return scalar_head(0.0, width), {}
        if name == TEMPERATURE:
            return scalar_head(fit_temperature(fit, Loss("nll")), width), {}
        if name == TEMPERATURE_ECE:
            return scalar_head(fit_temperature(fit, None), width), {}

        def report(record: FitRecord) -> None:
            self.on_epoch(name, record)

        if name == VECTOR:
            start = fit_temperature(fit, Loss("nll"))
            return fit_vector(self.layer, fit, validation, start=start, seed=self.seed, on_epoch=report), {
                "loss": "nll"
            }
        if name not in ARCHITECTURES:
            raise UsageError(f"unknown method '{name}'{did_you_mean(name, METHODS)}")
        found = fit_head_tuned(
            self._spec(ARCHITECTURES[name], width),
            fit,
            validation,
            loss=self.loss,
            seed=self.seed,
            device=self.layer.weight.device,
            on_epoch=report,
        )
        alpha = {"alpha": found.loss.alpha} if found.loss.name in SMOOTHING else {}
        return found.head, {"loss": found.loss.name, **alpha, "best_epoch": found.best_epoch, "epochs": found.epochs}

    def _spec(self, architecture: str, width: int) -> HeadSpec:
        if architecture == "linear":
            return HeadSpec("temperature", "linear", width)
        if self.config is None:
            raise ValueError(f"a {architecture} head needs `config`, the base's transformers configuration")
        return spec_for(self.config, architecture)


def _on_validation(head: nn.Module, layer: OutputLayer, features: TokenFeatures) -> Predictions:
    if isinstance(head, VectorHead):
        return predict_vector(head, layer, features)
    assert isinstance(head, TemperatureHead)
    log_scale = head_log_scales(head, features)
    return _predictions(features, lse_interpolate(features.curve, features.slope, log_scale), log_scale)


def _predictions(features: TokenFeatures, lse: Tensor, log_scale: Tensor) -> Predictions:
    lse, scale = lse.double().clamp_min(0.0), log_scale.double().exp()
    return Predictions(
        confidence=torch.exp(-(lse + scale * features.confidence_gap)).numpy(),
        correct=features.correct.numpy(),
        nll=nll(lse, scale, features.gap.double()).numpy(),
        window=features.window.numpy().astype(np.int64),
    )

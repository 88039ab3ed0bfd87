"""Fit every method on one split and score all of them on its test slice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmrl.ats.answer_level import answers_of
from llmrl.ats.features import TokenFeatures, exact_lse
from llmrl.ats.fit import FitRecord, fit_temperature, scalar_head, shuffle_hidden
from llmrl.ats.fit_heads import fit_head_tuned
from llmrl.ats.fit_vector import fit_vector, predict_vector
from llmrl.ats.head_spec import spec_for
from llmrl.ats.losses import SMOOTHING, Loss, nll
from llmrl.ats.metrics import Predictions, compare_methods, point_metrics, reliability_curve
from llmrl.ats.options import LINEAR, MLP, NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE, TRANSFORMER, VECTOR
from llmrl.ats.output_layer import OutputLayer
from llmrl.ats.recalibrate import fit_recalibration
from llmrl.ats.run_heads import head_log_scales
from llmrl.ats.splits import Split
from llmrl.errors import UsageError, did_you_mean
from llmrl.heads import HeadSpec
from llmrl.logits_heads import TemperatureHead, VectorHead
from llmrl_kernels import lse_interpolate

ISOTONIC, SCALING_BINNING, ORACLE, PAPER_HEAD = "isotonic", "scaling-binning", "oracle-group", "ats-paper"
ARCHITECTURES = {
    LINEAR: "linear",
    MLP: "mlp",
    TRANSFORMER: "transformer",
    PAPER_HEAD: "transformer",
    SHUFFLED: "linear",
}
# maps of the base's confidence; the rest of the distribution stays as it was, so there is nothing to serve
RECALIBRATED = {ISOTONIC: "isotonic", SCALING_BINNING: "scaling_binning"}
METHODS = (NONE, TEMPERATURE, TEMPERATURE_ECE, VECTOR, *RECALIBRATED, *ARCHITECTURES, ORACLE)
# a control and a bound cannot be served; a vector changes the text, so it is taken by name only
NOT_SELECTABLE = (SHUFFLED, ORACLE, VECTOR)
PARTS = ("fit", "validation", "test")
SELECTED_BY = "brier on validation"


@dataclass(frozen=True)
class SeedResult:
    """Everything one seed gave: heads, scores with intervals, paired differences, and the choice made on validation.

    Of graded answers `tokens` counts answers, and all scores are about them. `heads` has no "oracle-group", which is no
    head but a bound fitted on the test slice itself; `fits` says of each head that was trained by which loss, with which
    alpha (smoothing only), and which epoch of how many was kept; `predictions` has those of the validation and the test
    slice, by method.
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
    predictions: dict[str, dict[str, Predictions]]


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
    on_fit: Callable[[str, float], None] = lambda method, seconds: None,
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
        on_fit: called with the method and the seconds its fit took.
    """
    parts = {name: features.of_windows(getattr(split, name)) for name in PARTS}
    # a generator of its own for each part: the same permutation on two parts of one length would be a coincidence
    shuffled = {name: shuffle_hidden(part, 3 * seed + i) for i, (name, part) in enumerate(parts.items())}
    heads: dict[str, nn.Module] = {}
    fits: dict[str, dict[str, Any]] = {}
    fitting = _Fitting(layer, config, Loss(loss, aggregate=aggregate), seed, on_epoch)
    for name in (name for name in methods if name != ORACLE and name not in RECALIBRATED):
        start = perf_counter()
        heads[name], fits[name] = fitting.fit(name, shuffled if name == SHUFFLED else parts)
        on_fit(name, perf_counter() - start)
    chosen: dict[str, Predictions] = {}
    for name, head in heads.items():
        part = (shuffled if name == SHUFFLED else parts)["validation"]
        chosen[name] = _reported(_on_validation(head, layer, part), part, aggregate)
    validation = {name: point_metrics(p) for name, p in chosen.items()}
    found = _on_test(heads, layer, parts["test"], shuffled["test"])
    if ORACLE in methods:
        found |= predict(parts["test"], layer, {ORACLE: oracle_log_scales(parts["test"], sources, aggregate)})
    predictions = {name: _reported(p, parts["test"], aggregate) for name, p in found.items()}
    for name in (name for name in methods if name in RECALIBRATED):
        base = {part: _reported(_unscaled(layer, parts[part]), parts[part], aggregate) for part in ("fit", "test")}
        predictions[name] = _recalibrated(RECALIBRATED[name], base["fit"], base["test"])
    predictions = {name: predictions[name] for name in methods}
    scores, differences = compare_methods(predictions, seed=seed, draws=draws, pairs=pairs_of(methods))
    return SeedResult(
        seed=seed,
        heads=heads,
        methods=scores,
        differences=differences,
        validation=validation,
        best=min((n for n in heads if n not in NOT_SELECTABLE), key=lambda name: validation[name]["brier"]),
        tokens={name: _units(part) for name, part in parts.items()},
        reliability={name: reliability_curve(p) for name, p in predictions.items()},
        test_windows=split.test,
        fits={name: record for name, record in fits.items() if record},
        predictions={"validation": chosen, "test": predictions},
    )


def _on_test(
    heads: dict[str, nn.Module], layer: OutputLayer, test: TokenFeatures, shuffled: TokenFeatures
) -> dict[str, Predictions]:
    """Return the predictions of every head; all temperatures share one sweep over the logits."""
    scales = {
        name: head_log_scales(head, shuffled if name == SHUFFLED else test)
        for name, head in heads.items()
        if isinstance(head, TemperatureHead)
    }
    vectors = {name: head for name, head in heads.items() if isinstance(head, VectorHead)}
    return predict(test, layer, scales) | {name: predict_vector(head, layer, test) for name, head in vectors.items()}


def predict(features: TokenFeatures, layer: OutputLayer, log_scales: dict[str, Tensor]) -> dict[str, Predictions]:
    """Return the predictions of each method that is a temperature, from the model's logits (not from the curve)."""
    lse = exact_lse(layer, features, log_scales)
    return {name: _predictions(features, lse[name], scale) for name, scale in log_scales.items()}


def oracle_log_scales(features: TokenFeatures, sources: list[str] | None, aggregate: str = "mean") -> Tensor:
    """Return log s `[N]`: for each file the temperature that fits these very tokens best.

    A bound: what knowing the file, and its answers, would give a scalar. Nothing like it can be served.
    """
    if sources is None:
        raise ValueError("oracle-group needs `sources`, the file of each window")
    names = sorted(set(sources))
    group = torch.tensor([names.index(source) for source in sources])[features.window]
    result = torch.zeros(len(features))
    loss = _scalar_loss(features, aggregate)
    for number in group.unique().tolist():
        result[group == number] = fit_temperature(features.select(group == number), loss)
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
            return scalar_head(fit_temperature(fit, _scalar_loss(fit, self.loss.aggregate)), width), {}
        if name == TEMPERATURE_ECE:
            return scalar_head(fit_temperature(fit, None, self.loss.aggregate), width), {}

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
            loss=Loss("smoothing") if name == PAPER_HEAD else self.loss,
            seed=self.seed,
            device=self.layer.weight.device,
            on_epoch=report,
        )
        record: dict[str, Any] = {"loss": found.loss.name, "best_epoch": found.best_epoch, "epochs": found.epochs}
        if found.loss.name in SMOOTHING:
            record["alpha"] = found.loss.alpha
        return found.head, record | {"shrink": round(found.shrink, 4)}

    def _spec(self, architecture: str, width: int) -> HeadSpec:
        if architecture == "linear":
            return HeadSpec("temperature", "linear", width)
        if self.config is None:
            raise ValueError(f"a {architecture} head needs `config`, the base's transformers configuration")
        return spec_for(self.config, architecture)


def _scalar_loss(features: TokenFeatures, aggregate: str) -> Loss:
    # the tokens of an answer are the model's own: their likelihood says nothing about whether they are right
    return Loss("answer", aggregate=aggregate) if features.graded.all() else Loss("nll")


def _unscaled(layer: OutputLayer, features: TokenFeatures) -> Predictions:
    return predict(features, layer, {NONE: torch.zeros(len(features))})[NONE]


def _recalibrated(kind: str, fit: Predictions, test: Predictions) -> Predictions:
    """Return the test predictions with the confidence mapped; no likelihood of the target goes with it."""
    mapped = fit_recalibration(kind, fit.confidence, fit.correct)(test.confidence)
    return replace(test, confidence=mapped, nll=np.full(len(mapped), np.nan))


def _reported(tokens: Predictions, features: TokenFeatures, aggregate: str) -> Predictions:
    return answers_of(tokens, aggregate, features.question) if features.graded.all() else tokens


def _units(features: TokenFeatures) -> int:
    return len(features.window.unique()) if features.graded.all() else len(features)


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

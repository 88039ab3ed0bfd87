from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmrl.ats import evaluate as module
from llmrl.ats.evaluate import (
    ISOTONIC,
    NOT_SELECTABLE,
    ORACLE,
    PAPER_HEAD,
    SCALING_BINNING,
    fit_and_score,
    oracle_log_scales,
    pairs_of,
    predict,
)
from llmrl.ats.fit import fit_temperature, shuffle_hidden
from llmrl.ats.fit_heads import Fit
from llmrl.ats.options import LINEAR, MLP, NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE, TRANSFORMER, VECTOR
from llmrl.ats.recalibrate import fit_recalibration
from llmrl.ats.run_heads import head_log_scales
from llmrl.ats.splits import Split
from llmrl.errors import UsageError
from llmrl.heads import build_head

DIRECTION = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
ALL = [NONE, TEMPERATURE, TEMPERATURE_ECE, LINEAR, SHUFFLED]
HEADS = [NONE, TEMPERATURE, TEMPERATURE_ECE, VECTOR, LINEAR, MLP, TRANSFORMER, SHUFFLED, ORACLE]
CONFIG = SimpleNamespace(hidden_size=8, intermediate_size=24, num_attention_heads=2, head_dim=8, vocab_size=24)


def heterogeneous(hidden):
    return hidden @ DIRECTION - 0.4


@pytest.fixture(scope="module")
def result(make_world):
    world = make_world(heterogeneous, windows=100)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    found = fit_and_score(world.features, split, world.layer, methods=ALL, loss="nll", seed=0, draws=200)
    return world, split, found


def test_fit_and_score_scores_are_those_of_full_logits_on_the_test_windows(result):
    world, split, found = result
    inside = torch.isin(world.features.window, torch.tensor(split.test))
    z, y = world.logits[inside].double(), world.features.target[inside]
    for name in (NONE, TEMPERATURE, LINEAR):
        scale = head_log_scales(found.heads[name], world.features.select(inside)).double()
        probabilities = (z * scale.exp()[:, None]).softmax(-1)
        confidence, guess = probabilities.max(-1)
        score = found.methods[name]
        assert score["nll"]["value"] == pytest.approx(
            -probabilities.gather(1, y[:, None]).log().mean().item(), abs=1e-5
        )
        assert score["brier"]["value"] == pytest.approx(
            ((confidence - (guess == y).double()) ** 2).mean().item(), abs=1e-5
        )
        assert score["accuracy"]["value"] == pytest.approx((guess == y).double().mean().item())


def test_fit_and_score_linear_wins_where_temperatures_differ(result):
    _, _, found = result
    assert found.best == LINEAR
    for reference in (NONE, TEMPERATURE, TEMPERATURE_ECE):
        assert found.differences[f"{LINEAR} - {reference}"]["nll"]["high"] < 0
    # the control falls back to the scalar
    control = found.differences[f"{SHUFFLED} - {TEMPERATURE}"]["nll"]
    assert control["low"] < 0.01
    assert abs(control["value"]) < 0.01


def test_fit_and_score_accuracy_is_the_same_for_every_method(result):
    _, _, found = result
    assert len({found.methods[name]["accuracy"]["value"] for name in ALL}) == 1


def test_fit_and_score_chooses_on_validation_and_never_the_control(make_world):
    """The test slice is built so that it would choose otherwise."""
    good = make_world(heterogeneous, windows=100)
    mirrored = make_world(lambda hidden: -(hidden @ DIRECTION) - 0.4, windows=100)
    late = good.features.window >= 65
    names = ("gap", "correct", "target")
    mixed = {n: torch.where(late, getattr(mirrored.features, n), getattr(good.features, n)) for n in names}
    features = replace(good.features, **mixed)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    found = fit_and_score(features, split, good.layer, methods=ALL, loss="nll", seed=0, draws=50)
    assert found.best == LINEAR
    assert found.methods[LINEAR]["brier"]["value"] > found.methods[TEMPERATURE]["brier"]["value"]
    assert found.best == min((n for n in ALL if n != SHUFFLED), key=lambda n: found.validation[n]["brier"])


def test_pairs_of_reports_each_method_against_base_and_scalars():
    assert pairs_of(ALL) == [
        (TEMPERATURE, NONE), (TEMPERATURE_ECE, NONE), (LINEAR, NONE), (SHUFFLED, NONE),
        (TEMPERATURE_ECE, TEMPERATURE), (LINEAR, TEMPERATURE), (SHUFFLED, TEMPERATURE),
        (LINEAR, TEMPERATURE_ECE), (SHUFFLED, TEMPERATURE_ECE),
    ]  # fmt: skip


# --- every method at once ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(make_world):
    world = make_world(heterogeneous, tokens=6400, windows=100)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    records = []
    found = fit_and_score(
        world.features,
        split,
        world.layer,
        methods=HEADS,
        loss="nll+top_label",
        seed=0,
        draws=50,
        config=CONFIG,
        sources=["a" if i % 2 else "b" for i in range(100)],
        on_epoch=lambda method, record: records.append((method, record)),
    )
    return world, split, found, records


def test_fit_and_score_has_a_row_for_each_method_in_order(whole):
    _, _, found, records = whole
    assert list(found.methods) == list(found.reliability) == HEADS
    assert set(found.heads) == set(found.validation) == set(HEADS) - {ORACLE}
    assert {name: head.spec.architecture for name, head in found.heads.items()} == {
        NONE: "scalar", TEMPERATURE: "scalar", TEMPERATURE_ECE: "scalar", VECTOR: "vector", LINEAR: "linear",
        MLP: "mlp", TRANSFORMER: "transformer", SHUFFLED: "linear",
    }  # fmt: skip
    trained = {VECTOR, LINEAR, MLP, TRANSFORMER, SHUFFLED}
    assert set(found.fits) == {method for method, _ in records} == trained
    assert found.fits[MLP]["loss"] == "nll+top_label"
    assert set(found.fits[MLP]) == {"loss", "best_epoch", "epochs", "shrink"}


def test_fit_and_score_only_vector_changes_what_is_said(whole):
    _, _, found, _ = whole
    accuracies = {name: scores["accuracy"]["value"] for name, scores in found.methods.items()}
    assert len({value for name, value in accuracies.items() if name != VECTOR}) == 1
    assert accuracies[VECTOR] != accuracies[NONE]


def test_fit_and_score_heads_beat_the_scalar(whole):
    _, _, found, _ = whole
    for name in (LINEAR, MLP, TRANSFORMER):
        assert found.differences[f"{name} - {TEMPERATURE}"]["nll"]["high"] < 0


def test_fit_and_score_never_selects_a_control_a_bound_or_a_vector(make_world):
    assert set(NOT_SELECTABLE) >= {SHUFFLED, ORACLE, VECTOR}
    world = make_world(lambda hidden: torch.zeros(len(hidden)), tokens=3200, windows=100)
    # what is said is the base's logits and a bias: a vector can be sure of it, its Brier score is far below the others'
    target = (world.logits + 3.0 * torch.linspace(-1, 1, 24)).argmax(-1)
    correct = world.logits.argmax(-1) == target
    gap = world.logits.amax(-1) - world.logits.gather(1, target[:, None])[:, 0]
    features = replace(world.features, target=target, correct=correct, gap=gap)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    found = fit_and_score(
        features, split, world.layer, methods=[NONE, TEMPERATURE, VECTOR, SHUFFLED], loss="nll", seed=0, draws=20
    )
    assert found.validation[VECTOR]["brier"] < found.validation[TEMPERATURE]["brier"]
    assert found.best == TEMPERATURE


def test_fit_and_score_smoothing_says_its_alpha(make_world):
    world = make_world(heterogeneous, tokens=1600, windows=100)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    alphas = set()
    found = fit_and_score(
        world.features, split, world.layer, methods=[NONE, LINEAR], loss="smoothing", seed=0, draws=20,
        on_epoch=lambda method, record: alphas.add(record.alpha),
    )  # fmt: skip
    assert alphas == {found.fits[LINEAR]["alpha"]}


def test_fit_and_score_control_reads_shuffled_states_wherever_it_is_fitted_and_scored(make_world, monkeypatch):
    """With a known head in place of fits; each part is shuffled in its own order."""
    world = make_world(heterogeneous, tokens=1600, windows=100)
    split = Split(fit=list(range(40)), validation=list(range(40, 70)), test=list(range(70, 100)))
    shuffled, fitted = {}, []

    def shuffle(part, seed):
        found = shuffle_hidden(part, seed)
        shuffled[int(part.window[0])] = found
        return found

    def fit(spec, fit, validation, *, loss, **options):
        fitted.append((fit, validation))
        head = build_head(spec).requires_grad_(False)
        head.weight.copy_(DIRECTION[None])
        return Fit(head, loss, best_epoch=1, epochs=1, shrink=1.0)

    monkeypatch.setattr(module, "shuffle_hidden", shuffle)
    monkeypatch.setattr(module, "fit_head_tuned", fit)
    found = fit_and_score(
        world.features, split, world.layer, methods=[NONE, LINEAR, SHUFFLED], loss="nll", seed=1, draws=20
    )
    parts = {name: world.features.of_windows(getattr(split, name)) for name in ("fit", "validation", "test")}
    control = {name: shuffled[int(part.window[0])] for name, part in parts.items()}
    for seen, given in zip((parts, control), fitted, strict=True):
        assert [part.row.tolist() for part in given] == [seen[name].row.tolist() for name in ("fit", "validation")]
    orders = [control[name].row - parts[name].row[0] for name in ("validation", "test")]
    assert orders[0].sort().values.equal(orders[1].sort().values)
    assert not orders[0].equal(orders[1])
    for name in ("validation", "test"):
        for method, seen in ((LINEAR, parts), (SHUFFLED, control)):
            tau = (seen[name].hidden @ DIRECTION).double()
            expected = (world.logits[parts[name].row].double() * tau.exp()[:, None]).softmax(-1).amax(-1)
            assert found.predictions[name][method].confidence == pytest.approx(expected.numpy(), abs=1e-4)


def test_fit_and_score_of_graded_answers_is_about_whole_answers(make_world, monkeypatch):
    """Scalars, heads, bound and scores: all by the product of an answer's probabilities, none by the likelihood."""
    monkeypatch.setattr("llmrl.ats.fit_heads.MIN_STEPS", 3)
    world = make_world(heterogeneous, tokens=1600, windows=400)  # answers of four tokens
    said = world.logits.argmax(-1)
    right = torch.rand(400, generator=torch.Generator().manual_seed(2)) < 0.4
    features = replace(
        world.features,
        target=said,
        gap=torch.zeros(1600),
        graded=torch.ones(1600, dtype=torch.bool),
        correct=right[world.features.window],
    )
    split = Split(fit=list(range(200)), validation=list(range(200, 260)), test=list(range(260, 400)))
    records = {}
    found = fit_and_score(
        features, split, world.layer, methods=[NONE, TEMPERATURE, TEMPERATURE_ECE, LINEAR, ORACLE], loss="answer",
        seed=0, draws=20, aggregate="product", sources=["one"] * 400,
        on_epoch=lambda method, record: records.setdefault(method, record),
    )  # fmt: skip
    assert found.tokens == {"fit": 200, "validation": 60, "test": 140}

    def score(log_scale, windows):
        """Confidence and log loss of answers from full logits."""
        p = (world.logits.double() * np.exp(log_scale)).softmax(-1).amax(-1).view(400, 4).prod(1)[windows]
        return p.numpy(), -torch.where(right[windows], p.log(), torch.log1p(-p)).mean().item()

    grid = np.linspace(-1.0, 2.0, 151)
    best = {
        name: min(score(u, windows)[1] for u in grid) for name, windows in (("fit", split.fit), ("test", split.test))
    }
    scalar = found.heads[TEMPERATURE].bias.item()
    assert score(scalar, split.fit)[1] == pytest.approx(best["fit"], abs=1e-3)
    assert scalar < 1.0  # by likelihood it would be log 10, the end of the range
    part = features.of_windows(split.fit)
    assert found.heads[TEMPERATURE_ECE].bias.item() == pytest.approx(fit_temperature(part, None, "product"))
    assert abs(fit_temperature(part, None, "product") - fit_temperature(part, None, "mean")) > 0.1
    # a head starts at the scalar of its own loss
    assert (found.fits[LINEAR]["loss"], records[LINEAR].epoch) == ("answer", 0)
    assert records[LINEAR].fit_loss == pytest.approx(best["fit"], abs=1e-3)
    assert found.methods[ORACLE]["nll"]["value"] == pytest.approx(best["test"], abs=1e-3)
    for method, log_scale in ((NONE, 0.0), (TEMPERATURE, scalar)):
        confidence, loss = score(log_scale, split.test)
        assert found.predictions["test"][method].confidence == pytest.approx(confidence, abs=1e-5)
        assert found.methods[method]["nll"]["value"] == pytest.approx(loss, abs=1e-4)


def test_fit_and_score_paper_head_has_its_own_loss(make_world, monkeypatch):
    world = make_world(heterogeneous, tokens=640, windows=40)
    split = Split(fit=list(range(20)), validation=list(range(20, 26)), test=list(range(26, 40)))
    losses = []

    def fit(spec, *parts, loss, **options):
        losses.append((spec.architecture, loss.name))
        return Fit(build_head(spec).requires_grad_(False), loss, best_epoch=0, epochs=1, shrink=1.0)

    monkeypatch.setattr(module, "fit_head_tuned", fit)
    fit_and_score(
        world.features, split, world.layer, methods=[NONE, PAPER_HEAD, TRANSFORMER], loss="top_label", seed=0, draws=20,
        config=CONFIG,
    )  # fmt: skip
    assert losses == [("transformer", "smoothing"), ("transformer", "top_label")]


def test_fit_and_score_recalibration_is_fitted_on_the_fit_part(make_world):
    world = make_world(heterogeneous, tokens=3200, windows=100)
    split = Split(fit=list(range(50)), validation=list(range(50, 65)), test=list(range(65, 100)))
    found = fit_and_score(
        world.features, split, world.layer, methods=[NONE, ISOTONIC, SCALING_BINNING], loss="nll", seed=0, draws=20
    )
    assert found.best == NONE  # there is no head to serve
    parts = {name: world.features.of_windows(getattr(split, name)) for name in ("fit", "test")}
    base = {name: predict(part, world.layer, {NONE: torch.zeros(len(part))})[NONE] for name, part in parts.items()}
    for method, kind in ((ISOTONIC, "isotonic"), (SCALING_BINNING, "scaling_binning")):
        said = found.predictions["test"][method]
        expected = fit_recalibration(kind, base["fit"].confidence, base["fit"].correct)(base["test"].confidence)
        assert said.confidence == pytest.approx(expected, abs=1e-12)
        assert (said.correct == base["test"].correct).all()
        assert np.isnan(said.nll).all()  # a confidence alone says nothing about the other tokens
        assert found.methods[method]["brier"]["value"] < found.methods[NONE]["brier"]["value"]


def test_fit_and_score_refuses_what_it_does_not_know(make_world):
    world = make_world(heterogeneous, tokens=320, windows=20)
    split = Split(fit=list(range(10)), validation=list(range(10, 14)), test=list(range(14, 20)))

    def run(methods, **options):
        arguments = {"loss": "nll", "seed": 0, "draws": 5, **options}
        fit_and_score(world.features, split, world.layer, methods=methods, **arguments)

    with pytest.raises(UsageError, match="unknown method 'ats-lineer'; did you mean 'ats-linear'"):
        run(["none", "ats-lineer"])
    with pytest.raises(UsageError, match="unknown loss 'brier'"):
        run(["none"], loss="brier")
    with pytest.raises(ValueError, match="needs `config`"):
        run(["none", MLP])
    with pytest.raises(ValueError, match="needs `sources`"):
        run(["none", ORACLE])


# --- the bound --------------------------------------------------------------------------------------------------------


def test_oracle_log_scales_is_the_best_temperature_of_each_file(make_world):
    cold, warm = make_world(lambda h: torch.full((len(h),), -0.8)), make_world(lambda h: torch.full((len(h),), 0.3))
    late = cold.features.window >= 40
    names = ("gap", "correct", "target")
    mixed = {n: torch.where(late, getattr(warm.features, n), getattr(cold.features, n)) for n in names}
    features = replace(cold.features, **mixed)
    found = oracle_log_scales(features, ["x.txt"] * 40 + ["y.txt"] * 24)
    assert found[~late].unique().tolist() == pytest.approx([-0.8], abs=0.06)
    assert found[late].unique().tolist() == pytest.approx([0.3], abs=0.06)


def test_predict_of_graded_answers_is_about_what_was_said(make_world):
    world = make_world(heterogeneous, tokens=640, windows=64)
    grade = torch.arange(640) % 2 == 0
    features = replace(world.features, graded=torch.ones(640, dtype=torch.bool), correct=grade)
    log_scale = torch.full((640,), -0.4)
    found = predict(features, world.layer, {"x": log_scale})["x"]
    said = (world.logits.double() * log_scale.double().exp()[:, None]).softmax(-1).gather(1, features.target[:, None])
    torch.testing.assert_close(torch.from_numpy(found.confidence), said[:, 0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(found.nll), -said[:, 0].log(), rtol=1e-4, atol=1e-5)
    assert found.correct.tolist() == grade.tolist()

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llmrl.ats.evaluate import (
    NOT_SELECTABLE,
    ORACLE,
    fit_and_score,
    oracle_log_scales,
    pairs_of,
    predict,
)
from llmrl.ats.options import LINEAR, MLP, NONE, SHUFFLED, TEMPERATURE, TEMPERATURE_ECE, TRANSFORMER, VECTOR
from llmrl.ats.run_heads import head_log_scales
from llmrl.ats.splits import Split
from llmrl.errors import UsageError

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
    assert found.fits[LINEAR]["alpha"] in alphas
    assert len(alphas) == 5


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

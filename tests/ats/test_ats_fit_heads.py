from dataclasses import replace

import pytest
import torch

from llmrl.ats import fit_heads as module
from llmrl.ats.fit import curve_loss, fit_temperature, scalar_head, shuffle_hidden, tokens_of_loss
from llmrl.ats.fit_heads import ALPHAS, Fit, fit_head, fit_head_tuned, mean_loss, one_cycle
from llmrl.ats.losses import Loss
from llmrl.ats.run_heads import head_log_scales, window_batches
from llmrl.errors import DataError
from llmrl.heads import HeadSpec

NLL = Loss("nll")
DIRECTION = torch.tensor([0.5, -0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0])
SPECS = {
    "linear": HeadSpec("temperature", "linear", 8),
    "mlp": HeadSpec("temperature", "mlp", 8, intermediate_size=24),
    "transformer": HeadSpec(
        "temperature", "transformer", 8, intermediate_size=24, num_heads=2, num_kv_heads=1, head_dim=8
    ),
}


def constant(value):
    return lambda hidden: torch.full((len(hidden),), value)


def heterogeneous(hidden):
    return hidden @ DIRECTION - 0.4


def bent(hidden):
    """No straight line sees it."""
    return hidden[:, 0].abs() - 1.2


def remembered(hidden, length=16):
    """The temperature of a token hangs on the mean of its window of 16 so far."""
    first = hidden.view(-1, length, hidden.shape[1])[..., 0]
    return (1.5 * first.cumsum(1) / torch.arange(1, length + 1)).flatten().clamp(-1.5, 1.5) - 0.5


def mean_nll(world, log_scale):
    """From full logits, float64."""
    scaled = world.logits.double() * log_scale.double().exp()[:, None]
    return torch.nn.functional.cross_entropy(scaled, world.features.target).item()


def scalar_nll(fit, test):
    return mean_nll(test, torch.full((len(test.features),), fit_temperature(fit.features, NLL)))


def worlds(make_world, log_scale, tokens=8192):
    return [make_world(log_scale, tokens=n, seed=i) for i, n in enumerate((tokens, 2048, 4096))]


def fitted(architecture, fit, validation, loss=NLL, seed=0, **options):
    return fit_head(SPECS[architecture], fit.features, validation.features, loss=loss, seed=seed, **options)


@pytest.fixture(scope="module")
def linear_worlds(make_world):
    return worlds(make_world, heterogeneous)


# --- what a head finds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "tolerance"), [("nll", 0.07), ("top_label", 0.15), ("nll+top_label", 0.08), ("top_label_brier", 0.15)]
)
def test_fit_head_linear_recovers_a_linear_temperature(loss, tolerance, linear_worlds):
    fit, validation, _ = linear_worlds
    head = fitted("linear", fit, validation, Loss(loss)).head
    assert (head.weight[0] - DIRECTION).abs().max() < tolerance
    assert head.bias.item() == pytest.approx(-0.4, abs=tolerance)


def test_fit_head_mlp_finds_what_a_line_cannot(make_world):
    fit, validation, test = worlds(make_world, bent, tokens=16384)
    scores = {
        name: mean_nll(test, head_log_scales(fitted(name, fit, validation).head, test.features))
        for name in ("linear", "mlp")
    }
    best = mean_nll(test, bent(test.features.hidden))
    assert scores["linear"] == pytest.approx(scalar_nll(fit, test), abs=3e-3)
    assert scores["mlp"] < scores["linear"] - 0.02
    assert scores["mlp"] < best + 0.35 * (scores["linear"] - best)


def test_fit_head_transformer_finds_what_the_text_before_knows(make_world):
    sizes = (8192, 2048, 4096)
    fit, validation, test = (make_world(remembered, tokens=n, seed=i, windows=n // 16) for i, n in enumerate(sizes))
    scores = {
        name: mean_nll(test, head_log_scales(fitted(name, fit, validation).head, test.features))
        for name in ("mlp", "transformer")
    }
    best = mean_nll(test, remembered(test.features.hidden))
    assert scores["mlp"] < scalar_nll(fit, test) - 0.02  # the token's own state is part of the mean
    assert scores["transformer"] < scores["mlp"] - 0.06
    assert scores["transformer"] < best + 0.35 * (scores["mlp"] - best)


@pytest.mark.parametrize("architecture", SPECS)
def test_fit_head_ties_with_the_scalar_on_homogeneous_data(architecture, make_world, monkeypatch):
    fit, validation, test = worlds(make_world, constant(-0.5), tokens=4096)
    monkeypatch.setattr(module, "MIN_STEPS", 40)
    head = fitted(architecture, fit, validation).head
    assert mean_nll(test, head_log_scales(head, test.features)) == pytest.approx(scalar_nll(fit, test), abs=3e-3)


def test_fit_head_beats_the_scalar_and_the_shuffled_control_does_not(linear_worlds):
    fit, validation, test = linear_worlds
    scalar = scalar_nll(fit, test)
    linear = fitted("linear", fit, validation).head
    assert mean_nll(test, head_log_scales(linear, test.features)) < scalar - 0.02

    parts = [shuffle_hidden(world.features, i) for i, world in enumerate((fit, validation, test))]
    control = fit_head(SPECS["linear"], parts[0], parts[1], loss=NLL, seed=0).head
    assert mean_nll(test, head_log_scales(control, parts[2])) == pytest.approx(scalar, abs=3e-3)
    assert head_log_scales(control, parts[2]).std() < 0.06


def test_fit_head_of_a_wide_model_does_not_jump(make_world, monkeypatch):
    """Adam moves each of 1024 weights by the rate at once: without a rate for the width tau would cross its whole range."""
    monkeypatch.setattr(module, "MIN_STEPS", 30)

    def log_scale(hidden):
        return hidden[:, :64].sum(-1) * 0.1 - 0.4

    fit, validation, test = (
        make_world(log_scale, tokens=n, width=1024, seed=i) for i, n in enumerate((8192, 1024, 1024))
    )
    records = []
    found = fit_head(
        HeadSpec("temperature", "linear", 1024), fit.features, validation.features, loss=NLL, seed=0,
        on_epoch=records.append,
    )  # fmt: skip
    groups = module._optimizer(found.head.requires_grad_(), found.head.spec).param_groups
    # of the weights at 1024 features, and of the bias at any width
    assert [group["rate"] for group in groups] == [0.005, 0.02]
    assert max(record.fit_loss for record in records) < records[0].fit_loss + 0.01
    assert mean_nll(test, head_log_scales(found.head, test.features)) < scalar_nll(fit, test) - 0.02


# --- the record of a fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SPECS)
def test_fit_head_records_begin_at_the_scalar_and_the_least_is_kept(architecture, linear_worlds, monkeypatch):
    monkeypatch.setattr(module, "MIN_STEPS", 40)
    fit, validation, _ = linear_worlds
    records = []
    found = fitted(architecture, fit, validation, on_epoch=records.append)
    assert [r.epoch for r in records] == list(range(len(records)))
    scalar = torch.full((2048,), fit_temperature(fit.features, NLL))
    assert records[0].validation_loss == pytest.approx(mean_nll(validation, scalar), abs=2e-4)
    best = min(records, key=lambda r: r.validation_loss)
    assert found.best_epoch == best.epoch > 0
    # what shrink does afterwards can only help on the validation part, up to the offset, which hears the fit part too
    kept = mean_nll(validation, head_log_scales(found.head, validation.features))
    assert kept <= best.validation_loss + 5e-4
    assert kept == pytest.approx(best.validation_loss, abs=5e-3)
    assert all(r.alpha is None for r in records)


def test_fit_head_stops_early_and_keeps_the_scalar_when_every_epoch_is_worse(make_world, monkeypatch):
    monkeypatch.setattr(module, "shrink", lambda *_: 1.0)  # it would hide what is kept
    fit = make_world(heterogeneous, tokens=2048, seed=1)
    mirrored = make_world(lambda hidden: -(hidden @ DIRECTION) - 0.4, tokens=1024, seed=2)
    records = []
    found = fitted("linear", fit, mirrored, on_epoch=records.append)
    assert min(records, key=lambda r: r.validation_loss).epoch == found.best_epoch == 0
    assert len(records) == 1 + module.PATIENCE * found.epochs < found.epochs
    assert found.head.weight.eq(0).all()
    assert found.head.bias.item() == pytest.approx(fit_temperature(fit.features, NLL), abs=1e-6)


@pytest.mark.parametrize("architecture", SPECS)
def test_fit_head_same_seed_same_head_and_other_seeds_differ(architecture, make_world, monkeypatch):
    monkeypatch.setattr(module, "MIN_STEPS", 6)
    fit, validation = make_world(heterogeneous, tokens=6016, seed=1), make_world(heterogeneous, tokens=512, seed=2)
    heads = [fitted(architecture, fit, validation, seed=seed).head.state_dict() for seed in (0, 0, 1)]
    assert all(heads[0][name].equal(heads[1][name]) for name in heads[0])
    assert not heads[0]["weight"].equal(heads[2]["weight"])


def test_fit_head_deals_new_batches_every_epoch_and_limits_the_gradient(make_world, monkeypatch):
    seen, norms, plain = [], [], module.curve_loss

    def steep(loss, features, log_scale, tokens=None):
        if tokens is not None:
            seen.append(tokens)
        return 1000.0 * plain(loss, features, log_scale, tokens)

    def step(optimizer, closure=None):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    monkeypatch.setattr(module, "curve_loss", steep)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(module, "BATCH_TOKENS", 100)
    monkeypatch.setattr(module, "MIN_STEPS", 12)
    fit = make_world(heterogeneous, tokens=400)
    fitted("linear", fit, fit)
    epochs = [torch.cat(seen[i : i + 4]) for i in range(0, len(seen), 4)]
    assert all(epoch.sort().values.equal(torch.arange(400)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs) > 1
    assert norms == pytest.approx([module.MAX_NORM] * len(norms), abs=1e-4)


def test_one_cycle_goes_up_and_down():
    assert one_cycle(0.0) == pytest.approx(0.04)
    assert one_cycle(0.15) == pytest.approx(0.52)
    assert one_cycle(0.3) == pytest.approx(1.0)
    assert one_cycle(0.65) == pytest.approx(0.5)
    assert one_cycle(1.0) == pytest.approx(0.0)


# --- standardisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", SPECS)
def test_fit_head_does_not_depend_on_the_units_of_the_features(architecture, linear_worlds, monkeypatch):
    """tau of (h * a + c) is tau of h."""
    monkeypatch.setattr(module, "MIN_STEPS", 30)
    scale, shift = torch.logspace(-2, 2, 8), torch.linspace(-5, 5, 8)
    parts = [world.features for world in linear_worlds]
    moved = [replace(part, states=part.states * scale + shift) for part in parts]
    plain, other = (
        fit_head(SPECS[architecture], f[0], f[1], loss=NLL, seed=0).head for f in (parts, moved)
    )  # fmt: skip
    torch.testing.assert_close(head_log_scales(other, moved[2]), head_log_scales(plain, parts[2]), rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["linear", "mlp"])
def test_fit_head_gives_a_constant_feature_no_weight(architecture, dtype, make_world):
    fit, validation = make_world(heterogeneous, tokens=2048, seed=1), make_world(heterogeneous, tokens=1024, seed=2)

    def with_constant(world):
        constant_column = torch.full((len(world.logits), 1), 0.1)
        return replace(world.features, states=torch.cat([world.features.states, constant_column], 1).to(dtype))

    spec = replace(SPECS[architecture], hidden_size=9)
    head = fit_head(spec, with_constant(fit), with_constant(validation), loss=NLL, seed=0).head
    states = with_constant(validation).states[:50].float()
    moved = states.clone()
    moved[:, -1] += 100.0
    torch.testing.assert_close(head(moved), head(states), rtol=0, atol=1e-6)
    assert all(parameter.dtype == torch.float32 for parameter in head.parameters())
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_fit_head_standardises_the_states_that_the_head_sees(make_world, monkeypatch):
    """Those of scored tokens, or of whole windows: a transformer reads the others too."""
    monkeypatch.setattr(module, "MIN_STEPS", 1)
    features = make_world(heterogeneous, tokens=1024).features
    scored = features.select(features.hidden[:, 0] > 0)
    for architecture, states in (("mlp", scored.hidden), ("transformer", features.states)):
        head = fit_head(SPECS[architecture], scored, scored, loss=NLL, seed=0).head
        seen = states * head.scale + head.shift
        torch.testing.assert_close(seen.mean(0), torch.zeros(8), rtol=0, atol=1e-5)
        torch.testing.assert_close(seen.std(0, correction=0), torch.ones(8), rtol=0, atol=1e-5)


# --- the smoothing losses and answers ---------------------------------------------------------------------------------


def test_fit_head_tuned_takes_the_alpha_with_which_a_linear_head_has_the_least_validation_brier(
    make_world, monkeypatch
):
    monkeypatch.setattr(module, "MIN_STEPS", 10)
    fit, validation, _ = worlds(make_world, heterogeneous, tokens=4096)
    records = []
    found = fit_head_tuned(
        SPECS["mlp"], fit.features, validation.features, loss=Loss("smoothing"), seed=0, on_epoch=records.append
    )
    assert found.head.spec.architecture == "mlp"
    assert {r.alpha for r in records} == {found.loss.alpha}  # the others are not what was asked for
    brier = {}
    for alpha in ALPHAS:
        head = fitted("linear", fit, validation, Loss("smoothing", alpha=alpha)).head
        scale = head_log_scales(head, validation.features).double()
        confidence = (validation.logits * scale.exp()[:, None]).softmax(-1).amax(-1)
        brier[alpha] = (confidence - validation.features.correct.double()).square().mean().item()
    assert found.loss == Loss("smoothing", alpha=min(brier, key=brier.get))
    assert max(brier.values()) > 1.02 * min(brier.values())  # there was something to choose


def test_fit_head_tuned_asks_the_validation_part_and_not_the_fit_part(make_world, monkeypatch):
    fit, validation = make_world(constant(-0.9), tokens=4096), make_world(constant(0.3), tokens=4096, seed=1)
    monkeypatch.setattr(
        module, "fit_head", lambda *parts, loss, on_epoch=None: Fit(scalar_head(loss.alpha - 0.9, 8), loss, 0, 1, 1.0)
    )
    found = fit_head_tuned(SPECS["linear"], fit.features, validation.features, loss=Loss("smoothing"))
    assert found.loss.alpha == max(ALPHAS)  # at 0.0 nearest to the 0.3 of the validation part


def test_fit_head_tuned_fits_a_proper_loss_once(make_world, monkeypatch):
    monkeypatch.setattr(module, "MIN_STEPS", 4)
    fit, validation, _ = worlds(make_world, heterogeneous, tokens=4096)
    records = []
    fit_head_tuned(SPECS["linear"], fit.features, validation.features, loss=NLL, seed=0, on_epoch=records.append)
    assert [r.epoch for r in records] == list(range(len(records)))


def graded(world, answer=4):
    """Greedy answers of four tokens; their mean first feature says how likely the answer is right."""
    features = world.features
    windows = torch.arange(len(features)) // answer
    score = features.hidden[:, 0].view(-1, answer).mean(-1) * 4
    right = torch.rand(len(score), generator=torch.Generator().manual_seed(3)) < score.sigmoid()
    return replace(
        features,
        window=windows,
        offsets=torch.arange(0, len(features) + 1, answer),
        graded=torch.ones(len(features), dtype=torch.bool),
        gap=torch.zeros(len(features)),
        correct=right[windows],
    )


@pytest.mark.parametrize("architecture", ["linear", "transformer"])
def test_fit_head_answer_learns_which_answers_are_right(architecture, make_world, monkeypatch):
    monkeypatch.setattr(module, "MIN_STEPS", 60)
    fit, validation, test = (graded(world) for world in worlds(make_world, constant(0.0)))
    loss = Loss("answer", aggregate="geometric_mean")
    head = fit_head(SPECS[architecture], fit, validation, loss=loss, seed=0).head
    scalar = torch.full((len(test),), fit_temperature(fit, loss))
    assert mean_loss(loss, test, head) < curve_loss(loss, test, scalar).mean().item() - 0.02


@pytest.mark.parametrize("name", ["answer", "smoothing-reference"])
def test_fit_head_takes_whole_windows_into_a_batch_where_the_loss_is_of_windows(name, make_world, monkeypatch):
    seen, plain = [], module.curve_loss

    def spy(loss, features, log_scale, tokens=None):
        if tokens is not None:
            seen.append((features, tokens))
        return plain(loss, features, log_scale, tokens)

    monkeypatch.setattr(module, "curve_loss", spy)
    monkeypatch.setattr(module, "MIN_STEPS", 4)
    monkeypatch.setattr(module, "BATCH_TOKENS", 100)
    fit, validation = (graded(make_world(constant(0.0), tokens=n, seed=n)) for n in (800, 400))
    fit_head(SPECS["linear"], fit, validation, loss=Loss(name), seed=0)
    assert len(seen) > 20
    for features, tokens in seen:
        assert torch.isin(features.window, features.window[tokens]).sum() == len(tokens) == 100


def test_fit_head_answer_needs_grades(linear_worlds):
    fit, validation, _ = linear_worlds
    with pytest.raises(DataError, match="needs graded answers"):
        fitted("linear", fit, validation, Loss("answer"))


def test_tokens_of_loss_select_keeps_windows_whole(make_world):
    features = graded(make_world(constant(0.0), tokens=400))
    some = replace(features, graded=features.window % 3 == 0)
    kept = tokens_of_loss(Loss("answer"), some)
    assert kept.window.unique().equal(torch.arange(0, 100, 3))
    assert len(list(window_batches(kept, torch.randperm(34), 16))) == 9

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from llmrl.ats import output_layer
from llmrl.ats.features import TokenFeatures
from llmrl.ats.fit import fit_temperature
from llmrl.ats.fit_vector import fit_vector, nll_gradient, predict_vector
from llmrl.ats.losses import Loss
from llmrl.heads import HeadSpec, build_head

BIAS = torch.linspace(-1.0, 1.0, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(8))]


def with_targets(world, logits, seed):
    """The same tokens with targets drawn from the softmax of other logits."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    top, argmax = world.logits.max(-1)
    gap = top - world.logits.gather(1, target[:, None])[:, 0]
    world.features = replace(world.features, target=target, gap=gap, correct=argmax == target)
    return world


@pytest.fixture(scope="module")
def worlds(make_world):
    """Targets follow softmax(0.7 z + bias)."""
    made = [make_world(lambda h: torch.zeros(len(h)), tokens=n, seed=i) for i, n in enumerate((8192, 2048, 4096))]
    return [with_targets(world, 0.7 * world.logits + BIAS, seed) for seed, world in enumerate(made)]


def some_choices(features) -> TokenFeatures:
    """Every third token is chosen from four letters, every fifth from two; targets are moved among them."""
    number = torch.arange(len(features))
    choice = torch.where(number % 5 == 0, 1, torch.where(number % 3 == 0, 0, -1))
    choices = torch.tensor([[9, 2, 17, 5], [4, 20, -1, -1]])
    target = torch.where(choice == 0, choices[0][number % 4], features.target)
    target = torch.where(choice == 1, choices[1][number % 2], target)
    return replace(features, choice=choice, choices=choices, target=target)


def dense_nll(scale, bias, world, features):
    """Mean NLL from full logits in float64, letters by a mask."""
    z = world.logits.double() * scale + bias
    mask = torch.ones_like(z, dtype=torch.bool)
    for number, ids in enumerate(features.choices.tolist()):
        inside = torch.zeros(z.shape[1], dtype=torch.bool)
        inside[[i for i in ids if i >= 0]] = True
        mask[features.choice == number] = inside
    return cross_entropy(z.masked_fill(~mask, -torch.inf), features.target)


@pytest.mark.parametrize("letters", [False, True])
def test_nll_gradient_is_autograds(letters, worlds, monkeypatch):
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", 24 * 4 * 50)  # many chunks
    world = worlds[1]
    features = some_choices(world.features) if letters else world.features
    generator = torch.Generator().manual_seed(4)
    head = build_head(HeadSpec("vector", "vector", 8, outputs=24)).requires_grad_(False)
    head.scale.add_(0.3 * torch.randn(24, generator=generator))
    head.bias.add_(torch.randn(24, generator=generator))
    scale, bias = (p.double().requires_grad_() for p in (head.scale, head.bias))
    expected = dense_nll(scale, bias, world, features)
    expected.backward()
    loss, scale_gradient, bias_gradient = nll_gradient(head, world.layer, features, torch.arange(2048))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(scale_gradient.double(), scale.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias_gradient.double(), bias.grad, rtol=1e-4, atol=1e-6)
    # of some tokens only
    part, _, _ = nll_gradient(head, world.layer, features, torch.arange(100, 300))
    rest, _, _ = nll_gradient(head, world.layer, features, torch.cat([torch.arange(100), torch.arange(300, 2048)]))
    assert (200 * part + 1848 * rest) / 2048 == pytest.approx(loss, rel=1e-5)


def test_fit_vector_recovers_scale_and_bias(worlds):
    fit, validation, test = worlds
    start = fit_temperature(fit.features, Loss("nll"))
    head = fit_vector(fit.layer, fit.features, validation.features, start=start, seed=0)
    found = dense_nll(head.scale.double(), head.bias.double(), test, test.features).item()
    best = dense_nll(torch.full((24,), 0.7), BIAS.double(), test, test.features).item()
    scalar = dense_nll(torch.full((24,), start).exp(), torch.zeros(24), test, test.features).item()
    assert best < scalar - 0.1
    assert found < best + 0.15 * (scalar - best)
    off = head.bias - BIAS
    assert (off - off.mean()).abs().max() < 0.6  # a constant added to every logit says nothing


def test_fit_vector_keeps_the_epoch_that_is_best_on_validation(worlds):
    fit, validation, _ = worlds
    records = []
    head = fit_vector(fit.layer, fit.features, validation.features, start=-0.2, seed=0, on_epoch=records.append)
    scores = [r.validation_loss for r in records]
    assert [r.epoch for r in records] == list(range(len(records)))
    scalar = dense_nll(torch.full((24,), -0.2).exp(), torch.zeros(24), validation, validation.features)
    assert scores[0] == pytest.approx(scalar.item(), abs=1e-5)
    kept = dense_nll(head.scale.double(), head.bias.double(), validation, validation.features).item()
    assert kept == pytest.approx(min(scores), abs=1e-5)

    mirrored = with_targets(replace(validation), 0.7 * validation.logits - BIAS, seed=1)
    worse = fit_vector(fit.layer, fit.features, mirrored.features, start=-0.2, seed=0)
    torch.testing.assert_close(worse.scale, torch.full((24,), -0.2).exp())
    assert worse.bias.eq(0).all()


def test_predict_vector_is_the_softmax_of_scaled_logits(worlds):
    world = worlds[2]
    features = replace(world.features, graded=torch.arange(4096) < 1000)
    head = build_head(HeadSpec("vector", "vector", 8, outputs=24)).requires_grad_(False)
    head.bias.copy_(3 * BIAS)
    found = predict_vector(head, world.layer, features)
    p = (world.logits.double() + 3 * BIAS).softmax(-1)
    said = p.gather(1, features.target[:, None])[:, 0]
    top, argmax = p.max(-1)
    torch.testing.assert_close(torch.from_numpy(found.nll), -said.log(), rtol=1e-4, atol=1e-5)
    expected = torch.where(features.graded, said, top)
    torch.testing.assert_close(torch.from_numpy(found.confidence), expected, rtol=1e-4, atol=1e-5)
    right = torch.where(features.graded, features.correct, argmax == features.target)
    assert torch.from_numpy(found.correct).equal(right)
    assert (argmax != world.logits.argmax(-1)).double().mean() > 0.1  # it says other tokens than the base


def test_predict_vector_of_letters_is_among_the_letters(worlds):
    world = worlds[1]
    features = some_choices(world.features)
    head = build_head(HeadSpec("vector", "vector", 8, outputs=24)).requires_grad_(False)
    head.bias.copy_(BIAS)
    found = predict_vector(head, world.layer, features)
    expected = dense_nll(torch.ones(24), BIAS.double(), world, features).item()
    assert found.nll.mean() == pytest.approx(expected, rel=1e-5)
    two = features.choice == 1
    assert (torch.from_numpy(found.confidence)[two] >= 0.5).all()

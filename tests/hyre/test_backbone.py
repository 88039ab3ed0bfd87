"""Heads and backbone trained together: the loss, what is trained, what is logged."""

import numpy as np
import pytest
import torch
from backbone_runs import ROWS
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from llmrl.errors import (
    CheckpointError,
)
from llmrl.hyre import fit, tune
from llmrl.hyre.backbone import (
    EnsembleRewardModel,
    EnsembleTrainer,
    Objective,
    RewardPairCollator,
    head_scores,
    make_trainable,
    unfold,
)
from llmrl.hyre.diversity import HeadPlan, plan_heads
from llmrl.hyre.features import last_states
from llmrl.hyre.fit import FitSettings, HeadShape, Pairs, TrainedHeads, feature_scale, fit_heads
from llmrl.hyre.metrics import disagreement
from llmrl.training.batches import WholeBatches

SHAPES = [
    HeadShape("linear"),
    HeadShape("linear", prior="linear"),
    HeadShape("linear", prior="mlp", prior_hidden=5),
    HeadShape("mlp", hidden=4),
    HeadShape("mlp", hidden=4, prior="mlp", prior_hidden=5),
    HeadShape("epinet", hidden=6, prior="mlp", prior_hidden=5, index_size=4),
]


def parts(features, heads=3, shape=SHAPES[0], seed=0):
    """Return (pairs, plan, heads in training with random parameters) for features `[2N, H]`: the chosen, then the rejected."""
    half, draw = len(features) // 2, np.random.default_rng(seed)
    weights = draw.dirichlet(np.ones(half), size=heads).astype(np.float32)
    plan = HeadPlan(weights, np.array([1, -1, 1], np.float32)[:heads], tuple(f"h{k}" for k in range(heads)))
    examples = Pairs(features[:half], features[half:], torch.linspace(0, 0.6, half))
    made = TrainedHeads(heads, features.shape[1], shape, *feature_scale(examples), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return examples, plan, made


def reward_model(folder, shape=SHAPES[0], heads=3):
    """Return (a reward model of a small base, its pairs' features, plan) for the texts ROWS."""
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        features = last_states(base, ROWS, "cpu")
    examples, plan, made = parts(features, heads, shape)
    return EnsembleRewardModel(base, made), examples, plan


def data_set(examples, plan):
    half = len(ROWS) // 2
    weights = torch.from_numpy(half * plan.rows.T)
    return [
        {"chosen": ROWS[i], "rejected": ROWS[half + i], "weights": weights[i], "margin": examples.margin[i].item()}
        for i in range(half)
    ]


def trainer_of(model, objective, folder, size):
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=size, report_to="none", use_cpu=True)
    return EnsembleTrainer(model=model, args=arguments, objective=objective, heads_lr=1e-3)


def test_collator_pads_on_the_right_and_puts_the_chosen_first():
    weights = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    batch = RewardPairCollator()(
        [
            {"chosen": [5, 6, 7], "rejected": [8], "weights": weights[0], "margin": 0.5},
            {"chosen": [9, 9], "rejected": [4, 3, 2, 1], "weights": weights[1], "margin": 0.0},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [9, 9, 0, 0], [8, 0, 0, 0], [4, 3, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch["weights"].tolist() == weights.tolist()
    assert batch["margin"].tolist() == [0.5, 0.0]


def test_whole_batches_deal_out_every_row_once_and_another_order_an_epoch():
    sampler = WholeBatches(23, 5, seed=3)
    first = list(sampler)
    assert len(first) == len(sampler) == 20
    assert len(set(first)) == 20
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(WholeBatches(23, 5, seed=4)) != first


def test_features_of_a_padded_batch_are_the_last_states_of_each_row(any_model):
    model, _, _ = reward_model(any_model)
    batch = RewardPairCollator()(data_set(*reward_model(any_model)[1:]))
    found = model.features(batch["input_ids"], batch["attention_mask"])
    alone = torch.cat([last_states(model.backbone, [row], "cpu") for row in ROWS])
    assert found.dtype == torch.float32
    assert (found - alone).abs().max() < 1e-4 * alone.abs().max()


def test_a_backbone_in_training_has_no_dropout(tiny_model):
    model, _, _ = reward_model(tiny_model("gpt2"))
    ids = torch.tensor(ROWS[:1])
    expected = model.eval().scores(ids, torch.ones_like(ids))
    model.train()
    assert model.heads.training
    assert model.backbone.transformer.drop.p == 0.1
    assert torch.equal(model(ids, torch.ones_like(ids)), expected)


def test_heads_compute_in_float32_under_autocast(llama):
    model, _, _ = reward_model(llama, SHAPES[4])
    ids, mask = torch.tensor(ROWS[:1]), torch.ones(1, len(ROWS[0]), dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        features, found = model.features(ids, mask), model(ids, mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, head_scores(model.heads, features))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.kind}-{s.prior}")
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_unfold_gives_heads_in_training_the_scores_of_the_folded_head(shape, heads):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(40, 7, generator=generator) * 3 + 5
    examples = Pairs(features[:20], features[20:])
    plan = plan_heads("subset", heads, 20)
    settings = FitSettings(steps=30, lr=0.05)
    folded = fit_heads(examples, plan, shape, settings)
    assert folded(features).std() > 0.1
    made = tune.start_heads(examples, plan, shape, settings)
    assert (head_scores(made, features) - folded(features)).abs().max() < 1e-4
    assert (made.fold()(features) - folded(features)).abs().max() < 1e-4
    if shape.kind != "epinet":  # whose parameters are not the only ones with these scores
        fresh = TrainedHeads(heads, 7, shape, made.shift, made.scale, 0)
        unfold(made.fold(), fresh)
        for name, parameter in made.named_parameters():
            assert (parameter - fresh.get_parameter(name)).abs().max() < 1e-4, name


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.kind}-{s.prior}")
def test_gradient_of_the_heads_is_that_of_the_cached_features_objective(llama, tmp_path, monkeypatch, shape, center):
    model, examples, plan = reward_model(llama, shape)
    settings, caught = FitSettings(l2=0.07, center=center), {}

    def keep(module, objective, *rest):
        caught.update(module=module, objective=objective)

    monkeypatch.setattr(fit, "_minimise", keep)
    monkeypatch.setattr(fit, "_descend", keep)
    fit_heads(examples, plan, shape, settings)
    caught["module"].load_state_dict(model.heads.state_dict())
    model.backbone.requires_grad_(False)
    objective = Objective(torch.from_numpy(plan.signs), settings.l2, settings.center)
    for rows in ([0, 1, 2], [2, 0]):  # all pairs, and a batch of them
        trainer = trainer_of(model, objective, tmp_path, len(rows))
        batch = RewardPairCollator()([data_set(examples, plan)[i] for i in rows])
        model.zero_grad()
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        caught["module"].zero_grad()
        expected = caught["objective"](torch.tensor(rows))
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for name, parameter in model.heads.named_parameters():
            other = caught["module"].get_parameter(name).grad
            if name == "bias" and not center:  # differences do not see it
                assert parameter.grad is None
                assert other.norm() < 1e-6
                continue
            assert (parameter.grad - other).norm() < 1e-5 * other.norm() + 1e-7, name
        assert model.heads.weight.grad.norm() > 1e-3


def test_the_mean_over_batches_is_the_objective_of_all_pairs(llama, tmp_path):
    model, examples, plan = reward_model(llama)
    objective, rows = Objective(torch.from_numpy(plan.signs), 0.01, 0.2), data_set(examples, plan)

    def loss(chosen):
        batch = RewardPairCollator()([rows[i] for i in chosen])
        return trainer_of(model, objective, tmp_path, len(chosen)).compute_loss(model, batch).item()

    assert np.mean([loss([i]) for i in range(3)]) == pytest.approx(loss([0, 1, 2]), rel=1e-5)
    assert abs(loss([0]) - loss([1])) > 0.01


def test_gradient_reaches_the_backbone_through_the_heads_and_not_through_the_priors(llama):
    shape = HeadShape("linear", prior="mlp", prior_scale=5.0)
    model, _, _ = reward_model(llama, shape)
    embedding = model.backbone.get_input_embeddings().weight
    ids, mask = torch.tensor(ROWS[:1]), torch.ones(1, len(ROWS[0]), dtype=torch.long)
    model.scores(ids, mask).sum().backward()
    assert embedding.grad.norm() > 1e-4
    embedding.grad = None
    with torch.no_grad():
        model.heads.weight.zero_()
    scores = model.scores(ids, mask)
    assert scores.abs().max() > 0.1  # of the priors
    scores.sum().backward()
    assert embedding.grad is None or embedding.grad.norm() == 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_make_trainable_trains_what_is_read(llama, tuning):
    model = make_trainable(AutoModelForCausalLM.from_pretrained(llama), tuning, lora_r=3, seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("lm_head" in name for name in trained)
    if tuning == "full":
        assert trained == {name for name, _ in model.named_parameters()} - {"lm_head.weight"}
        return
    assert all("lora_" in name for name in trained)
    layers = [m for m in model.get_base_model().model.modules() if hasattr(m, "lora_A")]
    assert len(layers) == 2 * 7  # all linear layers of two blocks
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers} == {(3, 2.0)}
    again = make_trainable(AutoModelForCausalLM.from_pretrained(llama), tuning, lora_r=3, seed=0)
    other = make_trainable(AutoModelForCausalLM.from_pretrained(llama), tuning, lora_r=3, seed=1)
    name = next(name for name in sorted(trained) if "lora_A" in name)
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))


def test_a_tied_output_embedding_is_trained_as_the_input_embedding_and_saved_once(tiny_model):
    base = make_trainable(AutoModelForCausalLM.from_pretrained(tiny_model("qwen2")), "full", 1, 0)
    state = EnsembleRewardModel(base, parts(torch.randn(6, 32))[2]).trained_state()
    assert "backbone.model.embed_tokens.weight" in state
    assert "backbone.lm_head.weight" not in state
    assert {"heads.weight", "heads.shift", "heads.scale"} <= state.keys()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.kind}-{s.prior}")
def test_trained_state_brings_everything_but_the_frozen_base_back(llama, shape):
    def made(seed, heads=3):
        base = make_trainable(AutoModelForCausalLM.from_pretrained(llama), "lora", 3, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=generator)
        features = torch.randn(6, 32, generator=generator)
        return EnsembleRewardModel(base, parts(features, heads, shape, seed)[2])

    first, second = made(1), made(2)
    ids, mask = torch.tensor(ROWS[:1]), torch.ones(1, len(ROWS[0]), dtype=torch.long)
    assert (first.scores(ids, mask) - second.scores(ids, mask)).abs().max() > 1e-2
    second.load_trained_state(first.trained_state())
    assert torch.equal(first.scores(ids, mask), second.scores(ids, mask))
    with pytest.raises(CheckpointError, match=r"of another model or of other heads \(heads\."):
        second.load_trained_state(made(1, heads=2).trained_state())


def test_log_gives_each_head_its_own_rows(llama, tmp_path, monkeypatch):
    model, examples, plan = reward_model(llama)
    objective = Objective(torch.from_numpy(plan.signs))
    trainer, logged = trainer_of(model, objective, tmp_path, 3), {}
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time=None: logged.update(logs))
    rows = data_set(examples, plan)
    for chosen in ([0, 1], [2]):  # two forwards of different sizes are one mean
        trainer.compute_loss(model, RewardPairCollator()([rows[i] for i in chosen]))
    trainer.log({"loss": 1.0})
    with torch.no_grad():
        margins = (head_scores(model.heads, examples.chosen) - head_scores(model.heads, examples.rejected)).double()
    turned = margins.numpy() * plan.signs
    losses = np.logaddexp(0, -(turned - examples.margin.numpy()[:, None]))
    own = (plan.rows.T / plan.rows.T.sum(0)).astype(np.float64)
    for name, values in (("head_loss", losses), ("head_accuracy", (turned > 0).astype(float))):
        means = (own * values).sum(0)
        for kind in ("mean", "min", "max"):
            assert logged[f"{name}_{kind}"] == pytest.approx(getattr(means, kind)(), rel=1e-4), (name, kind)
    assert logged["disagreement"] == pytest.approx(disagreement(margins.numpy()))
    assert logged["head_loss_min"] < logged["head_loss_max"]
    assert trainer._sums is None

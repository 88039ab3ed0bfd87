"""The canary: real updates pass, and each way in which weights can get lost on the way fails with its name."""

import threading
from types import SimpleNamespace

import pytest
import torch
from engine_support import (
    STORIES,
    assert_sampled_from,
    disturbed,
    largest,
    token_logprobs,
    train,
    trainer,
    weights,
)

from llmrl.errors import EngineError, ModelError, SyncError
from llmrl.rollout import sync as sync_module
from llmrl.rollout.sync import WeightSync, write_probe
from llmrl.rollout.transformers_engine import TransformersEngine
from llmrl.types import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, max_tokens=8)


def ask(engine):
    return engine.generate([[1, 403, 407]], GREEDY)[0][0]


def assert_refuses(engine, words):
    for refused in (lambda: ask(engine), lambda: engine.score([1, 2]), lambda: engine.submit([1], GREEDY)):
        with pytest.raises(EngineError, match=words):
            refused()


def assert_recovers(engine, sync, model):
    """A good update ends the refusal, and what is sampled then is the trainer's."""
    number = engine.version.number
    train(model, lr=1e-4)
    assert sync.update().number == number + 1
    assert_sampled_from(ask(engine), [1, 403, 407], model)


@pytest.mark.parametrize("name", ["stories", "untied", "biased", "qknorm", "softcap"])
@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_update_after_real_steps_agrees(backend, name, tiny_folder, open_vllm):
    """Several updates in a row, each after AdamW steps that move every token's logprob."""
    folder = tiny_folder(name)
    model = trainer(folder)
    own = {"max_model_len": 500} if name == "stories" else {}  # not the engine that other tests only read from
    engine = TransformersEngine(str(folder)) if backend == "transformers" else open_vllm(folder, **own)
    engine.update(weights(model))
    sync = WeightSync(engine, model)
    assert sync.check() < 1e-3
    first, start = engine.version.number, weights(model)
    for i in range(3):
        train(model, steps=2, lr=1e-3, seed=i)
        version = sync.update()
        assert version == engine.version
        assert version.number == first + 1 + i
        report = sync.reports[-1]
        assert report.version == version
        assert report.difference < 1e-3
        assert report.difference_after_cached_prefix < 1e-3
        assert report.trainer_change > 0.01
        assert report.engine_change == pytest.approx(report.trainer_change, abs=2e-3)
        sample = ask(engine)
        assert sample.policy_version == version
        assert_sampled_from(sample, [1, 403, 407], model)
    assert largest_tensor_change(start, weights(model)) > 1e-3  # the steps moved every kind of tensor
    engine.update(start)


def largest_tensor_change(one, other):
    return min(float((one[name] - other[name]).abs().max()) for name in one)


def test_update_with_a_zero_learning_rate_passes(synced):
    model = trainer(STORIES)
    sync = WeightSync(synced, model)
    sync.check()
    number, before = synced.version.number, ask(synced)
    for i in range(2):
        train(model, lr=0.0)
        assert sync.update().number == number + 1 + i
        assert sync.reports[-1].trainer_change == 0.0
        assert sync.reports[-1].engine_change < 1e-5
    after = ask(synced)
    assert after.token_ids == before.token_ids
    assert after.policy_version.number == number + 2
    assert after.policy_version.fingerprint == before.policy_version.fingerprint  # the same weights


def test_update_names_a_tensor_that_is_dropped(synced):
    model = trainer(STORIES)
    tensors = weights(disturbed(model))
    del tensors["model.layers.3.mlp.up_proj.weight"]
    before, version = ask(synced), synced.version
    with pytest.raises(SyncError, match=r"lacks model\.layers\.3\.mlp\.up_proj\.weight"):
        synced.update(tensors)
    assert synced.version == version
    assert ask(synced) == before  # nothing has changed, and the engine goes on
    tensors = weights(disturbed(model)) | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}
    with pytest.raises(SyncError, match=r"model\.layers\.9"):
        synced.update(tensors)
    tensors = weights(disturbed(model)) | {"model.layers.3.mlp.up_proj.weight": torch.zeros(172, 63)}
    with pytest.raises(SyncError, match=r"shape.*model\.layers\.3\.mlp\.up_proj|up_proj\.weight has shape \[172, 63\]"):
        synced.update(tensors)
    assert ask(synced) == before
    synced.update(weights(model))
    assert ask(synced).token_ids == before.token_ids


def test_weight_sync_fails_the_run_on_a_dropped_tensor(synced, monkeypatch):
    model = trainer(STORIES)
    sync = WeightSync(synced, model)
    sync.check()
    plain = sync_module.disk_weights
    lost = "model.layers.0.self_attn.q_proj.weight"
    monkeypatch.setattr(sync_module, "disk_weights", lambda m: {k: v for k, v in plain(m).items() if k != lost})
    train(model)
    with pytest.raises(SyncError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        sync.update()
    assert_refuses(synced, "q_proj")
    monkeypatch.undo()
    assert_recovers(synced, sync, model)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.self_attn.v_proj.weight", "model.norm.weight"]
)
def test_weight_sync_fails_on_other_numbers_than_the_trainers(synced, monkeypatch, name):
    """The engine gets a tensor that was corrupted before its hash was taken: only the canary can know."""
    model = trainer(STORIES)
    sync = WeightSync(synced, model)
    sync.check()
    plain = sync_module.disk_weights

    def corrupted(model):
        tensors = plain(model)
        return tensors | {name: tensors[name] + 0.2 * tensors[name].std() + 0.05}

    monkeypatch.setattr(sync_module, "disk_weights", corrupted)
    train(model, lr=1e-4)
    with pytest.raises(SyncError, match=r"disagree after update \d+: .* nats .*holds corrupted weights"):
        sync.update()
    assert_refuses(synced, "corrupted weights")
    monkeypatch.undo()
    assert_recovers(synced, sync, model)


@pytest.mark.parametrize("checked", [True, False])
def test_weight_sync_fails_when_the_engine_keeps_its_weights(synced, monkeypatch, checked):
    model = trainer(STORIES)
    sync = WeightSync(synced, model)
    if checked:
        sync.check()
    train(model, steps=2)
    monkeypatch.setattr(synced, "update", lambda source: synced.version)
    with pytest.raises(SyncError, match=r"did not reach the engine.*old weights"):
        sync.update()
    monkeypatch.undo()
    assert_refuses(synced, "did not reach the engine")
    assert_recovers(synced, sync, model)


def test_weight_sync_fails_on_nan(synced):
    model = trainer(STORIES)
    sync = WeightSync(synced, model)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(SyncError, match="inf nats"):
        sync.update()


def test_check_fails_when_engine_and_trainer_start_apart(synced):
    sync = WeightSync(synced, disturbed(trainer(STORIES)))
    with pytest.raises(SyncError, match=r"disagree before any update.*start from the same checkpoint"):
        sync.check()
    assert_refuses(synced, "before any update")
    sync.update()
    assert len(ask(synced).token_ids) > 0


@pytest.mark.vllm
def test_weight_sync_fails_on_a_stale_prefix_cache(synced_vllm, monkeypatch):
    engine, model = synced_vllm, trainer(STORIES)
    sync = WeightSync(engine, model)
    sync.check()
    engine.generate([sync.probe_ids], GREEDY)
    assert engine.cached_tokens(sync.probe_ids) >= 256  # the prefix is served from the cache
    train(model, steps=2)
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda *args, **kwargs: True)
    with pytest.raises(SyncError, match=r"stale prefix cache: .*although its weights agree"):
        sync.update()
    engine.trust()
    assert engine.cached_tokens(sync.probe_ids) >= 256  # as it was after the update
    engine.distrust("stale prefix cache")
    monkeypatch.undo()
    assert_recovers(engine, sync, model)
    assert engine.cached_tokens([*sync.probe_ids[:200], 5]) >= 128  # computed anew since


@pytest.mark.vllm
def test_update_resets_the_prefix_cache(synced_vllm, stories_model):
    prompt = list(write_probe(synced_vllm, 300))
    synced_vllm.generate([prompt], GREEDY)
    assert synced_vllm.cached_tokens(prompt) >= 256
    moved = disturbed(stories_model, 0.1)
    synced_vllm.update(weights(moved))
    assert synced_vllm.cached_tokens(prompt) == 0
    assert_sampled_from(synced_vllm.generate([prompt], GREEDY)[0][0], prompt, moved)


@pytest.mark.vllm
def test_update_fails_when_the_cache_cannot_be_reset(synced_vllm, stories_model, monkeypatch):
    monkeypatch.setattr(synced_vllm._llm, "reset_prefix_cache", lambda *args, **kwargs: False)
    with pytest.raises(SyncError, match="did not reset its prefix cache"):
        synced_vllm.update(weights(stories_model))
    assert_refuses(synced_vllm, "did not reset its prefix cache")
    monkeypatch.undo()
    synced_vllm.update(weights(stories_model))
    assert_sampled_from(ask(synced_vllm), [1, 403, 407], stories_model)


@pytest.mark.vllm
def test_update_reaches_a_tied_output_layer(synced_vllm, stories_model):
    """The CPU build multiplies by a packed copy of the embeddings: without a new copy logits come from the old ones."""
    from copy import deepcopy

    moved = deepcopy(stories_model)
    with torch.no_grad():
        moved.model.embed_tokens.weight[403:] += 0.3  # ids that the prompt does not use
    synced_vllm.update(weights(moved))
    ids = [1, 300, 310, 320, 402]
    wanted, before = token_logprobs(moved, ids), token_logprobs(stories_model, ids)
    assert largest(wanted, before) > 0.1
    assert largest(synced_vllm.score(ids), wanted) < 1e-3


def test_samples_carry_the_version_they_were_drawn_with(synced, stories_model):
    """Requests that run when an update comes finish with the old weights; those sent after it have the new ones."""
    moved = disturbed(stories_model, 0.3)
    prompts = [[1, 403, 407 + i] for i in range(6)]
    long = [SamplingConfig(max_tokens=200, seed=i, temperature=1.0, n=2) for i in range(6)]
    for warm in (True, False):
        old = synced.version
        before = [synced.submit(prompt, one) for prompt, one in zip(prompts, long, strict=True)]
        if warm:  # one has ended, so the others run
            synced.generate([prompts[0]], SamplingConfig(max_tokens=1))
        thread = threading.Thread(target=synced.update, args=(weights(moved),))
        thread.start()
        thread.join()
        after = [synced.submit(prompt, SamplingConfig(max_tokens=20, seed=i)) for i, prompt in enumerate(prompts)]
        new = synced.version
        assert new.number == old.number + 1
        models = {old: stories_model, new: moved}
        for prompt, future in zip(prompts * 2, before + after, strict=True):
            for sample in future.result(timeout=200):
                if future in after:
                    assert sample.policy_version == new
                assert_sampled_from(sample, prompt, models[sample.policy_version])
        synced.update(weights(stories_model))


@pytest.mark.vllm
def test_requests_around_an_update_keep_their_order(synced_vllm, stories_model):
    """Sent before: the old version. Sent while the update waits for those, with and without an adapter: the new one."""
    moved, old = disturbed(stories_model, 0.3), synced_vllm.version
    prompt = [1, 403, 407]
    before = synced_vllm.submit(prompt, SamplingConfig(max_tokens=450, seed=1, temperature=1.0, n=8))
    hold, sent = threading.Event(), threading.Event()
    plain, plain_put = synced_vllm._admit, synced_vllm._put

    def admit(job):  # holds the engine's thread, so that all of it lies in the inbox in a known order
        hold.wait(60)
        plain(job)

    def put(work):
        plain_put(work)
        sent.set()

    synced_vllm._admit = admit
    first = synced_vllm.submit(prompt, GREEDY)
    synced_vllm._put = put
    thread = threading.Thread(target=synced_vllm.update, args=(weights(moved),))
    thread.start()
    assert sent.wait(60)
    plain_request = synced_vllm.submit(prompt, SamplingConfig(max_tokens=20, seed=2))
    base_request = synced_vllm.submit(prompt, SamplingConfig(max_tokens=20, seed=3), base=True)
    assert synced_vllm.version == old
    hold.set()
    thread.join()
    del synced_vllm._admit, synced_vllm._put
    new = synced_vllm.version
    for future, version, model in [
        (before, old, stories_model),
        (first, old, stories_model),
        (plain_request, new, moved),
        (base_request, new, moved),
    ]:
        for sample in future.result(timeout=200):
            assert sample.policy_version == version
            assert_sampled_from(sample, prompt, model)


def test_probe_leaves_the_trainer_as_it_was(synced):
    """No draw from its random state, and each module's mode, also where a frozen part was set to evaluation."""
    model = trainer(STORIES)
    model.config.attention_dropout = 0.5
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    parameters = [p.clone() for p in model.parameters()]
    probe = write_probe(synced, 50)
    state = torch.random.get_rng_state()
    sync = WeightSync(synced, model, probe_ids=probe)
    sync.check()
    sync.update()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    train(model)  # the forward passes of the probe left nothing that stops a backward pass


def test_write_probe_is_deterministic_and_long_enough(synced):
    probe = write_probe(synced)
    assert len(probe) == 320
    assert probe == write_probe(synced)
    assert len(set(probe)) > 50
    assert not set(probe[1:]) & {2}
    assert len(write_probe(synced, 10**6)) == synced.max_model_len - 17  # room for the tokens after it


@pytest.mark.parametrize("change", ["within", "beyond"])
def test_weight_sync_notices_an_engine_that_moved_alone(change, monkeypatch):
    """The trainer stood still; each difference is within the tolerance, and the engine moved by more than two of them."""
    moved = 2.5 if change == "beyond" else 1.5
    view = SimpleNamespace(name="", score=lambda ids: [-3.0, -4.0])
    view.generate = lambda prompt, sampling: SimpleNamespace(token_ids=[1], logprobs=[-3.0])
    engine = SimpleNamespace(dtype="float32", is_trusted=True, distrust=lambda reason: None, each=lambda: [view])
    sync = WeightSync(engine, torch.nn.Linear(2, 2), tolerance=1.0, probe_ids=[1, 2, 3])
    monkeypatch.setattr(sync, "_trainer_probe", lambda ids: [-3.0] * (len(ids) - 1))
    sync._engine[""], sync._still[""] = [-3.0, -4.0 + moved], [-3.9, -3.9]
    arguments = (view, SimpleNamespace(number=4), [-3.9, -3.9], 0.0, {})
    if change == "within":
        assert sync._judge(*arguments).engine_change == 1.5
        return
    with pytest.raises(SyncError, match=r"changed the engine by 2.5 nats.*other weights than the trainer's"):
        sync._judge(*arguments)


def test_tolerance_is_that_of_the_coarser_dtype(synced):
    model = trainer(STORIES)
    assert WeightSync(synced, model, probe_ids=[1, 2]).tolerance == 1e-3
    assert WeightSync(synced, model.to(torch.bfloat16), probe_ids=[1, 2]).tolerance == 0.8
    assert WeightSync(synced, model, tolerance=0.5, probe_ids=[1, 2]).tolerance == 0.5


@pytest.mark.vllm
def test_weight_sync_with_a_bfloat16_engine(open_vllm):
    """A float32 trainer and a bfloat16 engine agree within the tolerance; weights that stayed behind do not."""
    engine, model = open_vllm(STORIES, dtype="bfloat16"), trainer(STORIES)
    assert engine.dtype == "bfloat16"
    sync = WeightSync(engine, model)
    sync.check()
    for i in range(2):
        train(model, steps=2, seed=i)
        sync.update()
        assert 1e-3 < sync.reports[-1].difference < 0.8
        assert sync.reports[-1].mean_difference < 0.08
    with pytest.MonkeyPatch.context() as patch:  # one small step, whose trace is below the rounding of 16 bits
        patch.setattr(engine, "update", lambda source: engine.version)
        train(model, lr=5e-5, seed=5)
        gap = sync_module.compare(sync._trainer_probe(sync.probe_ids), engine.score(sync.probe_ids))
        assert sync._agree(gap)
        with pytest.raises(SyncError, match="did not reach the engine"):
            sync.update()
    engine.trust()
    plain = sync_module.disk_weights
    with pytest.MonkeyPatch.context() as patch:
        lost = "model.layers.2.mlp.down_proj.weight"
        patch.setattr(sync_module, "disk_weights", lambda m: plain(m) | {lost: torch.zeros_like(plain(m)[lost])})
        with pytest.raises(SyncError, match="corrupted weights"):
            sync.update()


def test_weight_sync_refuses_two_active_adapters(synced):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(trainer(STORIES), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    if synced.takes_adapters:
        with pytest.raises(ModelError, match="takes one adapter, the trainer has 2 active: default, second"):
            WeightSync(synced, model, probe_ids=[1, 2]).update()
    else:  # merged, both count
        WeightSync(synced, model).update()


def test_transformers_engine_refuses_weights_it_would_copy_to_nowhere(tiny_folder):
    """Expert by expert, as they lie on disk, the tensors are copies of the stacked ones that the model computes with."""
    model = trainer(tiny_folder("experts"))
    with TransformersEngine(str(tiny_folder("experts"))) as engine:
        before = engine.score([1, 300, 310])
        with pytest.raises(SyncError, match=r"experts\.0\..*in another layout than its files.*--rollout_backend vllm"):
            engine.update(weights(disturbed(model)))
        assert engine.score([1, 300, 310]) == before
        assert engine.version.number == 0

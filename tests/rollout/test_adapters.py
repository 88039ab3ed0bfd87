"""LoRA adapters: what PEFT computes with them is what both engines sample from, they are swapped, and bad ones refused."""

import json
import shutil

import pytest
import torch
from engine_support import STORIES, assert_sampled_from, largest, token_logprobs, train, trainer, weights
from safetensors.torch import load_file, save_file

from llmrl.errors import EngineError, ModelError, RequestError, UsageError
from llmrl.rollout.adapters import WEIGHTS, check_adapter, served_rank
from llmrl.rollout.sync import WeightSync
from llmrl.rollout.transformers_engine import TransformersEngine
from llmrl.types import SamplingConfig

PROMPTS = [[1, 403, 407], [1, 291, 376, 400], [1, 410]]


def lora(base=STORIES, seed=0, scale=0.1, **options):
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = get_peft_model(trainer(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Three adapters of different ranks with the models that hold them: (folder, PEFT model)."""
    root = tmp_path_factory.mktemp("adapters")
    models = {
        4: lora(seed=4),
        8: lora(seed=8, r=8, use_rslora=True),
        12: lora(seed=12, r=12, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 30}),
    }
    return [(saved(model, root / str(rank)), model.eval()) for rank, model in models.items()]


@pytest.fixture(scope="module", params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def lora_engine(request, open_vllm):
    if request.param == "vllm":
        yield open_vllm(STORIES, max_lora_rank=12)
    else:
        with TransformersEngine(str(STORIES)) as engine:
            yield engine


def assert_holds(engine, model, base):
    """Adapter and base requests sent together each get their own model, and the two are far apart."""
    sampling = SamplingConfig(max_tokens=16, seed=2)
    futures = [(p, off, engine.submit(p, sampling, base=off)) for p in PROMPTS for off in (False, True, False)]
    for prompt, off, future in futures:
        sample = future.result(timeout=120)[0]
        assert_sampled_from(sample, prompt, base if off else model)
        other = token_logprobs(model if off else base, [*prompt, *sample.token_ids])[len(prompt) - 1 :]
        assert largest(sample.logprobs, other) > 0.1
        assert (sample.policy_version == engine.version) is not off
    ids = [1, 403, 407, 261, 378]
    assert largest(engine.score(ids), token_logprobs(model, ids)) < 1e-3
    assert largest(engine.score(ids, base=True), token_logprobs(base, ids)) < 1e-3


def test_update_swaps_adapters(lora_engine, adapters, stories_model):
    number, base_version = lora_engine.version.number, None
    for i, (folder, model) in enumerate(adapters):
        version = lora_engine.update(folder)
        assert version.number == number + 1 + i
        assert version.fingerprint == check_adapter(folder).fingerprint
        assert_holds(lora_engine, model, stories_model)
        sample = lora_engine.generate([[1]], SamplingConfig(max_tokens=1), base=True)[0][0]
        base_version = base_version or sample.policy_version
        assert sample.policy_version == base_version  # the base stays what it is
    lora_engine.update(adapters[0][0])
    assert_holds(lora_engine, adapters[0][1], stories_model)


def test_update_copies_the_adapter(lora_engine, adapters, tmp_path, stories_model):
    """A trainer may write into the folder again, or remove it."""
    shutil.copytree(adapters[1][0], tmp_path / "adapter")
    lora_engine.update(tmp_path / "adapter")
    shutil.rmtree(tmp_path / "adapter")
    assert_holds(lora_engine, adapters[1][1], stories_model)


def test_transformers_engine_starts_with_an_adapter(adapters, stories_model):
    folder, model = adapters[0]
    with TransformersEngine(str(STORIES), adapter=folder) as engine:
        assert engine.version.number == 1
        assert_holds(engine, model, stories_model)


@pytest.mark.vllm
def test_vllm_engine_starts_with_an_adapter(adapters, open_vllm, stories_model):
    engine = open_vllm(STORIES, adapter=adapters[2][0])
    assert engine.max_lora_rank == 16  # rank 12, rounded up to what vLLM keeps buffers for
    assert_holds(engine, adapters[2][1], stories_model)


def test_engine_goes_on_after_a_refused_adapter(lora_engine, adapters, tmp_path, stories_model):
    folder, model = adapters[0]
    lora_engine.update(folder)
    version = lora_engine.version
    saved(lora(modules_to_save=["norm"]), tmp_path / "whole")
    # names that no layer has: only found out when the adapter is put in place
    shutil.copytree(folder, tmp_path / "strange")
    tensors = load_file(folder / WEIGHTS)
    save_file({name.replace("q_proj", "qq_proj"): t for name, t in tensors.items()}, tmp_path / "strange" / WEIGHTS)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["qq_proj"]
    (tmp_path / "strange" / "adapter_config.json").write_text(json.dumps(config))
    for bad in ("whole", "strange"):
        with pytest.raises(ModelError):
            lora_engine.update(tmp_path / bad)
        assert lora_engine.version == version
        assert_holds(lora_engine, model, stories_model)
    with pytest.raises(UsageError, match="not found"):
        lora_engine.update(tmp_path / "nowhere")
    lora_engine.update(adapters[1][0])
    assert_holds(lora_engine, adapters[1][1], stories_model)


@pytest.mark.vllm
def test_vllm_engine_refuses_a_rank_it_has_no_buffers_for(adapters, open_vllm, tmp_path):
    engine = open_vllm(STORIES, max_lora_rank=12)
    with pytest.raises(ModelError, match="has rank 32, the engine was opened with max_lora_rank=16"):
        engine.update(saved(lora(r=32), tmp_path / "wide"))
    with pytest.raises(EngineError, match=r"opened for adapters.*open it without to give it weights"):
        engine.update(weights(trainer(STORIES)))


@pytest.mark.vllm
def test_vllm_engine_without_lora_refuses_an_adapter(adapters, stories_vllm):
    assert not stories_vllm.takes_adapters
    with pytest.raises(EngineError, match="takes no adapter; open it with max_lora_rank"):
        stories_vllm.update(adapters[0][0])


def test_transformers_engine_with_an_adapter_refuses_weights(adapters):
    with (
        TransformersEngine(str(STORIES), adapter=adapters[0][0]) as engine,
        pytest.raises(EngineError, match="holds an adapter; open it without one"),
    ):
        engine.update(weights(trainer(STORIES)))


@pytest.mark.vllm
def test_base_requests_need_the_guard_of_the_cpu_build(adapters, open_vllm, stories_model, monkeypatch):
    """In a batch with adapter requests: far off without the guard, exact with it."""
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    engine = open_vllm(STORIES, max_lora_rank=12)
    engine.update(adapters[0][0])

    def off_by():
        sampling = SamplingConfig(temperature=0.0, max_tokens=12)
        futures = [(p, off, engine.submit(p, sampling, base=off)) for p in PROMPTS for off in (False, True)]
        gaps = {False: 0.0, True: 0.0}
        for prompt, off, future in futures:
            sample = future.result(timeout=120)[0]
            wanted = token_logprobs(stories_model if off else adapters[0][1], [*prompt, *sample.token_ids])
            gaps[off] = max(gaps[off], largest(sample.logprobs, wanted[len(prompt) - 1 :]))
        return gaps

    guarded = off_by()
    assert guarded[True] < 1e-3
    assert guarded[False] < 1e-3
    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        for module in (lora_ops, torch_ops, punica_cpu):
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    engine._reset_cache()
    bare = off_by()
    assert bare[True] > 0.1
    assert bare[False] < 1e-3
    monkeypatch.undo()
    engine._reset_cache()
    assert off_by()[True] < 1e-3


def trained(model, **options):
    train(model, steps=2, lr=5e-3, **options)


@pytest.mark.parametrize("adapter_name", ["default", "policy"])
def test_weight_sync_sends_the_adapter(lora_engine, adapter_name, stories_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(trainer(STORIES), LoraConfig(r=8, target_modules="all-linear"), adapter_name=adapter_name)
    sync = WeightSync(lora_engine, model)
    sync.update()
    for i in range(2):
        trained(model, seed=i)
        version = sync.update()
        assert version == lora_engine.version
        assert sync.reports[-1].difference < 1e-3
        assert sync.reports[-1].trainer_change > 0.01
        assert_sampled_from(lora_engine.generate([[1, 403]], SamplingConfig(max_tokens=8))[0][0], [1, 403], model)
        assert largest(lora_engine.score([1, 403, 407], base=True), token_logprobs(stories_model, [1, 403, 407])) < 1e-3


@pytest.mark.vllm
def test_weight_sync_sends_merged_weights_where_no_adapter_is_taken(synced_vllm):
    model = lora(seed=1)
    sync = WeightSync(synced_vllm, model)
    sync.update()
    trained(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sync.update()
    assert sync.reports[-1].difference < 1e-3
    assert sync.reports[-1].trainer_change > 0.01
    assert_sampled_from(synced_vllm.generate([[1, 403]], SamplingConfig(max_tokens=8))[0][0], [1, 403], model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def edited(source, folder, **changes):
    shutil.copytree(source, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter, expected LORA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=lm_head \(whole copies of layers\)"),
        ({"use_dora": True}, "use_dora; train plain LoRA"),
        ({"bias": "all"}, "a bias; train with bias='none'"),
        ({"lora_bias": True}, "a bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the base"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"r": 600}, "has rank 600, vLLM serves at most 512"),
        ({"rank_pattern": {"q_proj": 700}}, "has rank 700"),
    ],
    ids=str,
)
def test_check_adapter_refuses_by_its_settings(adapters, tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        check_adapter(edited(adapters[0][0], tmp_path / "bad", **changes), STORIES)


def test_check_adapter_accepts_starts_that_only_fill_a_and_b(adapters, tmp_path):
    assert check_adapter(edited(adapters[0][0], tmp_path / "ok", init_lora_weights="gaussian"), STORIES).rank == 4


def test_check_adapter_refuses_by_its_files(adapters, tmp_path, tiny_folder):
    folder = adapters[0][0]
    with pytest.raises(UsageError, match=r"not found: .*--adapter: a folder that PEFT wrote"):
        check_adapter(tmp_path / "nowhere")
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(ModelError, match=f"has no {WEIGHTS}: save the adapter with safe_serialization=True"):
        check_adapter(tmp_path / "pickled")
    with pytest.raises(ModelError, match=r"has no adapter_config\.json"):
        check_adapter(STORIES)
    shutil.copytree(folder, tmp_path / "torn")
    (tmp_path / "torn" / WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(ModelError, match=r"cannot be read .* save the adapter again"):
        check_adapter(tmp_path / "torn")
    (tmp_path / "torn" / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json is not JSON"):
        check_adapter(tmp_path / "torn")
    with pytest.raises(
        ModelError, match=r"is for another model: .*down_proj\.lora_A\.weight has width 172, the model 192"
    ):
        check_adapter(saved(lora(), tmp_path / "other"), _wide(tiny_folder("untied"), tmp_path / "wide"))


def _wide(folder, wide):
    """A checkpoint with the same names and other widths."""
    wide.mkdir()
    tensors = load_file(folder / "model.safetensors")
    save_file({n: torch.zeros([2 * s for s in t.shape]) for n, t in tensors.items()}, wide / "model.safetensors")
    return wide


def test_check_adapter_refuses_half_a_layer(adapters, tmp_path):
    shutil.copytree(adapters[0][0], tmp_path / "half")
    tensors = load_file(adapters[0][0] / WEIGHTS)
    lost = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "half" / WEIGHTS)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj.* has no lora_B"):
        check_adapter(tmp_path / "half", STORIES)


def test_check_adapter_fingerprint_is_of_weights_and_settings(adapters, tmp_path):
    folder = adapters[0][0]
    shutil.copytree(folder, tmp_path / "copy")
    assert check_adapter(tmp_path / "copy").fingerprint == check_adapter(folder).fingerprint
    scaled = edited(folder, tmp_path / "scaled", lora_alpha=9)
    other = edited(folder, tmp_path / "other")
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, other / WEIGHTS)
    assert len({check_adapter(f).fingerprint for f in (folder, scaled, other)}) == 3


def test_served_rank_rounds_up():
    assert [served_rank(r) for r in (1, 2, 4, 8, 12, 16, 33, 300, 512)] == [1, 8, 8, 8, 16, 16, 64, 320, 512]
    with pytest.raises(RequestError, match="at most 512, got 513"):
        served_rank(513)


@pytest.mark.vllm
def test_served_ranks_are_those_of_the_installed_vllm():
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from llmrl.rollout.adapters import VLLM_RANKS

    assert get_args(MaxLoRARanks) == VLLM_RANKS


@pytest.mark.vllm
def test_adapter_on_a_folder_with_a_head(save_head, tmp_path, adapters, open_vllm):
    """The head lies beside its base, whose widths the adapter is compared with."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_head(STORIES, tmp_path / "heads")
    engine = open_vllm(tmp_path / "heads", max_lora_rank=4)
    engine.update(adapters[0][0])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "heads"), adapters[0][0]).eval()
    sample = engine.generate([[1, 403]], SamplingConfig(max_tokens=8, seed=1))[0][0]
    assert_sampled_from(sample, [1, 403], model)

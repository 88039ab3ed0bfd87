"""What happens around a switch model: casts, copies, changed weights, prompts that are cached, padded or not told."""

import copy
import logging

import pytest
import torch
from switch_models import base_model, prompt, stir, switch_model
from transformers import AutoModelForCausalLM

from llmrl.errors import ConfigError, ModelError
from llmrl.lora_switch import (
    SwitchConfig,
    fix_route,
    get_switch_model,
    import_experts,
    load_switch_model,
    set_switch_mode,
)
from llmrl.lora_switch.decode import DecodeLoop
from llmrl.lora_switch.folder import read_switch_folder

POOLED = {"router_input": "prompt_pooled"}
NORM_WEIGHT = torch.linspace(0.2, 1.7, 32)  # a norm that rounds: one of ones would hide it


@torch.no_grad()
def test_a_route_by_embedding_does_not_depend_on_the_models_dtype():
    base = base_model(dtype=torch.bfloat16)
    base.model.layers[0].input_layernorm.weight.copy_(NORM_WEIGHT)
    model = get_switch_model(base, SwitchConfig(num_experts=8, r=2)).eval()
    ids = torch.arange(128)[None]
    for seed in range(20):
        torch.manual_seed(seed)
        model.switch_router.weight.normal_()
        model.bfloat16()
        model(ids)
        low = model.last_route()
        model.float()
        model(ids)
        assert torch.equal(model.last_route().ids, low.ids)
        assert torch.equal(model.last_route().weights, low.weights)


def test_the_router_moves_but_is_not_cast():
    model = switch_model()
    before = model.switch_router.weight.detach().clone()
    parameter = model.switch_router.weight
    assert torch.equal(model.bfloat16().switch_router.weight, before)
    assert model.half().switch_router.weight is parameter
    assert parameter.dtype == torch.float32
    assert model.double().switch_router.weight.dtype == torch.float64
    assert model.to("meta").switch_router.weight.is_meta


def test_a_choice_without_a_gradient_is_refused():
    with pytest.raises(ConfigError, match="the router would learn nothing: use gate 'hard'"):
        SwitchConfig(num_experts=4, top_k=1)
    assert SwitchConfig(num_experts=1, top_k=1).gate == "softmax"


def shared_mixture():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    more = {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
    }
    torch.manual_seed(0)
    config = Qwen2MoeConfig(**sizes, **more, num_experts_per_tok=2, pad_token_id=0)
    return Qwen2MoeForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [POOLED, {}])
def test_layers_that_see_rows_end_to_end_get_their_gates(options):
    """The shared expert of a base's own mixture."""
    model = get_switch_model(shared_mixture(), SwitchConfig(num_experts=4, r=3, **options))
    stir(model)
    model.eval()
    assert any("shared_expert" in name for name in model.switch_layers())
    ids = prompt()
    both = model(ids).logits
    alone = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)
    fix_route(model, [0.5, 0.5, 0, 0])
    torch.testing.assert_close(model(ids).logits[1:], model(ids[1:]).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_fixed_route_outlives_copies_training_and_modes():
    model, ids = switch_model(), prompt()
    free = model(ids).logits
    fix_route(model, [0.0, 1.0, 0.0, 0.0])
    expected = model(ids).logits
    assert (expected - free).abs().max() > 0.1
    made = copy.deepcopy(model)
    for one in (model, made, model.train().eval()):
        assert torch.equal(one(ids).logits, expected)
    set_switch_mode(model, "merged")
    made = copy.deepcopy(model)
    assert all(layer.merged_weight is None for layer in made.switch_layers().values())
    for one in (model, made):
        torch.testing.assert_close(one(ids).logits, expected, rtol=1e-4, atol=1e-4)
    model.train()
    model(input_ids=ids)
    assert model.last_route() is not None  # training asks the router
    fix_route(model.eval(), None)
    assert torch.equal(model(ids).logits, free)


def test_copies_of_a_model_that_was_loaded_in_inference_mode():
    with torch.inference_mode():
        model, ids = switch_model(), prompt(1, 1)
        expected = model(ids).logits
        set_switch_mode(model, "merged")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["merged", "resident"])
def test_modes_agree_in_bfloat16(mode):
    model = switch_model(
        dtype=torch.bfloat16, spread=0.05, **({"gate": "hard", "top_k": 1} if mode == "resident" else {})
    )
    ids = torch.arange(3, 128)[:, None]
    expected = torch.cat([model(one[None]).logits for one in ids]).float()
    set_switch_mode(model, mode)
    found = torch.cat([model(one[None]).logits for one in ids]).float()
    off = (found - expected).norm() / expected.norm()
    assert off < 0.02  # a merged weight is rounded once: 2^-9 of it


@torch.no_grad()
def test_one_launch_takes_one_dtype():
    model = switch_model(dtype=torch.bfloat16)
    model.model.layers[2].mlp.up_proj.float()
    with pytest.raises(
        ModelError, match=r"several dtypes \(torch.bfloat16, torch.float32\): stay with the mode 'fused'"
    ):
        set_switch_mode(model, "merged")
    set_switch_mode(model, "fused")


def without_graphs(model):
    """Return a loop that counts captures: a replay is a plain step."""
    loop = DecodeLoop(model, 24, 1)
    loop.graphed, loop.captures = True, 0

    class Step:
        def replay(self):
            loop.logits = loop._forward()

    def capture():
        loop.captures += 1
        loop._graph = Step()
        loop._graph.replay()

    loop._capture = capture
    return loop


def changes(model):
    layer = next(iter(model.switch_layers().values()))
    yield "expert", lambda: layer.switch_B.mul_(2)
    yield "router", lambda: model.switch_router.weight.mul_(-1)
    yield "base", lambda: model.lm_head.weight.mul_(1.5)
    yield "mode", lambda: set_switch_mode(model, "merged")
    yield "expert of merged copies", lambda: layer.switch_B.mul_(2)
    yield "fixed", lambda: fix_route(model, [0, 0, 1.0, 0])
    yield "fixed differently", lambda: fix_route(model, [0, 1.0, 0, 0])
    yield "free", lambda: fix_route(model, None)
    yield "packed", model.pack_for_inference
    yield "packed again", model.pack_for_inference


@torch.no_grad()
def test_a_graph_does_not_outlive_what_it_was_recorded_with():
    model, ids = switch_model(), prompt(1, 1)
    loop, seen = without_graphs(model), 1
    loop.generate(ids, 6)
    for name, change in changes(model):
        loop.generate(ids, 6)
        assert loop.captures == seen, f"before {name}: nothing had changed"
        change()
        seen += 1
        loop.generate(ids, 6)
        assert loop.captures == seen, name
    with model.disable_experts():
        loop.generate(ids, 6)
    assert loop.captures == seen + 1
    loop.generate(ids, 6)
    assert loop.captures == seen + 2


@pytest.mark.parametrize("what", ["lm_head", "embed_tokens"])
def test_training_the_base_as_well_is_refused(what):
    model = switch_model()
    next(module for name, module in model.named_modules() if name.endswith(what)).requires_grad_(True)
    with pytest.raises(
        ModelError, match=rf"{what}.weight is to be trained, but experts and router are all that is saved"
    ):
        model.train()
    model.eval()


def resized(model):
    model.resize_token_embeddings(140)


def edited(model):
    model.lm_head.weight.data.mul_(1.5)


def some_tokens(model):
    model.model.embed_tokens.weight.data[5:20].mul_(2)


@pytest.mark.parametrize("change", [resized, edited, some_tokens])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_base_that_is_another_by_now_is_not_named(change, when, tmp_path, caplog):
    base_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if when == "before":
        change(model)
    model = get_switch_model(model, SwitchConfig(num_experts=4, r=3)).eval()
    stir(model)
    if when == "after":
        change(model)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "switch")
    assert read_switch_folder(tmp_path / "switch").base.model == ""
    assert "pass it as base=" in caplog.text
    base = base_model()
    change(base)
    opened = load_switch_model(tmp_path / "switch", base=base)
    # the rows that were put on are random
    torch.testing.assert_close(opened(prompt()).logits[..., :128], model(prompt()).logits[..., :128])


def test_a_checkpoint_without_the_head_is_the_base_all_the_same(tmp_path):
    made = base_model()
    made.model.save_pretrained(tmp_path / "base")  # its names lack "model."
    made.lm_head.weight.data.zero_()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert get_switch_model(base, SwitchConfig(num_experts=2, r=2)).switch_base.model == str(tmp_path / "base")


def test_a_base_that_is_not_in_memory_yet(tmp_path):
    """As processes but the first have it when a sharded model is loaded."""
    base_model().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").to("meta")
    model = get_switch_model(base, SwitchConfig(num_experts=2, r=2))
    assert model.switch_base.model == str(tmp_path / "base")


def test_a_default_does_not_change_what_was_saved():
    assert SwitchConfig(r=4).to_json()["alpha"] == 16.0
    assert SwitchConfig.from_json(SwitchConfig(r=4, alpha=3.0).to_json()).alpha == 3.0


@torch.no_grad()
def test_a_loop_takes_nothing_for_merged_and_leaves_nothing_so():
    """A replay writes the copies by one plan, a pass outside by another, and neither can know of the other."""
    model, ids = switch_model(), prompt(1, 1)
    set_switch_mode(model, "merged")
    expected = model(ids).logits
    layer = next(iter(model.switch_layers().values()))
    loop = without_graphs(model)
    new = loop.generate(ids, 3)
    layer.merged_weight.data.zero_()  # as if by a replay of another plan
    torch.testing.assert_close(model(ids).logits, expected)
    layer.merged_weight.data.zero_()  # as if by a pass outside
    assert torch.equal(loop.generate(ids, 3), new)
    torch.testing.assert_close(model(ids).logits, expected)


@torch.no_grad()
def test_the_loop_follows_a_cast():
    model, ids = switch_model(), prompt(1)
    loop = DecodeLoop(model, 24)
    loop.generate(ids, 4)
    model.bfloat16()
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[:, 9:]
    assert torch.equal(loop.generate(ids, 4), expected)


def test_the_routers_gradient_is_not_cast_either():
    model, ids = switch_model().train(), prompt()
    model(input_ids=ids, labels=ids).loss.backward()
    before = model.switch_router.weight.grad.clone()
    model.bfloat16()
    assert torch.equal(model.switch_router.weight.grad, before)


def test_a_copy_that_fails_leaves_the_original_whole(monkeypatch):
    model, ids = switch_model(), prompt(1, 1)
    set_switch_mode(model, "merged")
    expected = model(ids).logits
    monkeypatch.setattr(copy, "deepcopy", lambda *args: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model.__deepcopy__({})
    assert torch.equal(model(ids).logits, expected)
    assert model._switch_now.route is not None


@torch.no_grad()
def test_a_pass_that_failed_leaves_nothing_behind():
    model, ids = switch_model(), prompt()
    expected = model.get_decoder()(ids).last_hidden_state
    with model.disable_experts(), pytest.raises(IndexError):
        model(torch.tensor([[999]]))
    with model.disable_experts(), pytest.raises(TypeError):  # before its decoder is reached
        model(*[ids] * 30)
    assert torch.equal(model.get_decoder()(ids).last_hidden_state, expected)


def test_more_than_a_text_model_is_refused(tmp_path):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = LlavaConfig(text_config={"model_type": "llama", **sizes, "vocab_size": 64}, vision_config=vision)
    with pytest.raises(ModelError, match="has more than a text model"):
        get_switch_model(LlavaForConditionalGeneration(config), SwitchConfig())


def test_import_into_a_model_that_has_experts(tmp_path):
    with pytest.raises(ModelError, match="already has experts"):
        import_experts(switch_model(), [tmp_path])

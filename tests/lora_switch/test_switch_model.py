"""A switch model against its definition, written down layer by layer; and what stays the base's."""

import copy
import inspect

import pytest
import torch
from switch_models import PARTICULAR, base_model, prompt, stir, switch_model
from transformers import PreTrainedModel

from llmrl.errors import ConfigError, ModelError
from llmrl.lora_switch import SwitchConfig, get_switch_model
from llmrl.lora_switch.layer import SwitchLinear
from llmrl.lora_switch.routing import choose, dense_gates

INPUTS = {
    "embedding": {},
    "layer0_mlp": {"router_input": "layer0_mlp"},
    "layer_k": {"router_input": "layer_k", "router_layer": 1},
    "prompt_pooled": {"router_input": "prompt_pooled"},
}


@pytest.mark.parametrize("name", PARTICULAR)
def test_fresh_experts_change_nothing(name):
    base, ids = base_model(name), prompt()
    expected = base(ids).logits
    model = get_switch_model(base, SwitchConfig(num_experts=4, r=2)).eval()
    assert isinstance(model, PreTrainedModel)
    assert torch.equal(model(ids).logits, expected)
    stir(model)
    assert (model(ids).logits - expected).abs().max() > 0.1
    with model.disable_experts():
        assert torch.equal(model(ids).logits, expected)


def merged_by_hand(model, weights):
    """Return the base with one mixture of experts added to its weights in float64."""
    config, plain = model.switch_config, base_model(type(model).__name__.removeprefix("Switch"))
    plain = plain.double()
    for name, layer in model.switch_layers().items():
        b = layer.switch_B.double().view(layer.out_features, config.num_experts, config.r)
        delta = sum(w * b[:, e] @ layer.switch_A[e].double() for e, w in enumerate(weights.tolist()))
        plain.get_submodule(name).weight.data += config.scale * delta
    return plain


@pytest.mark.parametrize("name", PARTICULAR)
def test_each_token_is_computed_with_its_own_experts(name):
    """One token a sequence, so that a token's route is the sequence's and the mixture can be merged by hand."""
    model = switch_model(name)
    for token in (5, 17, 99):
        ids = torch.tensor([[token]])
        found = model(ids).logits.double()
        route = model.last_route()
        expected = merged_by_hand(model, dense_gates(route, 4)[0, 0])(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_router_reads_the_normed_embedding():
    model, ids = switch_model(), prompt()
    model(ids)
    inner = model.model
    states = inner.layers[0].input_layernorm(inner.embed_tokens(ids))
    expected = choose(states @ model.switch_router.weight.T, 2)
    assert torch.equal(model.last_route().ids, expected.ids)
    torch.testing.assert_close(model.last_route().weights, expected.weights)
    # hence the same token has the same route wherever it stands
    again = ids.flip(1)
    model(again)
    assert torch.equal(model.last_route().ids.flip(1), expected.ids)


def capture(model, module, before=False):
    seen = []
    if before:
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    else:
        module.register_forward_hook(lambda m, args, out: seen.append(out))
    return seen


@pytest.mark.parametrize("which", ["layer0_mlp", "layer_k"])
def test_router_reads_inside_the_model(which):
    model, ids = switch_model(**INPUTS[which]), prompt()
    layers = model.model.layers
    seen = capture(model, layers[0].mlp, True) if which == "layer0_mlp" else capture(model, layers[1].input_layernorm)
    model(ids)
    expected = choose(seen[0] @ model.switch_router.weight.T, 2)
    assert torch.equal(model.last_route().ids, expected.ids)
    adapted = set(model.switch_layers())
    assert "model.layers.0.self_attn.q_proj" not in adapted
    assert ("model.layers.0.mlp.up_proj" in adapted) == (which == "layer0_mlp")
    assert "model.layers.1.self_attn.q_proj" in adapted
    model(ids.flip(1))
    assert not torch.equal(model.last_route().ids.flip(1), expected.ids)  # it knows the context


def test_pooled_route_is_the_prompts():
    model, ids = switch_model(**INPUTS["prompt_pooled"]), prompt()
    model(ids)
    whole = model.last_route()
    assert whole.ids.shape == (2, 1, 2)
    model(ids, switch_prompt_mask=torch.tensor([[1] * 4 + [0] * 5] * 2))
    first = model.last_route()
    other = ids.clone()
    other[:, 4:] = 7
    labels = other.clone()
    labels[:, :4] = -100
    out = model(other, labels=labels)
    torch.testing.assert_close(model.last_route().weights, first.weights)
    assert torch.isfinite(out.loss)
    assert not torch.equal(whole.weights, first.weights)


def test_pooled_needs_a_prompt():
    model, ids = switch_model(**INPUTS["prompt_pooled"]).train(), prompt()
    for mode in (True, False):
        with pytest.raises(ModelError, match="found a row without a prompt"):
            model.train(mode)(input_ids=ids, labels=ids)
    model.train()
    with pytest.raises(ModelError, match="cannot tell the prompt from the answer"):
        model(input_ids=ids)
    labels = torch.full_like(ids, -100)
    packed = torch.arange(9).remainder(5)[None].expand(2, 9)
    with pytest.raises(ModelError, match="turn packing off"):
        model(input_ids=ids, labels=labels, position_ids=packed)


def test_pooled_route_of_an_answer_is_not_the_futures():
    """In a talk of several turns the first prompt alone decides: what the user says later is in no earlier logit."""
    model, ids = switch_model(**INPUTS["prompt_pooled"]), prompt()
    labels = ids.clone()
    labels[:, :3] = labels[:, 6:8] = -100
    before = model(input_ids=ids, labels=labels).logits
    other = ids.clone()
    other[:, 6:8] = 7
    torch.testing.assert_close(model(input_ids=other, labels=labels).logits[:, :6], before[:, :6])


@torch.no_grad()
@pytest.mark.parametrize("which", INPUTS)
def test_a_copy_routes_by_itself(which):
    model, ids = switch_model(**INPUTS[which]), prompt()
    model(ids)
    made = copy.deepcopy(model)
    other = ids.flip(1)
    torch.testing.assert_close(made(other).logits, model(other).logits)
    made.switch_router.weight.mul_(-1)
    stir(made, seed=7)
    before = model(ids).logits
    assert (made(ids).logits - before).abs().max() > 0.1
    assert torch.equal(model(ids).logits, before)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.testing.assert_close(averaged(other).logits, model(other).logits)


def test_balance_loss_of_a_tuple_and_where_there_is_no_loss(caplog):
    ids = prompt()
    model, plain = switch_model(balance_coef=0.5).train(), switch_model(balance_coef=0.0).train()
    more, less = (m(input_ids=ids, labels=ids, return_dict=False)[0] for m in (model, plain))
    assert float(more - less) > 0.4
    model(input_ids=ids)
    assert "the balance loss is not part of the loss" in caplog.text


def test_data_parallel_is_refused():
    with pytest.raises(ModelError, match="start one process a GPU"):
        switch_model()._replicate_for_data_parallel()


@pytest.mark.parametrize("which", INPUTS)
def test_padding_changes_nothing(which):
    model, ids = switch_model(**INPUTS[which]), prompt(1)
    expected = model(ids).logits
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=ids.dtype)], 1)
    mask = torch.tensor([[1] * 9 + [0] * 3])
    found = model(padded, attention_mask=mask).logits[:, :9]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", INPUTS)
def test_gradients_reach_experts_and_router_and_nothing_else(which):
    model, ids = switch_model(**INPUTS[which], balance_coef=0.0).train(), prompt()
    labels = ids.clone()
    labels[:, :3] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, p in model.named_parameters() if ".switch_" in n or n.startswith("switch_router")}
    assert float(model.switch_router.weight.grad.abs().max()) > 0


@pytest.mark.parametrize("which", INPUTS)
def test_gradient_checkpointing_gives_the_same_gradients(which):
    """Also with another forward pass in between, whose route must not be taken for the one that is computed again."""
    ids = prompt()
    labels = ids.clone()
    labels[:, :3] = -100
    found = []
    for checkpointed in (False, True):
        model = switch_model(**INPUTS[which]).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=ids, labels=labels).loss
        with torch.no_grad():
            model(input_ids=ids.flip(1), switch_prompt_mask=torch.ones_like(ids))
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ConfigError, match="use_reentrant=True would leave the router without a gradient"):
        switch_model().gradient_checkpointing_enable({"use_reentrant": True})


def test_balance_loss_is_added_in_training_alone():
    ids = prompt()
    model, plain = switch_model(balance_coef=0.5).train(), switch_model(balance_coef=0.0).train()
    difference = model(input_ids=ids, labels=ids).loss - plain(input_ids=ids, labels=ids).loss
    from llmrl.lora_switch.routing import balance_loss

    assert float(difference) == pytest.approx(0.5 * float(balance_loss(model.last_route())), rel=1e-4)
    assert float(model.eval()(input_ids=ids, labels=ids).loss) == pytest.approx(
        float(plain.eval()(input_ids=ids, labels=ids).loss)
    )
    # of a batch in parts, each part counts as its share of the tokens
    half = model.train()(input_ids=ids, labels=ids, num_items_in_batch=32).loss
    whole = plain.train()(input_ids=ids, labels=ids, num_items_in_batch=32).loss
    assert float(half - whole) == pytest.approx(0.5 * float(balance_loss(model.last_route())) * 16 / 32, rel=1e-3)


def test_the_decoder_may_be_called_by_itself():
    model, ids = switch_model(), prompt()
    expected = model(ids).logits
    model(ids.flip(1))
    states = model.model(ids).last_hidden_state
    torch.testing.assert_close(model.lm_head(states), expected)


def test_one_expert_is_plain_lora():
    from peft import LoraConfig, get_peft_model

    ids = prompt()
    model = switch_model(num_experts=1, top_k=1, r=4, alpha=6.0)
    adapted = get_peft_model(base_model(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    with torch.no_grad():
        for name, layer in model.switch_layers().items():
            peft_layer = adapted.get_base_model().get_submodule(name)
            peft_layer.lora_A["default"].weight.copy_(layer.switch_A[0])
            peft_layer.lora_B["default"].weight.copy_(layer.switch_B)
    torch.testing.assert_close(model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)


def test_names_of_the_base_stay():
    before, model = set(base_model().state_dict()), switch_model()
    assert before < set(model.state_dict())
    assert model.state_dict().keys() - before == {
        *(f"{name}.switch_{part}" for name in model.switch_layers() for part in "AB"),
        "switch_router.weight",
    }
    assert inspect.signature(type(model).forward) == inspect.signature(type(base_model()).forward)
    assert len(model.switch_layers()) == 21


def test_experts_in_float32_beside_a_bfloat16_base():
    model = switch_model(dtype=torch.bfloat16, spread=0.0)
    for layer in model.switch_layers().values():
        layer.switch_A.data, layer.switch_B.data = layer.switch_A.data.float(), layer.switch_B.data.float()
    assert torch.equal(model(prompt()).logits, base_model(dtype=torch.bfloat16)(prompt()).logits)
    stir(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(prompt()).logits
    torch.testing.assert_close(model(prompt()).logits.float(), mixed.float(), rtol=0.1, atol=0.3)


def test_packed_layers_give_the_same():
    model, ids = switch_model(), prompt()
    with torch.no_grad():
        expected = model(ids).logits
        model.pack_for_inference()
        assert model.model.layers[0].self_attn.q_proj.shared is not None
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids[:, :1]).logits, expected[:, :1], rtol=1e-4, atol=1e-4)
    model.train()
    assert all(layer.shared is None for layer in model.switch_layers().values())


def test_packing_takes_one_shrink_for_layers_that_share_an_input(monkeypatch):
    import llmrl.lora_switch.layer as layer_module

    model, calls, plain = switch_model(), [], layer_module.routed_shrink
    model.pack_for_inference()
    monkeypatch.setattr(layer_module, "routed_shrink", lambda *a, **k: calls.append(1) or plain(*a, **k))
    with torch.no_grad():
        model(prompt())
    assert len(calls) == 3 * 2  # qkv and gate_up of three layers; o and down go the usual way


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_modules": ("q_prj",)},
            ConfigError,
            "no linear layer of the decoder layers is called 'q_prj'; did you mean 'q_proj'?",
        ),
        ({"router_input": "layer_k", "router_layer": 7}, ModelError, "decoder layers 0 to 2, got 7"),
    ],
)
def test_get_switch_model_refuses(options, error, message):
    with pytest.raises(error) as caught:
        get_switch_model(base_model(), SwitchConfig(**options))
    assert message in str(caught.value)


def test_get_switch_model_refuses_layers_that_run_too_early():
    model = base_model()
    only = SwitchConfig(target_modules=("layers.0.self_attn.q_proj",), router_input="layer0_mlp")
    with pytest.raises(ConfigError, match="all of them run before router_input 'layer0_mlp' is known"):
        get_switch_model(model, only)


def test_get_switch_model_refuses_models_that_carry_something():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ModelError, match="already has experts"):
        get_switch_model(switch_model(), SwitchConfig())
    with pytest.raises(ModelError, match="carries a peft adapter"):
        get_switch_model(get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"])), SwitchConfig())
    quantised = base_model()
    quantised.is_quantized = True
    with pytest.raises(ModelError, match="quantised"):
        get_switch_model(quantised, SwitchConfig())


def test_experts_of_a_mixture_are_said_to_get_none(caplog):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    base = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2))
    model = get_switch_model(base, SwitchConfig(num_experts=2, r=2)).eval()
    assert "they get no adapters" in caplog.text
    assert {name.rpartition(".")[2] for name in model.switch_layers()} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    stir(model)
    assert torch.isfinite(model(prompt(1) % 64).logits).all()


def test_get_switch_model_refuses_other_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16))
    with pytest.raises(ModelError, match="have no input_layernorm, which the router reads"):
        get_switch_model(model, SwitchConfig())
    with pytest.raises(ModelError, match="no plain linear layers"):
        get_switch_model(model, SwitchConfig(router_input="layer0_mlp"))


def test_a_layer_does_not_run_alone():
    layer = next(iter(switch_model().switch_layers().values()))
    assert isinstance(layer, SwitchLinear)
    with pytest.raises(ModelError, match="call the model, not its parts"):
        copy.deepcopy(layer)(torch.zeros(1, 32))

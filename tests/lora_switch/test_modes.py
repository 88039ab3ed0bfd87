"""Every run mode gives what fused gives; merging out of place never drifts, in place it does."""

import pytest
import torch
from switch_models import prompt, switch_model

from llmrl.errors import ConfigError, ModelError
from llmrl.lora_switch import fix_route, set_switch_mode
from llmrl.lora_switch.decode import DecodeLoop, rewind
from llmrl.lora_switch.modes import drift

HARD = {"gate": "hard", "top_k": 1}


@pytest.mark.parametrize("router", ["embedding", "layer0_mlp", "prompt_pooled"])
@pytest.mark.parametrize("mode", ["merged", "in_place", "resident"])
def test_modes_agree_token_by_token(mode, router):
    model = switch_model(router_input=router, **(HARD if mode == "resident" else {}))
    ids, expected = prompt(1), []
    with torch.no_grad():
        first = model(ids, use_cache=True)
        cache = first.past_key_values
        for token in range(20, 32):
            expected.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
        set_switch_mode(model, mode)
        first = model(ids, use_cache=True)
        cache = first.past_key_values
        for token, logits in zip(range(20, 32), expected, strict=True):
            found = model(torch.tensor([[token]]), past_key_values=cache).logits
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
            now = model._switch_now
            assert now.resident is not None if mode == "resident" else now.merged


@torch.no_grad()
@pytest.mark.parametrize("mode", ["merged", "in_place", "resident"])
def test_copies_follow_what_happens_to_the_model(mode):
    """Experts that are loaded or written, and a cast, after the copies were made."""
    model, ids = switch_model(**(HARD if mode == "resident" else {})), prompt(1, 1)
    set_switch_mode(model, mode)
    model(ids)
    for layer in model.switch_layers().values():
        layer.switch_B.mul_(-2.0)
    found = model(ids).logits
    set_switch_mode(model, "fused")
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)
    set_switch_mode(model, mode)
    model(ids)
    model.bfloat16()
    assert model(ids).logits.dtype == torch.bfloat16


def test_merged_weights_do_not_swallow_gradients():
    model, ids = switch_model(), prompt(1, 1)
    set_switch_mode(model, "merged")
    model(ids).logits.sum().backward()
    assert float(model.switch_router.weight.grad.abs().max()) > 0


def test_training_lets_go_of_the_copies():
    model = switch_model(**HARD)
    set_switch_mode(model, "resident")
    model.train()
    layers = model.switch_layers().values()
    assert all(layer.merged_weight is None and layer.resident_weights is None for layer in layers)


def test_a_batch_of_routes_is_fused():
    model = switch_model()
    expected = model(prompt()).logits
    set_switch_mode(model, "merged")
    assert torch.equal(model(prompt()).logits, expected)
    assert not model._switch_now.merged


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fused", "merged", "in_place"])
def test_a_fixed_route_holds_for_any_batch(mode):
    model = switch_model()
    weights = [0.5, 0.0, 0.3, 0.2]
    fix_route(model, weights)
    expected = model(prompt()).logits
    set_switch_mode(model, mode)
    torch.testing.assert_close(model(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
    assert model._switch_now.merged == (mode != "fused")
    fix_route(model, None)
    free = model(prompt()).logits
    assert (free - expected).abs().max() > 0.1


@torch.no_grad()
def walk(model, steps, seed=0):
    tokens = torch.randint(3, 128, (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    for token in tokens:
        model(torch.tensor([[token]]))


def test_merging_out_of_place_never_drifts_and_in_place_does():
    model = switch_model(dtype=torch.bfloat16, spread=0.02)
    set_switch_mode(model, "merged")
    walk(model, 40)
    fix_route(model, [0.0] * 4)
    walk(model, 1)
    for layer in model.switch_layers().values():
        assert torch.equal(layer.merged_weight.view(torch.int16), layer.weight.view(torch.int16))
    fix_route(model, None)
    set_switch_mode(model, "in_place")
    walk(model, 2)
    early = drift(model)
    walk(model, 40)
    assert drift(model) > max(2 * early, 1e-3)
    set_switch_mode(model, "merged")
    with pytest.raises(ModelError, match="drift is measured in the mode 'in_place'"):
        drift(model)


def test_training_goes_back_to_fused():
    model = switch_model()
    set_switch_mode(model, "merged")
    model.train()
    assert model._switch_runner is None
    with pytest.raises(ModelError, match=r"call model.eval\(\) first"):
        set_switch_mode(model, "merged")
    with pytest.raises(ModelError, match=r"call model.eval\(\) first"):
        fix_route(model, [1.0, 0.0, 0.0, 0.0])


def test_modes_that_cannot_be():
    with pytest.raises(ConfigError, match="did you mean 'merged'"):
        set_switch_mode(switch_model(), "mergd")
    with pytest.raises(ModelError, match="expected gate 'hard' and top_k 1, got 'softmax' and 2"):
        set_switch_mode(switch_model(), "resident")


def left_padded():
    ids, mask = prompt(2), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 3},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
@pytest.mark.parametrize("router", ["embedding", "layer0_mlp", "prompt_pooled"])
def test_a_route_does_not_depend_on_how_one_generates(router, options):
    """Against a whole forward pass over what was generated, told which tokens are the prompt."""
    model = switch_model(router_input=router)
    ids, mask = left_padded()
    if "prompt_lookup_num_tokens" in options:
        ids, mask = ids[1:], mask[1:]
    torch.manual_seed(0)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True}
    settings["output_scores"] = "num_beams" in options
    out = model.generate(ids, **{"do_sample": False, **settings, **options})
    times = out.sequences.shape[0] // ids.shape[0]
    whole = torch.cat([mask.repeat_interleave(times, 0), torch.ones(len(out.sequences), 8, dtype=torch.long)], 1)
    told = (
        {"switch_prompt_mask": torch.cat([whole[:, :9], torch.zeros_like(whole[:, 9:])], 1)}
        if "pooled" in router
        else {}
    )
    positions = (whole.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(out.sequences, attention_mask=whole, position_ids=positions, **told).logits[:, 8:-1]
    if (
        "num_beams" in options
    ):  # the logits returned are also of beams that were left: the scores are of those that stayed
        scores = logits.log_softmax(-1).gather(2, out.sequences[:, 9:, None]).sum((1, 2))
        torch.testing.assert_close(out.sequences_scores, scores / 8, rtol=1e-4, atol=1e-4)
        return
    found = torch.stack(out.logits, 1) if "prompt_lookup_num_tokens" not in options else logits
    torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3)
    if options.get("do_sample"):
        return
    assert torch.equal(logits.argmax(-1), out.sequences[:, 9:])


@torch.no_grad()
def test_a_cache_the_model_made_carries_the_prompts_route():
    model, ids = switch_model(router_input="prompt_pooled"), prompt(2)
    made = model(ids[:, :8], use_cache=True).past_key_values
    found = model(ids[:, 8:], past_key_values=made).logits
    told = torch.ones_like(ids)
    told[:, 8:] = 0
    torch.testing.assert_close(found, model(ids, switch_prompt_mask=told).logits[:, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["embedding", "layer0_mlp", "layer_k", "prompt_pooled"])
def test_generate_and_the_decode_loop_agree(router):
    model = switch_model(router_input=router)
    ids = prompt(2)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)[:, 9:]
    assert torch.equal(model.generate(ids, **options, cache_implementation="static")[:, 9:], expected)
    loop = DecodeLoop(model, 24, 2)
    assert torch.equal(loop.generate(ids, 12), expected)
    other = prompt(2, seed=8)
    assert not torch.equal(loop.generate(other, 12), expected)
    assert torch.equal(loop.generate(ids, 12), expected)  # nothing is left of the prompt in between


@torch.no_grad()
def test_warm_up_steps_leave_no_trace():
    """What a capture does before its first replay, on the CPU: a step that is taken twice and taken back is taken once."""
    model, ids = switch_model(), prompt(1)
    loop = DecodeLoop(model, 24)
    loop.generate(ids, 1)
    loop.token.fill_(5)
    loop.position.fill_(9)
    counters = [(layer, layer.cumulative_length.clone()) for layer in loop.cache.layers]
    first = loop._forward()
    assert int(loop.cache.layers[0].cumulative_length) == 10
    rewind(counters)
    torch.testing.assert_close(loop._forward(), first)
    assert (loop._forward() - first).abs().max() > 1e-3  # without it the token is there twice


def test_decode_loop_samples_by_seed():
    model, ids = switch_model(), prompt(2)
    loop = DecodeLoop(model, 24, 2)
    one = loop.generate(ids, 12, temperature=1.0, seed=1)
    assert torch.equal(loop.generate(ids, 12, temperature=1.0, seed=1), one)
    assert not torch.equal(loop.generate(ids, 12, temperature=1.0, seed=2), one)


def test_decode_loop_refuses_what_it_does_not_hold():
    from llmrl.errors import UsageError

    loop = DecodeLoop(switch_model(), 16, 1)
    with pytest.raises(UsageError, match=r"holds 1 rows of 16 tokens, asked for 2 of 9 \+ 3"):
        loop.generate(prompt(2), 3)
    with pytest.raises(UsageError, match=r"asked for 1 of 9 \+ 8"):
        loop.generate(prompt(1), 8)
    resident = switch_model(**HARD)
    set_switch_mode(resident, "resident")
    with pytest.raises(ModelError, match="the mode resident reads its route on the host"):
        DecodeLoop(resident, 16, graph=True)

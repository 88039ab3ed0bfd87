"""A router that pools over the prompt: which tokens it takes for the prompt, cached, padded, scored or sampled."""

import pytest
import torch
from switch_models import prompt, switch_model
from transformers import DynamicCache

from llmrl.errors import ModelError
from llmrl.lora_switch import fix_route

POOLED = {"router_input": "prompt_pooled"}


def padded_without_a_mask():
    ids = prompt()
    ids[0, :4] = 0
    return ids, ids.ne(0).long()


@torch.no_grad()
def test_pooled_guesses_a_mask_as_generate_does():
    model, (ids, mask) = switch_model(**POOLED), padded_without_a_mask()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    told, guessed = (model.generate(ids, **options, **more) for more in ({"attention_mask": mask}, {}))
    torch.testing.assert_close(torch.stack(guessed.logits), torch.stack(told.logits))


@torch.no_grad()
def test_pooled_goes_on_with_the_route_of_its_cache():
    """Keys of one route and queries of another would be a model that was never trained."""
    model, ids = switch_model(**POOLED), prompt(1)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache}
    first = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    more = torch.cat([first, prompt(1, 5, seed=9)], 1)
    more_options = {**options, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(more, attention_mask=torch.ones_like(more), **more_options)
    told = torch.zeros_like(more)
    told[:, :9] = 1
    expected = model(more, switch_prompt_mask=told).logits[:, -1]
    torch.testing.assert_close(found.logits[0], expected, rtol=1e-4, atol=1e-4)


def test_pooled_does_not_take_an_answer_for_a_prompt():
    model, ids = switch_model(**POOLED), prompt()
    with pytest.raises(ModelError, match="cannot tell the prompt from the answer"):
        model(ids, use_cache=False)  # as programs score what was sampled
    model(ids, use_cache=False, switch_prompt_mask=torch.ones_like(ids))
    fix_route(model, [1.0, 0, 0, 0])
    model(ids, use_cache=False)


@torch.no_grad()
def test_a_cache_that_was_reset_has_no_route():
    from transformers import StaticCache

    model = switch_model(**POOLED)
    options = {"max_new_tokens": 6, "do_sample": False}
    cache = StaticCache(config=model.config, max_cache_len=24)
    for seed in (1, 2, 3):
        ids = prompt(1, seed=seed)
        told = {"attention_mask": torch.ones_like(ids)}
        cache.reset()
        found = model.generate(ids, past_key_values=cache, **told, **options)
        assert torch.equal(found, model.generate(ids, **told, **options))
        cache.reset()
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_pooled_fills_a_generation_config_as_generate_does():
    from transformers import GenerationConfig

    model, (ids, mask) = switch_model(**POOLED), padded_without_a_mask()
    options = {"output_logits": True, "return_dict_in_generate": True}
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    guessed = model.generate(ids, generation_config=config, **options)
    told = model.generate(ids, generation_config=config, attention_mask=mask, **options)
    torch.testing.assert_close(torch.stack(guessed.logits), torch.stack(told.logits))


def test_a_pooled_model_is_scored_as_a_prompt():
    """What an engine's scores and the probe of a weight update are."""
    from llmrl.rollout.transformers_engine import prompt_logprobs

    model, ids = switch_model(**POOLED), prompt(1)
    (found,) = prompt_logprobs(model, ids.tolist())
    with torch.no_grad():
        expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected)


def test_pooled_samples_during_training():
    model, ids = switch_model(**POOLED), prompt()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.train().generate(ids, **options), model.eval().generate(ids, **options))

"""The transformers backend on a model that is in memory already."""

import torch

from llmrl.base_model import open_causal_lm
from llmrl.rollout.transformers_engine import TransformersEngine
from llmrl.types import SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, max_tokens=8)


def test_loaded_model_is_used_and_not_read_again(stories_dir):
    prompt = [1, 403, 407, 261, 378]
    model = open_causal_lm(str(stories_dir))
    with TransformersEngine(str(stories_dir)) as own, TransformersEngine(str(stories_dir), loaded=model) as engine:
        expected = own.generate([prompt], GREEDY)[0][0]
        found = engine.generate([prompt], GREEDY)[0][0]
        assert (found.token_ids, found.logprobs) == (expected.token_ids, expected.logprobs)
        with torch.no_grad():
            model.model.norm.weight.mul_(0.5)  # seen at once: it is the same object
        changed = engine.generate([prompt], GREEDY)[0][0]
        assert changed.logprobs != found.logprobs
        assert own.generate([prompt], GREEDY)[0][0].logprobs == expected.logprobs


def test_loaded_model_says_its_own_dtype(stories_dir):
    model = open_causal_lm(str(stories_dir), dtype="bfloat16")
    with TransformersEngine(str(stories_dir), loaded=model) as engine:
        assert engine.dtype == "bfloat16"

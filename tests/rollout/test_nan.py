"""A model whose numbers are no numbers for one prompt: that prompt fails with the reason, the others are answered."""

import pytest
import torch
from engine_support import trainer, weights

from llmrl.errors import RequestError
from llmrl.rollout.transformers_engine import TransformersEngine
from llmrl.types import SamplingConfig

GOOD, BAD = [1, 40, 41], [1, 33, 41]  # the second reaches the broken row of the input embeddings


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def broken(request, tiny_folder, open_vllm):
    """Each backend with output layers of their own: tied ones would carry the broken row to every prompt."""
    folder = tiny_folder("untied")
    plain = weights(trainer(folder))
    # an engine of its own: on a CPU, NaN that vLLM has once cached reaches later requests through masked positions
    engine = open_vllm(folder, max_model_len=200) if request.param == "vllm" else TransformersEngine(str(folder))
    bad = {name: tensor.clone() for name, tensor in plain.items()}
    bad["model.embed_tokens.weight"][33] = torch.nan
    engine.update(bad)
    yield engine
    engine.update(plain)
    if request.param == "transformers":
        engine.close()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_fails_for_the_prompt_that_reaches_nan_alone(broken, temperature):
    sampling = SamplingConfig(temperature=temperature, max_tokens=1, seed=1)
    futures = [broken.submit(prompt, sampling) for prompt in (GOOD, BAD, GOOD)]
    good = [futures[i].result(timeout=60)[0] for i in (0, 2)]
    assert good[0].token_ids == good[1].token_ids
    with pytest.raises(RequestError, match="not a number"):
        futures[1].result(timeout=60)

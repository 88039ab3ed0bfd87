"""What only vLLM has: structured output, its own refusals, and how it ends: closed, broken, killed."""

import json
import os
import time

import psutil
import pytest
import torch
from engine_support import (
    SMALL,
    STORIES,
    assert_sampled_from,
    disturbed,
    largest,
    token_logprobs,
    train,
    trainer,
    weights,
)

from llmrl.errors import EngineError, ModelError, RequestError, SyncError
from llmrl.rollout.sync import WeightSync
from llmrl.types import FinishReason, SamplingConfig

pytestmark = pytest.mark.vllm

SCHEMA = {
    "type": "object",
    "properties": {"done": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["done", "kind"],
    "additionalProperties": False,
}
LONG = SamplingConfig(max_tokens=480, temperature=2.0, n=4, seed=1)
SHORT = SamplingConfig(max_tokens=4, temperature=0.0)


def test_json_schema_constrains_the_answer(open_vllm, stories_model, text_ids):
    """The model has never seen JSON. Logprobs are those among the tokens that are allowed, hence larger than its own."""
    # left free, it writes line breaks to the end of the context
    engine = open_vllm(STORIES, structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True})
    sampling = SamplingConfig(max_tokens=120, json_schema=SCHEMA, seed=1, n=3)
    answers = engine.generate([text_ids[0], text_ids[1]], [sampling, SHORT])
    finished = [sample for sample in answers[0] if sample.finish_reason == FinishReason.STOP]
    assert finished
    for sample in finished:
        value = json.loads(sample.text)
        assert set(value) == {"done", "kind"}
        assert value["kind"] in ("cat", "dog")
        assert sample.token_ids[-1] in engine.end_ids
    for sample in answers[0]:
        own = token_logprobs(stories_model, [*text_ids[0], *sample.token_ids])[len(text_ids[0]) - 1 :]
        assert all(found > raw - 1e-3 for found, raw in zip(sample.logprobs, own, strict=True))
        assert sum(sample.logprobs) > sum(own) + 1
    assert_sampled_from(answers[1][0], text_ids[1], stories_model)


def test_json_schema_that_is_none_fails_alone(stories_vllm, text_ids):
    """vLLM raises something of its own there: the request fails, the engine goes on."""
    other = stories_vllm.submit(text_ids[0], LONG)
    with pytest.raises(RequestError, match="vLLM refused the request"):
        stories_vllm.submit(text_ids[0], SamplingConfig(json_schema={"type": "nonsense"})).result(timeout=60)
    assert len(other.result(timeout=120)) == 4
    with pytest.raises(RequestError, match=r"vLLM refused the request.*logprobs"):
        stories_vllm.submit(text_ids[0], SamplingConfig(logprobs=400)).result(timeout=60)
    assert len(stories_vllm.generate([text_ids[0]], SHORT)[0][0].token_ids) == 4


def test_any_error_of_admission_is_the_requests_own(stories_vllm, monkeypatch, text_ids):
    def refuse(*args, **kwargs):
        raise RuntimeError("a grammar nobody can compile")

    monkeypatch.setattr(stories_vllm._llm.llm_engine, "add_request", refuse)
    with pytest.raises(RequestError, match="a grammar nobody can compile"):
        stories_vllm.submit(text_ids[0], SHORT).result(timeout=60)
    monkeypatch.undo()
    assert len(stories_vllm.generate([text_ids[0]], SHORT)[0][0].token_ids) == 4


def test_cancel_frees_the_request_in_vllm(stories_vllm, text_ids):
    """All but one of many long requests are withdrawn while they run; their places are taken by others at once."""
    llm = stories_vllm._llm.llm_engine
    futures = [stories_vllm.submit(text_ids[0], LONG) for _ in range(10)]
    assert len(stories_vllm.generate([text_ids[1]], SHORT)[0][0].token_ids) == 4  # vLLM has taken them all
    for future in futures[1:]:
        assert future.cancel()
    assert [len(s.token_ids) > 0 for s in futures[0].result(timeout=200)] == [True] * 4
    stories_vllm.generate([text_ids[1]], SHORT)
    assert llm.get_num_unfinished_requests() == 0
    assert stories_vllm._jobs == {}


def test_score_does_not_come_from_the_prefix_cache(stories_vllm, stories_model, text_ids):
    ids = (text_ids[1] * 20)[:400]
    first = stories_vllm.score(ids)
    assert stories_vllm.cached_tokens(ids) >= 256
    assert largest(stories_vllm.score(ids), first) < 1e-4
    assert largest(first, token_logprobs(stories_model, ids)) < 1e-3


def test_answers_after_a_cached_prefix_are_the_same(stories_vllm, stories_model, text_ids):
    prompt = (text_ids[1] * 20)[:390]
    one, two = (stories_vllm.generate([prompt], SamplingConfig(temperature=0.0, max_tokens=8))[0][0] for _ in range(2))
    assert stories_vllm.cached_tokens(prompt) >= 256
    assert one.token_ids == two.token_ids
    assert_sampled_from(two, prompt, stories_model)


def test_close_of_one_engine_leaves_the_others(stories_vllm, text_ids):
    """Engines in one process share vLLM's process groups."""
    from llmrl.rollout.vllm_engine import VllmEngine

    with VllmEngine(str(STORIES), **SMALL) as other:
        assert other.generate([text_ids[0]], SHORT)[0][0] == stories_vllm.generate([text_ids[0]], SHORT)[0][0]
    assert len(stories_vllm.generate([text_ids[0]], SHORT)[0][0].token_ids) == 4


def test_close_does_not_wait_for_an_update_that_waits(text_ids, stories_model):
    from concurrent.futures import ThreadPoolExecutor

    from llmrl.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(str(STORIES), **SMALL)
    waiting = [engine.submit(text_ids[0], LONG) for _ in range(20)]
    with ThreadPoolExecutor(1) as pool:
        update = pool.submit(engine.update, weights(stories_model))
        while engine._inbox.qsize() and not update.running():
            time.sleep(0.001)
        engine.close()
        for future in waiting:
            with pytest.raises(EngineError, match="closed"):
                future.result(timeout=60)
        with pytest.raises(EngineError, match="closed"):
            update.result(timeout=60)
    with pytest.raises(EngineError, match="closed"):
        engine.update(weights(stories_model))


def test_an_engine_that_breaks_fails_everything_at_once(text_ids):
    from llmrl.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(str(STORIES), **SMALL)
    plain, steps = engine._llm.llm_engine.step, []

    def step():
        steps.append(1)
        if len(steps) > 3:
            raise RuntimeError("CUDA error: an illegal memory access\nand more lines")
        return plain()

    engine._llm.llm_engine.step = step
    futures = [engine.submit(text_ids[0], LONG) for _ in range(5)]
    for future in futures:
        with pytest.raises(
            EngineError, match="vLLM died: RuntimeError: CUDA error: an illegal memory access; finished"
        ):
            future.result(timeout=60)
    with pytest.raises(EngineError, match="vLLM died"):
        engine.submit(text_ids[0], SHORT).result(timeout=5)
    with pytest.raises(EngineError, match="vLLM died"):
        engine.score([1, 2])
    with pytest.raises(EngineError, match="vLLM died"):
        engine.update({})
    engine.close()


def test_engine_in_a_process_of_its_own(text_ids, stories_model):
    """The same answers, updates and refusals as in this process; then its core is killed while it works."""
    from llmrl.rollout.vllm_engine import VllmEngine

    before = set(psutil.Process().children(recursive=True))
    with VllmEngine(str(STORIES), own_process=True, **SMALL) as engine:
        core = set(psutil.Process().children(recursive=True)) - before
        assert core
        assert not hasattr(
            engine._llm.llm_engine.engine_core, "engine_core"
        )  # an engine before it here leaves no trace
        sample = engine.generate([text_ids[0]], SamplingConfig(max_tokens=8, seed=1))[0][0]
        assert_sampled_from(sample, text_ids[0], stories_model)
        model = trainer(STORIES)
        sync = WeightSync(engine, model, probe_ids=(text_ids[1] * 20)[:300])
        train(model)
        assert sync.update().number == 1
        tensors = weights(disturbed(model))
        del tensors["model.norm.weight"]
        with pytest.raises(SyncError, match=r"lacks model\.norm\.weight"):
            engine.update(tensors)
        assert_sampled_from(engine.generate([text_ids[0]], SHORT)[0][0], text_ids[0], model)
        futures = [engine.submit(text_ids[0], LONG) for _ in range(30)]
        for process in core:
            process.kill()
        for future in futures:
            with pytest.raises(EngineError, match="vLLM died"):
                future.result(timeout=60)
        for ask in (
            lambda: engine.submit(text_ids[0], SHORT).result(timeout=10),
            lambda: engine.score([1, 2]),
            lambda: engine.update(weights(model)),
        ):
            with pytest.raises(EngineError, match="vLLM died"):
                ask()


def test_vllm_engine_says_why_it_does_not_start(tmp_path):
    from llmrl.rollout.vllm_engine import VllmEngine

    with pytest.raises(EngineError, match=r"vLLM does not start with .*stories260k: "):
        VllmEngine(str(STORIES), **SMALL, max_num_batched_tokens=-5)
    with pytest.raises(ModelError, match="max_model_len 1000 is more than the 512 positions"):
        VllmEngine(str(STORIES), max_model_len=1000)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


def test_start_leaves_the_random_state(stories_vllm, text_ids):
    from llmrl.rollout.vllm_engine import VllmEngine

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    with VllmEngine(str(STORIES), **SMALL) as engine:
        assert torch.equal(torch.random.get_rng_state(), state)
        engine.generate([text_ids[0]], SHORT)
        engine.score(text_ids[0])
        assert torch.equal(torch.random.get_rng_state(), state)

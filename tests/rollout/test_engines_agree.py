"""Both backends say what a plain forward pass of transformers says: ids, logprobs, scores."""

import pytest
import torch
from engine_support import STORIES, assert_sampled_from, largest, token_logprobs, trainer, weights

from llmrl.rollout.transformers_engine import TransformersEngine, prompt_logprobs
from llmrl.types import FinishReason, SamplingConfig

MODELS = ["stories", "untied", "biased", "qknorm", "softcap"]
NEW = 24
GREEDY = SamplingConfig(temperature=0.0, max_tokens=NEW, logprobs=3)


@torch.inference_mode()
def greedy(model, prompt, end_ids):
    """Continue one prompt, one whole forward pass a token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW and not (len(ids) > len(prompt) and ids[-1] in end_ids):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module", params=MODELS)
def model_folder(request, tiny_folder):
    return tiny_folder(request.param)


@pytest.fixture(scope="module")
def expected(model_folder, text_ids):
    model = trainer(model_folder).eval()
    return [(prompt, greedy(model, prompt, {1, 2} if model_folder == STORIES else {2}), model) for prompt in text_ids]


def assert_agrees(engine, expected):
    answers = engine.generate([prompt for prompt, _, _ in expected], GREEDY)
    for (prompt, new, model), samples in zip(expected, answers, strict=True):
        assert len(samples) == 1
        assert list(samples[0].token_ids) == new
        assert_sampled_from(samples[0], prompt, model)
        assert_top(samples[0], prompt, model)
        assert largest(engine.score([*prompt, *new]), token_logprobs(model, [*prompt, *new])) < 1e-3


@torch.inference_mode()
def assert_top(sample, prompt, model):
    rows = model(input_ids=torch.tensor([[*prompt, *sample.token_ids]])).logits[0].double().log_softmax(-1)
    wanted = rows[len(prompt) - 1 : -1].topk(3)
    found = torch.tensor(sample.top_logprobs)  # [T, 3, (id, logprob)]
    assert found.shape == (len(sample.token_ids), 3, 2)
    assert torch.equal(found[..., 0].long(), wanted.indices)
    assert (found[..., 1] - wanted.values).abs().max() < 1e-3


def test_transformers_engine_agrees_with_a_plain_forward(model_folder, expected):
    """Three prompts of different lengths: batches are padded on the left to generate, alone and together the same."""
    with TransformersEngine(str(model_folder)) as together:
        assert_agrees(together, expected)
    with TransformersEngine(str(model_folder), batch_size=1) as alone:
        assert_agrees(alone, expected)


def test_transformers_engine_agrees_where_positions_are_learned(tiny_model, text_ids):
    """Rotary positions forgive a shift of a whole row, GPT-2's do not."""
    model = trainer(tiny_model("gpt2")).eval()
    with TransformersEngine(str(tiny_model("gpt2"))) as engine:
        assert_agrees(engine, [(prompt, greedy(model, prompt, {2}), model) for prompt in text_ids])


@pytest.mark.vllm
def test_vllm_engine_agrees_with_a_plain_forward(model_folder, expected, open_vllm):
    assert_agrees(open_vllm(model_folder), expected)


def test_greedy_equals_model_generate(engine, stories_model, text_ids):
    """The end token is part of the answer, as it is for transformers; generation_config.json lists two of them."""
    model = stories_model
    for prompt in text_ids[:2]:
        wanted = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=480, eos_token_id=[1, 2], pad_token_id=0
        )[0, len(prompt) :].tolist()
        found = engine.generate([prompt], SamplingConfig(temperature=0.0, max_tokens=480))[0][0]
        assert list(found.token_ids) == wanted
        assert found.finish_reason == (FinishReason.STOP if wanted[-1] in (1, 2) else FinishReason.LENGTH)


def test_prompt_logprobs_of_a_right_padded_batch(text_ids, model_folder):
    model = trainer(model_folder).eval()
    for row, found in zip(text_ids, prompt_logprobs(model, text_ids), strict=True):
        assert largest(found, token_logprobs(model, row)) < 1e-4


def test_score_batch_equals_score(stories_hf, text_ids):
    rows = [*text_ids, text_ids[1] * 20]
    batch = stories_hf.score_batch(rows)
    assert [len(scores) for scores in batch] == [len(row) - 1 for row in rows]
    for row, scores in zip(rows, batch, strict=True):
        assert largest(scores, stories_hf.score(row)) < 1e-4
    assert stories_hf.score_batch([]) == []


def test_score_of_one_token_is_empty(engine):
    assert engine.score([1]) == []


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
def test_logprobs_are_those_of_temperature_one(engine, temperature, filters, stories_model, text_ids):
    sampling = SamplingConfig(temperature=temperature, max_tokens=20, seed=3, n=2, logprobs=2, **filters)
    for samples, prompt in zip(engine.generate(text_ids[:2], sampling), text_ids[:2], strict=True):
        for sample in samples:
            assert_sampled_from(sample, prompt, stories_model)
            assert all(len(top) == 2 and top[0][1] >= top[1][1] for top in sample.top_logprobs)


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
def test_filters_leave_tokens_out(engine, filters, stories_model, text_ids):
    """Every sampled token is among those the filter keeps, and without it some are not."""

    def outside(sampling):
        count = 0
        for sample in engine.generate([text_ids[0]], sampling)[0]:
            with torch.inference_mode():
                logits = stories_model(input_ids=torch.tensor([[*text_ids[0], *sample.token_ids]])).logits[0]
            probs = (logits[len(text_ids[0]) - 1 : -1].double() / 1.5).softmax(-1)
            for row, token in zip(probs, sample.token_ids, strict=True):
                above = row > row[token] * (1 + 1e-4)
                count += {
                    "top_k": int(above.sum()) >= 3,
                    "top_p": float(row[above].sum()) >= 0.5 + 1e-3,
                    "min_p": float(row[token]) < 0.3 * float(row.max()) - 1e-4,
                }[next(iter(filters))]
        return count

    sampling = {"temperature": 1.5, "max_tokens": 30, "n": 4, "seed": 11}
    assert outside(SamplingConfig(**sampling, **filters)) == 0
    assert outside(SamplingConfig(**sampling)) > 5


def test_transformers_engine_keeps_a_head_over_updates(save_head, tmp_path, text_ids, stories_model):
    save_head(STORIES, tmp_path / "heads")
    _assert_keeps_head(TransformersEngine(str(tmp_path / "heads")), tmp_path / "heads", text_ids, stories_model)


@pytest.mark.vllm
def test_vllm_engine_keeps_a_head_over_updates(save_head, tmp_path, text_ids, stories_model, open_vllm):
    save_head(STORIES, tmp_path / "heads")
    _assert_keeps_head(open_vllm(tmp_path / "heads"), tmp_path / "heads", text_ids, stories_model)


def _assert_keeps_head(engine, folder, text_ids, stories_model):
    from engine_support import disturbed
    from transformers import AutoModelForCausalLM

    with_head = AutoModelForCausalLM.from_pretrained(
        folder
    ).eval()  # the head is in effect here: tests/test_modeling.py
    prompt = text_ids[1]
    sample = engine.generate([prompt], SamplingConfig(max_tokens=12, seed=1))[0][0]
    assert_sampled_from(sample, prompt, with_head)
    bare = token_logprobs(stories_model, [*prompt, *sample.token_ids])
    assert largest(engine.score([*prompt, *sample.token_ids]), bare) > 0.1
    moved = disturbed(stories_model, 0.2)
    engine.update(weights(moved))
    with_head.load_state_dict(moved.state_dict(), strict=False)
    sample = engine.generate([prompt], SamplingConfig(max_tokens=12, seed=1))[0][0]
    assert_sampled_from(sample, prompt, with_head)
    assert largest(sample.logprobs, token_logprobs(moved, [*prompt, *sample.token_ids])[len(prompt) - 1 :]) > 0.1

"""What every backend shares: requests and their errors, stops, finish reasons, futures, many callers, the end."""

import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
import torch
from engine_support import STORIES, assert_sampled_from

from llmrl.errors import ConfigError, EngineError, RequestError
from llmrl.rollout.engine import find_stop, gather, settle
from llmrl.rollout.protocols import Engine, Sample, Scorer
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.rollout.transformers_engine import TransformersEngine
from llmrl.types import FinishReason, PolicyVersion, SamplingConfig

GREEDY = SamplingConfig(temperature=0.0, max_tokens=30)


def test_engine_is_what_the_protocols_say(engine):
    assert isinstance(engine, Engine)
    assert isinstance(engine, Scorer)
    assert engine.max_model_len == 512
    assert engine.dtype == "float32"
    assert engine.version.number == 0
    assert engine.end_ids == {1, 2}


def test_both_backends_name_the_same_weights(stories_hf, tmp_path):
    """The fingerprint is that of the weights, not of a path."""
    import shutil

    shutil.copytree(STORIES, tmp_path / "copy")
    with TransformersEngine(str(tmp_path / "copy")) as other:
        assert other.version == stories_hf.version


@pytest.mark.parametrize(
    ("prompt", "setting", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 512], {}, "token id 512 is not in the vocabulary of 512"),
        ([1, -1], {}, "token id -1"),
        ("Once", {}, r"expected token ids, got 'Once'; encode text with engine\.tokenizer"),
        ([1.5], {}, "expected token ids"),
        ([1] * 512, {}, "the prompt has 512 tokens and the context holds 512"),
        ([1], {"stop_token_ids": (600,)}, r"stop_token_ids \[600\] are not in the vocabulary"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_served(engine, prompt, setting, message):
    sampling = SamplingConfig(max_tokens=2, **setting)
    with pytest.raises(RequestError, match=message):
        engine.submit(prompt, sampling)
    with pytest.raises(RequestError, match=f"prompt 1: {message}"):
        engine.generate([[1], prompt], [SamplingConfig(), sampling])


def test_score_refuses_what_is_no_prompt(engine):
    for ids, message in [([], "empty"), ([700], "token id 700"), ([1] * 513, "cannot score 513 tokens")]:
        with pytest.raises(RequestError, match=message):
            engine.score(ids)


def test_generate_wants_one_sampling_a_prompt(engine):
    with pytest.raises(RequestError, match=r"one sampling a prompt \(2\), got 1"):
        engine.generate([[1], [1]], [GREEDY])


def test_json_schema_is_refused_by_transformers(stories_hf):
    with pytest.raises(RequestError, match="TransformersEngine has none; use --rollout_backend vllm or server"):
        stories_hf.generate([[1]], SamplingConfig(json_schema={"type": "object"}))


def test_generate_takes_one_sampling_a_prompt(engine, text_ids):
    settings = [
        SamplingConfig(temperature=0.0, max_tokens=3),
        SamplingConfig(max_tokens=5, n=3, seed=1, logprobs=2),
        SamplingConfig(max_tokens=7, seed=1, stop_token_ids=(426,), temperature=0.0),
    ]
    answers = engine.generate(text_ids, settings)
    assert [len(samples) for samples in answers] == [1, 3, 1]
    assert [len(s.token_ids) for s in answers[0]] == [3]
    assert all(len(s.token_ids) == 5 and len(s.top_logprobs) == 5 for s in answers[1])
    assert answers[0][0].top_logprobs == ()
    assert len(answers[2][0].token_ids) <= 7


def greedy_text(engine, prompt):
    return engine.generate([prompt], GREEDY)[0][0]


def test_stop_string_over_several_tokens_cuts_the_text(engine, text_ids, stories_model):
    """The story goes on ", there was a little girl named Lily. She": no token holds "was a little g"."""
    whole = greedy_text(engine, text_ids[0])
    assert whole.text.startswith(", there was a little girl named Lily")
    sampling = SamplingConfig(temperature=0.0, max_tokens=30, stop=("zebra", "was a little g"))
    sample = engine.generate([text_ids[0]], sampling)[0][0]
    assert sample.text == ", there "
    assert (sample.finish_reason, sample.stop_reason) == (FinishReason.STOP, "was a little g")
    # all tokens of the stop string are there, the last one being that which completes it
    count = len(sample.token_ids)
    assert sample.token_ids == whole.token_ids[:count]
    spoken = engine.tokenizer.decode(sample.token_ids)
    assert "was a little g" in spoken
    assert "was a little g" not in engine.tokenizer.decode(sample.token_ids[:-1])
    assert_sampled_from(sample, text_ids[0], stories_model)


def test_stop_string_at_the_start_of_an_answer(engine, stories_tokenizer):
    """The first token says " there"; decoded alone it has lost its space."""
    prompt = stories_tokenizer("Once upon a time,")["input_ids"]
    assert greedy_text(engine, prompt).text.startswith("there was")
    for stop, text, count in [(" there", "", 1), ("there", "", 1), (" was", "there", 2)]:
        sample = engine.generate([prompt], SamplingConfig(temperature=0.0, max_tokens=30, stop=(stop,)))[0][0]
        assert (sample.text, sample.stop_reason, len(sample.token_ids)) == (text, stop, count)


def test_stop_id_ends_an_answer_and_is_part_of_it(engine, text_ids):
    whole = greedy_text(engine, text_ids[0])
    stop = whole.token_ids[5]
    first = whole.token_ids.index(stop)
    sample = engine.generate([text_ids[0]], SamplingConfig(temperature=0.0, max_tokens=30, stop_token_ids=(stop,)))[0][
        0
    ]
    assert sample.token_ids == whole.token_ids[: first + 1]
    assert (sample.finish_reason, sample.stop_reason) == (FinishReason.STOP, stop)
    assert sample.text == engine.tokenizer.decode(sample.token_ids)
    assert len(sample.logprobs) == first + 1


def test_end_token_ends_an_answer_and_is_part_of_it(engine, text_ids):
    sample = engine.generate([text_ids[0]], SamplingConfig(temperature=0.0, max_tokens=480))[0][0]
    assert sample.finish_reason == FinishReason.STOP
    assert sample.token_ids[-1] in engine.end_ids
    assert sample.stop_reason == sample.token_ids[-1]
    assert not engine.end_ids & set(sample.token_ids[:-1])
    assert "<" not in sample.text


def test_max_tokens_is_cut_at_the_end_of_the_context(engine, text_ids):
    prompt = (text_ids[1] * 40)[:505]
    sample = engine.generate([prompt], SamplingConfig(max_tokens=100, temperature=0.0))[0][0]
    assert len(sample.token_ids) == 7 or sample.finish_reason == FinishReason.STOP
    assert sample.finish_reason == (FinishReason.LENGTH if len(sample.token_ids) == 7 else FinishReason.STOP)
    longest = (text_ids[1] * 40)[:511]
    sample = engine.generate([longest], SamplingConfig(max_tokens=100, temperature=0.0, stop_token_ids=()))[0][0]
    assert (len(sample.token_ids), sample.finish_reason) == (1, FinishReason.LENGTH)


def test_length_is_the_reason_at_max_tokens(engine, text_ids):
    sample = engine.generate([text_ids[0]], SamplingConfig(max_tokens=4, temperature=0.0))[0][0]
    assert (len(sample.token_ids), sample.finish_reason, sample.stop_reason) == (4, FinishReason.LENGTH, None)


def test_many_threads_get_their_own_answers(engine, stories_model):
    """64 callers with four prompts each; a prompt's own last id comes back scored in its own context."""
    jobs = [(1, 300 + i % 150, 403 + j) for i in range(64) for j in range(4)]
    sampling = SamplingConfig(temperature=0.0, max_tokens=4)

    def ask(caller):
        return [engine.submit(prompt, sampling).result(timeout=240)[0] for prompt in jobs[4 * caller : 4 * caller + 4]]

    with ThreadPoolExecutor(64) as pool:
        answers = [sample for samples in pool.map(ask, range(64)) for sample in samples]
    rows = torch.tensor([[*prompt, *sample.token_ids][:4] for prompt, sample in zip(jobs, answers, strict=True)])
    with torch.inference_mode():
        logprobs = stories_model.eval()(input_ids=rows).logits[:, 2].log_softmax(-1)
    wanted = logprobs.gather(-1, rows[:, 3:])[:, 0]
    found = torch.tensor([sample.logprobs[0] for sample in answers])
    assert (found - wanted).abs().max() < 1e-3
    assert torch.equal(rows[:, 3], logprobs.argmax(-1))
    assert len(set(found.tolist())) > 100


def test_cancel_withdraws_a_request(engine, text_ids):
    long = SamplingConfig(max_tokens=500, temperature=2.0, n=4, seed=1)
    future = engine.submit(text_ids[0], long)
    assert future.cancel()
    with pytest.raises(CancelledError):
        future.result()
    assert len(greedy_text(engine, text_ids[0]).token_ids) == 30
    if hasattr(engine, "_jobs"):
        assert engine._jobs == {}
        assert engine._llm.llm_engine.get_num_unfinished_requests() == 0


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_close_fails_what_is_under_way(backend, text_ids):
    from engine_support import SMALL

    if backend == "vllm":
        from llmrl.rollout.vllm_engine import VllmEngine

        engine = VllmEngine(str(STORIES), **SMALL)
    else:
        engine = TransformersEngine(str(STORIES), batch_size=2)
    long = SamplingConfig(max_tokens=500, temperature=2.0, n=6, seed=1)
    waiting = [engine.submit(text_ids[0], long) for _ in range(8)]
    engine.close()
    for future in waiting:
        with pytest.raises(EngineError, match="the engine was closed"):
            future.result(timeout=60)
    with pytest.raises(EngineError, match="closed"):
        engine.submit(text_ids[0], long).result(timeout=60)
    assert not engine._thread.is_alive()
    engine.close()


def test_transformers_engine_reports_an_error_of_the_model(stories_tokenizer, monkeypatch):
    with TransformersEngine(str(STORIES)) as engine:
        monkeypatch.setattr(engine._model, "forward", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken op")))
        with pytest.raises(EngineError, match=r"transformers failed while generating.*broken op"):
            engine.generate([[1]], GREEDY)
        monkeypatch.undo()
        assert len(engine.generate([[1]], GREEDY)[0][0].token_ids) > 0


def test_distrust_refuses_everything_until_trust(stories_hf):
    stories_hf.distrust("the weights are a mixture")
    try:
        for ask in (lambda: stories_hf.submit([1], GREEDY), lambda: stories_hf.score([1, 2])):
            with pytest.raises(EngineError, match="the engine is not used: the weights are a mixture"):
                ask()
        assert not stories_hf.is_trusted
    finally:
        stories_hf.trust()
    assert stories_hf.is_trusted
    assert len(stories_hf.score([1, 2])) == 1


def test_gather_joins_fails_and_cancels():
    parts = [Future() for _ in range(3)]
    joined = gather(parts)
    for i, part in enumerate(reversed(parts)):
        assert not joined.done()
        settle(part, 2 - i)
    assert joined.result(timeout=1) == [0, 1, 2]

    parts = [Future() for _ in range(3)]
    joined = gather(parts)
    settle(parts[1], error=EngineError("gone"))
    with pytest.raises(EngineError, match="gone"):
        joined.result(timeout=1)
    assert parts[0].cancelled()
    assert parts[2].cancelled()

    parts = [Future() for _ in range(2)]
    joined = gather(parts)
    assert joined.cancel()
    assert all(part.cancelled() for part in parts)
    settle(parts[0], 1)  # a backend that comes too late is no error


def test_find_stop_takes_the_earliest():
    assert find_stop("abcdef", ["e", "bc"]) == (1, "bc")
    assert find_stop("abcdef", ["abc", "ab"]) == (0, "abc")
    assert find_stop("abcdef", ["ab", "abc"]) == (0, "ab")
    assert find_stop("abcdef", ["x"]) is None


def test_sample_is_validated_and_survives_json():
    version = PolicyVersion(3, "abc")
    sample = Sample((5, 6), (-0.5, -1.0), "hi", FinishReason.STOP, version, 6, (((5, -0.5),), ((6, -1.0),)))
    assert Sample.from_json(sample.to_json()) == sample
    with pytest.raises(Exception, match="2 numbers, one a token"):
        Sample((5, 6), (-0.5,), "hi", FinishReason.STOP, version)
    with pytest.raises(ConfigError):
        SamplingConfig(max_tokens=0)


def test_scripted_engine_answers_as_scripted(stories_tokenizer):
    engine = ScriptedEngine(stories_tokenizer, lambda request: "The dog ran. The cat sat.", max_model_len=64)
    ((sample,),) = engine.generate([[1, 403]], SamplingConfig())
    assert sample.text == "The dog ran. The cat sat."
    assert (sample.token_ids[-1], sample.finish_reason) == (2, FinishReason.STOP)
    ((cut,),) = engine.generate([[1, 403]], SamplingConfig(stop=("ran", "cat")))
    assert (cut.text, cut.stop_reason) == ("The dog ", "ran")
    ((short,),) = engine.generate([[1, 403]], SamplingConfig(max_tokens=2))
    assert (len(short.token_ids), short.finish_reason) == (2, FinishReason.LENGTH)
    scores = engine.score([1, 403, *sample.token_ids])
    assert scores[1:] == list(sample.logprobs)
    assert engine.update({}).number == 1


def test_scripted_engine_hands_on_the_errors_of_its_script(stories_tokenizer):
    def script(request):
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        ScriptedEngine(stories_tokenizer, script).generate([[1]], SamplingConfig())


def test_submit_may_be_called_from_a_thread_that_ends(engine, text_ids):
    held = []
    thread = threading.Thread(target=lambda: held.append(engine.submit(text_ids[0], GREEDY)))
    thread.start()
    thread.join()
    assert held[0].result(timeout=120)[0].token_ids == greedy_text(engine, text_ids[0]).token_ids

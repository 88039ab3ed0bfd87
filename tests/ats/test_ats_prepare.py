"""From the options of `llmrl calibrate` to windows: what is handed on to the sampling of answers, what is kept."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from llmrl.ats import on_policy
from llmrl.ats.data import Window, Windows, read_rows
from llmrl.ats.on_policy import SampledAnswers
from llmrl.ats.options import CalibrateConfig
from llmrl.ats.prepare import ANSWERS, MERGED, _engine, remove_unfinished, select_windows
from llmrl.ats.splits import limit_windows
from llmrl.ats.windows import make_windows
from llmrl.base_model import load_base


@pytest.fixture(scope="module")
def base(stories_dir):
    return load_base(str(stories_dir), device="cpu")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?", "answers": ["yes"]}) + "\n" for i in range(40)))
    return path


def config_for(data, base, **options):
    return CalibrateConfig(model=str(base.folder), data=[str(data)], output_dir="out", quiet=True, **options)


@pytest.fixture
def asked(monkeypatch):
    """What `sample_answers` was given; its answers are the rows' own."""
    calls = []

    def sample_answers(rows, engine, cache_dir, **options):
        calls.append(SimpleNamespace(engine=engine, cache_dir=cache_dir, **options))
        return SampledAnswers(make_windows([*rows], engine.tokenizer, 64), [], cached=0)

    monkeypatch.setattr(on_policy, "sample_answers", sample_answers)
    return calls


@pytest.mark.parametrize(("samples", "temperature"), [(1, 0.0), (4, 1.0)])
def test_select_windows_hands_the_options_on_to_the_sampling_of_answers(
    samples, temperature, base, questions, asked, tmp_path
):
    """One answer is the greedy one; several are drawn at temperature 1, whose confidence is the model's own."""
    config = config_for(
        questions, base, on_policy=True, samples=samples, seed=7, rollout_backend="transformers", max_length=48,
        batch_size=3,
    )  # fmt: skip
    said = []
    prepared = select_windows(config, read_rows([str(questions)]), base, said.append, tmp_path / ANSWERS)
    (call,) = asked
    assert (call.n, call.temperature, call.seed) == (samples, temperature, 7)
    assert call.cache_dir == tmp_path / ANSWERS
    assert call.engine.max_model_len == 48
    assert call.engine._model is base.model  # not loaded a second time
    assert prepared.level == "answer"
    assert "backend" not in prepared.answers
    # a run that was cut off and goes on has the same report
    assert "cached" not in prepared.answers
    assert any("(0 of them before)" in line for line in said)


def test_select_windows_says_which_questions_are_asked_again(base, tmp_path, monkeypatch):
    """Their sampled answers differ; what counts is the question."""
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i % 9}?", "answers": ["yes"]}) + "\n" for i in range(12)))

    def sample_answers(rows, *arguments, **options):
        windows = [
            Window(
                [4, ord(row.fields["question"][0]), 9, 100 + i], [False] * 3 + [True], i, "q", "q", grade=bool(i % 2)
            )
            for i, row in enumerate(rows)
        ]
        return SampledAnswers(Windows(windows, rows=len(rows)), [], cached=0)

    monkeypatch.setattr(on_policy, "sample_answers", sample_answers)
    said = []
    config = config_for(path, base, on_policy=True, rollout_backend="transformers")
    select_windows(config, read_rows([str(path)]), base, said.append, tmp_path / ANSWERS)
    assert "3 rows repeat the question of another; each question is in one part of the split only" in said


def test_engine_of_another_backend_computes_in_the_dtype_of_the_base(base, questions, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "llmrl.rollout.backends.open_engine", lambda model, **options: opened.append((model, options)) or nullcontext()
    )
    config = config_for(questions, base, on_policy=True)
    _engine("vllm", config, base, 96)
    options = {"rollout_backend": "vllm", "dtype": str(base.model.dtype).removeprefix("torch."), "max_model_len": 96}
    assert opened == [(str(base.folder), options)]


def test_select_windows_draws_other_rows_with_another_seed(base, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"The dog number {i} ran home."}) + "\n" for i in range(60)))
    rows = read_rows([str(path)])
    said = []
    kept = {}
    for seed in (0, 5):
        config = config_for(path, base, max_tokens=200, seed=seed)
        prepared = select_windows(config, rows, base, said.append)
        kept[seed] = prepared.windows
        assert prepared.windows == limit_windows(prepared.found.windows, 200, seed)
    assert kept[0] != kept[5]
    assert prepared.level == "token"
    assert any("spread over all files; --max_tokens takes more" in line for line in said)


@pytest.mark.parametrize("finished", ["features-00000.safetensors", ANSWERS, MERGED, None])
def test_remove_unfinished_keeps_what_the_next_run_can_use(finished, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text("{}")
    if finished:
        path = partial / finished
        path.write_bytes(b"") if path.suffix else path.mkdir()
    remove_unfinished(partial)
    assert partial.exists() == (finished is not None)

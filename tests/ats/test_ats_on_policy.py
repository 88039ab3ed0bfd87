"""Sampled and graded answers: with the transformers backend on the small chat model, and with a scripted engine."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from llmrl.ats import on_policy
from llmrl.ats.data import Row
from llmrl.ats.on_policy import sample_answers
from llmrl.errors import DataError, EngineError, ModelError, OutputError, RequestError, UsageError
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.rollout.transformers_engine import TransformersEngine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# what the small model was taught to answer, and what it knows nothing about
ASKED = {
    "Say the word river.": ["The river"],
    "What is 7 plus 5?": ["12", "twelve"],
    "Say the word lamp.": ["candle"],
    "What is 2 plus 2?": ["4"],
    "Who wrote Hamlet?": ["William Shakespeare", "Shakespeare"],
    "In which year did World War I begin?": ["1914"],
}


def rows_of(asked, **more):
    return [
        Row({"question": question, "answers": answers, **more}, f"q.jsonl:{i + 1}", "q.jsonl", f"q{i}")
        for i, (question, answers) in enumerate(asked.items())
    ]


ROWS = rows_of(ASKED)
SAID = {question: f"answer {i}" for i, question in enumerate(ASKED)}

# a run that is killed when it is asked the fourth question, one answer at a time
_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_ats_on_policy as tests
tests.on_policy._UNDER_WAY = 1
from llmrl.base_model import load_tokenizer
tokenizer = load_tokenizer(tests.EXAMPLES / "tiny_lm")
def script(request):
    question = tests.question_of(tokenizer, request)
    if question == "What is 2 plus 2?":
        os.kill(os.getpid(), signal.SIGKILL)
    return tests.SAID[question]
tests.sample_answers(tests.ROWS, tests.ScriptedEngine(tokenizer, script), Path(sys.argv[1]))
"""


@pytest.fixture(scope="module", autouse=True)
def killed(tmp_path_factory):
    """A run in a process of its own; it starts first and is waited for last."""
    folder = tmp_path_factory.mktemp("killed") / "answers"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(folder), str(Path(__file__).parent)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def tiny():
    with TransformersEngine(str(EXAMPLES / "tiny_lm"), batch_size=4) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tokenizer


def question_of(tokenizer, request):
    return tokenizer.decode(request.token_ids).split("<|user|>")[-1].split("<|end|>")[0]


@pytest.fixture
def scripted(tokenizer):
    """Return `scripted(answers, **options)`: an engine that looks the question up, and counts what it was asked."""

    def make(answers, **options):
        def script(request):
            engine.asked.append(request)
            said = answers[question_of(tokenizer, request)]
            if isinstance(said, Exception):
                raise said
            return said

        engine = ScriptedEngine(tokenizer, script, **options)
        engine.asked = []
        return engine

    return make


def scored_ids(window):
    return [i for i, counts in zip(window.token_ids, window.scored, strict=True) if counts]


# --- the small model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def greedy(tiny, tmp_path_factory):
    return sample_answers(ROWS, tiny, tmp_path_factory.mktemp("greedy"))


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(EXAMPLES / "tiny_lm", dtype=torch.float32).eval()


def test_sample_answers_greedy_ids_are_those_of_generate(greedy, model, tokenizer):
    newlines = 0
    for window, question in zip(greedy.windows.windows, ASKED, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        generated = model.generate(**prompt, do_sample=False, max_new_tokens=32, pad_token_id=0)[0].tolist()
        assert window.token_ids == generated[: len(window.token_ids)]
        if len(window.token_ids) < len(generated):
            newlines += 1
            assert "\n" in tokenizer.decode(window.token_ids[-1:])
    assert newlines < len(ASKED)


def test_sample_answers_of_the_small_model_are_graded(greedy):
    grades = {question: window.grade for question, window in zip(ASKED, greedy.windows.windows, strict=True)}
    assert grades["Say the word river."] is True
    assert grades["What is 7 plus 5?"] is True
    assert grades["Say the word lamp."] is False
    assert grades["Who wrote Hamlet?"] is False
    assert [answer.correct for answer in greedy.answers] == list(grades.values())
    assert greedy.summary()["accuracy"] == sum(grades.values()) / len(grades)


def test_sample_answers_scores_the_answer_and_not_its_end(greedy, tokenizer):
    for window, answer in zip(greedy.windows.windows, greedy.answers, strict=True):
        assert tokenizer.decode(scored_ids(window)).strip() == answer.text
        assert not {7, 2} & set(scored_ids(window))  # <|end|>, <|eos|>
    first = greedy.windows.windows[0]
    assert tokenizer.decode(first.token_ids).endswith("<|assistant|>river<|end|>")
    assert first.scored[-1] is False


def test_sample_answers_logprobs_are_the_models_own(greedy, model):
    for window, answer in zip(greedy.windows.windows, greedy.answers, strict=True):
        ids = torch.tensor([window.token_ids])
        with torch.inference_mode():
            logprobs = model(ids).logits[0].log_softmax(-1)
        at = [i for i, counts in enumerate(window.scored) if counts]
        expected = [logprobs[i - 1, window.token_ids[i]].item() for i in at]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)


def test_sample_answers_several_samples_do_not_depend_on_the_order_of_rows(tmp_path, tokenizer):
    with TransformersEngine(str(EXAMPLES / "tiny_lm"), batch_size=1) as engine:
        found = sample_answers(ROWS[:3], engine, tmp_path / "a", n=3, temperature=1.0, max_tokens=6)
        turned = sample_answers(ROWS[2::-1], engine, tmp_path / "b", n=3, temperature=1.0, max_tokens=6)
        other = sample_answers(ROWS[:3], engine, tmp_path / "c", n=3, temperature=1.0, max_tokens=6, seed=1)
    texts = [[a.text for a in run.answers] for run in (found, turned, other)]
    assert [a.row for a in found.answers] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [a.sample for a in found.answers] == [0, 1, 2] * 3
    assert texts[0] == texts[1][6:] + texts[1][3:6] + texts[1][:3]
    assert texts[0] != texts[2]
    assert len(set(texts[0])) > 3
    assert [w.row for w in found.windows.windows] == [a.row for a in found.answers]


def test_sample_answers_of_a_model_without_a_chat_template(tmp_path, stories_dir):
    with TransformersEngine(str(stories_dir)) as engine:
        found = sample_answers(ROWS[:2], engine, tmp_path, max_tokens=5)
        tokenizer = engine.tokenizer
    window = found.windows.windows[1]
    prompt = tokenizer("Question: What is 7 plus 5?\nAnswer:")["input_ids"]
    assert prompt[0] == tokenizer.bos_token_id
    assert window.token_ids[: len(prompt)] == prompt
    assert sum(window.scored) <= 5
    assert not any(window.scored[: len(prompt)])


# --- grading, with a scripted engine ----------------------------------------------------------------------------------


def test_sample_answers_grades_against_every_reference(scripted, tmp_path):
    said = {
        "Say the word river.": "River!",
        "What is 7 plus 5?": "Twelve\nQuestion: and now?",
        "Say the word lamp.": "",
        "What is 2 plus 2?": "4 or 5",
        "Who wrote Hamlet?": "the shakespeare",
        "In which year did World War I begin?": "In 1914",
    }
    found = sample_answers(ROWS, scripted(said), tmp_path)
    assert [(a.row, a.text, a.correct) for a in found.answers] == [
        (0, "River!", True),
        (1, "Twelve", True),
        (3, "4 or 5", False),
        (4, "the shakespeare", True),
        (5, "In 1914", False),
    ]
    assert [w.grade for w in found.windows.windows] == [True, True, False, True, False]
    assert found.windows.excluded == {"empty_answer": 1}
    assert found.windows.rows == 6
    assert found.summary() == {
        "answers": 5,
        "accuracy": 0.6,
        "mean_tokens": pytest.approx(sum(len(a.logprobs) for a in found.answers) / 5),
        "max_tokens": max(len(a.logprobs) for a in found.answers),
        "cut_off": 0,
    }


def test_sample_answers_keeps_the_ids_the_engine_saw_and_returned(scripted, tokenizer, tmp_path):
    """Letter by letter is not how the tokenizer writes the word; what is encoded again would be other ids."""
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "Paris"]
    assert tokenizer.decode(spelled) == "Paris"
    assert tokenizer("Paris")["input_ids"] != spelled
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    said = {"Capital?": [*spelled, newline, 99], "Other?": [*spelled, 7]}
    engine = scripted(said)
    found = sample_answers(rows_of({"Capital?": ["Paris"], "Other?": ["Lyon"]}), engine, tmp_path)
    for window, request, end in zip(found.windows.windows, engine.asked, (newline, 2), strict=True):
        sampled = window.token_ids[len(request.token_ids) :]
        assert tuple(window.token_ids[: len(request.token_ids)]) == request.token_ids
        assert scored_ids(window) == spelled
        if end == newline:
            assert sampled == [*spelled, newline]
        else:
            assert sampled[:5] == spelled
    assert [w.grade for w in found.windows.windows] == [True, False]


def test_sample_answers_does_not_score_an_end_token_that_is_an_ordinary_one(scripted, tokenizer, tmp_path):
    engine = scripted({"Capital?": "Paris. It is"})
    engine.end_ids |= {tokenizer.convert_tokens_to_ids(".")}
    (window,) = sample_answers(rows_of({"Capital?": ["Paris"]}), engine, tmp_path).windows.windows
    assert tokenizer.decode(window.token_ids).endswith("Paris.")
    assert tokenizer.decode(scored_ids(window)) == "Paris"
    assert window.grade is True


def test_sample_answers_worked_solutions_have_lines_and_are_graded_by_their_number(scripted, tmp_path):
    rows = rows_of({"One?": ["3+4 = 7\n#### 7"], "Two?": ["#### 1,000"], "Three?": ["seven"]})
    engine = scripted({"One?": "4+3 makes\n7 in all", "Two?": "#### 1000\n", "Three?": "seven\neight"})
    found = sample_answers(rows, engine, tmp_path)
    assert [(a.text, a.correct) for a in found.answers] == [
        ("4+3 makes\n7 in all", True),
        ("#### 1000", True),
        ("seven", True),
    ]
    assert [request.sampling.stop for request in engine.asked] == [(), (), ("\n",)]
    assert [request.sampling.max_tokens for request in engine.asked] == [320, 320, 32]
    assert all(request.sampling.temperature == 0 for request in engine.asked)


def test_sample_answers_counts_answers_that_the_limit_cut_off(scripted, tmp_path):
    said = {"One?": "a long answer that goes on", "Two?": "b"}
    found = sample_answers(rows_of({"One?": ["a"], "Two?": ["b"]}), scripted(said), tmp_path, max_tokens=2)
    assert found.summary()["cut_off"] == 1
    assert [a.cut for a in found.answers] == [True, False]
    assert len(found.answers[0].logprobs) == 2


# --- what is left out -------------------------------------------------------------------------------------------------


def test_sample_answers_counts_what_is_left_out_by_reason(scripted, tmp_path):
    asked = {"One?": ["1"], "Two?": ["2"], "Three?": ["3"], "word " * 200: ["4"]}
    rows = [*rows_of(asked), Row({"text": "no question"}, "t.txt", "t.txt")]
    said = {"One?": "1", "Two?": "  ", "Three?": "4"}
    rows += rows_of({f"Q{i}?": ["5"] for i in range(3)})
    engine = scripted({**said, **{f"Q{i}?": "5" for i in range(3)}}, max_model_len=100)
    found = sample_answers(rows, engine, tmp_path)
    assert found.windows.excluded == {"empty_answer": 1, "too_long": 1, "no_references": 1}
    assert [w.row for w in found.windows.windows] == [0, 2, 5, 6, 7]
    assert [w.where for w in found.windows.windows[:2]] == ["q.jsonl:1", "q.jsonl:3"]


def test_sample_answers_counts_a_row_with_one_empty_answer_of_several_as_a_part(tokenizer, tmp_path):
    said = iter(["", "yes"])
    engine = ScriptedEngine(tokenizer, lambda request: next(said))
    found = sample_answers(rows_of({"One?": ["yes"]}), engine, tmp_path, n=2, temperature=1.0)
    assert found.windows.excluded == {"part_of_row_empty_answer": 1}
    assert [(a.sample, a.correct) for a in found.answers] == [(1, True)]


def test_sample_answers_refuses_before_sampling_when_most_rows_have_no_references(scripted, tmp_path):
    rows = [*ROWS[:1], *[Row({"prompt": "a", "completion": "b"}, "p.jsonl:1", "p.jsonl")] * 2]
    engine = scripted({})
    with pytest.raises(
        DataError, match=r"2 of 3 rows cannot be used \(no_references 2\).*\n--on_policy needs rows with"
    ):
        sample_answers(rows, engine, tmp_path)
    assert engine.asked == []


def test_sample_answers_refuses_a_model_that_says_nothing(scripted, tmp_path):
    with pytest.raises(
        DataError, match=r"6 of 6 rows cannot be used \(empty_answer 6\).*\n.*a model that answers them"
    ):
        sample_answers(ROWS, scripted(dict.fromkeys(ASKED, "")), tmp_path)


def test_sample_answers_refuses_multiple_choice_and_several_greedy_answers(scripted, tmp_path):
    choice = Row({"question": "?", "choices": ["a", "b"], "answer": 0}, "m.jsonl:3", "m.jsonl")
    with pytest.raises(DataError, match=r"m\.jsonl:3 is multiple choice, .*leave --on_policy out"):
        sample_answers([choice], scripted({}), tmp_path)
    with pytest.raises(UsageError, match="2 greedy answers a question: expected 1"):
        sample_answers(ROWS, scripted({}), tmp_path, n=2)
    with pytest.raises(UsageError, match="0 greedy answers"):
        sample_answers(ROWS, scripted({}), tmp_path, n=0)


# --- going on after a failure -----------------------------------------------------------------------------------------


def test_sample_answers_goes_on_where_it_stopped(scripted, tmp_path):
    whole = sample_answers(ROWS, scripted(SAID), tmp_path / "whole")
    failing = scripted({**SAID, "Who wrote Hamlet?": EngineError("it died")})
    with pytest.raises(EngineError, match=r"it died\nfinished answers are kept in .*part; the same command goes on"):
        sample_answers(ROWS, failing, tmp_path / "part")
    engine = scripted(SAID)
    done = []
    found = sample_answers(ROWS, engine, tmp_path / "part", progress=lambda *numbers: done.append(numbers))
    assert len(engine.asked) == 1
    assert found.cached == 5
    assert done == [(6, 6)]
    assert (found.windows, found.answers) == (whole.windows, whole.answers)
    again = scripted({})
    assert sample_answers(ROWS, again, tmp_path / "part").cached == 6
    assert again.asked == []


def test_sample_answers_makes_a_torn_line_again(scripted, tmp_path):
    whole = sample_answers(ROWS, scripted(SAID), tmp_path)
    (shard,) = (tmp_path / "shards").glob("*.jsonl")
    shard.write_bytes(shard.read_bytes()[:-9])
    engine = scripted(SAID)
    assert sample_answers(ROWS, engine, tmp_path).answers == whole.answers
    assert len(engine.asked) == 1


def test_sample_answers_grades_anew_without_sampling(scripted, tmp_path):
    sample_answers(ROWS, scripted(SAID), tmp_path)
    engine = scripted({})
    other = rows_of({question: [f"Answer {i}"] for i, question in enumerate(ASKED)})
    assert sample_answers(other, engine, tmp_path).summary()["accuracy"] == 1.0
    assert engine.asked == []


@pytest.mark.parametrize(
    ("rows", "options", "differs"),
    [
        (ROWS, {"seed": 1}, "seed was 0, is 1"),
        (ROWS, {"temperature": 0.5}, "temperature was 0.0, is 0.5"),
        (ROWS[:-1], {}, "rows.count was 6, is 5"),
        (ROWS[::-1], {}, "rows.hash was"),
        (ROWS, {"max_tokens": 5}, "rows.hash was"),
    ],
)
def test_sample_answers_refuses_answers_of_another_run(rows, options, differs, scripted, tmp_path):
    sample_answers(ROWS, scripted(SAID), tmp_path)
    engine = scripted(SAID)
    with pytest.raises(OutputError, match=f"holds another run: .*{differs}.*\n--overwrite discards it"):
        sample_answers(rows, engine, tmp_path, **options)
    assert engine.asked == []


def test_sample_answers_a_model_that_answers_with_nan_names_the_row(scripted, tmp_path):
    broken = scripted({**SAID, "Say the word lamp.": RequestError("not a number: weights")})
    with pytest.raises(ModelError, match=r"q\.jsonl:3: not a number: weights"):
        sample_answers(ROWS, broken, tmp_path)


def test_sample_answers_tells_rows_with_one_id_apart(scripted, tmp_path):
    rows = rows_of({"One?": ["1"], "Two?": ["2"]})
    same = [Row(row.fields, row.where, row.source, "id") for row in rows] + [Row(rows[0].fields, "x:1", "x")]
    found = sample_answers(same, scripted({"One?": "1", "Two?": "2"}), tmp_path)
    assert [a.text for a in found.answers] == ["1", "2", "1"]


def test_sample_answers_two_processes_share_the_answers(scripted, tmp_path, monkeypatch):
    whole = sample_answers(ROWS, scripted(SAID), tmp_path / "one")
    wait, ranks = threading.Barrier(2, timeout=60), threading.local()
    monkeypatch.setattr(on_policy, "world_size", lambda: 2)
    monkeypatch.setattr(on_policy, "rank", lambda: ranks.number)
    monkeypatch.setattr(on_policy, "is_main_process", lambda: ranks.number == 0)
    monkeypatch.setattr(on_policy, "barrier", wait.wait)
    engines, found = [scripted(SAID), scripted(SAID)], {}

    def process(number):
        ranks.number = number
        found[number] = sample_answers(ROWS, engines[number], tmp_path / "two")

    threads = [threading.Thread(target=process, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(engine.asked) for engine in engines] == [3, 3]
    assert found[0] == found[1]
    assert (found[0].windows, found[0].answers) == (whole.windows, whole.answers)


def test_sample_answers_goes_on_after_a_kill(killed, scripted, tmp_path):
    process, folder = killed
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    found = sample_answers(ROWS, scripted(SAID), folder)
    assert found.cached == 3
    assert found.answers == sample_answers(ROWS, scripted(SAID), tmp_path).answers

"""Answers the model samples itself, graded: windows that say how sure it was and whether it was right.

A free question (`question`, `answers`) is put to a rollout engine, the answer is compared with the references, and the window
holds the very ids the engine read and returned. Scored are the tokens that spell the answer. The end token, or the newline
that ended it, is not scored: it says that the answer is over, not what it is. Answers are kept on disk as they come, so a
run that was cut off asks only for the rest; they are graded after reading, so new references cost no sampling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.ats.answers import answer_tokens, before_end, grade, is_numeric, plain_prompt, question_text
from llmrl.ats.data import Row, Window, Windows
from llmrl.ats.windows import add_row, check_left_out
from llmrl.errors import DataError, EngineError, LlmrlError, ModelError, OutputError, RequestError, UsageError
from llmrl.rollout.chat import Conversation
from llmrl.rollout.engine import BaseEngine
from llmrl.rollout.protocols import Sample
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import Key, ShardWriter, Stored, claim_run, read_shards, scan_shards
from llmrl.training.distributed import barrier, is_main_process, rank, world_size
from llmrl.types import FinishReason, Message, SamplingConfig

SHORT_ANSWER, WORKED_SOLUTION = 32, 320  # tokens, where max_tokens is None
_UNDER_WAY = 512  # answers asked for at once: more than any engine's batch
_ADVICE = "--on_policy needs rows with 'question' and 'answers', and a model that answers them"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GradedAnswer:
    """One sampled answer; `logprobs` are those of its scored tokens under the model, untempered.

    `cut` says that the token limit ended it.
    """

    row: int
    sample: int
    text: str
    correct: bool
    logprobs: tuple[float, ...]
    cut: bool


@dataclass(frozen=True)
class SampledAnswers:
    """Windows and the answers in them, one for one; `cached` answers had been sampled by an earlier run."""

    windows: Windows
    answers: list[GradedAnswer]
    cached: int

    def summary(self) -> dict[str, float]:
        """Return how many answers there are, the share that is right, their lengths in tokens, and how many were cut off."""
        lengths = [len(answer.logprobs) for answer in self.answers]
        return {
            "answers": len(lengths),
            "accuracy": sum(answer.correct for answer in self.answers) / max(1, len(lengths)),
            "mean_tokens": sum(lengths) / max(1, len(lengths)),
            "max_tokens": max(lengths, default=0),
            "cut_off": sum(answer.cut for answer in self.answers),
        }


@dataclass(frozen=True)
class _Job:
    """One answer to sample."""

    key: Key
    row: int
    prompt: tuple[int, ...]
    sampling: SamplingConfig


def sample_answers(
    rows: Sequence[Row],
    engine: BaseEngine,
    cache_dir: Path,
    *,
    n: int = 1,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> SampledAnswers:
    """Sample and grade answers to the free questions among `rows`.

    An answer ends at the model's end token or at a newline; one to a question whose references are worked solutions
    ("#### 42") has several lines and does not end there. With several processes each samples its share, all read all.

    Args:
        rows: from `read_rows`.
        engine: a rollout engine on the model that is calibrated, without its heads.
        cache_dir: where finished answers are kept; removed by the caller.
        n: answers a question.
        temperature: 0 is greedy.
        max_tokens: longest answer; None is 32, and 320 for worked solutions.
        seed: of the run; each answer's own is a hash of it, the row's id and the sample.
        progress: called with the number of answers that are done and `n * len(rows)`.

    Returns:
        Windows in the order of rows and samples. Left out, by reason: rows of another form (`no_references`), prompts that
        fill the context (`too_long`), answers that say nothing (`empty_answer`).

    Raises:
        UsageError: several greedy samples, or n < 1.
        DataError: multiple choice, or more than half of the rows are left out.
        OutputError: `cache_dir` holds answers to other rows or of other settings.
        EngineError: the engine died; what was finished is kept.
    """
    if n < 1 or (n > 1 and temperature == 0):
        raise UsageError(f"{n} greedy answers a question: expected 1, or a temperature above 0 for several")
    jobs, left_out = _jobs(rows, engine, n, temperature, max_tokens, seed)
    check_left_out(Windows([], len(rows), Counter(left_out.values())), _ADVICE)  # before the long part
    cached = 0
    records: dict[Key, dict[str, Any]] = {}
    if jobs:
        settings = {"n": n, "temperature": temperature, "seed": seed}
        stored = _claim(cache_dir, jobs, engine, settings)
        todo = [job for job in jobs if job.key not in stored]
        cached, total = len(jobs) - len(todo), n * len(rows)
        before = total - len(todo)
        with ShardWriter(cache_dir, rank()) as writer:
            mine = todo[rank() :: world_size()]
            _sample(mine, engine, rows, writer, lambda done: progress(min(total, before + done * world_size()), total))
        barrier()
        records = read_shards(cache_dir)
    return _graded(rows, engine, jobs, left_out, records, cached)


def _jobs(
    rows: Sequence[Row], engine: BaseEngine, n: int, temperature: float, max_tokens: int | None, seed: int
) -> tuple[list[_Job], dict[int, str]]:
    """Return what to sample, and why rows are left out, by their index."""
    jobs: list[_Job] = []
    left_out: dict[int, str] = {}
    for index, (row, row_id) in enumerate(zip(rows, _row_ids(rows), strict=True)):
        if "choices" in row.fields:
            raise DataError(
                f"{row.where} is multiple choice, whose answer is read off the letters: leave --on_policy out, or give "
                "rows with 'question' and 'answers'"
            )
        if "answers" not in row.fields:
            left_out[index] = "no_references"
            continue
        prompt = _prompt_ids(row, engine.tokenizer)
        if len(prompt) >= engine.max_model_len:
            left_out[index] = "too_long"
            continue
        worked = is_numeric(row.fields["answers"])
        longest = max_tokens if max_tokens is not None else WORKED_SOLUTION if worked else SHORT_ANSWER
        for sample in range(n):
            sampling = SamplingConfig(
                temperature=temperature,
                max_tokens=longest,
                stop=() if worked else ("\n",),
                seed=derive_seed(seed, row_id, sample, 0),
            )
            jobs.append(_Job((row_id, sample), index, prompt, sampling))
    return jobs, left_out


def _row_ids(rows: Sequence[Row]) -> list[str]:
    """Return each row's own id, or its number where it has none or another file used it before."""
    taken: set[str] = set()
    ids = []
    for index, row in enumerate(rows):
        name = row.id or f"row {index}"
        ids.append(f"{name} (row {index})" if name in taken else name)
        taken.add(ids[-1])
    return ids


def _prompt_ids(row: Row, tokenizer: Any) -> tuple[int, ...]:
    if not getattr(tokenizer, "chat_template", None):
        return tuple(tokenizer(plain_prompt(row.fields), verbose=False)["input_ids"])
    talk = Conversation(tokenizer)
    try:
        talk.add(Message("user", question_text(row.fields)))
        return talk.prompt()
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error


def _claim(cache_dir: Path, jobs: list[_Job], engine: BaseEngine, settings: dict[str, Any]) -> dict[Key, Stored]:
    """Make `cache_dir` the folder of these answers, in all processes; return what an earlier run has left in it."""
    described = [
        {"id": job.key[0], "prompt": job.prompt, "stop": job.sampling.stop, "max_tokens": job.sampling.max_tokens}
        for job in jobs
        if job.key[1] == 0
    ]
    identity = {
        "model": engine.version.fingerprint,
        "dtype": engine.dtype,
        "engine": type(engine).__name__,
        "end_ids": sorted(engine.end_ids),
        "max_model_len": engine.max_model_len,
    }
    for turn in (True, False):  # the first process makes the folder, the others look at it
        if is_main_process() is turn:
            try:
                claim_run(cache_dir, described, settings["n"], **identity, **settings)
            except OutputError as error:
                raise OutputError(f"{error}\n--overwrite discards it; another --output_dir keeps it") from None
        barrier()
    stored = scan_shards(cache_dir)
    barrier()  # nobody writes before all have read, so all share out the same answers
    return stored


def _sample(
    jobs: list[_Job], engine: BaseEngine, rows: Sequence[Row], writer: ShardWriter, done: Callable[[int], None]
) -> None:
    """Keep up to `_UNDER_WAY` answers in the engine's hands and write each as it comes; after a failure, those that came."""
    count = 0
    for start in range(0, len(jobs), _UNDER_WAY):
        futures: dict[Future[list[Sample]], _Job] = {}
        failures: list[LlmrlError] = []
        try:
            futures.update((_submit(engine, job), job) for job in jobs[start : start + _UNDER_WAY])
            for future in as_completed(futures):
                job = futures[future]
                try:
                    (sample,) = future.result()
                except CancelledError:
                    continue
                except (RequestError, EngineError) as error:
                    failures.append(_explained(error, rows[job.row], writer))
                    _cancel(futures)
                else:
                    writer.write(job.key, _record(sample), position=job.row)
                    count += 1
                    done(count)
        finally:
            _cancel(futures)
        if failures:
            raise failures[0]


def _submit(engine: BaseEngine, job: _Job) -> Future[list[Sample]]:
    try:
        return engine.submit(job.prompt, job.sampling)
    except LlmrlError as error:
        refused: Future[list[Sample]] = Future()
        refused.set_exception(error)
        return refused


def _cancel(futures: Iterable[Future[Any]]) -> None:
    for future in futures:
        future.cancel()


def _explained(error: LlmrlError, row: Row, writer: ShardWriter) -> LlmrlError:
    """Return the error to raise. A prompt that fits can only be refused for what the model makes of it."""
    if isinstance(error, RequestError):
        return ModelError(f"{row.where}: {error}")
    return EngineError(f"{error}\nfinished answers are kept in {writer.folder.parent}; the same command goes on")


def _record(sample: Sample) -> dict[str, Any]:
    return {
        "token_ids": list(sample.token_ids),
        "logprobs": list(sample.logprobs),
        "text": sample.text,
        "finish_reason": str(sample.finish_reason),
    }


def _graded(
    rows: Sequence[Row],
    engine: BaseEngine,
    jobs: list[_Job],
    left_out: dict[int, str],
    records: dict[Key, dict[str, Any]],
    cached: int,
) -> SampledAnswers:
    per_row: dict[int, list[_Job]] = {}
    for job in jobs:
        per_row.setdefault(job.row, []).append(job)
    result, answers = Windows([], rows=len(rows)), []
    for index, row in enumerate(rows):
        kept: list[Window] = []
        for job in per_row.get(index, []):
            record = records[job.key]
            count = _scored_tokens(engine, record)
            if count:
                correct = grade(record["text"], row.fields["answers"])
                logprobs = tuple(record["logprobs"][:count])
                cut = record["finish_reason"] == FinishReason.LENGTH
                answers.append(GradedAnswer(index, job.key[1], record["text"].strip(), correct, logprobs, cut))
                kept.append(_window(row, index, job.prompt, record["token_ids"], count, correct))
        reasons = {left_out[index]} if index in left_out else set()
        if len(kept) < len(per_row.get(index, [])):
            reasons.add("empty_answer")
        add_row(result, kept, reasons)
    check_left_out(result, _ADVICE)
    return SampledAnswers(result, answers, cached)


def _scored_tokens(engine: BaseEngine, record: dict[str, Any]) -> int:
    """Return how many of the sampled tokens spell the answer."""
    ids = record["token_ids"]
    return answer_tokens(engine.tokenizer, ids[: before_end(ids, engine.end_ids)], record["text"])


def _window(row: Row, index: int, prompt: tuple[int, ...], sampled: list[int], count: int, correct: bool) -> Window:
    scored = [False] * len(prompt) + [True] * count + [False] * (len(sampled) - count)
    return Window([*prompt, *sampled], scored, index, row.source, row.where, grade=correct)

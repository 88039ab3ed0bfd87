"""`llmrl rollout`: prompts from a file, samples into a file, resumable at any row."""

from __future__ import annotations

import errno
import json
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from llmrl.errors import (
    EXIT_DONE,
    EXIT_FAILED_ROWS,
    DataError,
    EngineError,
    Interrupted,
    LlmrlError,
    OutputError,
    UnansweredError,
    UsageError,
)
from llmrl.heads import fingerprint_template, fingerprint_tokenizer
from llmrl.rollout.adapters import check_adapter
from llmrl.rollout.backends import choose_backend, open_engine
from llmrl.rollout.engine import BaseEngine, gather
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.options import RolloutConfig
from llmrl.rollout.prompts import encode_row, read_prompts
from llmrl.rollout.protocols import Sample
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import Key, ShardWriter, Stored, claim_run, export_records, scan_shards
from llmrl.training.distributed import (
    barrier,
    is_main_process,
    join_processes,
    rank,
    sum_over_processes,
    world_size,
)
from llmrl.types import FinishReason, SamplingConfig

_UNDER_WAY = 1024  # rows sent at once: more than any engine's batch, less than memory
_UNANSWERED = 3  # rows in a row that no server answers: then it is not the rows
_PATIENCE = timedelta(days=30)  # of one process for the rows of another

_Answer = tuple[int, tuple[int, ...], list[Sample] | BaseException]


@dataclass
class _Tally:
    """What the summary says of the rows that this call sampled; `before` counts those that were there."""

    before: int = 0
    rows: int = 0
    failed: int = 0
    samples: int = 0
    tokens: int = 0
    finish: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, record: Mapping[str, Any]) -> None:
        self.rows += 1
        self.failed += "error" in record
        for sample in record["samples"]:
            self.samples += 1
            self.tokens += len(sample["token_ids"])
            self.finish[sample["finish_reason"]] += 1

    def add_up(self) -> None:
        """Add what the other processes counted."""
        reasons = [str(reason) for reason in FinishReason]
        counts = [self.rows, self.failed, self.samples, self.tokens, *(self.finish[reason] for reason in reasons)]
        self.rows, self.failed, self.samples, self.tokens, *ends = sum_over_processes(counts)
        self.finish = Counter({reason: count for reason, count in zip(reasons, ends, strict=True) if count})

    def sentence(self) -> str:
        speed = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.seconds > 0 and self.tokens else ""
        ends = ", ".join(f"{name} {count}" for name, count in sorted(self.finish.items()))
        failed = f", {self.failed} of them failed" if self.failed else ""
        before = f" and {self.before} done before" if self.before else ""
        work = f"{self.samples} samples, {self.tokens:,} tokens in {self.seconds:.1f} s{speed}"
        return f"{self.rows} rows{failed}{before}: {work}{f' ({ends})' if ends else ''}"


def rollout(config: RolloutConfig) -> int:
    """Sample answers to every prompt of a file; return the exit code: 3 when rows failed, else 0.

    Several processes of a launcher share the rows; the first one writes the file.
    """
    join_processes(patience=_PATIENCE)
    rows = read_prompts(str(config.prompts))
    output = Path(str(config.output)).expanduser()
    folder = output.with_name(f".{output.name}.run")
    again = "the same command without --overwrite" if config.overwrite else "the same command"
    try:
        return _rollout(config, rows, output, folder, again)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {_kept(folder, rows)} and kept; {again} goes on with the rest") from None
    except UnansweredError as error:
        raise EngineError(f"{error}\n{_kept(folder, rows)}") from error
    except EngineError as error:
        raise EngineError(f"{error}\n{_kept(folder, rows)} and kept; {again} goes on with the rest") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OutputError(
            f"disk full while writing {error.filename or folder}: free some space; {again} goes on\n{_kept(folder, rows)}"
        ) from error


def _rollout(config: RolloutConfig, rows: list[dict[str, Any]], output: Path, folder: Path, again: str) -> int:
    _check_output(config, output, folder)
    facts = read_facts(str(config.model))
    sampling = _sampling(config)
    backend, why = config.rollout_backend, "as asked"
    if backend == "auto":
        backend, why = choose_backend(facts, config.server_url)
    if backend == "transformers" and sampling.json_schema is not None:
        raise UsageError(
            "--json_schema goes with --rollout_backend vllm or server: transformers cannot constrain answers"
        )
    adapter = check_adapter(config.adapter, facts.folder).fingerprint if config.adapter else None
    stored = _claim(
        folder,
        rows,
        config,
        model=facts.fingerprint,
        tokenizer=fingerprint_tokenizer(facts.tokenizer),
        template=fingerprint_template(facts.tokenizer),
        backend=backend,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        adapter=adapter,
        seed=config.seed,
        n=config.n,
        sampling=sampling.to_json(),
    )
    left = [i for i, row in enumerate(rows) if (row["id"], 0) not in stored or stored[row["id"], 0].failed]
    todo = left[rank() :: world_size()]
    tally = _Tally(before=len(rows) - len(left))
    if left:
        before = f"; {tally.before} of {len(rows)} rows were done before" if tally.before else ""
        _say(config, f"backend: {backend} ({why}){before}")
    if todo:
        # the writer first: that another process is at work on this output is said before a model is loaded
        with ShardWriter(folder, rank()) as writer, _open(config, backend) as engine:
            attempts = {key: one.attempt + 1 for key, one in stored.items()}
            _sample_rows(engine, rows, todo, writer, attempts, sampling, config, tally)
    tally.add_up()  # and so every process has written its last row
    if not is_main_process():
        return EXIT_DONE
    export_records(folder, output)
    failed = sum(one.failed for one in scan_shards(folder).values())
    _say(config, f"{tally.sentence()}\nwrote {output}")
    if failed:
        raise _FailedRows(
            f"{failed} of {len(rows)} rows failed, each with its 'error' in {output}; {again} tries them again"
        )
    shutil.rmtree(folder, ignore_errors=True)
    return EXIT_DONE


def _open(config: RolloutConfig, backend: str) -> BaseEngine:
    return open_engine(
        str(config.model),
        rollout_backend=backend,
        server_url=config.server_url,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        adapter=config.adapter,
        batch_size=config.batch_size,
    )


def _claim(folder: Path, rows: list[dict[str, Any]], config: RolloutConfig, **identity: Any) -> dict[Key, Stored]:
    """Make the folder this run's, in all processes; return what an earlier attempt has left in it."""
    if is_main_process():
        if config.overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            claim_run(folder, rows, 1, **identity)
        except OutputError as error:
            raise OutputError(f"{error}\n--overwrite starts anew") from None
    barrier()
    if not is_main_process():
        claim_run(folder, rows, 1, **identity)
    stored = scan_shards(folder)
    barrier()  # nobody writes before all have read, so all share out the same rows
    return stored


class _FailedRows(LlmrlError):
    """The run is finished and some rows are errors."""

    exit_code = EXIT_FAILED_ROWS


def _sampling(config: RolloutConfig) -> SamplingConfig:
    sampling = config.sampling()
    if config.json_schema is None:
        return sampling
    path = Path(config.json_schema).expanduser()
    if not path.is_file():
        raise UsageError(f"not found: {path} (--json_schema)")
    try:
        return replace(sampling, json_schema=json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _check_output(config: RolloutConfig, output: Path, folder: Path) -> None:
    if not output.parent.is_dir():
        raise UsageError(f"not found: {output.parent} (the folder of --output)")
    if output.is_dir():
        raise OutputError(f"--output {output} is a folder; name a file")
    if output.exists() and not output.is_file():
        raise OutputError(f"--output {output} is no regular file; name one")
    if output.exists() and output.samefile(Path(str(config.prompts)).expanduser()):
        raise UsageError(f"--output {output} is the file of --prompts; name another one")
    if not os.access(output.parent, os.W_OK):
        raise OutputError(f"cannot write to {output.parent}: choose another --output")
    # with its folder it is a run that goes on: rows failed, or it began with --overwrite
    if output.exists() and not folder.exists() and not config.overwrite:
        raise OutputError(f"--output {output} exists; --overwrite replaces it")


def _sample_rows(
    engine: BaseEngine,
    rows: list[dict[str, Any]],
    todo: list[int],
    writer: ShardWriter,
    attempts: Mapping[Key, int],
    sampling: SamplingConfig,
    config: RolloutConfig,
    tally: _Tally,
) -> None:
    """Send every open row and keep each one when it is whole; callbacks of the engine only put it into a queue."""
    from tqdm import tqdm

    finished: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
    room = threading.Semaphore(_UNDER_WAY)
    stop = threading.Event()

    def send_all() -> None:
        for i in todo:
            room.acquire()
            if stop.is_set():
                return
            _send(engine, i, rows[i], sampling, config, finished)

    def keep(i: int, prompt: tuple[int, ...], answer: list[Sample] | BaseException) -> None:
        key = (rows[i]["id"], 0)
        record = _record(rows[i]["id"], prompt, answer)
        writer.write(key, record, position=i, failed="error" in record, attempt=attempts.get(key, 0))
        tally.add(record)

    started = time.monotonic()
    unanswered = 0
    bar = tqdm(total=len(todo), desc="rollout", unit="row", disable=not _talks(config), dynamic_ncols=True)
    with bar:
        threading.Thread(target=send_all, daemon=True).start()
        try:
            for _ in todo:
                one = finished.get()
                room.release()
                unanswered = unanswered + 1 if isinstance(one[2], UnansweredError) else 0
                if unanswered == _UNANSWERED:  # no single row is the cause
                    raise one[2]  # type: ignore[misc]
                keep(*one)
                tally.seconds = time.monotonic() - started
                bar.set_postfix_str(f"{tally.tokens / max(tally.seconds, 1e-9):,.0f} tokens/s", refresh=False)
                bar.update()
        except EngineError:
            with suppress(queue.Empty):  # others may have been finished when it died
                while True:
                    one = finished.get_nowait()
                    if not isinstance(one[2], EngineError):
                        keep(*one)
            raise
        finally:
            stop.set()
            room.release()


def _send(
    engine: BaseEngine, i: int, row: dict[str, Any], sampling: SamplingConfig, config: RolloutConfig, finished: Any
) -> None:
    prompt: tuple[int, ...] = ()
    try:
        prompt = encode_row(row, engine.tokenizer)
        seeds = [derive_seed(config.seed, row["id"], sample, 0) for sample in range(config.n)]
        futures = [engine.submit(prompt, replace(sampling, seed=seed)) for seed in seeds]
    except LlmrlError as error:
        finished.put((i, prompt, error))
        return
    except Exception as error:  # of a tokenizer or a template
        finished.put((i, prompt, DataError(f"{type(error).__name__}: {error}")))
        return

    def put(done: Future[list[list[Sample]]]) -> None:
        error = done.exception()
        finished.put((i, prompt, error if error is not None else [one[0] for one in done.result()]))

    gather(futures).add_done_callback(put)


def _record(row_id: str, prompt: tuple[int, ...], answer: list[Sample] | BaseException) -> dict[str, Any]:
    """Return the row of the output; a dead engine is no row's error.

    Raises:
        EngineError: the engine died.
    """
    if isinstance(answer, EngineError) and not isinstance(answer, UnansweredError):
        raise answer
    if isinstance(answer, BaseException):
        return {"id": row_id, "error": f"row {row_id}: {answer}", "prompt_token_ids": list(prompt), "samples": []}
    return {"id": row_id, "prompt_token_ids": list(prompt), "samples": [_sample(one) for one in answer]}


def _sample(sample: Sample) -> dict[str, Any]:
    row = sample.to_json()
    if not sample.top_logprobs:
        del row["top_logprobs"]
    return row


def _kept(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Count on the disk, which knows the rows of all processes."""
    done = sum(not one.failed for one in scan_shards(folder).values())
    return f"{done} of {len(rows)} rows are finished"


def _talks(config: RolloutConfig) -> bool:
    return is_main_process() and not config.quiet


def _say(config: RolloutConfig, text: str) -> None:
    if _talks(config):
        print(text, flush=True)

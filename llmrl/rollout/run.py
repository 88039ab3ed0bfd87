"""`llmrl rollout`: prompts from a file, samples into a file, resumable at any row."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
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
    UsageError,
)
from llmrl.rollout.adapters import check_adapter
from llmrl.rollout.backends import choose_backend, open_engine
from llmrl.rollout.engine import BaseEngine, gather
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.options import RolloutConfig
from llmrl.rollout.prompts import encode_row, read_prompts
from llmrl.rollout.protocols import Sample
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import ShardWriter, claim_run, export_records, scan_shards
from llmrl.types import SamplingConfig

_UNDER_WAY = 1024  # rows sent at once: more than any engine's batch, less than memory


@dataclass
class _Tally:
    """What the summary says."""

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

    def sentence(self) -> str:
        speed = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.seconds > 0 and self.tokens else ""
        ends = ", ".join(f"{name} {count}" for name, count in sorted(self.finish.items()))
        failed = f", {self.failed} of them failed" if self.failed else ""
        work = f"{self.samples} samples, {self.tokens:,} tokens in {self.seconds:.1f} s{speed}"
        return f"{self.rows} rows{failed}: {work} ({ends})"


def rollout(config: RolloutConfig) -> int:
    """Sample answers to every prompt of a file; return the exit code: 3 when rows failed, else 0."""
    rows = read_prompts(str(config.prompts))
    output = Path(str(config.output)).expanduser()
    folder = output.with_name(f".{output.name}.run")
    _check_output(output, folder, overwrite=config.overwrite)
    facts = read_facts(str(config.model))
    sampling = _sampling(config)
    backend, why = config.rollout_backend, "as asked"
    if backend == "auto":
        backend, why = choose_backend(facts, config.server_url)
    claim_run(
        folder,
        rows,
        1,
        model=facts.fingerprint,
        backend=backend,
        dtype=config.dtype,
        adapter=check_adapter(config.adapter, facts.folder).fingerprint if config.adapter else None,
        seed=config.seed,
        n=config.n,
        sampling=sampling.to_json(),
    )
    todo = _todo(folder, rows)
    done = len(rows) - len(todo)
    tally = _Tally()
    if todo:
        _say(config, f"backend: {backend} ({why}){f'; {done} of {len(rows)} rows were done before' if done else ''}")
        with open_engine(
            str(config.model),
            rollout_backend=backend,
            server_url=config.server_url,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            adapter=config.adapter,
            batch_size=config.batch_size,
        ) as engine:
            _sample_rows(engine, rows, todo, folder, sampling, config, tally)
    export_records(folder, output)
    failed = sum(stored.failed for stored in scan_shards(folder).values())
    _say(config, f"{tally.sentence()}\nwrote {output}")
    if failed:
        raise _FailedRows(
            f"{failed} of {len(rows)} rows failed, each with its 'error' in {output}; the same command tries them again"
        )
    shutil.rmtree(folder, ignore_errors=True)
    return EXIT_DONE


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


def _check_output(output: Path, folder: Path, *, overwrite: bool) -> None:
    if not output.parent.is_dir():
        raise UsageError(f"not found: {output.parent} (the folder of --output)")
    if output.is_dir():
        raise OutputError(f"--output {output} is a folder; name a file")
    if not os.access(output.parent, os.W_OK):
        raise OutputError(f"cannot write to {output.parent}: choose another --output")
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
        output.unlink(missing_ok=True)
    elif output.exists() and not folder.exists():  # with its folder it is a run with failed rows, to be tried again
        raise OutputError(f"--output {output} exists; --overwrite replaces it")


def _todo(folder: Path, rows: list[dict[str, Any]]) -> list[int]:
    stored = scan_shards(folder)
    return [i for i, row in enumerate(rows) if (row["id"], 0) not in stored or stored[row["id"], 0].failed]


def _sample_rows(
    engine: BaseEngine,
    rows: list[dict[str, Any]],
    todo: list[int],
    folder: Path,
    sampling: SamplingConfig,
    config: RolloutConfig,
    tally: _Tally,
) -> None:
    """Send every open row and keep each one when it is whole; callbacks of the engine only put it into a queue."""
    from tqdm import tqdm

    finished: queue.SimpleQueue[tuple[int, tuple[int, ...], list[Sample] | BaseException]] = queue.SimpleQueue()
    attempts = {key: stored.attempt + 1 for key, stored in scan_shards(folder).items()}
    room = threading.Semaphore(_UNDER_WAY)
    stop = threading.Event()

    def send_all() -> None:
        for i in todo:
            room.acquire()
            if stop.is_set():
                return
            _send(engine, i, rows[i], sampling, config, finished)

    started = time.monotonic()
    sender = threading.Thread(target=send_all, daemon=True)
    bar = tqdm(
        total=len(rows),
        initial=len(rows) - len(todo),
        desc="rollout",
        unit="row",
        disable=config.quiet,
        dynamic_ncols=True,
    )
    with ShardWriter(folder) as writer, bar:
        sender.start()
        try:
            for _ in todo:
                i, prompt, answer = finished.get()
                room.release()
                record = _record(rows[i]["id"], prompt, answer)
                key = (rows[i]["id"], 0)
                writer.write(key, record, position=i, failed="error" in record, attempt=attempts.get(key, 0))
                tally.add(record)
                tally.seconds = time.monotonic() - started
                bar.set_postfix_str(f"{tally.tokens / max(tally.seconds, 1e-9):,.0f} tokens/s", refresh=False)
                bar.update()
        except EngineError as error:
            raise EngineError(f"{error}\n{_kept(len(rows), todo, tally)}") from error
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted: {_kept(len(rows), todo, tally)}") from None
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
    if isinstance(answer, EngineError):
        raise answer
    if isinstance(answer, BaseException):
        return {"id": row_id, "error": f"row {row_id}: {answer}", "prompt_token_ids": list(prompt), "samples": []}
    return {"id": row_id, "prompt_token_ids": list(prompt), "samples": [_sample(one) for one in answer]}


def _sample(sample: Sample) -> dict[str, Any]:
    row = sample.to_json()
    if not sample.top_logprobs:
        del row["top_logprobs"]
    return row


def _kept(total: int, todo: list[int], tally: _Tally) -> str:
    done = total - len(todo) + tally.rows
    return f"{done} of {total} rows are finished and kept; the same command goes on with the rest"


def _say(config: RolloutConfig, text: str) -> None:
    if not config.quiet:
        print(text, flush=True)

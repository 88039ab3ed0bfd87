"""`llmrl rollout`: prompts from a file, samples into a file, resumable at any row.

Several processes share the rows: `torchrun --nproc_per_node 2 -m -- llmrl.cli rollout ...`, where the `--` keeps torchrun
from reading `--n` as one of its own options.
"""

from __future__ import annotations

import errno
import json
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext, suppress
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
from llmrl.fingerprints import fingerprint_template, fingerprint_tokenizer
from llmrl.rollout.adapters import check_adapter
from llmrl.rollout.backends import choose_backend, open_engine
from llmrl.rollout.engine import BaseEngine, gather
from llmrl.rollout.failures import FailureCount
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.options import RolloutConfig
from llmrl.rollout.prompts import encode_row, read_prompts
from llmrl.rollout.protocols import Sample
from llmrl.rollout.run_folder import check_run_folder, lock_run, remove_run
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import Key, ShardWriter, Stored, claim_run, describe_run, export_records, scan_shards
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


@dataclass
class _Place:
    """Where a run writes. What lies in `folder` is this run's once it has `begun`: --overwrite begins late."""

    output: Path
    folder: Path
    rows: int
    overwrite: bool
    begun: bool

    @property
    def again(self) -> str:
        return "the same command without --overwrite" if self.overwrite and self.begun else "the same command"

    def kept(self) -> str:
        """Count on the disk, which knows the rows of all processes."""
        if not self.begun:
            return "nothing is replaced yet"
        done = sum(not one.failed for one in scan_shards(self.folder).values())
        return f"{done} of {self.rows} rows are finished"

    def goes_on(self) -> str:
        if not self.begun:
            return f"{self.kept()}; {self.again} starts anew"
        return f"{self.kept()} and kept; {self.again} goes on with the rest"


def rollout(config: RolloutConfig) -> int:
    """Sample answers to every prompt of a file; return the exit code: 3 when rows failed, else 0.

    Several processes of a launcher share the rows; the first one writes the file.
    """
    join_processes(patience=_PATIENCE)
    rows = read_prompts(str(config.prompts))
    output = Path(str(config.output)).expanduser()
    folder = output.with_name(f".{output.name}.run")
    place = _Place(output, folder, len(rows), config.overwrite, begun=not config.overwrite)
    try:
        _check_output(config, place)
        with lock_run(folder) if is_main_process() else nullcontext():
            return _rollout(config, rows, place)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {place.goes_on()}") from None
    except EngineError as error:
        raise EngineError(f"{error}\n{place.goes_on()}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OutputError(
            f"disk full while writing {error.filename or folder}: free some space; {place.again} goes on\n{place.kept()}"
        ) from error


def _rollout(config: RolloutConfig, rows: list[dict[str, Any]], place: _Place) -> int:
    output, folder = place.output, place.folder
    if is_main_process():
        check_run_folder(folder)
    # with its folder it is a run that goes on: rows failed, or it began with --overwrite
    if output.exists() and not folder.exists() and not config.overwrite:
        raise OutputError(f"--output {output} exists; --overwrite replaces it")
    facts = read_facts(str(config.model))
    sampling = _sampling(config)
    backend, why = config.rollout_backend, "as asked"
    if backend == "auto":
        backend, why = choose_backend(facts, config.server_url)
    if backend == "transformers" and sampling.json_schema is not None:
        raise UsageError(
            "--json_schema goes with --rollout_backend vllm or server: transformers cannot constrain answers"
        )
    identity = {
        "model": facts.fingerprint,
        "tokenizer": fingerprint_tokenizer(facts.tokenizer),
        "template": fingerprint_template(facts.tokenizer),
        "backend": backend,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "adapter": check_adapter(config.adapter, facts.folder).fingerprint if config.adapter else None,
        "seed": config.seed,
        "n": config.n,
        "sampling": sampling.to_json(),
    }
    stored: dict[Key, Stored] = {}
    if config.overwrite:
        describe_run(rows, 1, **identity)  # rows that cannot be a run's must not cost the old work
    else:
        stored = _claim(folder, rows, identity)
    left = [i for i, row in enumerate(rows) if (row["id"], 0) not in stored or stored[row["id"], 0].failed]
    todo = left[rank() :: world_size()]
    tally = _Tally(before=len(rows) - len(left))
    if left:
        before = f"; {tally.before} of {len(rows)} rows were done before" if tally.before else ""
        _say(config, f"backend: {backend} ({why}){before}")
    with ExitStack() as stack:
        engine = stack.enter_context(_open(config, backend)) if todo else None
        if config.overwrite:  # only now: an engine that does not open must not cost the old work
            barrier()
            place.begun = True
            if is_main_process():
                remove_run(folder)
            _claim(folder, rows, identity)
        if engine is not None:
            writer = stack.enter_context(ShardWriter(folder, rank()))
            _sample_rows(engine, rows, todo, writer, stored, sampling, config, tally)
    tally.add_up()  # and so every process has written its last row
    if not is_main_process():
        return EXIT_DONE
    export_records(folder, output)
    failed = sum(one.failed for one in scan_shards(folder).values())
    _say(config, f"{tally.sentence()}\nwrote {output}")
    if failed:
        raise _FailedRows(
            f"{failed} of {len(rows)} rows failed, each with its 'error' in {output}; {place.again} tries them again"
        )
    remove_run(folder)
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


def _claim(folder: Path, rows: list[dict[str, Any]], identity: Mapping[str, Any]) -> dict[Key, Stored]:
    """Make the folder this run's, in all processes; return what an earlier attempt has left in it."""
    if is_main_process():
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


def _check_output(config: RolloutConfig, place: _Place) -> None:
    output = place.output
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


def _sample_rows(
    engine: BaseEngine,
    rows: list[dict[str, Any]],
    todo: list[int],
    writer: ShardWriter,
    stored: Mapping[Key, Stored],
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
        attempt = stored[key].attempt + 1 if key in stored else 0
        try:
            record = _record(key[0], prompt, answer)
            writer.write(key, record, position=i, failed="error" in record, attempt=attempt)
        except (DataError, TypeError, ValueError) as error:  # what JSON cannot hold
            record = _record(key[0], prompt, error)
            writer.write(key, record, position=i, failed=True, attempt=attempt)
        tally.add(record)

    started = time.monotonic()
    failures = FailureCount(row_id for (row_id, _), one in stored.items() if one.failed)
    hand: _Answer | None = None
    bar = tqdm(total=len(todo), desc="rollout", unit="row", disable=not _talks(config), dynamic_ncols=True)
    with bar:
        threading.Thread(target=send_all, daemon=True).start()
        try:
            for _ in todo:
                hand, written = None, writer.written
                hand = finished.get()
                room.release()
                keep(*hand)
                failures.add(rows[hand[0]]["id"], hand[2] if isinstance(hand[2], BaseException) else None)
                tally.seconds = time.monotonic() - started
                bar.set_postfix_str(f"{tally.tokens / max(tally.seconds, 1e-9):,.0f} tokens/s", refresh=False)
                bar.update()
        except (EngineError, KeyboardInterrupt):
            if hand is not None and writer.written == written:
                finished.put(hand)
            with suppress(queue.Empty):  # others may have been finished when it was stopped
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
    except BaseException as error:  # of a tokenizer or a template; a panic of the tokenizers library is no Exception
        finished.put((i, prompt, DataError(f"{type(error).__name__}: {error}")))
        return

    def put(done: Future[list[list[Sample]]]) -> None:
        try:
            answer: list[Sample] | BaseException = done.exception() or [one[0] for one in done.result()]
        except BaseException as error:  # withdrawn, or an engine's empty answer
            answer = EngineError(f"the engine gave no answer ({type(error).__name__})")
        finished.put((i, prompt, answer))

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


def _talks(config: RolloutConfig) -> bool:
    return is_main_process() and not config.quiet


def _say(config: RolloutConfig, text: str) -> None:
    if _talks(config):
        print(text, flush=True)

"""The `vllm` backend: vLLM in this process or a child of it, with continuous batching, LoRA and new weights.

One thread owns vLLM's engine: it takes requests from an inbox whenever it comes by, so that requests of many callers
share batches and none waits for another. An update is a command in the same inbox: what was sent before it is finished
with the old weights, what is sent after it waits.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.errors import EngineError, LlmrlError, ModelError, RequestError, SyncError
from llmrl.rollout.adapters import check_adapter
from llmrl.rollout.engine import BaseEngine, Request, cut_answer, first_line, settle
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.protocols import Sample
from llmrl.rollout.transfer import TransferFolder
from llmrl.rollout.vllm_start import settings_for, start_vllm, stop_vllm, usable_build
from llmrl.rollout.weight_files import WEIGHTS_TOUCHED, write_weights
from llmrl.training.distributed import world_size
from llmrl.types import FinishReason, PolicyVersion

if TYPE_CHECKING:
    import torch

_WATCH_SECONDS = 0.5
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}


@dataclass
class _Job:
    """A request under way, and what turns vLLM's output into its answer."""

    future: Future[Any]
    prompt: list[int]
    params: Any
    base: bool
    read: Callable[[Any], Any]


@dataclass
class _Update:
    """New weights on their way, and what puts them in place."""

    future: Future[PolicyVersion]
    load: Callable[[], PolicyVersion]


class VllmEngine(BaseEngine):
    """A model in vLLM.

    Args:
        model: A folder or a hub name.
        dtype: "auto" (float32 on a CPU, else the checkpoint's), "float32", "bfloat16" or "float16".
        max_model_len: A shorter context than the model's own.
        max_lora_rank: Highest rank of an adapter to come; 0 takes none.
        adapter: Folder of a PEFT adapter to start with.
        own_process: Run vLLM's core in a child process; None does so on a GPU and under a launcher of several processes.
            On a CPU it doubles the time to start.
        kv_cache_memory_bytes: Size of the KV cache; None leaves it to vLLM on a GPU and takes 1 GiB on a CPU,
            or more where one whole context needs it.
        transfer_dir: Where new weights pass through; None takes a private folder in memory (/dev/shm) where it fits.
        options: Further arguments of `vllm.LLM`, e.g. tensor_parallel_size or gpu_memory_utilization.

    Raises:
        VersionError: vLLM is not installed, or outside the versions llmrl was run with.
        EngineError: vLLM does not start; the message is its own.
    """

    supports_json_schema = True

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_lora_rank: int = 0,
        adapter: Path | str | None = None,
        own_process: bool | None = None,
        kv_cache_memory_bytes: int | None = None,
        transfer_dir: Path | str | None = None,
        **options: Any,
    ) -> None:
        build = usable_build()
        facts = read_facts(model, max_model_len=max_model_len)
        super().__init__(
            facts.tokenizer, max_model_len=facts.max_model_len, vocab_size=facts.vocab_size, end_ids=facts.end_ids
        )
        rank = check_adapter(adapter, facts.folder).rank if adapter else 0
        settings = settings_for(facts, build, dtype, max(max_lora_rank, rank), kv_cache_memory_bytes) | options
        # several processes: vLLM in this one would take the trainer's process group for its own
        apart = build != "cpu" or world_size() > 1
        self._own_process = apart if own_process is None else own_process
        self._llm = start_vllm(settings, own_process=self._own_process)
        self.dtype = str(self._llm.llm_engine.model_config.dtype).removeprefix("torch.")
        self.max_lora_rank = settings.get("max_lora_rank", 0)
        self._version = self._base_version = PolicyVersion(0, facts.fingerprint)
        self._label = self._llm.llm_engine.get_weight_version()
        self._folder = facts.folder
        self._transfer = TransferFolder(transfer_dir)
        self._lora: Any = None
        self._inbox: queue.SimpleQueue[_Job | _Update | None] = queue.SimpleQueue()
        self._closing = False
        self._jobs: dict[str, _Job] = {}
        self._number = 0
        self._broken: EngineError | None = None
        self._thread = threading.Thread(target=self._drive, name="llmrl-vllm", daemon=True)
        self._thread.start()
        if self._own_process:
            threading.Thread(target=self._watch, name="llmrl-vllm-watch", daemon=True).start()
        if adapter:
            try:
                self.update(Path(adapter))
            except BaseException:
                self.close()
                raise

    # what callers ask

    def _start(self, request: Request) -> Future[Sample]:
        return self._send(list(request.token_ids), _sampling_params(request), request.base, self._reader(request))

    @property
    def takes_adapters(self) -> bool:
        """Whether an update may be the folder of a PEFT adapter."""
        return bool(self.max_lora_rank)

    def score(self, token_ids: Sequence[int], *, base: bool = False) -> list[float]:
        """Return the log-probability of tokens 1 to T-1 given those before them: `T - 1` numbers in nats."""
        from vllm import SamplingParams

        ids = list(self.check_ids(token_ids))
        if len(ids) >= self.max_model_len:
            raise RequestError(f"cannot score {len(ids)} tokens: the context holds {self.max_model_len} with one more")
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)

        def read(output: Any) -> list[float]:
            pairs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
            return [step[token].logprob for token, step in pairs]

        return self._send(ids, params, base, read).result()

    def cached_tokens(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt came out of the prefix cache just now."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        return self._send(list(prompt), params, False, lambda output: output.num_cached_tokens or 0).result()

    def update(self, source: Mapping[str, torch.Tensor] | Path | str) -> PolicyVersion:
        """Take new weights, or a PEFT adapter in place of the one before; see `Syncable`.

        Raises:
            SyncError: A tensor is missing, unknown or corrupted. Nothing has changed then.
            ModelError: vLLM does not serve such an adapter.
        """
        done: Future[PolicyVersion] = Future()

        def load() -> PolicyVersion:
            version = self._load_adapter(Path(source)) if isinstance(source, Path | str) else self._load_weights(source)
            self._reset_cache()
            self.trust()
            return version

        self._put(_Update(done, load))
        return done.result()

    def close(self) -> None:
        """Stop the engine and free what it holds; requests under way fail."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join(timeout=60)
        self._transfer.remove()

    # the thread that owns vLLM

    def _send(self, prompt: list[int], params: Any, base: bool, read: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._put(_Job(future, prompt, params, base, read))
        return future

    def _put(self, work: _Job | _Update) -> None:
        if self._broken is None:
            self._inbox.put(work)
        if self._broken is not None:  # the thread may have ended just now, with nobody left to read the inbox
            settle(work.future, error=self._broken)

    def _drive(self) -> None:
        engine = self._llm.llm_engine
        update: _Update | None = None  # waits for what was sent before it; what comes after it waits
        try:
            while True:
                while update is None and (not self._inbox.empty() or not self._jobs):
                    work = self._inbox.get()
                    if isinstance(work, _Job):
                        self._admit(work)
                    elif work is not None:
                        update = work
                    if self._closing:
                        break
                if self._closing:
                    raise EngineError("the engine was closed")
                if update is not None and not self._jobs:
                    self._run(update)
                    update = None
                    continue
                self._withdraw()
                for output in engine.step() if self._jobs else []:
                    if output.finished:
                        self._finish(output)
        except BaseException as error:
            self._broken = error if isinstance(error, EngineError) else EngineError(_died(error))
            if update is not None:
                settle(update.future, error=self._broken)
            self._fail_all(self._broken)
        finally:
            stop_vllm(self._llm)

    def _watch(self) -> None:
        """Wake the thread when vLLM's process is gone: a killed one says nothing, and vLLM would wait for it forever."""
        core: Any = self._llm.llm_engine.engine_core
        while self._thread.is_alive():
            if core.resources.engine_dead:
                core.outputs_queue.put_nowait(RuntimeError("its process ended"))
                return
            time.sleep(_WATCH_SECONDS)

    def _admit(self, job: _Job) -> None:
        from vllm import TokensPrompt

        if job.future.cancelled():
            return
        self._number += 1
        name = str(self._number)
        prompt = TokensPrompt(prompt_token_ids=job.prompt)
        try:
            self._llm.llm_engine.add_request(name, prompt, job.params, lora_request=None if job.base else self._lora)
        except Exception as error:
            if type(error).__name__ == "EngineDeadError":
                settle(job.future, error=EngineError(_died(error)))
                raise
            settle(job.future, error=RequestError(f"vLLM refused the request: {first_line(error)}"))
            return
        self._jobs[name] = job

    def _run(self, update: _Update) -> None:
        try:
            settle(update.future, update.load())
        except Exception as error:
            settle(update.future, error=error)

    def _finish(self, output: Any) -> None:
        job = self._jobs.pop(output.request_id, None)
        if job is None:  # withdrawn
            return
        try:
            settle(job.future, job.read(output))
        except LlmrlError as error:  # the model's numbers are no numbers, or its weights not the expected ones
            settle(job.future, error=error)
        except Exception as error:
            settle(job.future, error=EngineError(f"vLLM's answer cannot be read: {type(error).__name__}: {error}"))

    def _withdraw(self) -> None:
        gone = [name for name, job in self._jobs.items() if job.future.cancelled()]
        if gone:
            self._llm.llm_engine.abort_request(gone)
            for name in gone:
                del self._jobs[name]

    def _fail_all(self, error: EngineError) -> None:
        for job in self._jobs.values():
            settle(job.future, error=error)
        self._jobs.clear()
        with suppress(queue.Empty):
            while True:
                work = self._inbox.get_nowait()
                if work is not None:
                    settle(work.future, error=error)

    def _reader(self, request: Request) -> Callable[[Any], Sample]:
        def read(output: Any) -> Sample:
            answer = output.outputs[0]
            labels = {span.version for span in getattr(answer, "weight_versions", None) or ()}
            if labels - {self._label}:
                raise EngineError(f"sampled with the weights {sorted(labels)}, expected {self._label}; update again")
            if answer.finish_reason not in _FINISH:
                raise EngineError(f"vLLM ended a request with '{answer.finish_reason}'; its own log says why")
            ids = tuple(answer.token_ids)
            return Sample(
                token_ids=ids,
                logprobs=tuple(step[token].logprob for token, step in zip(ids, answer.logprobs, strict=True)),
                text=cut_answer(self.tokenizer, request.token_ids, ids, request.sampling.stop)[0],
                finish_reason=_FINISH[answer.finish_reason],
                policy_version=self._base_version if request.base else self._version,  # no update passes a request
                stop_reason=answer.stop_reason,
                top_logprobs=_top_logprobs(answer.logprobs, request.sampling.logprobs),
            )

        return read

    # new weights

    def _load_weights(self, tensors: Mapping[str, torch.Tensor]) -> PolicyVersion:
        if self.max_lora_rank:
            raise EngineError("this engine was opened for adapters (max_lora_rank); open it without to give it weights")
        number = self._version.number + 1
        folder = self._transfer.folder(number, sum(tensor.nbytes for tensor in tensors.values()))
        version = PolicyVersion(number, write_weights(folder, tensors))
        self._llm.start_weight_update()
        try:
            self._llm.update_weights({"update_info": {"folder": str(folder)}})
        except Exception as error:
            if WEIGHTS_TOUCHED in str(error):
                self.distrust(str(error))
            raise error if isinstance(error, SyncError) else SyncError(first_line(error)) from error
        self._label = f"{version.number}-{version.fingerprint}"
        self._llm.finish_weight_update(weight_version=self._label)
        self._transfer.keep_only(folder)
        self._version = self._base_version = version
        return version

    def _load_adapter(self, source: Path) -> PolicyVersion:
        from vllm.lora.request import LoRARequest

        if not self.max_lora_rank:
            raise EngineError("this engine takes no adapter; open it with max_lora_rank, at least the adapter's rank")
        facts = check_adapter(source, self._folder)
        if facts.rank > self.max_lora_rank:
            raise ModelError(
                f"the adapter has rank {facts.rank}, the engine was opened with max_lora_rank={self.max_lora_rank}"
            )
        number = self._version.number + 1
        folder = self._transfer.folder(number, 0)
        shutil.copytree(source, folder)  # vLLM may read it again later, and a trainer may write there again
        # a name and a number of its own: the prefix cache is keyed by the adapter's name
        lora = LoRARequest(f"llmrl-{number}-{facts.fingerprint[:8]}", number, str(folder))
        try:
            self._llm.llm_engine.add_lora(lora)
        except Exception as error:
            raise ModelError(f"vLLM does not load the adapter {source}: {first_line(error)}") from error
        if self._lora is not None:
            self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
        self._lora = lora
        self._transfer.keep_only(folder)
        self._version = PolicyVersion(number, facts.fingerprint)
        return self._version

    def _reset_cache(self) -> None:
        """Forget the keys and values of the old weights; nothing runs at this point, so vLLM can drop them all."""
        if not self._llm.reset_prefix_cache():
            reason = "vLLM did not reset its prefix cache after an update, so it mixes old and new weights"
            self.distrust(reason)
            raise SyncError(reason)


def _sampling_params(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    wanted = request.sampling
    schema = None if wanted.json_schema is None else StructuredOutputsParams(json=wanted.json_schema)
    return SamplingParams(
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        max_tokens=wanted.max_tokens,
        seed=wanted.seed,
        stop=list(wanted.stop),
        stop_token_ids=sorted(request.end_ids),
        ignore_eos=True,  # the end tokens are all in stop_token_ids, as for the other backends
        logprobs=wanted.logprobs,
        detokenize=bool(wanted.stop),
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=schema,
    )


def _top_logprobs(steps: Any, k: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    if not k:
        return ()
    ranked = [sorted(step.items(), key=lambda item: -item[1].logprob)[:k] for step in steps]
    return tuple(tuple((token, found.logprob) for token, found in step) for step in ranked)


def _died(error: BaseException) -> str:
    return f"vLLM died: {type(error).__name__}: {first_line(error)}; finished work is kept, the same command goes on"

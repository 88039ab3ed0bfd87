"""The `transformers` backend: correct on any machine, and the reference the others are tested against.

One thread takes what is waiting, up to `batch_size` requests, pads them on the left and decodes them together with a KV
cache until all have ended. Sampling runs on one row at a time with a generator of its own, so a seed gives the same
tokens in any batch as far as the model gives the same logits in any batch.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.base_model import open_causal_lm
from llmrl.errors import EngineError, ModelError, RequestError, SyncError, explain
from llmrl.heads import PREFIX
from llmrl.rollout.adapters import check_adapter
from llmrl.rollout.engine import BaseEngine, Request, cut_answer, first_line, settle
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.protocols import NOT_A_NUMBER, Sample
from llmrl.rollout.weight_files import check_names, digest, fingerprint, shown
from llmrl.rollout.weights import disk_weights
from llmrl.types import FinishReason, PolicyVersion, SamplingConfig

_SPARE_TOKENS = 8  # of a character that the stop string begins in


@dataclass
class _Row:
    """One request of a batch while it is decoded."""

    request: Request
    future: Future[Sample]
    version: PolicyVersion
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    done: bool = False


class TransformersEngine(BaseEngine):
    """A model in this process.

    Args:
        model: A folder or a hub name.
        dtype: "auto" (float32 on a CPU, else the checkpoint's), "float32", "bfloat16" or "float16".
        device: A torch device; None takes the GPU when there is one.
        batch_size: Most requests decoded together. With 1 a seed gives the same bytes whatever else runs.
        max_model_len: A shorter context than the model's own.
        adapter: Folder of a PEFT adapter to start with.
        loaded: The model itself, if it is in memory already; dtype and device are then its own.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int = 32,
        max_model_len: int | None = None,
        adapter: Path | str | None = None,
        loaded: Any = None,
    ) -> None:
        facts = read_facts(model, max_model_len=max_model_len)
        super().__init__(
            facts.tokenizer, max_model_len=facts.max_model_len, vocab_size=facts.vocab_size, end_ids=facts.end_ids
        )
        if batch_size < 1:
            raise RequestError(f"batch_size: expected at least 1, got {batch_size}")
        on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
        if loaded is None:
            loaded = open_causal_lm(model, dtype="float32" if dtype == "auto" and on_cpu else dtype, device=device)
        self._model = loaded
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._folder, self._batch_size = facts.folder, batch_size
        self._version = self._base_version = PolicyVersion(0, facts.fingerprint)
        self._adapter = ""
        self._lock = threading.Lock()  # one forward at a time: adapters are switched on the module
        self._inbox: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._closed: EngineError | None = None
        self._thread = threading.Thread(target=self._drive, name="llmrl-transformers", daemon=True)
        self._thread.start()
        if adapter:
            try:
                self.update(Path(adapter))
            except BaseException:
                self.close()
                raise

    def _start(self, request: Request) -> Future[Sample]:
        future: Future[Sample] = Future()
        generator = None
        if request.sampling.temperature > 0:
            generator = torch.Generator()
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed)
        version = self._base_version if request.base else self._version
        self._inbox.put(_Row(request, future, version, generator))
        if self._closed is not None:
            self._fail_waiting(self._closed)
        return future

    @property
    def takes_adapters(self) -> bool:
        """Whether an update may be the folder of a PEFT adapter."""
        return True

    def score(self, token_ids: Sequence[int], *, base: bool = False) -> list[float]:
        """Return the log-probability of tokens 1 to T-1 given those before them: `T - 1` numbers in nats."""
        return self.score_batch([token_ids], base=base)[0]

    def score_batch(self, rows: Sequence[Sequence[int]], *, base: bool = False) -> list[list[float]]:
        """Score rows of different lengths in one forward pass, padded on the right."""
        if not rows:
            return []
        checked = [self.check_ids(row) for row in rows]
        for ids in checked:
            if len(ids) > self.max_model_len:
                raise RequestError(f"cannot score {len(ids)} tokens: the context holds {self.max_model_len}")
        with self._lock, self._adapter_off(base):
            return prompt_logprobs(self._model, checked)

    def update(self, source: Mapping[str, Tensor] | Path | str) -> PolicyVersion:
        """Take new weights, or a PEFT adapter in place of the one before; see `Syncable`.

        Raises:
            SyncError: A tensor is missing, unknown or of another shape. Nothing has changed then.
            ModelError: PEFT does not load the adapter.
        """
        with self._lock:  # held for a whole batch, so what runs ends with the weights it began with
            self._version = (
                self._load_adapter(Path(source)) if isinstance(source, Path | str) else self._load_weights(source)
            )
        self.trust()
        return self._version

    def close(self) -> None:
        """Stop the engine and free what it holds; requests under way fail."""
        self._closed = EngineError("the engine was closed")
        self._inbox.put(None)
        self._thread.join(timeout=60)
        self._fail_waiting(self._closed)

    def _drive(self) -> None:
        while self._closed is None:
            first = self._inbox.get()
            rows = [first] if first is not None else []
            with suppress(queue.Empty):
                while len(rows) < self._batch_size:
                    row = self._inbox.get_nowait()
                    rows += [row] if row is not None else []
            rows = [row for row in rows if not row.future.cancelled()]
            for base in (False, True):
                self._decode([row for row in rows if row.request.base is base], base)

    def _fail_waiting(self, error: EngineError) -> None:
        with suppress(queue.Empty):
            while True:
                row = self._inbox.get_nowait()
                if row is not None:
                    settle(row.future, error=error)

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], base: bool) -> None:
        """Decode a batch to its end; an error of the model is the error of each of its rows."""
        if not rows:
            return
        try:
            with self._lock, self._adapter_off(base):
                for row in rows:
                    row.version = self._base_version if base else self._version
                for logits in _steps(self._model, rows, lambda: self._closed is not None):
                    for row, row_logits in zip(rows, logits, strict=True):
                        if not row.done:
                            self._take(row, row_logits)
                self._closed_rows(rows)
        except Exception as error:
            why = explain(error) or f"{type(error).__name__}: {first_line(error)}"
            for row in rows:
                settle(row.future, error=EngineError(f"transformers failed while generating: {why}"))

    def _closed_rows(self, rows: list[_Row]) -> None:
        for row in rows:
            if not row.done:
                settle(row.future, error=self._closed or EngineError("the request was withdrawn"))

    def _take(self, row: _Row, logits: Tensor) -> None:
        """Draw one token for a row and see whether it ends it."""
        sampling = row.request.sampling
        logprobs = logits.float().log_softmax(-1)
        if logprobs.isnan().any():
            row.done = True
            row.ids.append(0)  # the batch goes on, and feeds something for this row
            settle(row.future, error=RequestError(NOT_A_NUMBER))
            return
        token = draw(logits, sampling, row.generator)
        row.ids.append(token)
        row.logprobs.append(logprobs[token].item())
        if sampling.logprobs:
            best = logprobs.topk(min(sampling.logprobs, self.vocab_size))
            row.top.append(tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        reason: FinishReason | None = None
        why: int | str | None = None
        stopped = None
        if sampling.stop:  # it can only have ended in the last tokens
            longest = max(len(word.encode()) for word in sampling.stop)  # a token says at least one byte
            tail = row.ids[-(longest + _SPARE_TOKENS) :]
            before = [*row.request.token_ids, *row.ids[: -len(tail)]]
            stopped = cut_answer(self.tokenizer, before, tail, sampling.stop)[1]
        if token in row.request.end_ids:
            reason, why = FinishReason.STOP, token
        elif stopped:
            reason, why = FinishReason.STOP, stopped
        elif len(row.ids) >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        if reason is None:
            row.done = row.future.cancelled()
            return
        row.done = True
        settle(
            row.future,
            Sample(
                token_ids=tuple(row.ids),
                logprobs=tuple(row.logprobs),
                text=cut_answer(self.tokenizer, row.request.token_ids, row.ids, sampling.stop)[0],
                finish_reason=reason,
                policy_version=row.version,
                stop_reason=why,
                top_logprobs=tuple(row.top),
            ),
        )

    @contextmanager
    def _adapter_off(self, off: bool) -> Iterator[None]:
        with self._model.disable_adapter() if off and hasattr(self._model, "disable_adapter") else nullcontext():
            yield

    def _load_weights(self, tensors: Mapping[str, Tensor]) -> PolicyVersion:
        if hasattr(self._model, "disable_adapter"):
            raise EngineError("this engine holds an adapter; open it without one to give it weights")
        own = dict(disk_weights(self._model))
        heads = {name for name in own if name.startswith(PREFIX)}  # those that do not come stay as they are
        check_names(tensors, set(own) - (heads - set(tensors)), "the weight update")
        held = {parameter.untyped_storage().data_ptr() for parameter in self._model.state_dict().values()}
        copies = [name for name in tensors if own[name].untyped_storage().data_ptr() not in held]
        if copies:
            raise SyncError(
                f"{shown(copies)}: {type(self._model).__name__} keeps them in another layout than its files, which only the "
                "vllm backend updates; use --rollout_backend vllm"
            )
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise SyncError(f"{name} has shape {list(tensor.shape)}, the model's has {list(own[name].shape)}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        number = self._version.number + 1
        self._base_version = PolicyVersion(number, fingerprint({name: digest(t) for name, t in tensors.items()}))
        return self._base_version

    def _load_adapter(self, source: Path) -> PolicyVersion:
        from peft import PeftModel

        facts = check_adapter(source, self._folder)
        model: Any = self._model
        number = self._version.number + 1
        name = f"llmrl-{number}"  # beside the one before, which is dropped when this one has loaded
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(str(source), adapter_name=name)
                model.set_adapter(name)
                model.delete_adapter(self._adapter)
            else:
                model = PeftModel.from_pretrained(model, str(source), adapter_name=name)
        except Exception as error:
            if not self._undo_adapter(name):
                self.distrust(f"the adapter {source} did not load")
            raise ModelError(f"PEFT does not load the adapter {source}: {first_line(error)}") from error
        self._model, self._adapter = model.eval().requires_grad_(False), name
        return PolicyVersion(number, facts.fingerprint)

    def _undo_adapter(self, name: str) -> bool:
        """Take off what a failed load left behind; return whether the model is what it was."""
        model: Any = self._model
        if hasattr(model, "disable_adapter"):
            with suppress(Exception):
                model.set_adapter(self._adapter)
                if name in model.peft_config:
                    model.delete_adapter(name)
            held = set(model.peft_config)
            return held == {self._adapter} and list(model.active_adapters) == [self._adapter]
        return not any(".lora_" in parameter for parameter, _ in model.named_parameters())


def _steps(model: Any, rows: list[_Row], stop: Callable[[], bool]) -> Iterator[Tensor]:
    """Yield the logits `[B, V]` that each row's next token is drawn from; the caller appends it to `row.ids`."""
    prompts = [row.request.token_ids for row in rows]
    longest = max(len(prompt) for prompt in prompts)
    device = model.device
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = None
    while True:
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        yield out.logits[:, -1]
        if all(row.done for row in rows) or stop():
            return
        ids = torch.tensor([[row.ids[-1]] for row in rows], device=device)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=-1)
        positions = positions[:, -1:] + 1


def draw(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator | None) -> int:
    """Draw one token from logits `[V]`: temperature, then min-p, top-k and top-p, the order of vLLM."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = filtered(logits.float().cpu() / sampling.temperature, sampling)
    return int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))


def filtered(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Return logits `[V]` with -inf where a filter of `sampling` leaves a token out; they are already tempered."""
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.max(), -torch.inf)
    if 0 < sampling.top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill(
            torch.zeros_like(logits, dtype=torch.bool).scatter(0, index, before >= sampling.top_p), -torch.inf
        )
    return logits


@torch.inference_mode()
def prompt_logprobs(model: Any, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the log-probability of tokens 1 to T-1 of each row, from one pass over a batch padded on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    routes_by_prompt = getattr(getattr(model, "switch_config", None), "router_input", "") == "prompt_pooled"
    told = {"switch_prompt_mask": mask} if routes_by_prompt else {}  # a scored row is all prompt
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **told).logits
    picked = [
        row_logits[: len(row) - 1].float().log_softmax(-1).gather(-1, row_ids[1 : len(row), None])[:, 0].tolist()
        for row, row_ids, row_logits in zip(rows, ids, logits, strict=True)
    ]
    return picked

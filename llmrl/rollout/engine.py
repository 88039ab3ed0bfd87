"""What all backends share: checking a request before anything runs, fanning out samples, joining their futures.

A backend implements `_start` (one request, one sample) and `score`; everything a caller sees is defined here once, so
that the backends agree on it.
"""

from __future__ import annotations

import operator
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from llmrl.errors import EngineError, RequestError
from llmrl.rollout.protocols import Sample
from llmrl.rollout.seeds import derive_seed
from llmrl.types import PolicyVersion, SamplingConfig

_T = TypeVar("_T")
_TAIL = 8  # tokens of a prompt that say how its continuation is spaced


@dataclass(frozen=True)
class Request:
    """One sample to draw: `sampling.n` is 1, its seed is the sample's own, `max_tokens` fits into the context.

    `end_ids` are the tokens that end it: those of the model and those of the sampling.
    """

    token_ids: tuple[int, ...]
    sampling: SamplingConfig
    end_ids: frozenset[int]
    base: bool = False


class BaseEngine(ABC):
    """A model that samples and scores. Use it as a context manager, or call `close`."""

    supports_json_schema = False
    is_shared = False  # whether other processes may be using, and updating, the same weights
    dtype = "float32"

    def __init__(self, tokenizer: Any, *, max_model_len: int, vocab_size: int, end_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.end_ids = end_ids
        self._version = PolicyVersion(0, "unknown")
        self._distrusted: str | None = None
        self._special: frozenset[str] | None = None

    @property
    def takes_adapters(self) -> bool:
        """Whether an update may be the folder of a PEFT adapter."""
        return False

    @property
    def version(self) -> PolicyVersion:
        """The weights it samples with now."""
        return self._version

    @property
    def is_trusted(self) -> bool:
        """Whether it is known what the engine samples with."""
        return self._distrusted is None

    def distrust(self, reason: str) -> None:
        """Refuse every request from now on: what the engine samples with is not known. An update ends it."""
        self._distrusted = reason

    def trust(self) -> None:
        """Take requests again."""
        self._distrusted = None

    @abstractmethod
    def _start(self, request: Request) -> Future[Sample]:
        """Start one request; called from many threads."""

    @abstractmethod
    def score(self, token_ids: Sequence[int], *, base: bool = False) -> list[float]:
        """Return the log-probability of tokens 1 to T-1 given those before them: `T - 1` numbers in nats."""

    def submit(self, prompt: Sequence[int], sampling: SamplingConfig, *, base: bool = False) -> Future[list[Sample]]:
        """Start one prompt and return at once; the future holds its samples or the error. `cancel()` withdraws it."""
        requests = self.requests(prompt, sampling, base=base)
        return gather([self._start(request) for request in requests])

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        *,
        base: bool = False,
    ) -> list[list[Sample]]:
        """Return `sampling.n` samples a prompt, in order. Every prompt is checked before the first one starts.

        Raises:
            RequestError: A prompt or its sampling cannot be served; the first such prompt is named by its position.
            EngineError: The engine died.
        """
        per_prompt = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
        if len(per_prompt) != len(prompts):
            raise RequestError(f"expected one sampling a prompt ({len(prompts)}), got {len(per_prompt)}")
        rows = []
        for i, (prompt, one) in enumerate(zip(prompts, per_prompt, strict=True)):
            try:
                rows.append(self.requests(prompt, one, base=base))
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
        futures = [gather([self._start(request) for request in requests]) for requests in rows]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def requests(self, prompt: Sequence[int], sampling: SamplingConfig, *, base: bool = False) -> list[Request]:
        """Return one request a sample, or say why this engine cannot serve the prompt."""
        ids = self.check_ids(prompt)
        room = self.max_model_len - len(ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the context holds {self.max_model_len} with the answer; "
                "shorten it, or serve the model with a longer context"
            )
        if sampling.json_schema is not None and not self.supports_json_schema:
            raise RequestError(
                f"json_schema needs a backend with constrained decoding, {type(self).__name__} has none; "
                "use --rollout_backend vllm or server"
            )
        beyond = [token for token in sampling.stop_token_ids if token >= self.vocab_size]
        if beyond:
            raise RequestError(f"stop_token_ids {beyond} are not in the vocabulary of {self.vocab_size} tokens")
        special = [word for word in sampling.stop if word in self._special_tokens()]
        if special:
            raise RequestError(
                f"stop {special}: special tokens are not part of the text that is searched; give their ids as stop_token_ids"
            )
        end_ids = self.end_ids | set(sampling.stop_token_ids)
        one = replace(sampling, n=1, max_tokens=min(sampling.max_tokens, room))
        return [
            Request(ids, replace(one, seed=_sample_seed(sampling.seed, i)), end_ids, base) for i in range(sampling.n)
        ]

    def _special_tokens(self) -> frozenset[str]:
        if self._special is None:
            self._special = frozenset(getattr(self.tokenizer, "all_special_tokens", ()))
        return self._special

    def each(self) -> list[Any]:
        """Return one view a copy of the model, for checks that must reach every copy: `name`, `score`, `generate`."""
        return [_Whole(self)]

    def check_ids(self, token_ids: Sequence[int]) -> tuple[int, ...]:
        """Return the ids as a tuple; refuse an empty prompt, ids outside of the vocabulary, and an engine not trusted."""
        if self._distrusted is not None:
            raise EngineError(f"the engine is not used: {self._distrusted}")
        try:
            ids = tuple(operator.index(token) for token in token_ids)
        except TypeError:
            raise RequestError(
                f"expected token ids, got {token_ids!r:.60}; encode text with engine.tokenizer"
            ) from None
        if not ids:
            raise RequestError("the prompt is empty: expected at least one token")
        beyond = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if beyond is not None:
            raise RequestError(f"token id {beyond} is not in the vocabulary of {self.vocab_size} tokens")
        return ids

    def close(self) -> None:  # noqa: B027 - a scripted engine holds nothing
        """Stop the engine and free what it holds; requests under way fail."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Whole:
    """The view of an engine that holds one copy of its model."""

    name = ""

    def __init__(self, engine: BaseEngine) -> None:
        self._engine = engine

    def score(self, token_ids: Sequence[int]) -> list[float]:
        return self._engine.score(token_ids)

    def generate(self, prompt: Sequence[int], sampling: SamplingConfig) -> Sample:
        return self._engine.generate([prompt], sampling)[0][0]

    def cached_tokens(self, prompt: Sequence[int]) -> int | None:
        """Return how many tokens of a prompt came out of the prefix cache; None where it cannot be told."""
        ask = getattr(self._engine, "cached_tokens", None)
        return None if ask is None else ask(prompt)


def _sample_seed(seed: int | None, sample: int) -> int | None:
    return seed if seed is None or sample == 0 else derive_seed(seed, sample)


def gather(futures: Sequence[Future[_T]]) -> Future[list[_T]]:
    """Return a future of all results in order; it fails with the first failure, and cancelling it cancels them all."""
    joined: Future[list[_T]] = Future()
    left = len(futures)
    lock = threading.Lock()

    def one_done(done: Future[_T]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        error = EngineError("the request was withdrawn") if done.cancelled() else done.exception()
        try:
            if error is not None:
                if not joined.done():
                    joined.set_exception(error)
            elif last and not joined.done():
                joined.set_result([future.result() for future in futures])
        except InvalidStateError:  # the caller cancelled in between
            pass

    def cancel_all(done: Future[list[_T]]) -> None:
        if done.cancelled() or done.exception() is not None:
            for future in futures:
                future.cancel()

    joined.add_done_callback(cancel_all)
    for future in futures:
        future.add_done_callback(one_done)
    return joined


def settle(future: Future[_T], result: _T | None = None, error: BaseException | None = None) -> None:
    """Give a future its result or error unless its caller has cancelled it."""
    try:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]
    except InvalidStateError:
        pass


def find_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """Return where the earliest stop string begins and which it is, or None; of two at one place the one listed first."""
    found = [(text.find(word), i, word) for i, word in enumerate(stop) if word in text]
    if not found:
        return None
    at, _, word = min(found)
    return at, word


def cut_answer(
    tokenizer: Any, prompt: Sequence[int], token_ids: Sequence[int], stop: Sequence[str]
) -> tuple[str, str | None]:
    """Return what the tokens say, cut before the earliest stop string, and that stop string.

    The search is in the text as it continues the prompt: decoded alone, a first word loses its space with tokenizers of
    the SentencePiece family, and the stop string " The" would not be found where vLLM finds it.
    """
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    if not stop:
        return text, None
    tail = list(prompt[-_TAIL:])
    before = tokenizer.decode(tail, skip_special_tokens=True)
    lost = " " if tokenizer.decode([*tail, *token_ids], skip_special_tokens=True) == f"{before} {text}" else ""
    cut = find_stop(lost + text, stop)
    return (text, None) if cut is None else ((lost + text)[len(lost) : cut[0]], cut[1])


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

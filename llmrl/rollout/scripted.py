"""The engine of the tests: answers come from a function, everything else is as with a model. Deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from llmrl.errors import RequestError
from llmrl.rollout.engine import BaseEngine, Request, cut_answer, settle
from llmrl.rollout.protocols import Sample
from llmrl.rollout.seeds import derive_seed
from llmrl.types import FinishReason, PolicyVersion

Script = Callable[[Request], "str | Sequence[int]"]


class ScriptedEngine(BaseEngine):
    """Answers with what `script` returns for a request: text, which is encoded and ended, or token ids as they stand.

    Args:
        tokenizer: Any Hugging Face tokenizer with an end token.
        script: Called with each request, from the caller's thread. What it raises is the request's error.
        max_model_len: Most tokens of prompt and answer together; a longer answer is cut with finish reason LENGTH.
    """

    def __init__(self, tokenizer: Any, script: Script, *, max_model_len: int = 2048) -> None:
        if tokenizer.eos_token_id is None:
            raise RequestError("a scripted engine needs a tokenizer with an end token (eos_token)")
        end = frozenset({tokenizer.eos_token_id})
        super().__init__(tokenizer, max_model_len=max_model_len, vocab_size=len(tokenizer), end_ids=end)
        self.script = script
        self._version = PolicyVersion(0, "scripted")

    def _start(self, request: Request) -> Future[Sample]:
        future: Future[Sample] = Future()
        try:
            settle(future, self._answer(request))
        except Exception as error:
            settle(future, error=error)
        return future

    def _answer(self, request: Request) -> Sample:
        said = self.script(request)
        if isinstance(said, str):
            said = [*self.tokenizer.encode(said, add_special_tokens=False), self.tokenizer.eos_token_id]
        ids: list[int] = []
        reason, why = FinishReason.LENGTH, None
        for token in said[: request.sampling.max_tokens]:
            ids.append(int(token))
            stopped = cut_answer(self.tokenizer, request.token_ids, ids, request.sampling.stop)[1]
            if token in request.end_ids or stopped:
                reason, why = FinishReason.STOP, token if token in request.end_ids else stopped
                break
        text, _ = cut_answer(self.tokenizer, request.token_ids, ids, request.sampling.stop)
        logprobs = _logprobs([*request.token_ids, *ids])[len(request.token_ids) - 1 :]
        return Sample(tuple(ids), tuple(logprobs), text, reason, self.version, why)

    def score(self, token_ids: Sequence[int], *, base: bool = False) -> list[float]:
        """Return numbers that depend on the tokens up to each one and on nothing else."""
        return _logprobs(self.check_ids(token_ids))

    def update(self, source: Mapping[str, Any] | Path | str) -> PolicyVersion:
        """Count a version; what it answers stays the script's business."""
        number = self._version.number + 1
        self._version = PolicyVersion(number, f"scripted-{number}")
        return self._version


def _logprobs(token_ids: Sequence[int]) -> list[float]:
    logprobs, state = [], derive_seed(*token_ids[:1])
    for token in token_ids[1:]:
        state = derive_seed(state, token)
        logprobs.append(math.log((state % 997 + 1) / 1000))
    return logprobs

"""What a rollout engine can be asked. An engine is what satisfies those protocols its backend can.

Prompts are token ids and so are answers; text is derived from them and never encoded again. All four can be called
from many threads at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmrl.errors import RequestError
from llmrl.types import FinishReason, PolicyVersion, Record, SamplingConfig

if TYPE_CHECKING:
    import torch

NOT_A_NUMBER = "the model gave a logprob that is not a number: weights that this prompt reaches hold NaN or infinity"


@dataclass(frozen=True)
class Sample(Record):
    """One sampled answer.

    `token_ids` holds every sampled token, the end token and the tokens of a stop string included; `logprobs[t]` is the
    log-probability of token `t` under the untempered, unfiltered distribution (under a JSON schema: of what that leaves);
    `text` is what the tokens say without
    special tokens, cut before the stop string. `stop_reason` is the stop string or the id that ended it.
    `top_logprobs[t]` lists (id, logprob) of the `logprobs` most likely tokens, most likely first, where the sampling
    asked for them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: PolicyVersion
    stop_reason: int | str | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()

    def __post_init__(self) -> None:
        tuples = tuple(tuple((int(token), float(logprob)) for token, logprob in top) for top in self.top_logprobs)
        version = self.policy_version
        self._set(
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=FinishReason(self.finish_reason),
            policy_version=version if isinstance(version, PolicyVersion) else PolicyVersion.from_json(version),
            top_logprobs=tuples,
        )
        self._need(len(self.logprobs) == len(self.token_ids), "logprobs", f"{len(self.token_ids)} numbers, one a token")
        if not all(math.isfinite(logprob) for logprob in self.logprobs):
            raise RequestError(NOT_A_NUMBER)


@runtime_checkable
class Sampler(Protocol):
    """Samples answers."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        *,
        base: bool = False,
    ) -> list[list[Sample]]:
        """Return `sampling.n` samples a prompt, in order.

        Args:
            prompts: Token ids of each prompt.
            sampling: For all prompts, or one a prompt.
            base: Sample from the model without its adapter.

        Raises:
            RequestError: A prompt or its sampling cannot be served; the first such prompt is named.
            EngineError: The engine died.
        """
        ...

    def submit(self, prompt: Sequence[int], sampling: SamplingConfig, *, base: bool = False) -> Future[list[Sample]]:
        """Start one prompt and return at once; the future holds its samples or the error. `cancel()` withdraws it."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """Scores given tokens."""

    def score(self, token_ids: Sequence[int], *, base: bool = False) -> list[float]:
        """Return the log-probability of tokens 1 to T-1 given those before them: `T - 1` numbers in nats."""
        ...


@runtime_checkable
class Syncable(Protocol):
    """Takes new weights without a restart."""

    @property
    def version(self) -> PolicyVersion:
        """The weights it samples with now."""
        ...

    def update(self, source: Mapping[str, torch.Tensor] | Path | str) -> PolicyVersion:
        """Take new weights and return their version; samples that are under way finish with the old ones first.

        Args:
            source: All weights of the model by their names on disk, or the folder of a PEFT adapter, which then takes
                the place of the one before.
        """
        ...


@runtime_checkable
class RewardClient(Protocol):
    """Asks a reward model."""

    def scores(self, texts: Sequence[str]) -> list[list[float]]:
        """Return `[N, K]` raw scores of K heads."""
        ...


@runtime_checkable
class Engine(Sampler, Scorer, Protocol):
    """A language model that samples and scores, with what a caller must know about it."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of its model."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    @property
    def version(self) -> PolicyVersion:
        """The weights it samples with now."""
        ...

    def close(self) -> None:
        """Stop the engine and free what it holds; requests under way fail."""
        ...

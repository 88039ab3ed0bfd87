"""Sample several turns from any engine, say the one of the highest value: a policy improved without touching its sampling.

The engine may be a vLLM server of the plain behaviour policy; values are read here, from a policy with a value head.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmrl.heads_forward import decoder_of, states_of
from llmrl.hindsight.policy import TwoTrunks
from llmrl.hindsight.policy_folder import HEAD_NAME
from llmrl.rollout.engine import settle
from llmrl.rollout.protocols import Engine, Sample
from llmrl.types import PolicyVersion, SamplingConfig


class RerankEngine:
    """An engine that answers with the best of `n` samples of another.

    Args:
        engine: samples; it is not closed with this one.
        model: from `llmrl.hindsight.policy.load_policy`, with values.
        n: samples a turn.
        backup: of the training: by "turn", a turn is worth Q of its last token; by "token", the sum of Q - V of its tokens.
    """

    def __init__(self, engine: Engine, model: Any, n: int = 8, backup: str = "turn") -> None:
        self.engine, self.model, self.n, self.backup = engine, model, n, backup
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        """Of the engine."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Of the engine."""
        return self.engine.max_model_len

    @property
    def version(self) -> PolicyVersion:
        """Of the engine."""
        return self.engine.version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        *,
        base: bool = False,
    ) -> list[list[Sample]]:
        """See `Sampler`; one sample a prompt."""
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else list(sampling)
        waiting = [self.submit(prompt, one, base=base) for prompt, one in zip(prompts, each, strict=True)]
        return [future.result() for future in waiting]

    def submit(self, prompt: Sequence[int], sampling: SamplingConfig, *, base: bool = False) -> Future[list[Sample]]:
        """See `Sampler`; one sample."""
        chosen: Future[list[Sample]] = Future()
        samples = self.engine.submit(prompt, replace(sampling, n=self.n), base=base)

        def choose(done: Future[list[Sample]]) -> None:
            try:
                found = done.result()
                with self._lock:
                    values = turn_values(self.model, prompt, [sample.token_ids for sample in found], self.backup)
                settle(chosen, [found[int(torch.tensor(values).argmax())]])
            except BaseException as error:
                settle(chosen, error=error)

        samples.add_done_callback(choose)
        chosen.add_done_callback(lambda done: samples.cancel() if done.cancelled() else None)
        return chosen

    def score(self, token_ids: Sequence[int], *, base: bool = False) -> list[float]:
        """See `Scorer`: of the engine."""
        return self.engine.score(token_ids, base=base)

    def close(self) -> None:
        """Do nothing: the engine is its owner's."""


@torch.inference_mode()
def turn_values(model: Any, prompt: Sequence[int], turns: Sequence[Sequence[int]], backup: str = "turn") -> list[float]:
    """Return what each turn after a prompt is worth; see `RerankEngine`."""
    trunk = model.values if isinstance(model, TwoTrunks) else model
    head, decoder = model.llmrl_heads[HEAD_NAME], decoder_of(trunk)
    found = []
    for turn in turns:
        ids = torch.tensor([[*prompt, *turn]], device=trunk.device)
        states = states_of(decoder, decoder(ids, use_cache=False))[0, len(prompt) - 1 : -1]
        q: Tensor = head.q_of(states, ids[0, len(prompt) :]).amin(0)
        value = q[-1] if backup == "turn" else (q - head.v(states)).sum()
        found.append(float(value))
    return found

"""A reward model in vLLM in this process: texts in, K raw scores out. The HTTP client of the same protocol is rewards.py."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

from llmrl.errors import DataError, EngineError, RequestError
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.vllm_start import settings_for, start_vllm, stop_vllm, usable_build


class VllmRewards:
    """A sequence classification model, or a folder llmrl wrote with a reward head.

    Args:
        model: A folder or a hub name.
        dtype: "auto" (float32 on a CPU, else the checkpoint's), "float32", "bfloat16" or "float16".
        max_model_len: A shorter context than the model's own.
        kv_cache_memory_bytes: As for `VllmEngine`.
        options: Further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        **options: Any,
    ) -> None:
        build = usable_build()
        facts = read_facts(model, max_model_len=max_model_len)
        settings = settings_for(facts, build, dtype, 0, kv_cache_memory_bytes) | {"runner": "pooling"} | options
        del settings["weight_transfer_config"]
        self._tokenizer, self._max_model_len = facts.tokenizer, facts.max_model_len
        self._llm = start_vllm(settings, own_process=build != "cpu")
        self._lock = threading.Lock()  # vLLM's LLM takes one call at a time

    def scores(self, texts: Sequence[str]) -> list[list[float]]:
        """Return `[N, K]` raw scores of K heads, without an activation.

        Raises:
            DataError: A text is empty or longer than the context; its position is named.
            EngineError: vLLM failed, or a score is not a number.
        """
        from vllm import PoolingParams, TokensPrompt

        prompts = []
        for i, text in enumerate(texts):
            ids = self._tokenizer(text)["input_ids"]
            if not text or len(ids) > self._max_model_len:
                raise DataError(f"text {i} has {len(ids)} tokens, expected 1 to {self._max_model_len}")
            prompts.append(TokensPrompt(prompt_token_ids=ids))
        if not prompts:
            return []
        with self._lock:
            try:
                params = PoolingParams(use_activation=False)
                outputs = self._llm.classify(prompts, pooling_params=params, use_tqdm=False)
            except ValueError as error:
                raise RequestError(f"vLLM refused the texts: {error}") from error
            except Exception as error:
                raise EngineError(f"vLLM failed on the reward model: {type(error).__name__}: {error}") from error
        rows = [[float(score) for score in output.outputs.probs] for output in outputs]
        if not all(math.isfinite(score) for row in rows for score in row):
            raise EngineError("the reward model gave a score that is not a number; check its weights and dtype")
        return rows

    def close(self) -> None:
        """Stop vLLM; other engines in this process run on."""
        stop_vllm(self._llm)

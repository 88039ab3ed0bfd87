"""A reward model behind vLLM's HTTP server (`llmrl serve` of a folder with reward heads): texts in, K raw scores out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from llmrl.errors import DataError, EngineError
from llmrl.rollout.http import LoopThread, Refusal, ServerBusy, ServerFault
from llmrl.rollout.server_pool import Member, Pool


class HttpRewardClient:
    """Asks POST /classify, without an activation: the numbers are those of the heads.

    Args:
        url: Of the server, or several that serve the same model.
        model: Its name there; None takes the only one.
        batch_size: Texts a request.
        timeout: Seconds to wait for one answer.
        retries: How many failures of servers one request survives.
        patience: Seconds to wait for a server to come back when all are down.
        api_key: Sent as a bearer token.

    Raises:
        EngineError: A server does not answer, or they serve different models.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        model: str | None = None,
        *,
        batch_size: int = 64,
        timeout: float = 600.0,
        retries: int = 5,
        patience: float = 45.0,
        api_key: str | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.outputs: int | None = None  # K, known with the first answer
        self._loop = LoopThread("llmrl-rewards")
        try:
            urls = [url] if isinstance(url, str) else list(url)
            self._loop.run(self._connect(urls, timeout, retries, patience, api_key, model))
        except BaseException:
            self.close()
            raise

    async def _connect(
        self,
        urls: list[str],
        timeout: float,
        retries: int,
        patience: float,
        api_key: str | None,
        model: str | None,
    ) -> None:
        self._pool = Pool(urls, timeout=timeout, retries=retries, patience=patience, api_key=api_key)
        served: dict[str, list[str]] = {}
        for member in self._pool.members:
            try:
                found = await member.http.get("/v1/models")
                served[member.url] = [str(card["id"]) for card in found["data"]]
            except (ServerFault, ServerBusy, Refusal, KeyError, TypeError) as error:
                raise EngineError(
                    f"{member.url} cannot be used: {error}\nstart it first: llmrl serve REWARD_MODEL --port PORT"
                ) from None
        first = next(iter(served.values()))
        self.model = model or first[0]
        lacking = [f"{url} serves {', '.join(names)}" for url, names in served.items() if self.model not in names]
        if lacking:
            raise EngineError(f"{'; '.join(lacking)}, expected {self.model}: name the served model")

    def scores(self, texts: Sequence[str]) -> list[list[float]]:
        """Return `[N, K]` raw scores of K heads.

        Raises:
            RequestError: The server refused a text, e.g. as too long.
            EngineError: No server is left.
        """
        wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str) or not text), None)
        if wrong is not None:
            raise DataError(f"text {wrong}: expected a text that is not empty, got {texts[wrong]!r:.60}")
        batches = [list(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        rows = [row for batch in self._loop.run(self._all(batches)) for row in batch]
        widths = {len(row) for row in rows}
        if self.outputs is not None:
            widths.add(self.outputs)
        if len(widths) > 1:
            raise EngineError(f"answers with different numbers of scores ({sorted(widths)}): the model was exchanged")
        self.outputs = widths.pop() if widths else self.outputs
        return rows

    async def _all(self, batches: list[list[str]]) -> list[list[list[float]]]:
        return await asyncio.gather(*(self._batch(batch) for batch in batches))

    async def _batch(self, texts: list[str]) -> list[list[float]]:
        async def work(member: Member) -> list[list[float]]:
            body = {"model": self.model, "input": texts, "use_activation": False}
            return read_scores(await member.http.post("/classify", body, harmless=True), len(texts))

        return await self._pool.call(work)

    def close(self) -> None:
        """Close the connections; the servers run on."""
        self._loop.stop(self._let_go())

    async def _let_go(self) -> None:
        if hasattr(self, "_pool"):
            await self._pool.close()


def read_scores(answer: Any, count: int) -> list[list[float]]:
    """Return the scores in an answer of /classify, in the order of the texts.

    Raises:
        ServerFault: They are not `count` rows of finite numbers of one length.
    """
    try:
        rows = {int(item["index"]): [float(value) for value in item["probs"]] for item in answer["data"]}
    except (KeyError, TypeError, ValueError):
        raise ServerFault(f"answered with something that is no classification: {answer!r:.80}") from None
    if sorted(rows) != list(range(count)) or len(answer["data"]) != count:
        raise ServerFault(f"answered with scores of {len(rows)} texts, expected {count}")
    if len({len(row) for row in rows.values()}) != 1 or not rows[0]:
        raise ServerFault("answered with rows of different lengths, or empty ones")
    if not all(math.isfinite(value) for row in rows.values() for value in row):
        raise ServerFault("answered with a score that is not finite: the reward model is broken")
    return [rows[i] for i in range(count)]

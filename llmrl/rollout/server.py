"""The `server` backend: any number of plain `vllm serve` processes by URL, here or on other machines.

One HTTP request a sample. It goes to the server with the fewest requests; where that one fails, the same request with the
same seed goes to another, so that each future settles once and nothing is lost or drawn twice. Nothing is believed that
does not hold up (`server_answers`), and after an update nothing from a server that does not hold the new weights
(`server_updates`).
"""

from __future__ import annotations

import asyncio
import math
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmrl.errors import EngineError, LlmrlError, RequestError, UsageError
from llmrl.rollout.adapters import check_adapter
from llmrl.rollout.engine import BaseEngine, Request
from llmrl.rollout.http import LoopThread, Refusal, ServerBusy, ServerFault
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.protocols import Sample
from llmrl.rollout.server_answers import (
    NOT_A_NUMBER,
    NOT_IN_JSON,
    completion_body,
    read_completion,
    read_score,
    score_body,
)
from llmrl.rollout.server_pool import Member, Pool
from llmrl.rollout.server_updates import Held, Updates
from llmrl.rollout.transfer import TransferFolder
from llmrl.rollout.weight_files import write_weights
from llmrl.types import PolicyVersion, SamplingConfig

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
_PROBE = (
    "The quick brown fox, 12 times. It ran over the hill to see what the other animals had been doing all day, and they "
    "told it a long story about the sea, which none of them had ever seen."
)
# mean difference in nats: above what precisions differ by between prefill and decoding (0.05 in bfloat16), below what a
# temperature of 2 does to logprobs (0.5 and more)
_RAW_TOLERANCE = 0.2
_PROBE_TOKENS, _SCORED_TOKENS = 16, 64


class ServerEngine(BaseEngine):
    """A model that is served by vLLM, as often as there are URLs.

    Opening it checks that all servers serve the same model, with this tokenizer, and report raw logprobs; weights that
    an earlier run left on them are replaced by those of the model.

    Args:
        model: The folder or hub name the servers were started with, as seen from here: its tokenizer, end tokens and
            vocabulary are used, and its weights when servers have to be put back to the start.
        urls: Of the servers, such as http://127.0.0.1:8000.
        adapter: Folder of a PEFT adapter to start with.
        timeout: Seconds without an answer after which a server is asked for its health. One that is healthy is waited for
            on, as the request may only be queued there; one that leaves a request without an answer for ten times as
            long has failed. `close` waits as long for weights that are on their way.
        retries: How many failures of servers one request survives.
        patience: Seconds to wait for a server to come back when all are down.
        transfer_dir: Where new weights pass through: a folder all machines share. None takes a private folder in memory
            (/dev/shm) where it fits, which only servers on this machine see.
        require_sync: Refuse servers that cannot take new weights now instead of at the first update.
        api_key: Sent to the servers as a bearer token; None takes that of the environment variable VLLM_API_KEY.
        max_model_len: A shorter context than that of the servers.

    Raises:
        EngineError: A server does not answer, serves something else than the others or than `model`, or has a shorter
            context than was asked for.
    """

    supports_json_schema = True
    is_shared = True

    def __init__(
        self,
        model: str,
        urls: Sequence[str],
        *,
        adapter: Path | str | None = None,
        timeout: float = 600.0,
        retries: int = 5,
        patience: float = 45.0,
        transfer_dir: Path | str | None = None,
        require_sync: bool = False,
        api_key: str | None = None,
        max_model_len: int | None = None,
    ) -> None:
        if max_model_len is not None and max_model_len < 1:
            raise UsageError(f"max_model_len {max_model_len}: expected at least 1 token")
        facts = read_facts(model)
        super().__init__(
            facts.tokenizer, max_model_len=facts.max_model_len, vocab_size=facts.vocab_size, end_ids=facts.end_ids
        )
        self._version = PolicyVersion(0, facts.fingerprint)
        self._folder = facts.folder
        self._run = secrets.token_hex(3)  # in the names of adapters: those of another run may still be loaded
        self._transfer = TransferFolder(transfer_dir)
        self._updating = threading.Lock()
        self._change: Future[PolicyVersion] | None = None
        self._loop = LoopThread("llmrl-servers")
        try:
            self._loop.run(self._connect(urls, timeout, retries, patience, api_key, require_sync, max_model_len))
            if adapter:
                self.update(Path(adapter))
        except BaseException:
            self.close()
            raise

    # opening

    async def _connect(
        self,
        urls: Sequence[str],
        timeout: float,
        retries: int,
        patience: float,
        api_key: str | None,
        require_sync: bool,
        max_model_len: int | None,
    ) -> None:
        self._pool = Pool(
            urls, timeout=timeout, retries=retries, patience=patience, api_key=api_key, revive=self._revive
        )
        members = self._pool.members
        cards = await asyncio.gather(*(_at_open(member, _base_card(member)) for member in members))
        _check_same([member.url for member in members], cards)
        self._card = cards[0]
        self.served_name, root, longest = self._card
        if max_model_len is not None and max_model_len > longest:
            raise EngineError(
                f"max_model_len {max_model_len} is more than the {longest} tokens of context at {members[0].url}: ask for "
                f"less, or start the servers with --max-model-len {max_model_len}"
            )
        self.max_model_len = max_model_len or longest
        held = Held(self._version, self._version)
        self._updates = Updates(self._pool, root, self._folder, held, self._transfer, self._probe)
        for member in members:
            await _at_open(member, self._updates.reset(member))
        await asyncio.gather(*(_at_open(member, self._check_member(member)) for member in members))
        await self._updates.check_same()
        if require_sync:
            for member in members:
                await self._updates.check_means(member)

    async def _check_member(self, member: Member) -> None:
        """Ask a server for a few tokens: is its tokenizer ours, and are its logprobs raw."""
        ids = self.tokenizer.encode(_PROBE, add_special_tokens=False)
        try:
            body = {"model": self.served_name, "prompt": _PROBE, "add_special_tokens": False}
            found = (await member.http.post("/tokenize", body)).get("tokens")
        except Refusal:  # a server may leave it out
            found = ids
        if found != ids:
            raise EngineError(f"{member.url} has another tokenizer than {self._folder}: name the model it serves")
        room = self._card[2] - 2
        ids = ids[: max(1, min(_PROBE_TOKENS, room // 2))]
        sampling = SamplingConfig(temperature=2.0, max_tokens=max(1, min(_PROBE_TOKENS, room - len(ids))), seed=1)
        sample = await self._complete(member, Request(tuple(ids), sampling, frozenset()), self._updates.held)
        whole = [*ids, *sample.token_ids]
        scored = read_score(await member.http.post("/v1/completions", score_body(whole, self.served_name)), whole)
        pairs = list(zip(sample.logprobs, scored[len(ids) - 1 :], strict=True))
        off = sum(abs(one - other) for one, other in pairs) / len(pairs)
        if off > _RAW_TOLERANCE:
            raise EngineError(
                f"{member.url} reports logprobs after temperature and filters (off by {off:.2g} nats), expected raw ones: "
                "start it without --logprobs-mode"
            )

    async def _probe(self, member: Member, held: Held, seconds: float | None) -> list[float]:
        ids = self.tokenizer.encode(_PROBE, add_special_tokens=False)[: max(1, min(_SCORED_TOKENS, self._card[2] - 1))]
        try:
            body = score_body(ids, self._name(held, False))
            return read_score(await self._ask(member, body, seconds), ids)
        except RequestError:
            return [math.nan] * (len(ids) - 1)

    async def _revive(self, member: Member) -> None:
        card = await _base_card(member)
        if (card[0], card[2]) != (self._card[0], self._card[2]):
            raise ServerFault(f"now serves {_shown(card)}, expected {_shown(self._card)}")
        await self._updates.restore(member)

    # requests

    def _start(self, request: Request, only: Member | None = None) -> Future[Sample]:
        async def work(member: Member, held: Held) -> Sample:
            return await self._complete(member, request, held)

        return self._loop.submit(self._call(work, only))

    def score(self, token_ids: Sequence[int], *, base: bool = False) -> list[float]:
        """Return the log-probability of tokens 1 to T-1 given those before them: `T - 1` numbers in nats."""
        return self._score(token_ids, base, None)

    def _score(self, token_ids: Sequence[int], base: bool, only: Member | None) -> list[float]:
        ids = self.check_ids(token_ids)
        if len(ids) >= self.max_model_len:
            raise RequestError(f"cannot score {len(ids)} tokens: the context holds {self.max_model_len} with one more")

        async def work(member: Member, held: Held) -> list[float]:
            body = score_body(ids, self._name(held, base))
            return await self._believed(member, held, body, lambda answer: read_score(answer, ids))

        return self._loop.run(self._call(work, only))

    def each(self) -> list[Any]:
        """Return one view a server that is up, by its URL: what it is asked goes to that server only.

        Raises:
            EngineError: None is up, and none comes back.
        """
        self._loop.run(self._pool.pick())
        return [_One(self, member) for member in self._pool.up]

    async def _call(self, work: Callable[[Member, Held], Awaitable[_T]], only: Member | None = None) -> _T:
        async with self._pool.request():
            if self._distrusted is not None:
                raise EngineError(f"the engine is not used: {self._distrusted}")
            held = self._updates.held  # does not change while a request is under way
            return await self._pool.call(lambda member: work(member, held), only)

    async def _complete(self, member: Member, request: Request, held: Held) -> Sample:
        version = held.base_version if request.base else held.version

        def read(answer: Any) -> Sample:
            return read_completion(
                answer, request, tokenizer=self.tokenizer, vocab_size=self.vocab_size, version=version
            )

        return await self._believed(member, held, completion_body(request, self._name(held, request.base)), read)

    async def _believed(self, member: Member, held: Held, body: dict[str, Any], read: Callable[[Any], _T]) -> _T:
        try:
            result = read(await self._ask(member, body))
        except RequestError:  # NaN is the model's own only where the model is the right one
            await self._updates.check_answer(member, held)
            raise
        await self._updates.check_answer(member, held)
        return result

    async def _ask(self, member: Member, body: dict[str, Any], seconds: float | None = None) -> Any:
        try:
            return await member.http.post("/v1/completions", body, timeout=seconds, harmless=True)
        except (Refusal, ServerFault) as error:
            if NOT_IN_JSON in str(error):
                raise RequestError(NOT_A_NUMBER) from None
            if isinstance(error, ServerFault):
                raise
            refusal = error
            if refusal.status == 404:  # not the caller's mistake: the server served it when it was last asked
                raise ServerFault(f"was restarted and does not know {body['model']} any more") from None
            raise

    def _name(self, held: Held, base: bool) -> str:
        return self.served_name if base or held.adapter is None else held.adapter

    # new weights

    def update(self, source: Mapping[str, torch.Tensor] | Path | str) -> PolicyVersion:
        """Take new weights, or a PEFT adapter in place of the one before, on all servers or on none; see `Syncable`.

        Raises:
            EngineError: A server was started without the means; the message holds the command that starts it right.
            SyncError: A server failed or refused (a tensor is missing, unknown or corrupted). The others sample on with
                the weights before; one that broke off half-way is left out until it is restarted.
            ModelError: vLLM does not serve such an adapter.
        """
        with self._updating:
            if self._change is not None:  # of a caller who was interrupted
                wait([self._change])
            return (
                self._change_adapter(Path(source)) if isinstance(source, Path | str) else self._change_weights(source)
            )

    def _change_weights(self, tensors: Mapping[str, torch.Tensor]) -> PolicyVersion:
        if self._updates.held.adapter:
            raise EngineError("this engine samples with an adapter; give it adapters, or open one without for weights")
        number = self._version.number + 1
        folder = self._transfer.folder(number, sum(tensor.nbytes for tensor in tensors.values()))
        version = PolicyVersion(number, write_weights(folder, tensors))
        return self._in_turn(lambda: self._updates.change_weights(folder, version))

    def _change_adapter(self, source: Path) -> PolicyVersion:
        if self._updates.held.folder:
            raise EngineError("this engine was given whole weights; give it weights, or open one for adapters")
        facts = check_adapter(source, self._folder)
        number = self._version.number + 1
        folder = self._transfer.folder(number, 0)
        shutil.copytree(source, folder)  # a server may read it again later, and a trainer may write there again
        version = PolicyVersion(number, facts.fingerprint)
        name = f"llmrl-{self._run}-{number}-{facts.fingerprint[:8]}"
        return self._in_turn(lambda: self._updates.change_adapter(name, folder, version))

    def _in_turn(self, change: Callable[[], Awaitable[None]]) -> PolicyVersion:
        """Run a change when nothing else is under way. Once begun it ends, even if the caller is interrupted."""

        async def run() -> PolicyVersion:
            async with self._pool.update():
                await self._pool.whole(keep())
            self.trust()
            return self._version

        async def keep() -> None:
            try:
                await change()
            finally:
                held = self._updates.held
                self._version = held.version
                self._transfer.keep_only(*(folder for folder in (held.folder, held.adapter_folder) if folder))

        self._change = self._loop.submit(run())
        return self._change.result()

    def close(self) -> None:
        """Let go of the servers, which run on; requests under way fail, an update that has begun comes to its end."""
        pool: Pool | None = getattr(self, "_pool", None)
        self._loop.stop(self._let_go(), first=pool.calm if pool else None, longest=pool.timeout if pool else 0.0)
        self._transfer.remove()

    async def _let_go(self) -> None:
        updates: Updates | None = getattr(self, "_updates", None)
        if updates is not None and updates.held.adapter:
            await updates.drop_adapter(updates.held.adapter)
        if hasattr(self, "_pool"):
            await self._pool.close()


class _One:
    """The view of one server among several."""

    def __init__(self, engine: ServerEngine, member: Member) -> None:
        self.name = member.url
        self._engine, self._member = engine, member

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probability of tokens 1 to T-1."""
        return self._engine._score(token_ids, False, self._member)

    def generate(self, prompt: Sequence[int], sampling: SamplingConfig) -> Sample:
        """Return one sample."""
        (request,) = self._engine.requests(prompt, replace(sampling, n=1))
        return self._engine._start(request, self._member).result()

    def cached_tokens(self, prompt: Sequence[int]) -> None:
        """Servers do not say how many tokens of a prompt came out of their prefix cache."""


async def _at_open(member: Member, work: Awaitable[_T]) -> _T:
    """Name the server in what goes wrong while opening."""
    try:
        return await work
    except RequestError as error:
        raise EngineError(f"{member.url} cannot be used: {error}; check its weights") from None
    except LlmrlError:
        raise
    except (ServerFault, ServerBusy, Refusal) as error:
        raise EngineError(
            f"{member.url} cannot be used: {error}\nstart it first, and check the URL: llmrl serve MODEL --port PORT"
        ) from None


async def _base_card(member: Member) -> tuple[str, str, int]:
    """Return (name, root, context length) of the model a server was started with."""
    found = await member.http.get("/v1/models")
    try:
        card = next(card for card in found["data"] if card.get("parent") is None)
        return str(card["id"]), str(card["root"]), int(card["max_model_len"])
    except (KeyError, TypeError, StopIteration, AttributeError, ValueError):
        raise ServerFault(f"answered /v1/models with {found!r:.80}; expected a vLLM server") from None


def _check_same(urls: Sequence[str], cards: Sequence[tuple[str, str, int]]) -> None:
    """Refuse servers that serve different models, naming the odd ones."""
    usual, _ = Counter(cards).most_common(1)[0]
    odd = [f"{url} serves {_shown(card)}" for url, card in zip(urls, cards, strict=True) if card != usual]
    if odd:
        first = urls[cards.index(usual)]
        raise EngineError(
            f"{'; '.join(odd)}, but {first} serves {_shown(usual)}: start all servers with the same model and options"
        )


def _shown(card: tuple[str, str, int]) -> str:
    name, root, length = card
    return f"{name} (from {root}, {length} tokens of context)"

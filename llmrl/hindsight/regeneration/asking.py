"""Asking a model for text: one of our engines, or any OpenAI-compatible endpoint; answers are kept, and counted.

NAME@http://127.0.0.1:8000/v1     the model NAME at an endpoint; without NAME@ the only one that it serves
FOLDER or hub name                a model that is opened here, or by the vLLM servers of --server_url
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llmrl.errors import DataError, EngineError, RequestError, UsageError
from llmrl.hindsight.regeneration.answers import Answers, key_of
from llmrl.hindsight.regeneration.budget import Cost, Meter
from llmrl.rollout.chat import Conversation
from llmrl.rollout.engine import BaseEngine
from llmrl.rollout.http import is_http_url
from llmrl.rollout.users import ChatEndpoint
from llmrl.types import FinishReason, Message, SamplingConfig

_MESSAGE_TOKENS = 16  # of a chat template, a message


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: without special tokens.
        cut: it was cut off at the limit of tokens.
        prompt_hash: of the messages.
    """

    text: str
    cut: bool
    prompt_hash: str


class Source(Protocol):
    """A model that can be asked. `identity` is all that makes its answers what they are, beside the question."""

    name: str
    identity: Mapping[str, Any]

    def most(self, messages: Sequence[Message]) -> int:
        """Return the most tokens that a question can take, its answer included."""
        ...

    def answer(
        self, messages: Sequence[Message], seed: int, schema: Mapping[str, Any] | None, cost: Cost
    ) -> tuple[str, bool]:
        """Return the text, and whether it was cut off; fill in what it took."""
        ...


class EngineSource:
    """One of our engines.

    Args:
        engine: of any backend.
        name: of the model.
        sampling: of answers.
        constrained: hold answers to the schema where there is one; a backend that cannot is asked without.
    """

    def __init__(self, engine: BaseEngine, name: str, sampling: SamplingConfig, *, constrained: bool = True) -> None:
        self.name, self._engine, self._sampling = name, engine, sampling
        self._constrained = constrained and engine.supports_json_schema
        self.identity: Mapping[str, Any] = {
            "model": engine.version.fingerprint,
            "sampling": {key: value for key, value in sampling.to_json().items() if key not in ("seed", "n")},
            "constrained": self._constrained,
        }

    def most(self, messages: Sequence[Message]) -> int:
        """Return the tokens of the prompt and of the longest answer."""
        return len(self._prompt(messages)) + self._sampling.max_tokens

    def answer(
        self, messages: Sequence[Message], seed: int, schema: Mapping[str, Any] | None, cost: Cost
    ) -> tuple[str, bool]:
        """Sample one answer. See `Source`.

        Raises:
            RequestError: the prompt is too long for the context, or its template refuses it.
            EngineError: the engine died.
        """
        prompt = self._prompt(messages)
        held = dict(schema) if schema is not None and self._constrained else None
        sampling = replace(self._sampling, seed=seed, json_schema=held)
        sample = self._engine.submit(prompt, sampling).result()[0]
        cost.prompt, cost.completion = len(prompt), len(sample.token_ids)
        return sample.text, sample.finish_reason is FinishReason.LENGTH

    def _prompt(self, messages: Sequence[Message]) -> Sequence[int]:
        try:
            conversation = Conversation(self._engine.tokenizer)
            conversation.add(*messages)
            return conversation.prompt()
        except DataError as error:  # of this dialogue, which the template cannot write; others go on
            raise RequestError(str(error)) from None


class EndpointSource:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        endpoint: of the model.
        tokens: most tokens of an answer.
        temperature: of sampling.
        constrained: ask for answers that hold to the schema (`response_format`), where there is one.
    """

    def __init__(self, endpoint: ChatEndpoint, tokens: int, temperature: float, *, constrained: bool = True) -> None:
        self.name = f"{endpoint.model}@{endpoint.url.removesuffix('/chat/completions')}"
        self._endpoint, self._tokens, self._constrained = endpoint, tokens, constrained
        self._options = {"max_tokens": tokens, "temperature": temperature}
        self.identity: Mapping[str, Any] = {"model": self.name, "sampling": self._options, "constrained": constrained}

    def most(self, messages: Sequence[Message]) -> int:
        """Return an upper bound: an endpoint tells the tokens of a prompt only afterwards."""
        sizes = [len(m.content.encode()) + _MESSAGE_TOKENS for m in messages]  # no token is less than a byte
        return sum(sizes) + self._tokens

    def answer(
        self, messages: Sequence[Message], seed: int, schema: Mapping[str, Any] | None, cost: Cost
    ) -> tuple[str, bool]:
        """Ask for one answer. See `Source`, and `ChatEndpoint.ask` for the errors."""
        options: dict[str, Any] = dict(self._options)
        if schema is not None and self._constrained:
            held = {"name": "answer", "schema": dict(schema), "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": held}
        said = self._endpoint.ask(messages, seed, **options)
        text = said.text or ""  # a model that thought to the end of its tokens has said nothing
        if said.prompt_tokens is not None and said.completion_tokens is not None:
            cost.prompt, cost.completion = said.prompt_tokens, said.completion_tokens
        else:
            cost.prompt = self.most(messages) - self._tokens
            cost.completion = min(len(text.encode()), self._tokens) if text else self._tokens
        return text, said.finish_reason == "length"


class Asker:
    """A source in a role, with the answers that are kept and the meter of the run.

    Args:
        source: the model.
        role: "controller", "user", "agent" or "judge".
        answers: what is known already.
        meter: of the run.
    """

    def __init__(self, source: Source, role: str, answers: Answers, meter: Meter) -> None:
        self.source, self.role, self.name = source, role, source.name
        self._answers, self._meter = answers, meter

    def ask(self, messages: Sequence[Message], seed: int, schema: Mapping[str, Any] | None = None) -> Answer:
        """Return the answer to messages, from what is kept if it was asked before.

        Raises:
            BudgetSpent: the request might go over the budget.
            RequestError: this request cannot be served.
            EngineError: nobody answers.
        """
        said = [message.to_json() for message in messages]
        prompt_hash = key_of(said)
        key = key_of(self.source.identity, said, schema, seed)
        found = self._answers.get(key)
        if found is not None:
            self._meter.remember(self.role, sum(found["tokens"]))
            return Answer(found["text"], found["cut"], prompt_hash)
        most = self.source.most(messages)
        with self._meter.request(self.role, most) as cost:
            try:
                text, cut = self.source.answer(messages, seed, schema, cost)
            except EngineError:
                cost.prompt = most  # it may have been answered, and be paid for, and have been lost on the way
                raise
        self._answers.put(key, {"text": text, "cut": cut, "tokens": [cost.prompt, cost.completion], "role": self.role})
        return Answer(text, cut, prompt_hash)

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        """Return the text alone: an asker is a `llmrl.rollout.users.Chat`."""
        return self.ask(messages, seed).text


def split_endpoint(text: str) -> tuple[str | None, str] | None:
    """Return (name, URL) of "NAME@URL" or "URL", or None for what is no endpoint."""
    if is_http_url(text):
        return None, text
    name, at, url = text.partition("@")
    return (name, url) if at and name and is_http_url(url) else None


def only_model(url: str, key_env: str | None) -> str:
    """Return the one model that an endpoint serves.

    Raises:
        UsageError: it serves several, or none.
        EngineError: it does not answer.
    """
    import os

    import httpx

    key = os.environ.get(key_env or "", "").strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(f"{url.rstrip('/')}/models", headers=headers, timeout=30.0)
        answer.raise_for_status()
        names = [str(one["id"]) for one in answer.json()["data"]]
    except httpx.HTTPError as error:
        raise EngineError(
            f"{url}/models gave no answer ({type(error).__name__}: {error!s:.120}); is it running?"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise EngineError(f"{url}/models is no list of models; name the model: NAME@{url}") from None
    if len(names) != 1:
        raise UsageError(f"{url} serves {', '.join(names) or 'no model'}: name one, NAME@{url}")
    return names[0]

"""Simulated users: environments in which somebody talks with the model that is trained.

What speaks is a function of the dialogue, so a script, another model and an endpoint on the network are the same thing:

    def make(row, seed):
        user = as_user(EngineChat(engine, sampling), row["persona"], seed)          # one of our engines
        user = as_user(ChatEndpoint("http://127.0.0.1:8000/v1", "qwen"), row["persona"], seed)
        user = lambda messages: "why?"                                              # a script
        return SimulatedUser(user, stop="###STOP###", reward=judge)

What a user says is an observation to the model: it is recorded with a loss mask of zeros and never trained on.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmrl.errors import EngineError, RequestError, UsageError
from llmrl.rollout.chat import Conversation
from llmrl.rollout.environment import Step
from llmrl.rollout.protocols import Engine
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message, SamplingConfig

Speaker = Callable[[Sequence[Message]], str]
"""The dialogue so far, as the model sees it, to what the user says next."""

Chat = Callable[[Sequence[Message], int], str]
"""Messages that end with one to answer, and a seed, to the answer."""

OPENER = "Begin the conversation."
_LONGEST_WAIT = 60.0  # seconds that a server's Retry-After may ask for


class SimulatedUser:
    """An environment of one user who talks with the model.

    Args:
        speak: Says what the user says next.
        context: Messages before the user's first one: the model's system prompt.
        max_user_turns: After the answer to the user's last message the episode is cut (`truncated`).
        stop: Ends the episode: a phrase in what the user says, or a function of the dialogue, asked after each message
            of either side.
        reward: Called after each answer with the dialogue, the user's reply included, and whether the episode is over;
            returns the named rewards of that answer.
        tools: For the chat template.
    """

    def __init__(
        self,
        speak: Speaker,
        *,
        context: Sequence[Message] = (),
        max_user_turns: int = 8,
        stop: str | Callable[[Sequence[Message]], bool] | None = None,
        reward: Callable[[Sequence[Message], bool], Mapping[str, float]] | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ) -> None:
        if max_user_turns < 1:
            raise UsageError(f"max_user_turns: expected a number >= 1, got {max_user_turns}")
        self.tools = tools
        self.messages = list(context)
        self._speak, self._stop, self._reward = speak, stop, reward
        self._left = max_user_turns

    def observe(self) -> Sequence[Message]:
        """Return the context and the user's first message."""
        self._say()
        return tuple(self.messages)

    def step(self, answer: Message) -> Step:
        """Let the user answer the model."""
        self.messages.append(answer)
        done = self._is_over()
        truncated = not done and self._left == 0
        said = () if done or truncated else (self._say(),)
        done = done or (bool(said) and self._is_over())
        rewards = self._reward(tuple(self.messages), done or truncated) if self._reward else {}
        return Step(said, rewards=rewards, done=done, truncated=truncated)

    def _say(self) -> Message:
        self._left -= 1
        self.messages.append(Message("user", self._speak(tuple(self.messages))))
        return self.messages[-1]

    def _is_over(self) -> bool:
        last = self.messages[-1]
        if isinstance(self._stop, str):
            return last.role == "user" and self._stop in last.content
        return self._stop is not None and self._stop(tuple(self.messages))


def as_user(chat: Chat, persona: str, seed: int, *, opener: str = OPENER) -> Speaker:
    """Let a chat model play the user: it sees its own messages as the assistant's and the other side's as the user's.

    Args:
        chat: The model.
        persona: Its system prompt: who it is, what it wants, when to end.
        seed: The environment's seed; each turn derives its own.
        opener: What it is asked before the first message, since templates want a user to speak first.
    """

    def speak(messages: Sequence[Message]) -> str:
        turn = sum(m.role == "user" for m in messages)
        return chat(users_view(messages, persona, opener), derive_seed(seed, turn))

    return speak


def users_view(messages: Sequence[Message], persona: str, opener: str = OPENER) -> list[Message]:
    """Return a dialogue as its user lives it: their own messages are the assistant's, the other side's the user's.

    Args:
        messages: of the dialogue; system messages, tool calls and their results are between the model and its world.
        persona: the system message: who the user is.
        opener: stands before the user's first message where they speak first, since templates want a user to.
    """
    roles = {"user": "assistant", "assistant": "user"}
    lived: list[Message] = []
    for message in messages:
        if message.role not in roles or not message.content.strip():  # an agent that calls a tool says nothing
            continue
        role, text = roles[message.role], message.content
        if lived and lived[-1].role == role:
            lived[-1] = Message(role, f"{lived[-1].content}\n{text}")
        else:
            lived.append(Message(role, text))
    asked = [Message("user", opener)] if not lived or lived[0].role == "assistant" else []
    return [Message("system", persona), *asked, *lived]


class EngineChat:
    """Answers messages with one of our engines, so that a trained model can be the user."""

    def __init__(
        self, engine: Engine, sampling: SamplingConfig, *, template_options: Mapping[str, Any] | None = None
    ) -> None:
        self._engine, self._sampling, self._options = engine, sampling, template_options

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        """Return the text of the answer."""
        conversation = Conversation(self._engine.tokenizer, template_options=self._options)
        conversation.add(*messages)
        return self._engine.submit(conversation.prompt(), replace(self._sampling, seed=seed)).result()[0].text


@dataclass(frozen=True)
class ChatAnswer:
    """What an endpoint answered; `text` is None where it said nothing, the others where it does not tell them."""

    text: str | None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class ChatEndpoint:
    """Answers messages with any OpenAI-compatible chat endpoint. Text only; can be called from many threads.

    Args:
        url: What stands before `/chat/completions`: https://api.example.com/v1.
        model: The name the endpoint knows the model by.
        api_key_env: Name of the environment variable that holds the key. The key is read at each request and written
            nowhere.
        options: Further fields of the request: temperature, max_tokens. null takes a field out, such as `seed` where an
            endpoint refuses it.
        timeout: Seconds to wait for an answer.
        retries: How often to ask again after 429, 5xx, a lost connection or no answer in time.
        backoff: Seconds before the first of these, doubled each time; a Retry-After header of the server goes first.

    Raises:
        UsageError: The environment variable is not set, or the URL is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        options: Mapping[str, Any] | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 1.0,
    ) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise UsageError(f"expected a URL such as http://127.0.0.1:8000/v1, got {url!r:.80}")
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.model = model
        self._api_key_env = api_key_env
        self._options = dict(options or {})
        self._retries, self._backoff = retries, backoff
        self._lost = httpx.TransportError
        # one connection an episode: how long a request would wait for a free one is not the server's fault
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.Client(timeout=timeout, limits=limits)
        self._headers()

    def __call__(self, messages: Sequence[Message], seed: int) -> str:
        """Return the text of the answer.

        Raises:
            RequestError: There is none; or see `ask`.
            EngineError: See `ask`.
        """
        text = self.ask(messages, seed).text
        if text is None:
            raise RequestError(f"{self.url}: expected an answer in text, got none")
        return text

    def ask(self, messages: Sequence[Message], seed: int, **options: Any) -> ChatAnswer:
        """Return the answer with what the endpoint says of it.

        Args:
            messages: end with one to answer.
            seed: of sampling.
            options: further fields of this request, before those of the endpoint.

        Raises:
            RequestError: The endpoint refuses these messages; others may be served.
            EngineError: It refuses everyone, stays away after all retries, or answers with something else than a chat.
        """
        said = [message.to_json() for message in messages]
        body = {"model": self.model, "messages": said, "seed": seed, **self._options, **options}
        answer = self._ask({key: value for key, value in body.items() if value is not None})
        try:
            whole = answer.json()
            choice, usage = whole["choices"][0], whole.get("usage") or {}
            text, reason = choice["message"]["content"], choice.get("finish_reason")
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise EngineError(
                f"{self.url} answered with something that is not a chat completion: {self._words(answer.text)!r:.100}; "
                "expected the URL of an OpenAI-compatible endpoint, without /chat/completions"
            ) from None
        if not isinstance(text, str | None):
            raise RequestError(f"{self.url}: expected an answer in text, got {text!r:.60}")
        return ChatAnswer(text, reason, *(count if isinstance(count, int) else None for count in counts))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _ask(self, body: dict[str, Any]) -> Any:
        for attempt in range(self._retries + 1):
            wait = self._backoff * 2**attempt * (0.5 + random.random() / 2)  # spread, so that not all come back at once
            try:
                answer = self._client.post(self.url, json=body, headers=self._headers())
            except self._lost as error:
                trouble = f"{type(error).__name__}: {self._words(str(error))}"
            else:
                if answer.is_success:
                    return answer
                trouble = f"HTTP {answer.status_code}: {self._words(answer.text)}"
                self._refuse(answer.status_code, trouble)
                wait = _retry_after(answer.headers.get("retry-after")) or wait
            if attempt < self._retries:
                time.sleep(wait)
        raise EngineError(f"{self.url} gave no answer in {self._retries + 1} tries ({trouble}); is it running?")

    def _refuse(self, status: int, trouble: str) -> None:
        if status in (408, 429) or status >= 500:
            return
        if status in (400, 413, 422):
            raise RequestError(f"{self.url} refuses the request: {trouble}")
        key = f"the key in {self._api_key_env}" if self._api_key_env else "api_key_env"
        raise EngineError(f"{self.url} refuses: {trouble}; check the URL, model {self.model!r} and {key}")

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _key(self) -> str | None:
        if self._api_key_env is None:
            return None
        key = os.environ.get(self._api_key_env, "").strip()
        if not key:
            raise UsageError(f"{self._api_key_env} is not set: expected the key of {self.url} in it")
        return key

    def _words(self, text: str) -> str:
        """Return a server's words in a line; some repeat the key, which must not reach a file."""
        key = self._key()
        return " ".join((text.replace(key, "***") if key else text).split())[:300]


def _retry_after(header: str | None) -> float | None:
    try:
        return min(max(float(header or ""), 0.0), _LONGEST_WAIT)
    except ValueError:
        return None

"""What an episode is played against: a game, a tool, a simulated user.

    class Calculator:
        tools = [{"type": "function", "function": {"name": "add", "parameters": {...}}}]

        def __init__(self, row, seed):
            self.row = row

        def observe(self):
            return [Message("user", self.row["question"])]

        def step(self, answer):
            calls, mistake = parse_tool_calls(answer.content)
            if mistake:
                return Step([Message("tool", mistake)])
            if not calls:
                return Step(rewards={"correct": float(self.row["answer"] in answer.content)}, done=True)
            return Step([Message("tool", str(sum(call.arguments["terms"])), name=call.name) for call in calls])

`run_episodes(engine, rows, Calculator, sampling, output=...)` plays it; a step that raises ends its own episode only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from llmrl.errors import DataError
from llmrl.types import Message, Record

_TOOL_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_FORM = 'write <tool_call>{"name": "...", "arguments": {...}}</tool_call>'


@dataclass(frozen=True)
class Step(Record):
    """What an environment answers with.

    Attributes:
        messages: the observations that follow; at least one unless the episode is over.
        rewards: named numbers for the answer that was judged.
        done: the episode is over, nothing comes after.
        truncated: the environment gives up on a limit of its own; the last state still has a value.
        metadata: JSON to keep with the episode: what was retrieved, which tool failed.
    """

    messages: Sequence[Message] = ()
    rewards: Mapping[str, float] = field(default_factory=dict)
    done: bool = False
    truncated: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._need(isinstance(self.messages, list | tuple), "messages", "a list of messages")
        messages = tuple(m if isinstance(m, Message) else Message.from_json(m) for m in self.messages)
        for name in ("done", "truncated"):
            self._need(isinstance(getattr(self, name), bool), name, "true or false")
        self._need(not (self.done and self.truncated), "truncated", "false where done is true")
        over = self.done or self.truncated
        self._need(over or bool(messages), "messages", "a message to go on with, or done=True")
        numbers = [isinstance(r, int | float) and not isinstance(r, bool) for r in dict(self.rewards).values()]
        self._need(all(numbers) and all(map(math.isfinite, self.rewards.values())), "rewards", "named finite numbers")
        try:
            metadata = json.loads(json.dumps(dict(self.metadata), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"Step.metadata: expected what JSON can hold, got {self.metadata!r:.80} ({error})"
            ) from None
        self._set(messages=messages, rewards=dict(self.rewards), metadata=metadata)


@runtime_checkable
class Environment(Protocol):
    """One episode's world; made for that episode alone and used by one thread. It may have a `close()`.

    `tools` are JSON-schema descriptions for the chat template; empty where there are none.
    """

    tools: Sequence[dict[str, Any]]

    def observe(self) -> Sequence[Message]:
        """Return the opening: system prompt, question."""
        ...

    def step(self, answer: Message) -> Step:
        """Take the model's answer and return what follows."""
        ...


MakeEnvironment = Callable[[Mapping[str, Any], int], Environment]
"""`make_environment(row, seed)`; the row is a copy, the seed is the episode's own."""


@dataclass(frozen=True)
class ToolCall:
    """One call that a model wrote."""

    name: str
    arguments: dict[str, Any]


def parse_tool_calls(text: str) -> tuple[list[ToolCall], str | None]:
    """Return the calls in `text` in the form `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, and a mistake.

    Returns:
        The calls and None; no calls and None where the text has none; or no calls and a sentence that tells the model
        what is wrong with the first malformed one, to be sent back as a tool's message.
    """
    calls = []
    for number, match in enumerate(_TOOL_CALL.finditer(text), start=1):
        try:
            calls.append(_tool_call(*match.groups()))
        except (ValueError, RecursionError) as error:
            return [], f"tool call {number}: {error}; {_FORM}"
    return calls, None


def _tool_call(body: str, end: str) -> ToolCall:
    if end != "</tool_call>":
        raise ValueError("expected </tool_call> at its end")
    try:
        call = json.loads(body, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at character {error.pos} of {body.strip()!r:.80}") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f"expected an object with a name, got {body.strip()!r:.80}")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise ValueError(f"expected arguments to be an object, got {json.dumps(arguments):.80}")
    return ToolCall(call["name"], arguments)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON, use null")

"""What an environment may answer with, and how tool calls are read out of a model's text."""

import re

import pytest

from llmrl.errors import DataError
from llmrl.rollout.environment import Environment, Step, ToolCall, parse_tool_calls
from llmrl.types import Message

HELLO = Message("user", "hello")


def test_step_round_trips_and_takes_messages_as_json():
    step = Step([HELLO.to_json()], rewards={"score": 1}, metadata={"hops": (1, 2)})
    assert step.messages == (HELLO,)
    assert step.metadata == {"hops": [1, 2]}
    assert Step.from_json(step.to_json()) == step


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "a message to go on with, or done=True"),
        ({"done": True, "truncated": True}, "false where done is true"),
        ({"done": 1}, "true or false"),
        ({"messages": HELLO, "done": True}, "a list of messages"),
        ({"done": True, "rewards": {"score": float("nan")}}, "named finite numbers"),
        ({"done": True, "rewards": {"score": True}}, "named finite numbers"),
        ({"done": True, "metadata": {"score": float("inf")}}, "what JSON can hold"),
        ({"done": True, "metadata": {"who": object()}}, "what JSON can hold"),
    ],
)
def test_step_refuses(fields, words):
    with pytest.raises(DataError, match=words):
        Step(**fields)


def test_environment_is_told_by_what_it_has():
    class Game:
        tools = ()

        def observe(self):
            return [HELLO]

    assert not isinstance(Game(), Environment)
    Game.step = lambda self, answer: Step(done=True)
    assert isinstance(Game(), Environment)


def test_parse_tool_calls_returns_calls_in_order():
    first = '<tool_call>\n{"name": "find", "arguments": {"q": "a"}}\n</tool_call>'
    text = f'I look.{first} and <tool_call>{{"name": "now"}}</tool_call>'
    assert parse_tool_calls(text) == ([ToolCall("find", {"q": "a"}), ToolCall("now", {})], None)
    assert parse_tool_calls("no tools here") == ([], None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '<tool_call>{"name": "find", }</tool_call>',
            "not valid JSON: Illegal trailing comma|not valid JSON: Expecting",
        ),
        ('<tool_call>{"name": "find"}', "expected </tool_call> at its end"),
        ('<tool_call>{"name": "a"}<tool_call>{"name": "b"}</tool_call>', "tool call 1: expected </tool_call>"),
        ('<tool_call>["find"]</tool_call>', "expected an object with a name"),
        ('<tool_call>{"name": 3}</tool_call>', "expected an object with a name"),
        ('<tool_call>{"name": "find", "arguments": "a"}</tool_call>', 'expected arguments to be an object, got "a"'),
        ('<tool_call>{"name": "find", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "tool call 1"),
        ('<tool_call>{"name": "ok"}</tool_call><tool_call>{</tool_call>', "tool call 2"),
    ],
)
def test_parse_tool_calls_says_what_is_wrong(text, words):
    calls, mistake = parse_tool_calls(text)
    assert calls == []  # nothing is done by halves
    assert re.search(words, mistake), mistake
    assert mistake.endswith('write <tool_call>{"name": "...", "arguments": {...}}</tool_call>')
    assert len(mistake) < 300

"""What the environments share: playing a scripted policy, reading a row, comparing sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.rollout.environment import Environment
from llmrl.types import Message

Policy = Callable[[Sequence[Message]], str]
"""`policy(history)`: what the agent says after these messages, the last of which is the world's."""


def play(
    environment: Environment, policy: Policy, *, id: str, task: str, provenance: Mapping[str, Any] | None = None
) -> Dialogue:
    """Play one episode to its end and return it.

    Args:
        environment: a fresh one; it has to end by itself.
        policy: the agent; it gets all messages so far.
        id, task, provenance: of the dialogue.

    Returns:
        The dialogue, each of the agent's turns with the sum of what it was rewarded. What the world says last is kept.
    """
    messages = list(environment.observe())
    rewards = [0.0] * len(messages)
    while True:
        answer = Message(AGENT, policy(messages))
        step = environment.step(answer)
        messages += [answer, *step.messages]
        rewards += [float(sum(step.rewards.values())), *(0.0 for _ in step.messages)]
        if step.done or step.truncated:
            return Dialogue(
                id=id,
                messages=tuple(messages),
                rewards=tuple(rewards),
                done=step.done,
                truncated=step.truncated,
                task=task,
                provenance=dict(provenance or {}),
            )


def row_value(row: Mapping[str, Any], key: str, known: Sequence[str], default: str | None = None) -> str:
    """Return `row[key]`, which has to be one of `known`.

    Raises:
        DataError: the key is missing and has no default, or its value is another.
    """
    value = row.get(key, default)
    if value not in known:
        raise DataError(
            f"row {row.get('id', '?')}: expected '{key}' to be one of {', '.join(known)}, got {value!r:.80}"
        )
    return str(value)


def normalised(text: str) -> str:
    """Return the words alone, in lower case: neither punctuation nor white space matters."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))

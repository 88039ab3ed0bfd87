"""What models are asked: a controller for edits, a judge for a score, a user and an agent for what they say next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.types import Message

END = "[END]"
"""What a user says when the conversation is over for them."""

USER = (
    "You are the user in a conversation with an agent. Go on as this same user would: in their manner, as long as they speak, "
    f"no easier to win over than they were. Say only the user's next turn. When the conversation is over for you, say {END}."
)

_CONTROLLER = (
    "You review conversations of an agent after they have ended. You know how they ended; the agent did not. Find where the "
    "agent went wrong, and write what it should have said there instead. What you write must be what the agent could have said "
    "at that moment: use nothing that the user tells only later, in no words. Write it as long as the agent's turns are, and "
    "only the agent's words."
)
_WITHOUT_HINDSIGHT = (
    "You are shown a conversation of an agent up to its last turn. Write what the agent should have said there instead, so "
    "that the conversation goes as well as it can. Write it as long as the agent's turns are, and only the agent's words."
)
_JUDGE = (
    "You judge conversations of an agent. Read the whole conversation, say in a sentence what speaks for and against it, then "
    "give a score from 0 to 10. Score what the user did and said, not how nice the agent is.\n\nRubric: "
)
RUBRIC = (
    "0: the user refuses or leaves in anger. 3: the user stays unmoved. 5: the user is interested but promises nothing. 7: the "
    "user agrees in words to a part. 10: the user does what the agent is there for, in full."
)


def controller_prompt(
    dialogue: Dialogue,
    turns: Sequence[int],
    edits: int,
    candidates: int,
    schema: Mapping[str, Any],
    usual: float,
    complaint: str | None = None,
) -> list[Message]:
    """Return the question for edits of a finished dialogue.

    Args:
        dialogue: whole; system messages are what the agent was told.
        turns: that may be edited.
        edits: most of them; all are named where it is their number.
        candidates: utterances for each.
        schema: of the answer.
        usual: mean return of the logs, to tell what the outcome is worth.
        complaint: why the last answer could not be used.
    """
    most = "every turn" if edits >= len(turns) else f"at most {edits} turn{'s' if edits > 1 else ''}"
    several = f", {candidates} different utterances for each" if candidates > 1 else ""
    text = "\n".join(
        [
            transcript(dialogue.messages),
            "",
            f"Outcome: the agent earned {dialogue.total:g}; conversations like this one earn {usual:.3g} on average.",
            f"Name {most} of the agent where something better could have been said{several}. Turns that may be named: "
            f"{', '.join(map(str, turns))}.",
            _schema(schema),
            *([f"Your last answer could not be used: {complaint}"] if complaint else []),
        ]
    )
    return [Message("system", _CONTROLLER), Message("user", text)]


def prefix_prompt(
    dialogue: Dialogue, turn: int, candidates: int, schema: Mapping[str, Any], complaint: str | None = None
) -> list[Message]:
    """Return the question for another utterance at a turn, with nothing of what came after it."""
    several = f"{candidates} different utterances" if candidates > 1 else "one utterance"
    text = "\n".join(
        [
            transcript(dialogue.messages[: turn + 1]),
            "",
            f"Write {several} for turn {turn}.",
            _schema(schema),
            *([f"Your last answer could not be used: {complaint}"] if complaint else []),
        ]
    )
    return [Message("system", _WITHOUT_HINDSIGHT), Message("user", text)]


def judge_prompt(messages: Sequence[Message], rubric: str, schema: Mapping[str, Any]) -> list[Message]:
    """Return the question for the score of a dialogue."""
    return [Message("system", _JUDGE + rubric), Message("user", f"{transcript(messages)}\n\n{_schema(schema)}")]


def transcript(messages: Sequence[Message]) -> str:
    """Return the turns with their numbers; the agent's instructions and tools stand where they came."""
    names = {AGENT: "Agent", "user": "User", "system": "Instructions of the agent", "tool": "Tool"}
    return "\n".join(f"[{i}] {names[m.role]}: {_said(m)}" for i, m in enumerate(messages))


def _said(message: Message) -> str:
    calls = [f"(calls {json.dumps(call.get('function', call))})" for call in message.tool_calls]
    return " ".join([*message.content.split(), *calls])


def _schema(schema: Mapping[str, Any]) -> str:
    return f"Answer with JSON of this schema and nothing else: {json.dumps(schema)}"

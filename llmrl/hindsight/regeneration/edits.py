"""What a controller proposes: which turn of the agent was at fault, why, and what should have been said; as JSON.

    {"edits": [{"turn": 3, "diagnosis": "The user was never asked what matters to them.", "utterances": ["..."]}]}

An answer is read strictly. What cannot be used has a reason, by which it is counted, and is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
# of texts in an answer under constrained decoding: a small model would never come to an end
_LONGEST_DIAGNOSIS, _LONGEST_UTTERANCE = 300, 800


@dataclass(frozen=True)
class Edit:
    """One turn said otherwise.

    Attributes:
        turn: index into the dialogue's messages.
        diagnosis: what was wrong with it.
        utterance: what the agent says instead.
        candidate: which of several utterances for this turn.
    """

    turn: int
    diagnosis: str
    utterance: str
    candidate: int = 0


@dataclass(frozen=True)
class Refused:
    """What was not used, and why.

    Attributes:
        reason: a short name to count by.
        detail: one sentence.
        edit: what was refused, where there was that much.
        answer: the controller's whole answer, where nothing could be read in it.
    """

    reason: str
    detail: str
    edit: Edit | None = None
    answer: str | None = None


class BadAnswer(Exception):
    """An answer of which nothing can be used; `refused` says why."""

    def __init__(self, reason: str, detail: str, answer: str | None = None) -> None:
        super().__init__(detail)
        self.refused = Refused(reason, detail, answer=answer)


def edit_schema(turns: Sequence[int], edits: int, candidates: int) -> dict[str, Any]:
    """Return the JSON schema of an answer, for constrained decoding and for the prompt.

    Args:
        turns: indices of the turns that may be edited.
        edits: most turns that are edited; one at least.
        candidates: utterances for each of them.
    """
    utterances = {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": _LONGEST_UTTERANCE},
        "minItems": candidates,
        "maxItems": candidates,
    }
    edit = {
        "type": "object",
        "properties": {
            "turn": {"type": "integer", "enum": list(turns)},
            "diagnosis": {"type": "string", "minLength": 1, "maxLength": _LONGEST_DIAGNOSIS},
            "utterances": utterances,
        },
        "required": ["turn", "diagnosis", "utterances"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"edits": {"type": "array", "items": edit, "minItems": 1, "maxItems": edits}},
        "required": ["edits"],
        "additionalProperties": False,
    }


def parse_edits(text: str) -> list[Edit]:
    """Return the edits of an answer, one for each utterance; whether they can be used is for `validation` to say.

    A block of Markdown around the JSON is taken off, because chat models like it; any other text beside it is not.

    Raises:
        BadAnswer: "prose" where there is no JSON, "cut off" where it breaks off, "not the schema" where it is another one.
    """
    body = unfenced(text)
    if not body.startswith("{"):
        raise BadAnswer("prose", f"expected JSON and nothing else, got {text.strip()[:80]!r}", text)
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        at_the_end = getattr(error, "pos", 0) >= len(body) - 1 or "Unterminated string" in str(error)
        reason = "cut off" if at_the_end else "prose"
        raise BadAnswer(reason, f"not JSON: {str(error).splitlines()[0]}", text) from None
    try:
        return [edit for one in _of(value, dict)["edits"] for edit in _edits_of(_of(one, dict))]
    except (KeyError, TypeError) as error:
        raise BadAnswer(
            "not the schema", f"expected edits with turn, diagnosis and utterances: {error}", text
        ) from None


def unfenced(text: str) -> str:
    """Return a text without a block of Markdown around it."""
    inner = _FENCE.match(text.strip())
    return (inner[1] if inner else text).strip()


def _edits_of(one: dict[str, Any]) -> list[Edit]:
    turn, diagnosis = _of(one["turn"], int), _of(one["diagnosis"], str)
    said = _of(one["utterances"], list)
    if not said:
        raise TypeError("no utterance")
    return [Edit(turn, diagnosis, _of(text, str), i) for i, text in enumerate(said)]


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"expected {kind.__name__}, got {value!r:.60}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")

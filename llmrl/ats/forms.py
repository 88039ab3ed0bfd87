"""What a row may hold, whatever file it came from: five forms, checked and brought to one shape each.

`messages`; `prompt` with `completion`; `text`; multiple choice (`question`, `choices`, `answer`); free answers
(`question`, `answers`). The last two also take what the public sets call these columns: a letter as the answer,
TruthfulQA's `mc1` and `mc1_targets`, TriviaQA's answer with aliases, GSM8K's `solution`.
"""

from __future__ import annotations

import random
from typing import Any

from llmrl.ats.answers import LETTERS
from llmrl.errors import DataError, did_you_mean

FORMS = "'messages', 'prompt' with 'completion', 'text', or 'question' with 'choices' or 'answers'"
_KEYS = ("messages", "prompt", "completion", "text", "question", "choices", "answer", "answers")
_ONE_RIGHT = ("mc1", "mc1_targets")


def known_form(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the columns of a row that count; `where` is "FILE:LINE".

    Returns:
        One of {messages}, {prompt, completion}, {text}, {question, choices, answer: index}, {question, answers: texts}.

    Raises:
        DataError: no known form, or a value of the wrong kind.
    """
    if _has(fields, "messages"):
        value = fields["messages"]
        if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
            raise DataError(f"{where}: 'messages' must be a list of objects with 'role' and 'content' (a string)")
        return {"messages": value}
    if _has(fields, "prompt") or _has(fields, "completion"):
        return {key: _text(fields, key, where) for key in ("prompt", "completion")}
    if _has(fields, "text"):
        return {"text": _text(fields, "text", where)}
    if _has(fields, "question"):
        return _question(fields, where)
    hints = [did_you_mean(key, _KEYS) for key in fields]
    hint = next((h for h in hints if "did you mean" in h), "")
    raise DataError(f"{where}: needs {FORMS}; has: {', '.join(map(str, fields)) or 'nothing'}{hint}")


def is_multiple_choice(fields: dict[str, Any]) -> bool:
    """Tell whether a row of a known form is multiple choice."""
    return "choices" in fields


def _question(fields: dict[str, Any], where: str) -> dict[str, Any]:
    question = _text(fields, "question", where)
    if not question.strip():
        raise DataError(f"{where}: 'question' is empty")
    if _has(fields, "choices"):
        choices = _choices(fields["choices"], where)
        return {"question": question, "choices": choices, "answer": _index(fields.get("answer"), len(choices), where)}
    targets = next((key for key in _ONE_RIGHT if _has(fields, key)), None)
    if targets is not None:
        return {"question": question, **_one_right(fields[targets], question, f"{where}: '{targets}'")}
    return {"question": question, "answers": _answers(fields, where)}


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        got = f"{len(value)} of them" if isinstance(value, list) else type(value).__name__
        raise DataError(f"{where}: 'choices' must be a list of 2 to {len(LETTERS)} texts, got {got}")
    for choice in value:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"{where}: 'choices' must be texts that are not empty, got {choice!r:.60}")
    return value


def _index(answer: Any, choices: int, where: str) -> int:
    index = answer
    if isinstance(answer, str) and len(answer.strip()) == 1:
        index = LETTERS.find(answer.strip().upper())
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < choices:
        raise DataError(
            f"{where}: 'answer' must be the index of a choice, 0 to {choices - 1}, or its letter, A to "
            f"{LETTERS[choices - 1]}; got {answer!r:.60}"
        )
    return index


def _one_right(targets: Any, question: str, where: str) -> dict[str, Any]:
    """Read TruthfulQA's choices, of which the first is the right one, and deal them out anew, each time in the same way."""
    if isinstance(targets, dict):
        names, labels = targets.get("choices"), targets.get("labels")
    else:
        pairs = targets if isinstance(targets, list) else []
        complete = bool(pairs) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
        names, labels = ([pair[0] for pair in pairs], [pair[1] for pair in pairs]) if complete else (None, None)
    if not isinstance(names, list) or not isinstance(labels, list) or len(names) != len(labels) or labels.count(1) != 1:
        raise DataError(f"{where} must list choices, each with a label, and one label that is 1")
    order = list(range(len(names)))
    random.Random(question).shuffle(order)
    return {"choices": _choices([names[i] for i in order], where), "answer": order.index(labels.index(1))}


def _answers(fields: dict[str, Any], where: str) -> list[str]:
    key = next((key for key in ("answers", "answer", "solution") if _has(fields, key)), None)
    if key is None:
        raise DataError(f"{where}: 'question' needs 'choices' with 'answer', or 'answers'; has: {', '.join(fields)}")
    value = fields[key]
    if isinstance(value, dict) and isinstance(value.get("value"), str):  # TriviaQA as it is on the hub
        aliases = value.get("aliases")
        value = [value["value"], *(aliases if isinstance(aliases, list) else [])]
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: '{key}' must be a text or a list of texts, got {fields[key]!r:.60}")
    for answer in value:
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f"{where}: '{key}' must hold texts that are not empty, got {answer!r:.60}")
    return list(dict.fromkeys(value))


def _text(fields: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(fields.get(key), str):
        raise DataError(f"{where}: '{key}' must be a string, got {type(fields.get(key)).__name__}")
    return fields[key]


def _has(fields: dict[str, Any], key: str) -> bool:
    return fields.get(key) is not None


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )

"""Preference pairs from JSONL files in trl's columns, and the texts that a reward model reads.

A row has `prompt`, `chosen` and `rejected`: texts, or lists of messages `{"role", "content"}` (then the last message of chosen
and rejected is the answer, and what stands before it belongs to the prompt). `group` may name who labelled the row, `margin` by
how much the chosen one must win. Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.jsonl import read_objects, text_field

Messages = tuple[tuple[str, str], ...]  # (role, content)
PROBES: tuple[
    tuple[Messages, str], ...
] = (  # texts that tell one model from another; of different lengths, for padding
    ((("user", "Hello."),), "Hello! How can I help you today?"),
    ((("user", "Tell me about a small town near the sea."),), "It is quiet."),
    (
        (("user", "What is two and two?"), ("assistant", "Four."), ("user", "Are you sure?")),
        "Yes. Take two apples, then two more, and count them: one, two, three, four. It is the same with anything else.",
    ),
)


@dataclass(frozen=True)
class Pair:
    """One label: somebody prefers `chosen` to `rejected` as an answer to `prompt`.

    Attributes:
        prompt: messages before the answer; () for none.
        chosen, rejected: the answers.
        group: who or what said so; "" where the row does not say.
        margin: see `llmrl.hyre.fit.Pairs`.
        where: "FILE:LINE".
    """

    prompt: Messages
    chosen: str
    rejected: str
    group: str = ""
    margin: float = 0.0
    where: str = ""

    def turned(self) -> Pair:
        """Return the opposite label."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)


def read_pairs(paths: Path | str | Sequence[Path | str]) -> list[Pair]:
    """Read files of pairs, in order.

    Raises:
        UsageError: a file is not there.
        DataError: no rows, or a row that is no pair; FILE:LINE is named.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    pairs = [read_pair(row, where) for file in files for where, row in read_objects(file)]
    if not pairs:
        raise DataError(f"{', '.join(map(str, files))}: no rows; expected one pair a line: prompt, chosen, rejected")
    return pairs


def read_pair(row: Mapping[str, Any], where: str) -> Pair:
    """Return the pair in a row.

    Raises:
        DataError: a missing or empty answer, equal answers, chosen and rejected that answer different dialogues, a margin that
            is no number.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) in (None, "", []):
            raise DataError(
                f"{where}: expected an answer in '{name}', got {row.get(name)!r}; columns: prompt, chosen, rejected"
            )
    before, chosen = _answer(row["chosen"], "chosen", where)
    other, rejected = _answer(row["rejected"], "rejected", where)
    if before != other:
        raise DataError(
            f"{where}: chosen and rejected answer different dialogues; what stands before the answers must be equal"
        )
    if chosen == rejected:
        raise DataError(f"{where}: chosen and rejected are the same text, which is no preference")
    prompt = _messages(row.get("prompt"), "prompt", where)
    group = row.get("group")
    group = "" if group is None else str(group) if isinstance(group, int) else text_field(row, "group", where)
    margin = row.get("margin", 0.0)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < float("inf"):
        raise DataError(f"{where}: expected a number in 'margin', got {margin!r:.40}")
    return Pair((*prompt, *before), chosen, rejected, group, float(margin), where)


def _answer(value: Any, name: str, where: str) -> tuple[Messages, str]:
    messages = _messages(value, name, where, role="assistant")
    if not messages[-1][1].strip():
        raise DataError(f"{where}: the answer in '{name}' is empty")
    return messages[:-1], messages[-1][1]


def _messages(value: Any, name: str, where: str, role: str = "user") -> Messages:
    if value is None or value in ("", []):
        return ()
    if isinstance(value, str):
        return ((role, text_field({name: value}, name, where)),)
    whole = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not whole:
        raise DataError(
            f"{where}: expected a text or a list of messages with role and content in '{name}', got {value!r:.60}"
        )
    return tuple((m["role"], text_field(m, "content", where)) for m in value)


def plain_text(prompt: Messages, answer: str) -> str:
    """Return a dialogue as text, for a model without a chat template: turns between blank lines."""
    return "\n\n".join([*(content for _, content in prompt), answer])


def chat_text(tokenizer: Any, prompt: Messages, answer: str) -> str:
    """Return a dialogue in the model's chat template, without the text of the token that its tokenizer puts first itself."""
    messages = [{"role": role, "content": content} for role, content in (*prompt, ("assistant", answer))]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    first = tokenizer.bos_token
    return text.removeprefix(first) if first and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else text


def model_text(tokenizer: Any, prompt: Messages, answer: str) -> str:
    """Return what a causal LM reads: its chat template's text, or plain text where its tokenizer has no template."""
    return chat_text(tokenizer, prompt, answer) if tokenizer.chat_template else plain_text(prompt, answer)


def one_prompt(pairs: Sequence[Pair]) -> bool:
    """Tell whether all pairs have the same prompt, which then says nothing."""
    return len({pair.prompt for pair in pairs}) == 1

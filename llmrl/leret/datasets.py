"""Pairs, targets and groups as rows for trl's trainers.

`render(state)` gives the bare prompt of a state: a list of messages, or a text. Rows are conversational in the first case
and plain text in the second, as trl tells them apart. What describes a row stands beside trl's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmrl.errors import DataError
from llmrl.leret.context import SearchState
from llmrl.leret.pairs import Pair, Target
from llmrl.leret.records import Group
from llmrl.types import Message

Prompt = str | Sequence[Message | Mapping[str, Any]]
Render = Callable[[SearchState], Prompt]


def preference_rows(pairs: Iterable[Pair], render: Render) -> list[dict[str, Any]]:
    """Return rows with `prompt`, `chosen`, `rejected` for trl's DPOTrainer, and the columns that describe a pair."""
    rows = []
    for pair in pairs:
        prompt, answer = _prompt(pair.state, render)
        described = {
            "chosen_reward": pair.chosen_reward,
            "rejected_reward": pair.rejected_reward,
            "margin": pair.margin,
            "chosen_prompts": list(pair.chosen_prompts),
            "rejected_prompts": list(pair.rejected_prompts),
        }
        texts = {"prompt": prompt, "chosen": answer(pair.chosen), "rejected": answer(pair.rejected)}
        rows.append(texts | _where(pair.state) | described)
    return rows


def sft_rows(targets: Iterable[Target], render: Render) -> list[dict[str, Any]]:
    """Return rows with `prompt` and `completion` for trl's SFTTrainer."""
    rows = []
    for target in targets:
        prompt, answer = _prompt(target.state, render)
        row = {"prompt": prompt, "completion": answer(target.query)}
        rows.append(row | _where(target.state) | {"reward": target.reward})
    return rows


def grpo_rows(groups: Iterable[Group], render: Render) -> list[dict[str, Any]]:
    """Return one row a group: `prompt`, the `candidates` with their `rewards`, and `gold_ids`, a list for each document.

    Every candidate stands there as it was sampled, which an advantage over the group needs.
    """
    rows = []
    for group in groups:
        row = {
            "prompt": _prompt(group.state, render)[0],
            "candidates": [candidate.query for candidate in group.candidates],
            "rewards": [candidate.value for candidate in group.candidates],
            "gold_ids": [list(ids) for ids in group.gold],
        }
        rows.append(row | _where(group.state))
    return rows


def _where(state: SearchState) -> dict[str, Any]:
    return {"question_id": state.question_id, "hop": state.hop + 1, "state": state.key}


def _prompt(state: SearchState, render: Render) -> tuple[Any, Callable[[str], Any]]:
    """Return the prompt as plain JSON, and what makes an answer of the same form."""
    prompt = render(state)
    if not prompt:
        raise DataError(f"question {state.question_id}, hop {state.hop + 1}: the prompt is empty")
    if isinstance(prompt, str):
        return prompt, lambda text: text
    messages = [message.to_json() if isinstance(message, Message) else dict(message) for message in prompt]
    return messages, lambda text: [{"role": "assistant", "content": text}]

"""Rows of several tasks: prompt, completion, and which task it is; encoded so that the loss is on the completion alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.jsonl import read_objects, text_field

ONE_TASK = "all"


@dataclass(frozen=True)
class Row:
    """A prompt, what is to follow it, and the name of its task."""

    task: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class EncodedRow:
    """Token ids, of which the first `prompt` are read and the rest are learnt."""

    task: str
    ids: tuple[int, ...]
    prompt: int


def read_rows(paths: Sequence[str | Path]) -> list[Row]:
    """Read JSONL files (also .gz) with prompt, completion, and task where there are several.

    Raises:
        DataError: a bad row, by file and line; no row at all.
    """
    rows = []
    for path in paths:
        for where, found in read_objects(path):
            task = text_field(found, "task", where) if "task" in found else ONE_TASK
            row = Row(task, text_field(found, "prompt", where), text_field(found, "completion", where))
            if not row.completion.strip():
                raise DataError(f"{where}: the completion is empty; expected text to learn")
            rows.append(row)
    if not rows:
        raise DataError(
            f"{', '.join(map(str, paths))}: no rows; expected one JSON object with prompt and completion a line"
        )
    return rows


def encode(rows: Iterable[Row], tokenizer: Any, max_length: int) -> tuple[list[EncodedRow], int]:
    """Return the rows as token ids, and how many were left out for being longer than `max_length`; none is cut.

    With a chat template the prompt is the user's turn and the completion the assistant's; without one they are joined
    and the end-of-text token follows.
    """
    kept, too_long = [], 0
    for row in rows:
        prompt, whole = _ids(row, tokenizer)
        if len(whole) > max_length:
            too_long += 1
        else:
            kept.append(EncodedRow(row.task, tuple(whole), len(prompt)))
    return kept, too_long


def _ids(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
        text = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        if not whole.startswith(text):
            raise DataError("the chat template does not begin a dialogue with its own prompt: it cannot be trained on")
        prompt = tokenizer.encode(text, add_special_tokens=False)
        return prompt, prompt + tokenizer.encode(whole[len(text) :], add_special_tokens=False)
    prompt = tokenizer.encode(row.prompt)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return prompt, prompt + tokenizer.encode(row.completion, add_special_tokens=False) + end


def collate(rows: Sequence[EncodedRow], pad: int = 0) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels` `[B, T]`, padded on the right; labels are -100 but on completions."""
    import torch

    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        labels[i, row.prompt : len(row.ids)] = torch.tensor(row.ids[row.prompt :])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

"""Prompts from a JSONL file, and the token ids of each.

A file that is not JSONL is refused whole, before a model is loaded. A row that is JSON and cannot be sampled from is an
error of its own, under its id, and the others go on.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import Any

from llmrl.errors import DataError, RequestError, UsageError
from llmrl.jsonl import parse_object
from llmrl.rollout.chat import Conversation
from llmrl.types import Message

# how the families of models write their control tokens in text; the bars of the second kind are wide ones
_CONTROL = re.compile(r"<\|[A-Za-z0-9_]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|</?(?:start|end)_of_turn>|\[/?INST\]")


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Return the rows of a file, each with its `id`.

    Raises:
        UsageError: no such file.
        DataError: not JSONL, no row, an id that is no text, or an id twice; the message names the line.
    """
    text = _text(Path(path).expanduser(), path)
    rows: list[dict[str, Any]] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_object(line, f"{path}:{number}", "an object with 'prompt' or 'messages'")
        if row.get("id") is None:  # data sets written with null for what is not there
            row["id"] = str(len(rows))
        row_id = row["id"]
        if not isinstance(row_id, str) or not row_id:
            raise DataError(f"{path}:{number}: expected an id that is text, got {row_id!r:.60}; write it in quotes")
        if row_id in lines:
            raise DataError(
                f"{path}:{number}: the id {row_id!r:.60} is that of line {lines[row_id]} too; give each its own"
            )
        lines[row_id] = number
        rows.append(row)
    if not rows:
        raise DataError(f"{path} has no rows: expected a line of JSON with 'prompt' or 'messages' for each")
    return rows


def _text(file: Path, path: str) -> str:
    if not file.exists():
        raise UsageError(f"not found: {path} (--prompts)")
    if not file.is_file():  # a pipe could not be read again when the run goes on
        raise UsageError(f"{path} is no file: --prompts wants a JSONL file, which may be compressed (.gz)")
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from None


def encode_row(row: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Return the token ids to sample after.

    A `prompt` is encoded with the special tokens the tokenizer adds by default. `messages` go through the chat template,
    up to where the assistant begins to write.

    Raises:
        RequestError: neither or both of them, an empty one, messages without a chat template, or a control token that
            this tokenizer does not have.
        DataError: the messages or the chat template refuse.
    """
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        got = (
            "both" if prompt is not None else f"the keys {', '.join(sorted(row.keys() - {'id'})) or 'of an empty row'}"
        )
        raise RequestError(f"expected 'prompt' or 'messages', got {got}")
    if messages is not None:
        if not isinstance(messages, list) or not messages:
            raise RequestError(f"messages: expected a list of messages, got {messages!r:.60}")
        if not tokenizer.chat_template:
            raise RequestError("messages need a chat template, and this model has none; write the row as 'prompt'")
        parsed = [Message.from_json(message) for message in messages]
        for message in parsed:
            _check_control(message.content, tokenizer, "take it out of the message")
        talk = Conversation(tokenizer)
        talk.add(*parsed)
        return talk.prompt()
    if not isinstance(prompt, str):
        raise RequestError(f"prompt: expected text, got {type(prompt).__name__}")
    if not prompt:
        raise RequestError("the prompt is empty: expected text")
    _check_control(prompt, tokenizer, "write the row as 'messages', or take it out")
    return tuple(tokenizer(prompt)["input_ids"])


def _check_control(text: str, tokenizer: Any, mend: str) -> None:
    """Refuse another family's control tokens: they would be read as letters, and the model would see no turn at all."""
    known = None
    for found in _CONTROL.findall(text):
        known = tokenizer.get_vocab() if known is None else known
        # Llama 2 writes [INST] as plain letters: what a model's own template writes is no stranger
        if found not in known and found not in str(tokenizer.chat_template or ""):
            raise RequestError(f"holds {found}, a control token that this model's tokenizer does not know; {mend}")

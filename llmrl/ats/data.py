"""From files to windows of token ids with a mask of the tokens that count.

Rows are `{"messages": [...]}` (loss on the assistant's turns), `{"prompt": ..., "completion": ...}` (loss on the
completion) or `{"text": ...}` (loss on every token). A long `text` is cut into windows; a row of the other two forms that
does not fit is left out and counted by reason.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.errors import DataError, did_you_mean
from llmrl.files import resolve_reference

_FORMS = "'messages', 'prompt' with 'completion', or 'text'"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz")


@dataclass(frozen=True)
class Row:
    """One row as it stood in its file; `where` is "FILE:LINE" for error messages."""

    fields: dict[str, Any]
    where: str
    source: str


@dataclass(frozen=True)
class Window:
    """Token ids the model reads at once. `scored[i]` says that token i counts (as a prediction from the ones before)."""

    token_ids: list[int]
    scored: list[bool]
    row: int
    source: str
    where: str


@dataclass
class Windows:
    """All windows of a data set, and what was left out of it by reason."""

    windows: list[Window]
    rows: int
    excluded: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """Number of tokens that count."""
        return sum(sum(window.scored) for window in self.windows)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_rows(data: list[str]) -> list[Row]:
    """Read files (JSONL, JSONL.gz, parquet, .txt, .txt.gz) or data sets by hub name (`NAME` or `NAME:SPLIT`).

    Raises:
        UsageError: a path that does not exist.
        DataError: an empty file, a broken line, a row without a known form; FILE:LINE is named.
    """
    rows: list[Row] = []
    for name in data:
        path, local = resolve_reference(name, "--data")
        found = list(_read_file(Path(path)) if local else _read_hub(name))
        if not found:
            raise DataError(f"{name} is empty: expected rows with {_FORMS}")
        rows.extend(found)
    return rows


def _read_file(path: Path) -> Iterator[Row]:
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the files in it ({', '.join(_SUFFIXES)})")
    if path.name.endswith((".txt", ".txt.gz")):
        text = _decode(path)
        if text.strip():
            yield Row({"text": text}, str(path), str(path))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for number, line in enumerate(_decode(path).split("\n"), start=1):
            if line.strip():
                yield _check_row(_parse_line(line, f"{path}:{number}"), f"{path}:{number}", str(path))
    elif path.name.endswith(".parquet"):
        for number, fields in enumerate(_read_parquet(path), start=1):
            yield _check_row(fields, f"{path}:{number}", str(path))
    else:
        raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(_SUFFIXES)}")


def _decode(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file") from error


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise DataError(f"{where}: not JSON that can be read ({str(error).splitlines()[0]})") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected an object with {_FORMS}, got {type(fields).__name__}")
    return fields


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    try:
        yield from parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet file: {str(error).splitlines()[0]}") from error


def _read_hub(name: str) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} is no file here; a data set by name needs: pip install datasets") from error
    path, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(path, split=split or "train")
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name} is neither a file here nor a data set that can be loaded: {first}") from error
    for number, fields in enumerate(found, start=1):
        yield _check_row(dict(fields), f"{name}:{number}", name)


def _check_row(fields: dict[str, Any], where: str, source: str) -> Row:
    row = _known_form(fields, where, source)
    try:
        json.dumps(row.fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair in the text (character {error.start})") from error
    return row


def _known_form(fields: dict[str, Any], where: str, source: str) -> Row:
    if _has(fields, "messages"):
        value = fields["messages"]
        if not isinstance(value, list) or not value or not all(_is_message(message) for message in value):
            raise DataError(f"{where}: 'messages' must be a list of objects with 'role' and 'content' (a string)")
        return Row({"messages": value}, where, source)
    if _has(fields, "prompt") or _has(fields, "completion"):
        for key in ("prompt", "completion"):
            if not isinstance(fields.get(key), str):
                raise DataError(f"{where}: '{key}' must be a string, got {type(fields.get(key)).__name__}")
        return Row({"prompt": fields["prompt"], "completion": fields["completion"]}, where, source)
    if _has(fields, "text"):
        if not isinstance(fields["text"], str):
            raise DataError(f"{where}: 'text' must be a string, got {type(fields['text']).__name__}")
        return Row({"text": fields["text"]}, where, source)
    hints = [did_you_mean(key, ("messages", "prompt", "completion", "text")) for key in fields]
    hint = next((h for h in hints if "did you mean" in h), "")
    raise DataError(f"{where}: needs {_FORMS}; has: {', '.join(map(str, fields)) or 'nothing'}{hint}")


def _has(fields: dict[str, Any], key: str) -> bool:
    return fields.get(key) is not None


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


# --- tokens -----------------------------------------------------------------------------------------------------------


def make_windows(rows: list[Row], tokenizer: Any, max_length: int) -> Windows:
    """Encode rows.

    Args:
        rows: from `read_rows`.
        tokenizer: of the model; a chat template is needed for `messages` only, a pad token for nothing.
        max_length: longest window in tokens, BOS included.

    Raises:
        DataError: `messages` without a chat template or refused by it, or more than half of the rows left out.
    """
    result = Windows([], rows=len(rows))
    for index, row in enumerate(rows):
        lost = 0
        if "messages" in row.fields:
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(
                    f"{row.where}: 'messages' need a chat template and this tokenizer has none; "
                    "use a chat model, or rows with 'prompt' and 'completion'"
                )
            try:
                pieces, lost = _encode_messages(row.fields["messages"], tokenizer)
            except Exception as error:  # templates refuse orders of roles, or read keys a message lacks
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise DataError(f"{row.where}: the chat template refuses these messages: {first}") from error
        elif "prompt" in row.fields:
            pieces = [_encode_completion(row.fields["prompt"], row.fields["completion"], tokenizer)]
        else:
            pieces = _encode_text(row.fields["text"], tokenizer, max_length)
        kept: list[Window] = []
        reasons = {"turn_not_scored"} if lost else set()
        for ids, scored in pieces:
            if len(ids) > max_length:
                reasons.add("too_long")
            elif not any(scored):
                reasons.add("no_scored_tokens")
            else:
                kept.append(Window(ids, scored, index, row.source, row.where))
        result.windows.extend(kept)
        if not kept:
            result.excluded[min(reasons, default="no_scored_tokens")] += 1
        elif reasons:
            result.excluded["part_of_row_" + min(reasons)] += 1
    left_out = sum(count for reason, count in result.excluded.items() if not reason.startswith("part_of_row"))
    if 2 * left_out > len(rows):
        reasons_text = ", ".join(f"{reason} {count}" for reason, count in sorted(result.excluded.items()))
        raise DataError(
            f"{left_out} of {len(rows)} rows cannot be used ({reasons_text}); more than half is an error\n"
            f"rows longer than {max_length} tokens need a model with a longer context or a larger --max_length"
        )
    return result


def _adds_bos(tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _encode_text(text: str, tokenizer: Any, max_length: int) -> list[tuple[list[int], list[bool]]]:
    if not text:
        return []
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    size = max_length - len(start)
    windows = []
    for i in range(0, len(ids), size):
        window = start + ids[i : i + size]
        # the first token of a window has nothing before it to be predicted from
        windows.append((window, [False] + [True] * (len(window) - 1)))
    return [(window, scored) for window, scored in windows if any(scored)]


def _encode_completion(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        # a token that begins in the prompt belongs to the prompt, special tokens ((0, 0)) too
        scored = [start >= len(prompt) and end > start for start, end in encoded["offset_mapping"]]
    else:
        prefix = tokenizer(prompt, verbose=False)["input_ids"]
        ids = prefix + tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        scored = [False] * len(prefix) + [True] * (len(ids) - len(prefix))
    if scored:
        scored[0] = False
    return ids, scored


def _encode_messages(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[tuple[list[int], list[bool]]], int]:
    """Return windows whose scored tokens are the assistant's, and how many of its turns the template does not let score."""

    def render(upto: int, generation: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=generation, tokenize=True)
        return list(ids["input_ids"] if hasattr(ids, "keys") else ids)

    pieces: list[tuple[list[int], list[bool]]] = []
    lost = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # a first turn answers nothing; templates that rewrite history show the turn after other tokens than were there
        before = render(i, generation=False) if i else []
        whole = render(i + 1, generation=False) if i else []
        if not i or whole[: len(before)] != before:
            lost += 1
            continue
        # normally the whole generation prompt; less where its last token merges with the answer's first
        start = _common_prefix(render(i, generation=True), whole)
        scored = [False] * start + [True] * (len(whole) - start)
        if pieces and whole[: len(pieces[-1][0])] == pieces[-1][0]:
            earlier = pieces.pop()[1]
            scored[: len(earlier)] = earlier
        pieces.append((whole, scored))
    for _, scored in pieces:
        scored[0] = False
    return pieces, lost


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

"""From rows to windows of token ids with a mask of the tokens that count.

Scored are the assistant's turns of `messages`, the completion, every token of `text`, the first reference of a free
question, and of multiple choice the right letter. A long `text` is cut into windows; a row of another form that does not
fit is left out and counted by reason. Questions go through the chat template where the tokenizer has one.
"""

from __future__ import annotations

from typing import Any

from llmrl.ats.answers import LETTERS, plain_prompt, question_text
from llmrl.ats.data import Row, Window, Windows
from llmrl.errors import DataError

_Piece = tuple[list[int], list[bool]]


def make_windows(rows: list[Row], tokenizer: Any, max_length: int) -> Windows:
    """Encode rows.

    Args:
        rows: from `read_rows`.
        tokenizer: of the model; a chat template is needed for `messages` only, a pad token for nothing.
        max_length: longest window in tokens, BOS included.

    Raises:
        DataError: `messages` without a chat template or refused by it, answer letters that are not a token each, or more
            than half of the rows left out.
    """
    result = Windows([], rows=len(rows))
    for index, row in enumerate(rows):
        pieces, choices, lost = _encode_row(row, tokenizer, max_length)
        reasons = {"turn_not_scored"} if lost else set()
        kept: list[Window] = []
        for ids, scored in pieces:
            if len(ids) > max_length:
                reasons.add("too_long")
            elif not any(scored):
                reasons.add("no_scored_tokens")
            else:
                kept.append(Window(ids, scored, index, row.source, row.where, choices))
        add_row(result, kept, reasons)
    check_left_out(
        result, f"rows longer than {max_length} tokens need a model with a longer context or a larger --max_length"
    )
    return result


def add_row(result: Windows, kept: list[Window], reasons: set[str]) -> None:
    """Add one row's windows, and count why the row, or a part of it, was left out."""
    result.windows.extend(kept)
    if not kept:
        result.excluded[min(reasons, default="no_scored_tokens")] += 1
    elif reasons:
        result.excluded["part_of_row_" + min(reasons)] += 1


def check_left_out(result: Windows, advice: str) -> None:
    """Refuse data of which more than half is left out.

    Raises:
        DataError: it is; the reasons are counted and `advice` says what to do.
    """
    left_out = sum(count for reason, count in result.excluded.items() if not reason.startswith("part_of_row"))
    if 2 * left_out > result.rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result.excluded.items()))
        raise DataError(
            f"{left_out} of {result.rows} rows cannot be used ({reasons}); more than half is an error\n{advice}"
        )


def _encode_row(row: Row, tokenizer: Any, max_length: int) -> tuple[list[_Piece], tuple[int, ...] | None, int]:
    """Return windows, the ids of the letters of a multiple-choice row, and how many turns could not be scored."""
    fields = row.fields
    if "messages" in fields:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{row.where}: 'messages' need a chat template and this tokenizer has none; "
                "use a chat model, or rows with 'prompt' and 'completion'"
            )
        pieces, lost = _encode_messages(fields["messages"], tokenizer, row.where)
        return pieces, None, lost
    if "choices" in fields:
        return _encode_choices(row, tokenizer)
    if "question" in fields:
        pieces, lost = _encode_answer(row, fields["answers"][0], tokenizer)
        return pieces, None, lost
    if "prompt" in fields:
        return [_encode_completion(fields["prompt"], fields["completion"], tokenizer)], None, 0
    return _encode_text(fields["text"], tokenizer, max_length), None, 0


def _encode_answer(row: Row, answer: str, tokenizer: Any, space: str = " ") -> tuple[list[_Piece], int]:
    """Encode a question with an answer; the chat template, where there is one, decides how they are put together."""
    if getattr(tokenizer, "chat_template", None):
        messages = [
            {"role": "user", "content": question_text(row.fields)},
            {"role": "assistant", "content": answer},
        ]
        return _encode_messages(messages, tokenizer, row.where)
    return [_encode_completion(plain_prompt(row.fields), space + answer, tokenizer)], 0


def _encode_choices(row: Row, tokenizer: Any) -> tuple[list[_Piece], tuple[int, ...], int]:
    """Encode a question up to the right letter, which is the one scored token.

    The question is encoded with each letter in turn, so that the letters' ids are those of this very context: with or
    without a space, as the chat template writes them. Without a template the letter follows "Answer:" after a space, or,
    where a space is a token of its own before some letters (small SentencePiece vocabularies), without one.
    """
    letters = LETTERS[: len(row.fields["choices"])]
    for space in (" ",) if getattr(tokenizer, "chat_template", None) else (" ", ""):
        encoded = [_encode_answer(row, letter, tokenizer, space) for letter in letters]
        if not all(pieces for pieces, _ in encoded):
            return [], (), 1
        whole = [pieces[0][0] for pieces, _ in encoded]
        at = _only_difference(whole)
        if at is not None:
            context = whole[row.fields["answer"]][: at + 1]
            return [(context, [False] * at + [True])], tuple(ids[at] for ids in whole), 0
    raise DataError(
        f"{row.where}: this tokenizer does not write the answer letters {letters[0]} to {letters[-1]} as one token each, "
        "so there is no choice to score; write the row as 'prompt' and 'completion' instead"
    )


def _only_difference(rows: list[list[int]]) -> int | None:
    """Return the one position at which the rows differ, all from each other; None where they differ otherwise."""
    if len({len(row) for row in rows}) > 1:
        return None
    apart = [i for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    return apart[0] if len(apart) == 1 and apart[0] and len({row[apart[0]] for row in rows}) == len(rows) else None


def _adds_bos(tokenizer: Any) -> bool:
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _encode_text(text: str, tokenizer: Any, max_length: int) -> list[_Piece]:
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


def _encode_completion(prompt: str, completion: str, tokenizer: Any) -> _Piece:
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


def _encode_messages(messages: list[dict[str, str]], tokenizer: Any, where: str) -> tuple[list[_Piece], int]:
    """Return windows whose scored tokens are the assistant's, and how many of its turns the template does not let score.

    Raises:
        DataError: the template refuses the messages.
    """

    def render(upto: int, generation: bool) -> list[int]:
        try:
            ids = tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=generation, tokenize=True)
        except Exception as error:  # templates refuse orders of roles, or read keys a message lacks
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{where}: the chat template refuses these messages: {first}") from error
        return list(ids["input_ids"] if hasattr(ids, "keys") else ids)

    pieces: list[_Piece] = []
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

"""Questions and answers as pure functions: how a question is put, when an answer is right, how sure of it a model was.

Multiple choice is put the way MMLU is (Hendrycks et al. 2021, and lm-evaluation-harness): lettered lines and "Answer:".
Free answers are compared as SQuAD compares them (Rajpurkar et al. 2016), worked solutions by their last number (GSM8K,
Cobbe et al. 2021). The confidence of an answer of several tokens has no standard: it is a choice with a name.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from llmrl.errors import ConfigError, DataError, did_you_mean

LETTERS = string.ascii_uppercase
CONFIDENCES = ("mean", "geometric_mean", "product", "min", "first", "last", "letters")
NUMERIC_MARK = "####"  # before the result, in GSM8K's worked solutions

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# a minus that follows a digit or a letter subtracts; a comma belongs to the number only where it groups thousands
_NUMBER = re.compile(r"(?:(?<![\w).])-)?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_ALONE = re.compile(r"[\W_]*([A-Za-z])[\W_]*")
_LEADING = re.compile(r"[\W_]*([A-Z])(?=[.):,;\]*\n])")
_STATED = re.compile(r"(?i:answer|choice|option)(?i:\s+is|:)?[\s:*(\"']*([A-Z])(?![\w'’])")


# --- prompts ----------------------------------------------------------------------------------------------------------


def question_text(fields: Mapping[str, Any]) -> str:
    """Return what a chat user writes: the question, and with `choices` a lettered line for each and "Answer:"."""
    question = str(fields["question"]).strip()
    if "choices" not in fields:
        return question
    lines = [f"{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, fields["choices"], strict=False)]
    return "\n".join([question, *lines, "Answer:"])


def plain_prompt(fields: Mapping[str, Any]) -> str:
    """Return what a model without a chat template continues; it ends in "Answer:" and the answer begins with a space."""
    return question_text(fields) if "choices" in fields else f"Question: {question_text(fields)}\nAnswer:"


# --- grading ----------------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Return `text` as SQuAD compares it: lower case, no punctuation, no articles, single spaces.

    Beyond SQuAD, which knows ASCII punctuation only, all of Unicode's counts, after compatibility forms (full-width
    letters, ligatures) became plain ones. Accents stay.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in folded if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Tell whether `answer` equals one of the references after `normalise`; an empty answer never does."""
    said = _comparable(answer)
    return bool(said) and any(said == _comparable(reference) for reference in references)


def _comparable(text: str) -> str:
    # "A" and "..." have nothing left: two such answers are equal only if they are so as they stand
    return normalise(text) or " ".join(text.lower().split())


def final_number(text: str) -> Decimal | None:
    """Return the number after the last "####", or else the last number of the text; None where there is none.

    Thousands may be grouped by commas, a dollar sign is passed over, and 18.00 equals 18.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    head, mark, tail = plain.rpartition(NUMERIC_MARK)
    found = _NUMBER.findall(tail)
    if mark and found:
        number = found[0]
    else:
        found = _NUMBER.findall(head + " " + tail)
        if not found:
            return None
        number = found[-1]
    return Decimal(number.replace("$", "").replace(",", ""))


def numeric_match(answer: str, references: Sequence[str]) -> bool:
    """Tell whether the final number of `answer` is that of one of the references."""
    said = final_number(answer)
    return said is not None and any(said == final_number(reference) for reference in references)


def chosen_letter(answer: str, choices: int) -> int | None:
    """Return the index of the choice that a free text names, or None.

    Read are a letter alone ("b", "(C)"), a letter with a mark behind it at the start ("B. Paris"), and else the last
    letter that is said to be the answer ("The answer is B").
    """
    text = answer.strip()
    found = _ALONE.fullmatch(text) or _LEADING.match(text)
    letters = [found.group(1)] if found else _STATED.findall(text)
    index = LETTERS.index(letters[-1].upper()) if letters else choices
    return index if index < choices else None


def letter_match(answer: str, right: int, choices: int) -> bool:
    """Tell whether a free text names the choice with the index `right` out of `choices`."""
    return chosen_letter(answer, choices) == right


def is_numeric(references: Sequence[str]) -> bool:
    """Tell whether the references are worked solutions that end in "#### NUMBER"."""
    return any(NUMERIC_MARK in reference for reference in references)


def grade(answer: str, references: Sequence[str]) -> bool:
    """Tell whether a free answer is right: by its final number where a reference has "####", else by exact match."""
    return numeric_match(answer, references) if is_numeric(references) else exact_match(answer, references)


# --- what of a generation is the answer -------------------------------------------------------------------------------


def first_line(text: str) -> str:
    """Return a generated text up to its first newline, without the space around it."""
    return text.partition("\n")[0].strip()


def before_end(token_ids: Sequence[int], end_ids: frozenset[int] | set[int]) -> int:
    """Return how many ids stand before the first end token."""
    return next((i for i, token in enumerate(token_ids) if token in end_ids), len(token_ids))


def answer_tokens(tokenizer: Any, token_ids: Sequence[int], text: str) -> int:
    """Return how many leading ids it takes to spell `text`, which is the start of what all of them say.

    Trailing space does not count, so a newline that ended the answer is left out; a token that holds both the answer's
    last letters and the newline is taken in.
    """
    wanted, count = text.rstrip(), len(token_ids)
    if not wanted:
        return 0
    while count > 1 and tokenizer.decode(token_ids[: count - 1], skip_special_tokens=True).startswith(wanted):
        count -= 1
    return count


# --- confidence -------------------------------------------------------------------------------------------------------


def answer_confidences(logprobs: np.ndarray, answers: np.ndarray, how: str) -> np.ndarray:
    """Return the confidence of each answer from the log-probabilities of its tokens.

    Args:
        logprobs: `[N]` nats, tokens of an answer in order.
        answers: `[N]` which answer a token belongs to, any integers.
        how: "mean" of the probabilities (the ATS paper's code), "geometric_mean", "product", "min", "first" or "last"
            token; or "letters", where the "tokens" of an answer are the letters to choose from, and the result is the
            share of the most likely one among them.

    Returns:
        `[A]` in [0, 1], float64, in ascending order of the answers' integers.

    Raises:
        ConfigError: `how` is none of CONFIDENCES.
        DataError: a log-probability is not a number, or there is not one integer for each.
    """
    if how not in CONFIDENCES:
        raise ConfigError(f"answer confidence '{how}': not a choice{did_you_mean(how, CONFIDENCES)}")
    values = np.asarray(logprobs, dtype=np.float64)
    if values.shape != np.shape(answers) or values.ndim != 1:
        raise DataError(f"expected one answer a logprob, got {np.shape(answers)} for {values.shape}")
    if np.isnan(values).any():
        raise DataError("a log-probability is not a number: the model's weights are damaged, or it overflows")
    values = np.clip(values, -1e30, 0.0)  # rounding may end above 0, and a difference of infinities is not a number
    order = np.argsort(answers, kind="stable")
    values, counts = values[order], np.unique(answers, return_counts=True)[1]
    starts = np.cumsum(counts) - counts
    if len(values) == 0:
        return values
    if how == "mean":
        return np.add.reduceat(np.exp(values), starts) / counts
    if how == "geometric_mean":
        return np.exp(np.add.reduceat(values, starts) / counts)
    if how == "product":
        return np.exp(np.add.reduceat(values, starts))
    if how == "min":
        return np.exp(np.minimum.reduceat(values, starts))
    if how == "letters":
        top = np.maximum.reduceat(values, starts)
        return 1.0 / np.add.reduceat(np.exp(values - np.repeat(top, counts)), starts)
    return np.exp(values[starts if how == "first" else starts + counts - 1])


def answer_confidence(logprobs: Sequence[float], how: str) -> float:
    """Return the confidence of one answer; see `answer_confidences`.

    Raises:
        DataError: no logprob; an answer without tokens has no confidence.
    """
    if len(logprobs) == 0:
        raise DataError("expected at least one logprob: an answer without tokens has no confidence")
    values = np.asarray(logprobs, dtype=np.float64)
    return float(answer_confidences(values, np.zeros(len(values), dtype=np.int64), how)[0])

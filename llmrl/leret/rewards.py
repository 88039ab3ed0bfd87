"""Rewards of a ranked context against the gold documents of its question.

A gold document is a set of acceptable passage ids and counts once, at the first of them. With 2 gold documents and k=3 the
average precision of a context is 0, 1/6, 1/4, 1/2, 7/12, 5/6 or 1; the paper (arXiv 2410.23214) takes that of the whole
context after the hop.

The gains subtract the context before: a query that brings nothing new earns 0 there, where the plain rewards would let it
keep the old value and be preferred over one that found a gold document behind a distractor.
"""

from __future__ import annotations

import inspect
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from llmrl.errors import DataError, UsageError, did_you_mean

Gold = Sequence[frozenset[str]]
_READABLE = ("before", "hits", "question")
_ANSWER_SCORES = ("f1", "exact_match")


class Reward(Protocol):
    """What a query is worth. All but the first two arguments are for rewards that read them."""

    def __call__(
        self,
        ranked: Sequence[str],
        gold: Gold,
        *,
        before: Sequence[str] = (),
        hits: Sequence[str] = (),
        question: Any = None,
    ) -> float:
        """Return the reward.

        Args:
            ranked: the context after the hop, best first, without repetitions.
            gold: for each gold document the passage ids that count as it.
            before: the context before the hop.
            hits: what the query itself returned.
            question: the `Question`, for rewards that need its text or answers.
        """


# --- of a ranking -----------------------------------------------------------------------------------------------------


def found_ranks(ranked: Sequence[str], gold: Gold) -> list[int | None]:
    """Return for each gold document the rank (from 1) of its first acceptable passage, None where it has none.

    Raises:
        DataError: there is no gold document, or one that no passage can be.
    """
    if not gold or not all(gold):
        raise DataError(
            "expected at least one gold document and a passage id for each; such a question cannot be scored"
        )
    rank: dict[str, int] = {}
    for number, passage in enumerate(ranked, 1):
        rank.setdefault(passage, number)
    return [min((rank[passage] for passage in ids if passage in rank), default=None) for ids in gold]


def average_precision(ranked: Sequence[str], gold: Gold) -> float:
    """Return the sum over found gold documents of the precision at their rank, over the number of gold documents."""
    ranks = found_ranks(ranked, gold)
    relevant = sorted(
        {rank for rank in ranks if rank is not None}
    )  # a passage that is two of them is one relevant passage
    precision = {rank: count / rank for count, rank in enumerate(relevant, 1)}
    return math.fsum(precision[rank] for rank in ranks if rank is not None) / len(ranks)


def recall(ranked: Sequence[str], gold: Gold) -> float:
    """Return the share of gold documents found."""
    ranks = found_ranks(ranked, gold)
    return sum(rank is not None for rank in ranks) / len(ranks)


def reciprocal_rank(ranked: Sequence[str], gold: Gold) -> float:
    """Return 1 over the rank of the first gold document, 0 without one."""
    best = min((rank for rank in found_ranks(ranked, gold) if rank is not None), default=None)
    return 0.0 if best is None else 1.0 / best


def ndcg(ranked: Sequence[str], gold: Gold) -> float:
    """Return the discounted gain, sum of 1 / log2(rank + 1), over that of all gold documents at the top.

    The ideal is not cut at the length of the context: one of two gold documents alone in a context is not perfect.
    """
    relevant = {rank for rank in found_ranks(ranked, gold) if rank is not None}
    ideal = math.fsum(1 / math.log2(rank + 1) for rank in range(1, len(gold) + 1))
    return math.fsum(1 / math.log2(rank + 1) for rank in sorted(relevant)) / ideal


def all_gold(ranked: Sequence[str], gold: Gold) -> float:
    """Return 1 when every gold document is found, else 0."""
    return float(all(rank is not None for rank in found_ranks(ranked, gold)))


# --- over the context before ------------------------------------------------------------------------------------------


def ap_gain(ranked: Sequence[str], gold: Gold, before: Sequence[str] = ()) -> float:
    """Return how much average precision rose; below 0 where a distractor was ranked above a gold document."""
    return average_precision(ranked, gold) - average_precision(before, gold)


def recall_gain(ranked: Sequence[str], gold: Gold, before: Sequence[str] = ()) -> float:
    """Return the share of all gold documents that this hop added."""
    return recall(ranked, gold) - recall(before, gold)


def marginal(ranked: Sequence[str], gold: Gold, before: Sequence[str] = ()) -> float:
    """Return the share of the gold documents missing before that this hop found; 0 when none was missing."""
    missing = 1 - recall(before, gold)
    return recall_gain(ranked, gold, before) / missing if missing else 0.0


# --- as rewards -------------------------------------------------------------------------------------------------------

_METRICS: dict[str, Callable[..., float]] = {
    "ap": average_precision,
    "recall": recall,
    "mrr": reciprocal_rank,
    "ndcg": ndcg,
    "all_gold": all_gold,
    "ap_gain": ap_gain,
    "recall_gain": recall_gain,
    "marginal": marginal,
}


def as_reward(function: Callable[..., float]) -> Reward:
    """Make a `Reward` of any function of (ranked, gold) and those of before, hits and question that its signature names.

    The result is checked: a reward that is no finite number is a DataError that names the function.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    read = [name for name in _READABLE if takes_all or name in (p.name for p in parameters)]
    name = getattr(function, "__name__", type(function).__name__)

    def reward(ranked: Sequence[str], gold: Gold, **seen: Any) -> float:
        given = {"before": (), "hits": (), "question": None, **seen}
        value = function(ranked, gold, **{key: given[key] for key in read})
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"reward '{name}' returned {value!r:.60}: expected a finite number")
        return number

    return reward


REWARDS: dict[str, Reward] = {name: as_reward(function) for name, function in _METRICS.items()}


def reward_named(name: str) -> Reward:
    """Return a reward of the registry.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in REWARDS:
        raise UsageError(f"unknown reward '{name}'{did_you_mean(name, REWARDS)}")
    return REWARDS[name]


# --- of the answer ----------------------------------------------------------------------------------------------------


def answer_reward(answer_fn: Callable[[Any, Sequence[str]], str], score: str = "f1") -> Reward:
    """Return a reward that reads the context with `answer_fn` and scores what it answers; no gold document is needed.

    Args:
        answer_fn: (question, ranked passage ids) -> answer.
        score: "f1" of the words, or "exact_match"; the best over the question's accepted answers.

    Raises:
        UsageError: the score is unknown. The reward raises DataError for a question without answers.
    """
    if score not in _ANSWER_SCORES:
        raise UsageError(f"unknown answer score '{score}'{did_you_mean(score, _ANSWER_SCORES)}")
    compare = answer_f1 if score == "f1" else exact_match

    def answer(ranked: Sequence[str], gold: Gold, question: Any = None) -> float:
        accepted = getattr(question, "answers", ())
        if not accepted:
            raise DataError(f"question {getattr(question, 'id', None)} has no answers: an answer reward needs them")
        said = answer_fn(question, ranked)
        return max(compare(said, right) for right in accepted)

    return as_reward(answer)


def exact_match(said: str, right: str) -> float:
    """Return 1 when both are the same words after SQuAD's normalisation (case, punctuation, articles), else 0."""
    return float(list(_words(said)) == list(_words(right)))


def answer_f1(said: str, right: str) -> float:
    """Return the F1 of the words of both after SQuAD's normalisation."""
    ours, theirs = Counter(_words(said)), Counter(_words(right))
    common = (ours & theirs).total()
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * common / (ours.total() + theirs.total())


def _words(text: str) -> Iterator[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return (word for word in re.split(r"\s+", bare) if word and word not in ("a", "an", "the"))

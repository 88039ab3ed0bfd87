"""Which questions a round explores, and which are set aside: by a hash of seed and id, so never by the order of a file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from llmrl.errors import DataError, UsageError, did_you_mean
from llmrl.rollout.seeds import derive_seed

PARTITIONS = ("disjoint", "full")


@dataclass(frozen=True)
class Slices:
    """Ids of questions that pairs are built from, and that few-shot examples are mined from."""

    train: tuple[str, ...]
    few_shot: tuple[str, ...]


def partition_rounds(
    ids: Sequence[str], rounds: int, kind: str = "disjoint", seed: int = 0
) -> tuple[tuple[str, ...], ...]:
    """Return the ids of each round, each in a shuffled order of its own.

    Args:
        ids: of the training questions, in any order.
        rounds: at least 1.
        kind: "disjoint" deals every question to one round, their numbers differing by at most one; "full" gives every
            round all of them.
        seed: of the run.

    Raises:
        UsageError: `kind` is unknown, or there are more disjoint rounds than questions.
        DataError: an id is there twice.
    """
    if kind not in PARTITIONS:
        raise UsageError(f"unknown partition '{kind}'{did_you_mean(kind, PARTITIONS)}")
    if rounds < 1 or (kind == "disjoint" and rounds > len(ids)):
        raise UsageError(f"cannot make {rounds} rounds of {len(ids)} questions: set rounds between 1 and {len(ids)}")
    if kind == "full":
        return tuple(shuffled(ids, seed, "round", number) for number in range(rounds))
    order = shuffled(ids, seed, "round")
    return tuple(order[number::rounds] for number in range(rounds))


def slice_questions(ids: Sequence[str], *, few_shot: int = 0, seed: int = 0) -> Slices:
    """Set questions aside, the rest to train on.

    Args:
        ids: of all questions, in any order.
        few_shot: questions that few-shot prompts are made from. Pairs of questions whose own best queries stand in the
            prompt would flatter that prompt.
        seed: of the run.

    Raises:
        UsageError: nothing would be left to train on.
        DataError: an id is there twice.
    """
    if not 0 <= few_shot < len(ids):
        raise UsageError(f"{few_shot} few-shot questions of {len(ids)} leave nothing to train on: lower their number")
    order = shuffled(ids, seed, "slice")
    return Slices(order[few_shot:], order[:few_shot])


def share_of(text: str) -> float:
    """Return a number from 0 to below 1 that the text alone decides: a question is held out when it is below some share."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def shuffled(ids: Sequence[str], seed: int, *parts: int | str) -> tuple[str, ...]:
    """Return the ids in an order of hashes of seed, parts and id: one more id leaves the others in their order.

    Raises:
        DataError: an id is there twice.
    """
    twice = sorted(name for name, count in Counter(ids).items() if count > 1)
    if twice:
        raise DataError(f"{len(twice)} question id(s) are there twice, the first: {twice[0]}")
    return tuple(sorted(ids, key=lambda name: (derive_seed(seed, *parts, name), name)))

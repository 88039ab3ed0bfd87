"""What a question has found so far, and the one list that a reward scores and a prompt shows.

A `SearchState` keeps each hop as it came back. `merge` makes one ranking of the hops without repetitions:

    hop_order   hop after hop, best first within each (the default here)
    score       by the greatest raw score a passage got (the paper). Raw scores of different queries are only comparable
                where the retriever makes them so: BM25's grow with the length of the query
    rrf         reciprocal rank fusion, sum over hops of 1 / (60 + rank) (Cormack et al. 2009)

Equals keep the order of their first appearance, so a ranking is the same on any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

from llmrl.errors import DataError, UsageError, did_you_mean
from llmrl.types import Record

MERGE_RULES = ("hop_order", "score", "rrf")
RRF_K = 60


class Scored(Protocol):
    """What `extend` reads of a hit."""

    @property
    def id(self) -> str:
        """Passage id."""

    @property
    def score(self) -> float:
        """Raw score of the retriever, greater is better."""


@dataclass(frozen=True)
class SearchState(Record):
    """A question after `hop` hops; without any it is the bare question.

    Args:
        question_id: the question.
        queries: one a hop.
        hops: passage ids of each hop, best first, without repetitions inside a hop; empty for a query without a hit.
        scores: the retriever's score of each of them.
    """

    question_id: str
    queries: tuple[str, ...] = ()
    hops: tuple[tuple[str, ...], ...] = ()
    scores: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        self._need(isinstance(self.question_id, str) and bool(self.question_id), "question_id", "non-empty text")
        self._set(
            queries=tuple(self.queries),
            hops=tuple(tuple(hop) for hop in self.hops),
            scores=tuple(tuple(float(score) for score in hop) for hop in self.scores),
        )
        lengths = {"queries": len(self.queries), "hops": len(self.hops), "scores": len(self.scores)}
        if len(set(lengths.values())) > 1:
            got = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise DataError(
                f"SearchState {self.question_id}: expected a query, passages and scores for each hop, got {got}"
            )
        for number, (ids, scores) in enumerate(zip(self.hops, self.scores, strict=True), 1):
            if len(ids) != len(scores) or len(set(ids)) != len(ids):
                raise DataError(
                    f"SearchState {self.question_id}: expected different passages with a score each in hop {number}, "
                    f"got {len(ids)} passages ({len(set(ids))} different) and {len(scores)} scores"
                )

    @property
    def hop(self) -> int:
        """Number of hops done; 0 when nothing was retrieved."""
        return len(self.hops)

    @cached_property
    def seen(self) -> frozenset[str]:
        """Ids of all passages retrieved so far."""
        return frozenset(chain.from_iterable(self.hops))

    @cached_property
    def key(self) -> str:
        """16 hex digits that name the state: the question, its queries and what each of them returned."""
        content = json.dumps([self.question_id, self.queries, self.hops])
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def extend(state: SearchState, query: str, hits: Iterable[Scored]) -> SearchState:
    """Return the state after one more hop; of a passage that was returned twice the first place counts."""
    first: dict[str, float] = {}
    for hit in hits:
        first.setdefault(hit.id, float(hit.score))
    return SearchState(
        question_id=state.question_id,
        queries=(*state.queries, query),
        hops=(*state.hops, tuple(first)),
        scores=(*state.scores, tuple(first.values())),
    )


def up_to(state: SearchState, hops: int) -> SearchState:
    """Return the state as it was after its first `hops` hops."""
    return SearchState(state.question_id, state.queries[:hops], state.hops[:hops], state.scores[:hops])


def merge(state: SearchState, rule: str = "hop_order") -> tuple[str, ...]:
    """Return the passages of all hops in one order, each once.

    Args:
        state: what was retrieved.
        rule: one of MERGE_RULES.

    Raises:
        UsageError: the rule is unknown.
    """
    if rule not in MERGE_RULES:
        raise UsageError(f"unknown merge rule '{rule}'{did_you_mean(rule, MERGE_RULES)}")
    order = tuple(dict.fromkeys(chain.from_iterable(state.hops)))
    if rule == "hop_order":
        return order
    weight: dict[str, float] = {}
    for ids, scores in zip(state.hops, state.scores, strict=True):
        for rank, (passage, score) in enumerate(zip(ids, scores, strict=True), 1):
            if rule == "score":
                weight[passage] = max(score, weight.get(passage, score))
            else:
                weight[passage] = weight.get(passage, 0.0) + 1 / (RRF_K + rank)
    return tuple(sorted(order, key=lambda passage: -weight[passage]))  # sorted is stable: equals stay in order

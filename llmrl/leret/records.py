"""What exploration writes and everything after it reads: candidates, and the groups in which they are compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeVar

from llmrl.errors import DataError
from llmrl.jsonl import read_objects, write_objects
from llmrl.leret.context import SearchState, extend
from llmrl.types import FinishReason, Record

_DIGITS = 9  # of a reward: sums of the same fractions in another order are one level
_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class Retrieved:
    """A passage id with its score."""

    id: str
    score: float


@dataclass(frozen=True)
class Candidate(Record):
    """One query that was tried in one state.

    Args:
        state_before: what the query was written from.
        prompt_name: the prompt style that produced it.
        sample: number of the sample under that prompt and temperature.
        temperature: it was drawn at, 0 for greedy.
        query: the text that was searched for.
        hits: passage ids it brought into the context, best first; empty when it found nothing.
        scores: their scores.
        reward: of the context after this hop.
        ap: average precision of that context, whatever the reward is: the paper's rule for the next state reads it.
        recall: share of the gold documents in it.
        ret: the return, what pairs are built on; the reward unless futures were sampled.
        finish: "stop", or "length" where the query was cut.
        stopped: the candidate is the stop action: it searched for nothing and ends the search.
        token_ids: of the completion, as the engine gave them.
    """

    state_before: SearchState
    prompt_name: str
    sample: int
    temperature: float
    query: str
    hits: tuple[str, ...]
    scores: tuple[float, ...]
    reward: float
    ap: float
    recall: float
    ret: float | None = None
    finish: str = "stop"
    stopped: bool = False
    token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        state = self.state_before
        self._set(state_before=state if isinstance(state, SearchState) else SearchState.from_json(state))
        self._need_int("sample")
        self._need(isinstance(self.query, str), "query", "text")
        self._need(self.finish in (FinishReason.STOP, FinishReason.LENGTH), "finish", "'stop' or 'length'")
        for name in ("temperature", "reward", "ap", "recall", "ret"):
            if getattr(self, name) is None and name == "ret":
                self._set(ret=self.reward)
            self._set(**{name: _finite(getattr(self, name), f"Candidate.{name}")})
        for name in ("hits", "scores", "token_ids"):
            self._set(**{name: tuple(getattr(self, name))})
        self._need(len(self.hits) == len(self.scores), "hits", f"{len(self.scores)} passages, one a score")
        self._need(not (self.stopped and self.hits), "hits", "no passages of a stop action")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build the record from what `to_json` wrote; earlier files also hold `prompt_token_ids`, always empty."""
        if isinstance(value, Mapping):
            value = {key: of for key, of in value.items() if key != "prompt_token_ids"}
        return super().from_json(value)

    @property
    def question_id(self) -> str:
        """The question it belongs to."""
        return self.state_before.question_id

    @property
    def hop(self) -> int:
        """Number of the hop it was tried in, from 1."""
        return self.state_before.hop + 1

    @property
    def no_hit(self) -> bool:
        """Whether it searched and found nothing."""
        return not self.hits and not self.stopped

    @property
    def value(self) -> float:
        """The return, rounded so that equal sums of fractions are one level."""
        assert self.ret is not None
        return level(self.ret)

    @cached_property
    def state_after(self) -> SearchState:
        """The state its query leads to; that of a stop action is the state before."""
        if self.stopped:
            return self.state_before
        hits = (Retrieved(passage, score) for passage, score in zip(self.hits, self.scores, strict=True))
        return extend(self.state_before, self.query, hits)

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key that does not depend on when it was sampled."""
        return (self.question_id, self.hop, self.state_before.key, self.prompt_name, self.temperature, self.sample)


@dataclass(frozen=True)
class Group(Record):
    """The candidates of one state, which are compared with each other under the bare prompt.

    Args:
        gold: for each gold document the passage ids that count as it.
        candidates: at least one, all from the same state, in the order of `Candidate.order`.
    """

    gold: tuple[tuple[str, ...], ...]
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        candidates = [c if isinstance(c, Candidate) else Candidate.from_json(c) for c in self.candidates]
        candidates.sort(key=lambda candidate: candidate.order)
        self._set(gold=tuple(tuple(sorted(ids)) for ids in self.gold), candidates=tuple(candidates))
        self._need(len(candidates) > 0, "candidates", "at least one")
        states = {candidate.state_before.key for candidate in candidates}
        self._need(len(states) == 1, "candidates", f"candidates of one state, these are of {len(states)}")
        for before, after in pairwise(candidates):
            if before.order == after.order:
                raise DataError(
                    f"question {after.question_id}, hop {after.hop}: prompt '{after.prompt_name}', temperature "
                    f"{after.temperature:g}, sample {after.sample} is there twice; the exploration was stored twice"
                )

    @property
    def state(self) -> SearchState:
        """The state all of them start from."""
        return self.candidates[0].state_before

    @property
    def question_id(self) -> str:
        """The question."""
        return self.state.question_id

    @property
    def hop(self) -> int:
        """Number of the hop that was tried, from 1."""
        return self.state.hop + 1

    @property
    def all_found(self) -> bool:
        """Whether every gold document is in the state already, so that nothing is left to search for."""
        return bool(self.gold) and all(self.state.seen.intersection(ids) for ids in self.gold)

    @property
    def levels(self) -> tuple[float, ...]:
        """The different returns, least first."""
        return tuple(sorted({candidate.value for candidate in self.candidates}))


def level(value: float) -> float:
    """Round a reward so that sums of the same fractions in another order are equal."""
    return round(value, _DIGITS)


def group_candidates(
    candidates: Iterable[Candidate], gold: Mapping[str, Sequence[Iterable[str]]] | None = None
) -> list[Group]:
    """Group candidates by state, sorted by question, hop and state: the same groups in any order of arrival.

    Args:
        candidates: of any number of questions and hops.
        gold: by question id, for each gold document the passage ids that count as it; without it the groups have none,
            and no state counts as solved.

    Raises:
        DataError: a question has no gold, or a candidate is there twice.
    """
    by_state: dict[tuple[str, int, str], list[Candidate]] = {}
    for candidate in candidates:
        by_state.setdefault(candidate.order[:3], []).append(candidate)
    lacking = sorted({question for question, _, _ in by_state} - set(gold)) if gold is not None else []
    if lacking:
        raise DataError(f"{len(lacking)} explored question(s) without gold documents, the first: {lacking[0]}")
    return [
        Group(
            tuple(tuple(ids) for ids in gold[question]) if gold is not None else (), tuple(by_state[question, hop, key])
        )
        for question, hop, key in sorted(by_state)
    ]


def write_records(path: Path | str, records: Iterable[Record]) -> None:
    """Write one record a line to a .jsonl or .jsonl.gz file, which is whole or absent."""
    write_objects(path, (record.to_json() for record in records))


def read_records(path: Path | str, kind: type[_R]) -> list[_R]:
    """Read what `write_records` wrote.

    Raises:
        UsageError: the file is missing.
        DataError: a line is not such a record; the message names it.
    """
    records = []
    for where, row in read_objects(path):
        try:
            records.append(kind.from_json(row))
        except (DataError, TypeError) as error:
            raise DataError(f"{where}: expected a {kind.__name__}; {error}") from None
    return records


def _finite(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value != value or abs(value) == float("inf"):
        raise DataError(f"{where}: expected a finite number, got {value!r:.60}")
    return float(value)

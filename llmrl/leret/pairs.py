"""Preference pairs and SFT targets from explored groups.

The queries of a group were written from one state by several prompts; they are compared under the bare prompt. Queries with
one text are one query, and those with one return a level. Which levels are paired:

    adjacent     every query of a level over every query of the level below (the paper)
    all          every query over every query of any lower level
    best_worst   every query of the best level over every query of the worst

A group with a single level gives no pair. In a state where everything was found, the stop query is preferred to any search.
All choices are seeded by hashes of what is chosen, so neither the order of the groups nor the number of processes matters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from llmrl.errors import UsageError, did_you_mean
from llmrl.leret.context import SearchState
from llmrl.leret.records import Candidate, Group, level
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Record

PAIR_POLICIES = ("adjacent", "all", "best_worst")


@dataclass(frozen=True)
class PairRule:
    """Which pairs are built.

    Args:
        policy: one of PAIR_POLICIES.
        margin: least difference of the two returns.
        max_pairs: most pairs a question, shared out evenly over its hops; 0 is no limit.
        near_duplicate: queries whose sets of words overlap this much (Jaccard) or more count as one; 1 is off, and only
            equal texts do.
        echo_headers: words of the prompt that a query has no business to repeat; queries with one of them are left out.
        stop_query: what a policy says to stop, "" for an empty query; None: there is no stop action.
        seed: of the run.
    """

    policy: str = "adjacent"
    margin: float = 0.0
    max_pairs: int = 0
    near_duplicate: float = 1.0
    echo_headers: tuple[str, ...] = ()
    stop_query: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in PAIR_POLICIES:
            raise UsageError(f"unknown pairs '{self.policy}'{did_you_mean(self.policy, PAIR_POLICIES)}")
        if not (self.margin >= 0 and math.isfinite(self.margin)):
            raise UsageError(f"the margin of a pair must be a number of at least 0, got {self.margin}")
        if self.max_pairs < 0:
            raise UsageError(f"max_pairs must be at least 0 (no limit), got {self.max_pairs}")
        if not 0 < self.near_duplicate <= 1:
            raise UsageError(f"near_duplicate must be above 0 and at most 1 (off), got {self.near_duplicate}")
        if isinstance(self.echo_headers, str) or not all(header.strip() for header in self.echo_headers):
            raise UsageError(f"echo_headers must be a list of texts that are not empty, got {self.echo_headers!r:.60}")


@dataclass(frozen=True)
class Query:
    """One text of a group, its return, and the styles that wrote it."""

    text: str
    value: float
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _AtState(Record):
    """What belongs to the state it was tried from."""

    state: SearchState

    def __post_init__(self) -> None:
        self._set(state=self.state if isinstance(self.state, SearchState) else SearchState.from_json(self.state))

    @property
    def question_id(self) -> str:
        """The question."""
        return self.state.question_id

    @property
    def hop(self) -> int:
        """Number of the hop, from 1."""
        return self.state.hop + 1


@dataclass(frozen=True)
class Pair(_AtState):
    """A query preferred to another from the same state.

    Of a stop query over a search the rewards are those of the contexts, so their difference may be 0.

    Args:
        state: both are tried from.
        chosen: text of the better query.
        rejected: text of the worse one.
        chosen_reward: return of the better one.
        rejected_reward: of the worse one.
        chosen_prompts: styles that wrote the better one.
        rejected_prompts: that wrote the worse one.
    """

    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float
    chosen_prompts: tuple[str, ...] = ()
    rejected_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(chosen_prompts=tuple(self.chosen_prompts), rejected_prompts=tuple(self.rejected_prompts))
        self._need(self.chosen != self.rejected, "rejected", "another query than the chosen one")

    @property
    def margin(self) -> float:
        """Difference of the returns."""
        return level(self.chosen_reward - self.rejected_reward)


@dataclass(frozen=True)
class Target(_AtState):
    """What supervised training says in a state: the query with the greatest return."""

    query: str
    reward: float


def build_pairs(groups: Iterable[Group], rule: PairRule) -> list[Pair]:
    """Return the pairs of all groups, sorted by question, hop, state and text."""
    by_question: dict[str, list[Pair]] = {}
    for group in groups:
        by_question.setdefault(group.question_id, []).extend(group_pairs(group, rule))
    pairs = [pair for question in by_question.values() for pair in _capped(question, rule)]
    return sorted(pairs, key=lambda pair: (pair.question_id, pair.hop, pair.state.key, pair.chosen, pair.rejected))


def group_pairs(group: Group, rule: PairRule) -> list[Pair]:
    """Return all pairs of one group; the limit a question is not applied."""
    queries = distinct_queries(group, rule)
    if rule.stop_query is not None and group.all_found:
        stop = _stopping(group, queries, rule.stop_query)
        return [_pair(group.state, stop, query) for query in queries if query.text != stop.text]
    return [
        _pair(group.state, chosen, rejected)
        for chosen, rejected in _compared(queries, rule.policy)
        if level(chosen.value - rejected.value) >= level(rule.margin) and not _near(chosen.text, rejected.text, rule)
    ]


def best_queries(groups: Iterable[Group], rule: PairRule) -> list[Target]:
    """Return the SFT target of each group whose returns are not all equal, sorted by question, hop and state.

    Where they are, nothing says which query is good. Of equally good queries the one with the fewest words is taken, then
    the first by text. In a state where everything was found the target is the stop query, if there is one.

    Args:
        groups: of any number of questions and hops.
        rule: its filters and its stop query are used.
    """
    targets = []
    for group in sorted(groups, key=lambda group: group.candidates[0].order[:3]):
        queries = distinct_queries(group, rule)
        if rule.stop_query is not None and group.all_found:
            stop = _stopping(group, queries, rule.stop_query)
            targets.append(Target(group.state, stop.text, stop.value))
        elif len({query.value for query in queries}) > 1:
            best = max(query.value for query in queries)
            taken = min((query for query in queries if query.value == best), key=_shortest)
            targets.append(Target(group.state, taken.text, taken.value))
    return targets


def distinct_queries(group: Group, rule: PairRule) -> list[Query]:
    """Return the texts of a group that may be trained on, worst level first and the shortest first within one.

    Equal texts are one, with the mean return where sampled futures gave them several. An empty text, one that repeats a
    header of the prompt, and a near duplicate of a shorter one on the same level are left out.
    """
    by_text: dict[str, list[Candidate]] = {}
    for candidate in group.candidates:
        text = candidate.query.strip()
        if (text or rule.stop_query == "") and not _echoes(text, rule.echo_headers):
            by_text.setdefault(text, []).append(candidate)
    kept: list[Query] = []
    for query in sorted((_query(text, same) for text, same in by_text.items()), key=lambda q: (q.value, *_shortest(q))):
        if not any(query.value == other.value and _near(query.text, other.text, rule) for other in kept):
            kept.append(query)
    return kept


def jaccard(first: str, second: str) -> float:
    """Return the overlap of the sets of lower-cased words, shared over all; 1 for two texts without a word."""
    ours, theirs = _word_set(first), _word_set(second)
    return len(ours & theirs) / len(ours | theirs) if ours | theirs else 1.0


def _query(text: str, same: Sequence[Candidate]) -> Query:
    return Query(
        text=text,
        value=level(math.fsum(candidate.value for candidate in same) / len(same)),
        prompts=tuple(sorted({candidate.prompt_name for candidate in same})),
    )


def _shortest(query: Query) -> tuple[int, str]:
    return len(query.text.split()), query.text


def _echoes(text: str, headers: Sequence[str]) -> bool:
    return any(header.lower() in text.lower() for header in headers)


def _near(first: str, second: str, rule: PairRule) -> bool:
    return rule.near_duplicate < 1 and jaccard(first, second) >= rule.near_duplicate


def _word_set(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _compared(queries: Sequence[Query], policy: str) -> Iterator[tuple[Query, Query]]:
    levels = sorted({query.value for query in queries})
    index = {value: i for i, value in enumerate(levels)}
    for chosen in queries:
        for rejected in queries:
            above, below = index[chosen.value], index[rejected.value]
            adjacent = above == below + 1
            extreme = above == len(levels) - 1 and below == 0
            if above > below and (policy == "all" or (adjacent if policy == "adjacent" else extreme)):
                yield chosen, rejected


def _pair(state: SearchState, chosen: Query, rejected: Query) -> Pair:
    return Pair(
        state=state,
        chosen=chosen.text,
        rejected=rejected.text,
        chosen_reward=chosen.value,
        rejected_reward=rejected.value,
        chosen_prompts=chosen.prompts,
        rejected_prompts=rejected.prompts,
    )


def _stopping(group: Group, queries: Sequence[Query], stop: str) -> Query:
    """Return the stop query; the state is worth what a stop earned, where one was tried, else the best of the searches."""
    same = [candidate for candidate in group.candidates if candidate.query.strip() == stop]
    found = _query(stop, same) if same else Query(stop, 0.0)
    stopped = [candidate.value for candidate in group.candidates if candidate.stopped]
    return replace(found, value=max(stopped or [query.value for query in queries] or [1.0]))


def _capped(pairs: list[Pair], rule: PairRule) -> list[Pair]:
    """Take pairs of each hop in turn, in an order that only a hash of the pair decides, until the limit."""
    if not rule.max_pairs or len(pairs) <= rule.max_pairs:
        return pairs
    by_hop: dict[int, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: _lot(pair, rule.seed)):
        by_hop.setdefault(pair.hop, []).append(pair)
    dealt = zip_longest(*(by_hop[hop] for hop in sorted(by_hop)))
    return [pair for turn in dealt for pair in turn if pair is not None][: rule.max_pairs]


def _lot(pair: Pair, seed: int) -> int:
    return derive_seed(seed, pair.question_id, pair.state.key, pair.chosen, pair.rejected, "pair")

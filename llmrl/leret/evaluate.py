"""What a way of searching finds: scores after each hop, means with 95% intervals, paired differences between systems.

    recall   share of the gold documents in the context ("RE")
    ap       average precision of the context
    mrr      one over the rank of the first gold document
    both     1 when every gold document is there

The context after a hop holds what all hops so far found. A question whose search stopped early keeps the scores it had.
Questions are drawn with replacement, the same draws for all systems, so that what makes a question hard cancels in a
difference. Of several training seeds the scores of a question are averaged first: its runs are drawn together, and three
runs do not count as three times the questions. That interval is about new questions, these seeds given; `sd` is the
spread over seeds, beside it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.errors import DataError, UsageError, did_you_mean
from llmrl.files import to_json
from llmrl.intervals import draw_means, interval
from llmrl.leret.context import SearchState, merge
from llmrl.leret.questions import Excluded, Question
from llmrl.leret.rewards import Gold, all_gold, average_precision, recall, reciprocal_rank
from llmrl.types import Record

Array = NDArray[np.float64]
METRICS = ("recall", "ap", "mrr", "both")
NO_TYPE = "no type"
_DIGITS = 12  # a difference of sums of the same fractions is 0, not 1e-17
MOST_EMPTY = 0.5  # a row with more empty searches than this share is marked


@dataclass(frozen=True)
class HopScore(Record):
    """The context after one hop; `no_hit` says that this hop's query found nothing at all."""

    recall: float
    ap: float
    mrr: float
    both: float
    no_hit: bool = False


@dataclass(frozen=True)
class Outcome(Record):
    """What a system found for one question.

    Args:
        question_id: the question.
        type: of the question, None where the file names none.
        hops: scores after each hop; fewer than others have where the search stopped early.
        queries: one a hop.
        context: passage ids at the end, best first.
    """

    question_id: str
    type: str | None
    hops: tuple[HopScore, ...]
    queries: tuple[str, ...]
    context: tuple[str, ...]

    def __post_init__(self) -> None:
        hops = tuple(hop if isinstance(hop, HopScore) else HopScore.from_json(hop) for hop in self.hops)
        self._set(hops=hops, queries=tuple(self.queries), context=tuple(self.context))
        self._need(len(self.queries) == len(hops), "queries", f"{len(hops)}, one a hop")

    def after(self, hop: int) -> HopScore:
        """Return the scores after `hop` hops (from 1), or where it stopped before."""
        return self.hops[min(hop, len(self.hops)) - 1] if self.hops else HopScore(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class System:
    """A row of the report: its name, and one outcome a question in any order.

    Raises:
        DataError: there is no outcome, or a question is there twice.
    """

    name: str
    outcomes: tuple[Outcome, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "outcomes", tuple(sorted(self.outcomes, key=lambda outcome: outcome.question_id)))
        if not self.outcomes:
            raise DataError(f"system '{self.name}' has no outcomes: expected one a question")
        question, count = Counter(self.ids).most_common(1)[0]
        if count > 1:
            raise DataError(f"system '{self.name}' has {count} outcomes of question {question}: expected one")

    @property
    def ids(self) -> tuple[str, ...]:
        """Question ids, sorted."""
        return tuple(outcome.question_id for outcome in self.outcomes)

    @cached_property
    def hops(self) -> int:
        """Most hops of any question."""
        return max(len(outcome.hops) for outcome in self.outcomes)

    @property
    def mostly_empty(self) -> bool:
        """Whether more than MOST_EMPTY of its searches found nothing; a question without any query counts as one of them."""
        empty, calls, _ = _calls([self])
        return empty > MOST_EMPTY * calls

    def scores(self, hop: int | None = None) -> Array:
        """Return `[questions, METRICS]` after `hop` hops, or at the end, questions in the order of `ids`."""
        at = [outcome.after(self.hops if hop is None else hop) for outcome in self.outcomes]
        return np.array([[getattr(score, metric) for metric in METRICS] for score in at], dtype=np.float64)

    def means(self) -> dict[str, float]:
        """Return the mean of each metric at the end, without intervals."""
        return dict(zip(METRICS, self.scores().mean(0).tolist(), strict=True))


# --- scores of one question -------------------------------------------------------------------------------------------


def score_hops(contexts: Sequence[Sequence[str]], gold: Gold, no_hit: Sequence[bool] = ()) -> tuple[HopScore, ...]:
    """Score the context after each hop.

    Args:
        contexts: one a hop, each with everything found so far, best first.
        gold: for each gold document the passage ids that count as it.
        no_hit: for each hop, whether its own query found nothing; none did by default.
    """
    empty = no_hit or [False] * len(contexts)
    if len(empty) != len(contexts):
        raise DataError(f"expected one no_hit for each of {len(contexts)} hops, got {len(empty)}")
    return tuple(
        HopScore(
            recall=recall(context, gold),
            ap=average_precision(context, gold),
            mrr=reciprocal_rank(context, gold),
            both=all_gold(context, gold),
            no_hit=nothing,
        )
        for context, nothing in zip(contexts, empty, strict=True)
    )


def score_state(question: Question, state: SearchState, rule: str) -> Outcome:
    """Score a finished search after each of its hops; `rule` orders the passages of several hops (`context.merge`)."""
    contexts = [
        merge(SearchState(state.question_id, state.queries[:hop], state.hops[:hop], state.scores[:hop]), rule)
        for hop in range(1, state.hop + 1)
    ]
    scores = score_hops(contexts, question.gold, [not hits for hits in state.hops])
    return Outcome(question.id, question.type, scores, state.queries, contexts[-1] if contexts else ())


# --- the report -------------------------------------------------------------------------------------------------------


def report_json(
    systems: Sequence[System],
    pairs: Iterable[tuple[str, str]],
    *,
    draws: int = 10_000,
    seed: int = 0,
    excluded: Sequence[Excluded] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report of systems over the same questions.

    Args:
        systems: the rows.
        pairs: names (a, b) for which a - b is reported.
        draws: of the bootstrap.
        seed: of the draws.
        excluded: questions that were left out before, to be counted.
        facts: further keys: fingerprints of corpus, retriever and model, settings of the search.

    Returns:
        "systems": by name METRICS as {"value", "low", "high"}, "hops_used" (queries a question) likewise, "by_hop" (a list),
        "by_type", "searches" and "empty", the share of them that found nothing, "never_searched" (questions for which no
        query was written), and "mostly_empty": with these, more than MOST_EMPTY of the searches found nothing. "paired": by
        "a - b" METRICS as {"value", "low", "high", "two_sided"}, the last being twice the smaller share of draws on one
        side of 0. Likewise "paired_by_hop" and "paired_by_type". Then "questions", "excluded", "bootstrap" and `facts`.

    Raises:
        DataError: systems over different questions, or two of one name.
        UsageError: a pair names no system, or a fact has the name of a key of the report.
    """
    return report_seeds({"": systems}, pairs, draws=draws, seed=seed, excluded=excluded, facts=facts)


def report_seeds(
    runs: Mapping[str, Sequence[System]],
    pairs: Iterable[tuple[str, str]],
    *,
    draws: int = 10_000,
    seed: int = 0,
    excluded: Sequence[Excluded] = (),
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report of several training seeds in the form of `report_json`, each value being the mean over the seeds.

    Each score and each difference then also has "runs", its value by training seed, and "sd" over them.

    Args:
        runs: by training seed its systems, of the same names and over the same questions; a baseline that needs no training
            is the same in all. The other arguments are those of `report_json`.
    """
    by_name, pairs = _rows(runs), list(dict.fromkeys(pairs))
    for name in (name for pair in pairs for name in pair):
        if name not in by_name:
            raise UsageError(f"no system '{name}' to compare{did_you_mean(name, by_name)}")
    seeds = list(runs) if len(runs) > 1 else []
    outcomes = next(iter(by_name.values()))[0].outcomes
    everything = _Sample(by_name, np.arange(len(outcomes)), seeds, draws, seed, by_hop=True)
    types = np.array([outcome.type or NO_TYPE for outcome in outcomes])
    names = sorted(set(types.tolist()) - ({NO_TYPE} if (types == NO_TYPE).all() else set()))
    by_type = {name: _Sample(by_name, np.flatnonzero(types == name), seeds, draws, seed) for name in names}
    report = {
        "systems": {name: _system_json(name, found, everything, by_type) for name, found in by_name.items()},
        **_paired_json(pairs, by_name, everything, by_type),
        "questions": len(outcomes),
        "excluded": {
            "questions": len(excluded),
            "reasons": dict(Counter(e.reason for e in excluded)),
            "ids": [e.id for e in excluded],
        },
        "bootstrap": {"unit": "question", "draws": draws, "seed": seed, "interval": 0.95, "training_seeds": seeds},
    }
    clash = sorted(set(facts or {}) & set(report))
    if clash:
        raise UsageError(f"'{clash[0]}' is a key of the report itself: give the fact another name")
    return to_json({**report, **(facts or {})})


def _system_json(
    name: str, found: Sequence[System], everything: _Sample, by_type: Mapping[str, _Sample]
) -> dict[str, Any]:
    empty, calls, never = _calls(found)
    return {
        **everything.scores(name),
        "hops_used": everything.interval((name, None, "hops_used")),
        **_empties(found),
        "never_searched": never,
        "mostly_empty": empty > MOST_EMPTY * calls,
        "by_hop": [
            {"hop": hop, **everything.scores(name, hop), **_empties(found, hop)} for hop in range(1, _hops(found) + 1)
        ],
        "by_type": {t: {"questions": sample.size, **sample.scores(name)} for t, sample in by_type.items()},
    }


def _paired_json(
    pairs: Sequence[tuple[str, str]],
    by_name: Mapping[str, Sequence[System]],
    everything: _Sample,
    by_type: Mapping[str, _Sample],
) -> dict[str, Any]:
    result: dict[str, Any] = {"paired": {}, "paired_by_hop": {}, "paired_by_type": {}}
    for a, b in pairs:
        name, hops = f"{a} - {b}", min(_hops(by_name[a]), _hops(by_name[b]))
        result["paired"][name] = everything.differences(a, b)
        result["paired_by_hop"][name] = [
            {"hop": hop, **everything.differences(a, b, hop)} for hop in range(1, hops + 1)
        ]
        result["paired_by_type"][name] = {t: sample.differences(a, b) for t, sample in by_type.items()}
    return result


def _empties(found: Sequence[System], hop: int | None = None) -> dict[str, Any]:
    """Return how many searches there were (at one hop) and the share of them that found nothing."""
    taken = slice(None) if hop is None else slice(hop - 1, hop)
    searches = [score.no_hit for system in found for outcome in system.outcomes for score in outcome.hops[taken]]
    return {"searches": len(searches), "empty": sum(searches) / len(searches) if searches else None}


def _calls(found: Sequence[System]) -> tuple[int, int, int]:
    """Return (empty searches, all searches, questions without a query), the last being in the first two as well."""
    outcomes = [outcome for system in found for outcome in system.outcomes]
    never = sum(not outcome.hops for outcome in outcomes)
    empty = sum(score.no_hit for outcome in outcomes for score in outcome.hops)
    return never + empty, never + sum(len(outcome.hops) for outcome in outcomes), never


def _hops(found: Sequence[System]) -> int:
    return max(system.hops for system in found)


def _rows(runs: Mapping[str, Sequence[System]]) -> dict[str, list[System]]:
    """Return the runs of each system by name, checked to be over the same questions of the same types."""
    if not runs or not all(runs.values()):
        raise DataError("expected at least one system to report, got none")
    by_name: dict[str, list[System]] = {system.name: [] for system in next(iter(runs.values()))}
    for run, systems in runs.items():
        names = [system.name for system in systems]
        if len(set(names)) < len(names) or set(names) != set(by_name):
            where = f"seed {run}: " if run else ""
            raise DataError(f"{where}expected each of {', '.join(by_name)} once, got {', '.join(names)}")
        for system in systems:
            by_name[system.name].append(system)
    everyone = [system for found in by_name.values() for system in found]
    for system in everyone[1:]:
        _check_same_questions(everyone[0], system)
    return by_name


def _check_same_questions(a: System, b: System) -> None:
    if a.ids != b.ids:
        only_a, only_b = sorted(set(a.ids) - set(b.ids)), sorted(set(b.ids) - set(a.ids))
        raise DataError(
            f"'{a.name}' and '{b.name}' were not asked the same questions: {len(only_a)} only of the first, {len(only_b)} "
            f"only of the second, e.g. {(only_a or only_b)[0]}; evaluate both on one file"
        )
    for mine, theirs in zip(a.outcomes, b.outcomes, strict=True):
        if mine.type != theirs.type:
            raise DataError(
                f"question {mine.question_id} is of type {mine.type} in '{a.name}' and {theirs.type} in '{b.name}'; "
                "evaluate both on one file"
            )


_Key = tuple[str, int | None, str]  # system, hop (None: at the end), metric


class _Sample:
    """The scores of all systems on some of the questions, and their means under shared draws."""

    def __init__(
        self, by_name: Mapping[str, Sequence[System]], rows: NDArray[np.int64], seeds: Sequence[str],
        draws: int, seed: int, *, by_hop: bool = False,
    ) -> None:  # fmt: skip
        self.size, self.seeds = len(rows), seeds
        self.runs: dict[_Key, Array] = {}  # `[seeds, questions]`
        for name, found in by_name.items():
            for hop in (None, *range(1, _hops(found) + 1)) if by_hop else (None,):
                scores = np.stack([system.scores(hop)[rows] for system in found])
                self.runs.update({(name, hop, metric): scores[:, :, i] for i, metric in enumerate(METRICS)})
            used = np.array([[len(outcome.hops) for outcome in system.outcomes] for system in found], dtype=np.float64)
            self.runs[name, None, "hops_used"] = used[:, rows]
        values = {key: runs.mean(0) for key, runs in self.runs.items()}
        if self.size > 1:
            means = draw_means(np.stack(list(values.values()), axis=1), draws, seed)
        else:
            means = np.full((draws, len(values)), np.nan)  # one question says nothing about the next
        self.draws = dict(zip(values, means.T, strict=True))

    def scores(self, name: str, hop: int | None = None) -> dict[str, Any]:
        return {metric: self.interval((name, hop, metric), ceiling=1.0) for metric in METRICS}

    def interval(self, key: _Key, ceiling: float | None = None) -> dict[str, Any]:
        runs = self.runs[key]
        return {**interval(_mean(runs), self.draws[key], 0.0, ceiling, basic=False), **self._spread(runs)}

    def differences(self, a: str, b: str, hop: int | None = None) -> dict[str, Any]:
        return {metric: self._difference((a, hop, metric), (b, hop, metric)) for metric in METRICS}

    def _difference(self, a: _Key, b: _Key) -> dict[str, Any]:
        runs, draws = self.runs[a] - self.runs[b], np.round(self.draws[a] - self.draws[b], _DIGITS)
        fewer = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
        # + 1: so many draws cannot show that something never happens (Davison and Hinkley 1997, 4.2)
        share = min(1.0, 2 * (fewer + 1) / (len(draws) + 1)) if self.size > 1 else None
        return {**interval(_mean(runs), draws, None, basic=False), "two_sided": share, **self._spread(runs)}

    def _spread(self, runs: Array) -> dict[str, Any]:
        if not self.seeds:
            return {}
        means = [round(value, _DIGITS) for value in runs.mean(1).tolist()]
        sd = round(float(np.std(means, ddof=1)), _DIGITS)  # of equal values 0, not 1e-16
        return {"runs": dict(zip(self.seeds, means, strict=True)), "sd": sd}


def _mean(runs: Array) -> float:
    return round(math.fsum(runs.ravel().tolist()) / runs.size, _DIGITS)

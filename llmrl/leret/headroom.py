"""What exploration found, before anything is trained: is there something to learn, and where does it come from?

Training moves the bare prompt towards the best query of each group, so the room above it is the best reward of a group over
the mean of its queries (what sampling without preference gives) and over the bare prompt (what the model does today).
Figures are of rewards, in the units of the reward; the shares are between 0 and 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from llmrl.leret.pairs import PairRule, build_pairs
from llmrl.leret.records import Candidate, Group, level
from llmrl.tables import aligned_table

# there is nothing to learn beyond these
MAX_EMPTY_RETRIEVALS = 0.5  # share of searches without a hit
MIN_DISTINCT_QUERIES = 0.05  # mean of (distinct - 1) / (queries - 1) a group: 0 when all of them are the same
MIN_QUESTIONS_WITH_PAIR = 0.02  # share
MIN_HEADROOM = 0.005  # best of a group over its mean, in reward

_AXES: dict[str, Callable[[Candidate], str]] = {
    "prompt": lambda candidate: candidate.prompt_name,
    "sample": lambda candidate: str(candidate.sample),
    "temperature": lambda candidate: f"{candidate.temperature:g}",
}


def headroom(groups: Iterable[Group], rule: PairRule, bare: str = "bare") -> dict[str, Any]:
    """Return the report on explored groups, ready for JSON; what cannot be computed is None.

    Args:
        groups: all of a round.
        rule: pairs are counted under it, with its limit a question.
        bare: name of the prompt that is trained.
    """
    groups = list(groups)
    # where everything was found, stopping is right and not one query among others; a group with one candidate compares nothing
    by_group = [[c for c in group.candidates if not (c.stopped and group.all_found)] for group in groups]
    compared = [candidates for candidates in by_group if len(candidates) > 1]
    tried = [candidate for candidates in by_group for candidate in candidates]
    searches = [candidate for candidate in tried if not candidate.stopped]
    pairs = build_pairs(groups, rule)
    questions = {group.question_id for group in groups}
    with_pair = {pair.question_id for pair in pairs}
    per_hop = Counter(pair.hop for pair in pairs)
    return {
        "questions": len(questions),
        "groups": len(groups),
        "searches": len(searches),
        "stops": len(tried) - len(searches),
        "empty_retrievals": _mean(candidate.no_hit for candidate in searches),
        "distinct_queries": _mean(_distinct(candidates) for candidates in compared),
        "levels": _levels(groups),
        "pairs": len(pairs),
        "pairs_by_hop": {str(hop): per_hop[hop] for hop in sorted({group.hop for group in groups})},
        "questions_with_pair": len(with_pair) / len(questions) if questions else None,
        **_room(compared, bare),
        "room_by_hop": {
            str(hop): _room([cs for cs in compared if cs[0].hop == hop], bare)
            for hop in sorted({g.hop for g in groups})
        },
        "win_rates": _win_rates(compared),
        "axes": {name: _axis(tried, key) for name, key in _AXES.items()},
    }


def refuse_reason(report: Mapping[str, Any]) -> str | None:
    """Return why there is nothing to learn from what was explored, and what to change; None when there is.

    Args:
        report: of `headroom`.
    """
    if not report["searches"]:
        return "nothing was explored: no query was tried; check the questions and the prompts"
    if report["empty_retrievals"] > MAX_EMPTY_RETRIEVALS:
        return (
            f"{report['empty_retrievals']:.0%} of {report['searches']} searches found nothing (limit "
            f"{MAX_EMPTY_RETRIEVALS:.0%}): check the retriever, its corpus and the queries"
        )
    if report["distinct_queries"] is None:
        return "one query a state, so nothing can be compared: explore with more prompts, samples, or a temperature above 0"
    if report["distinct_queries"] < MIN_DISTINCT_QUERIES:
        return (
            f"the prompts ask the same query: {report['distinct_queries']:.1%} of what could differ does (least "
            f"{MIN_DISTINCT_QUERIES:.0%}): explore with more prompts, or a temperature above 0"
        )
    if not report["pairs"] or report["questions_with_pair"] < MIN_QUESTIONS_WITH_PAIR:
        return (
            f"{report['pairs']} pairs from {report['questions_with_pair']:.1%} of {report['questions']} questions (least "
            f"{MIN_QUESTIONS_WITH_PAIR:.0%}): the queries of a state earn the same reward; use more different prompts, a "
            "smaller margin, or a reward with more levels"
        )
    if report["headroom"] < MIN_HEADROOM:
        return (
            f"the best query of a state earns {report['headroom']:.4f} more than the mean (least {MIN_HEADROOM}): the "
            "model asks as well as it can here; use more different prompts, or harder questions"
        )
    return None


def headroom_table(report: Mapping[str, Any]) -> str:
    """Return the report as markdown tables, which read as well in a terminal."""
    levels = report["levels"]["histogram"]
    rows = [
        ("questions / groups / searches", f"{report['questions']} / {report['groups']} / {report['searches']}"),
        ("distinct queries", _shown(report["distinct_queries"])),
        ("stops before all is found", str(report["stops"])),
        ("searches without a hit", _shown(report["empty_retrievals"])),
        ("reward levels a group", f"{_shown(report['levels']['mean'])} (groups by levels: {_counts(levels)})"),
        ("pairs", f"{report['pairs']} (by hop: {_counts(report['pairs_by_hop'])})"),
        ("questions with a pair", _shown(report["questions_with_pair"])),
        ("best / mean / bare prompt", " / ".join(_shown(report[key]) for key in ("best", "mean", "bare"))),
        ("headroom over mean / over bare", " / ".join(_shown(report[key]) for key in ("headroom", "headroom_bare"))),
        *_unanswered(report),
    ]
    wins = [
        (name, _shown(win["best"]), _shown(win["alone"]), _shown(report["axes"]["prompt"][name]["reward"]))
        for name, win in report["win_rates"].items()
    ]
    others = [
        (f"{axis} {name}", _shown(of["reward"]), _shown(of["empty_retrievals"]), str(of["tried"]))
        for axis, values in report["axes"].items()
        if axis == "prompt" or len(values) > 1  # one sample and one temperature are no axis
        for name, of in values.items()
    ]
    return "\n\n".join(
        (
            aligned_table(("exploration", ""), rows),
            aligned_table(("prompt", "reaches the best", "alone", "mean reward"), wins),
            aligned_table(("axis", "mean reward", "no hit", "tried"), others),
        )
    )


def _unanswered(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the row on prompts without an answer, where the report of a run counts them."""
    failed = report.get("failed_prompts")
    if failed is None:
        return []
    of = f" of {report['prompts']}" if "prompts" in report else ""
    first = " ".join(report.get("first_failure", "").replace("|", "/").split())  # a cell of a table
    why = f" ({first:.80})" if first else ""
    return [("prompts without an answer", f"{failed}{of}{why}")]


def _distinct(candidates: Sequence[Candidate]) -> float:
    """Return 0 when all queries of a group are the same, 1 when no two are."""
    return (len({candidate.query.strip() for candidate in candidates}) - 1) / (len(candidates) - 1)


def _levels(groups: Sequence[Group]) -> dict[str, Any]:
    counts = Counter(len(group.levels) for group in groups)
    return {
        "mean": _mean(len(group.levels) for group in groups),
        "histogram": {str(number): counts[number] for number in sorted(counts)},
    }


def _room(compared: Sequence[Sequence[Candidate]], bare: str) -> dict[str, float | None]:
    """Return means over groups; those of the bare prompt over the groups in which it was tried."""
    best = [max(c.value for c in candidates) for candidates in compared]
    means = [_mean(c.value for c in candidates) for candidates in compared]
    bares = [_mean(c.value for c in candidates if c.prompt_name == bare) for candidates in compared]
    return {
        "best": _mean(best),
        "mean": _mean(means),
        "bare": _mean(bares),
        "headroom": _mean(top - mean for top, mean in zip(best, means, strict=True) if mean is not None),
        "headroom_bare": _mean(top - own for top, own in zip(best, bares, strict=True) if own is not None),
    }


def _win_rates(compared: Sequence[Sequence[Candidate]]) -> dict[str, dict[str, float | None]]:
    """Return for each prompt the share of its groups in which it reaches the best reward, and in which no other does."""
    winners: dict[str, list[set[str]]] = {}
    for candidates in compared:
        best = max(c.value for c in candidates)
        at_best = {c.prompt_name for c in candidates if c.value == best}
        for name in {c.prompt_name for c in candidates}:
            winners.setdefault(name, []).append(at_best)
    return {
        name: {
            "groups": len(sets),
            "best": _mean(name in at_best for at_best in sets),
            "alone": _mean(at_best == {name} for at_best in sets),
        }
        for name, sets in sorted(winners.items())
    }


def _axis(tried: Sequence[Candidate], key: Callable[[Candidate], str]) -> dict[str, dict[str, Any]]:
    by_value: dict[str, list[Candidate]] = {}
    for candidate in tried:
        by_value.setdefault(key(candidate), []).append(candidate)
    return {
        name: {
            "tried": len(same),
            "reward": _mean(candidate.value for candidate in same),
            "empty_retrievals": _mean(candidate.no_hit for candidate in same),
        }
        for name, same in sorted(by_value.items())
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return level(math.fsum(known) / len(known)) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{key}: {count}" for key, count in counts.items()) or "none"

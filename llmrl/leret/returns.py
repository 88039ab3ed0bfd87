"""What a query is worth: its own hop alone, or what the search came to afterwards.

    greedy   the reward after its hop (the paper)
    best     the greatest final reward of the futures sampled from its context
    mean     their mean

A reward is that of the whole context so far, so the final one needs no sum over hops; a future that takes T more hops is
worth discount^T of its final reward. With a gain as the reward only greedy is meaningful.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from llmrl.errors import UsageError, did_you_mean
from llmrl.leret.records import Candidate, Group

RETURNS = ("greedy", "best", "mean")
_Context = tuple[str, tuple[tuple[str, ...], ...]]


def future_return(
    reward: float, futures: Sequence[Sequence[float]], how: str = "greedy", discount: float = 1.0
) -> float:
    """Return the return of one query.

    Args:
        reward: after its own hop.
        futures: a sampled continuation each, as the rewards after each further hop; one without a hop (it stopped, or all
            was found) ends with `reward`. None at all: the query was the last.
        how: one of RETURNS.
        discount: of a hop, in (0, 1].

    Raises:
        UsageError: `how` is unknown or `discount` outside its range.
    """
    _check(how, discount)
    if how == "greedy" or not futures:
        return reward
    finals = [discount ** len(future) * (future[-1] if len(future) else reward) for future in futures]
    return max(finals) if how == "best" else math.fsum(finals) / len(finals)


def propagate(groups: Iterable[Group], how: str = "greedy", discount: float = 1.0) -> list[Group]:
    """Set the return of every candidate from the hops that were explored after it.

    The futures of a candidate are the candidates tried from the context it led to, each with its own return, so that
    "best" is the best path of the explored tree and "mean" the mean over it. Where some contexts of a group were explored
    and others were not, returns of the two would not compare: the unexplored are left out, unless nothing was left to do
    in them (all was found, or the search stopped).

    Args:
        groups: of any number of questions, all hops together.
        how: one of RETURNS.
        discount: of a hop, in (0, 1].

    Returns:
        The groups in their order.
    """
    _check(how, discount)
    groups = list(groups)
    if how == "greedy":
        return [_with_returns(group, {i: c.reward for i, c in enumerate(group.candidates)}) for group in groups]
    future: dict[_Context, list[float]] = {}  # returns of what was tried from a context
    done: dict[int, Group] = {}
    for index in sorted(range(len(groups)), key=lambda i: -groups[i].hop):  # a return needs those of the hop after it
        group = groups[index]
        final = {i: c.reward for i, c in enumerate(group.candidates) if c.stopped or c.recall >= 1}
        explored = {}
        for i, candidate in enumerate(group.candidates):
            after = future.get(_context(candidate), ())
            if after and i not in final:
                explored[i] = discount * (max(after) if how == "best" else math.fsum(after) / len(after))
        returns = explored | final if explored else {i: c.reward for i, c in enumerate(group.candidates)}
        done[index] = _with_returns(group, returns)
        future.setdefault((group.question_id, group.state.hops), []).extend(returns.values())
    return [done[index] for index in range(len(groups))]


def _context(candidate: Candidate) -> _Context:
    return candidate.question_id, candidate.state_after.hops


def _with_returns(group: Group, returns: dict[int, float]) -> Group:
    kept = tuple(replace(group.candidates[i], ret=value) for i, value in sorted(returns.items()))
    return replace(group, candidates=kept)


def _check(how: str, discount: float) -> None:
    if how not in RETURNS:
        raise UsageError(f"unknown returns '{how}'{did_you_mean(how, RETURNS)}")
    if not 0 < discount <= 1:
        raise UsageError(f"the discount must be above 0 and at most 1, got {discount}")

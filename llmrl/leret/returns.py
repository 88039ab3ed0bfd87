"""What a query is worth: its own hop alone, or what the search came to afterwards.

    greedy   the reward after its hop (the paper)
    best     the greatest final reward of the futures sampled from its context
    mean     their mean

A reward is that of the whole context so far, so the final one needs no sum over hops; a future that takes T more hops is
worth discount^T of its final reward. With a gain as the reward only greedy is meaningful.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmrl.errors import UsageError, did_you_mean

RETURNS = ("greedy", "best", "mean")


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


def _check(how: str, discount: float) -> None:
    if how not in RETURNS:
        raise UsageError(f"unknown returns '{how}'{did_you_mean(how, RETURNS)}")
    if not 0 < discount <= 1:
        raise UsageError(f"the discount must be above 0 and at most 1, got {discount}")

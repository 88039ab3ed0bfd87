"""What is to go in a set of dialogues, and whether the values that were learnt can be right.

V is an upper expectile of what can follow, so it lies above what was earned on average and below the best that was seen.
Outside of that range something is wrong with the training, whatever the losses say: V of offline RL drifts without a sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmrl.hindsight.encode import Encoded

_LOW, _HIGH = 0.5, 95  # deviations below the mean, percentile above it
_EQUAL = 1e-6  # of the largest: a spread below it is rounding


@dataclass(frozen=True)
class ToGo:
    """What was earned from each of the agent's turns on, and what can be.

    Attributes:
        scale: what rewards are multiplied by in training; what the tokens learn then has a standard deviation of 1.
        mean, high: of what was to go at the turns, times `scale`; `high` is the 95th percentile.
        least, most: what a dialogue as long as the longest can earn, times `scale`: the least and the most that any turn
            earned, all along. Not what one dialogue did earn: the best of several may be put together.
    """

    scale: float
    mean: float
    high: float
    least: float
    most: float


def to_go_of(rows: Sequence[Encoded], discount: float, unit: str) -> ToGo:
    """Return the scale of rewards and what is to go in dialogues.

    With a deviation of 1, errors of Q and V weigh about as much in the loss as those of the policy beside them.
    """
    backups = [row.backup("turn", discount, unit) for row in rows]
    tokens = np.array([value for one in backups for value in one.to_go])
    states = np.array([value for one in backups for value in one.state_to_go])
    scale = 1.0 / _spread(tokens)
    rewards = [span.reward for row in rows for span in row.spans]
    longest = max(max(len(row.spans), len(row.turns)) for row in rows)
    least = min(min(rewards), longest * min(rewards), float(tokens.min()))
    most = max(max(rewards), longest * max(rewards), float(tokens.max()))
    found = [states.mean(), np.percentile(states, _HIGH), least, most]
    return ToGo(scale, *(scale * float(value) for value in found))


def _spread(values: NDArray[np.float64]) -> float:
    """Return the standard deviation, or the size of values that are all the same but for rounding."""
    largest = float(np.abs(values).max())
    spread = float(values.std())
    return spread if spread > _EQUAL * largest else largest or 1.0


def alarms(value: float, to_go: ToGo) -> list[str]:
    """Return a sentence for each way in which V, on average over states, cannot be right.

    Args:
        value: mean of V at the end of a training, of scaled rewards.
        to_go: of the data.
    """
    told = f"V is {value / to_go.scale:.3g} on average, in units of the rewards"
    if value < to_go.mean - _LOW:
        return [
            f"{told}, below the {to_go.mean / to_go.scale:.3g} that was earned: values that are too low; train longer, or with "
            "a lower --lr"
        ]
    if value > to_go.high:
        return [
            f"{told}, above the {to_go.high / to_go.scale:.3g} that 95% of all turns stay below: values that are too high; "
            "train longer, or with a lower --expectile or --lr"
        ]
    return []

"""What is to go in a set of dialogues, and whether the values that were learnt can be right.

V is an upper expectile of what can follow, so it lies above what was earned on average and below the best that was seen.
Outside of that range something is wrong with the training, whatever the losses say: V of offline RL drifts without a sound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmrl.hindsight.encode import Encoded

_LOW, _HIGH = 0.5, 95  # deviations below the mean, percentile above it


@dataclass(frozen=True)
class ToGo:
    """What was earned from each of the agent's turns on.

    Attributes:
        scale: what rewards are multiplied by in training; what is to go then has a standard deviation of 1.
        least, most, mean, high: of what is to go, times `scale`; `high` is its 95th percentile.
    """

    scale: float
    least: float
    most: float
    mean: float
    high: float


def to_go_of(rows: Sequence[Encoded], discount: float, unit: str) -> ToGo:
    """Return the scale of rewards and what is to go in dialogues.

    With a deviation of 1, errors of Q and V weigh about as much in the loss as those of the policy beside them.
    """
    values = np.array([value for row in rows for value in row.backup("turn", discount, unit).to_go])
    spread = float(values.std())
    scale = 1.0 / max(spread, 1e-8) if spread > 0 else 1.0
    found = [values.min(), values.max(), values.mean(), np.percentile(values, _HIGH)]
    return ToGo(scale, *(scale * float(value) for value in found))


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

"""Bellman backups of a dialogue as index arithmetic: which state each token of the agent learns from, and with what reward.

A state is what the model has read so far; its hidden state stands at the position of the last token read. An action is a token
of the agent. Everybody else's tokens are the world: they are passed over, not discounted and not learnt.

    turn backup    every token of the agent's turn k learns r_k + gamma V(first state of turn k + 1). V is learnt at first
                   states, from Q of the whole turn, that is, of its last token (times gamma for each token before it, where
                   gamma counts tokens).
    token backup   a token learns gamma V(next state); the last one of the turn r_k + gamma V(first state of turn k + 1). V is
                   learnt at every state, from Q of the token that was chosen there (Snell et al., arXiv 2206.11871).

A reward r_k arrives with the last token of its turn. A dialogue that is done has nothing after its last turn; of one that was
cut off, the last state has a value like any other. `discount` counts turns or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrl.errors import DataError

BACKUPS = ("turn", "token")
UNITS = ("turn", "token")
NO_STATE = -1


@dataclass(frozen=True)
class Span:
    """The tokens [start, stop) that the agent wrote in one turn, and what the turn earned."""

    start: int
    stop: int
    reward: float

    def __post_init__(self) -> None:
        if not 1 <= self.start < self.stop:
            raise DataError(f"expected a turn of one token or more after the first, got [{self.start}, {self.stop})")


@dataclass(frozen=True)
class Backup:
    """The actions of one dialogue, N in all; a list each.

    Attributes:
        position: of the state in which the action is taken; the action is the token at position + 1.
        turn: number of the agent's turn.
        reward: what the action learns without a next state, discounted where `discount` counts tokens.
        next_position: of the state it bootstraps from; NO_STATE where nothing comes after.
        discount: factor of that state's value.
        to_go: all that was earned from the action on, discounted: what Monte-Carlo learns.
        value_position: `[M]` of the states where V is learnt.
        value_action: `[M]`, the action whose Q it is learnt from.
        value_discount: `[M]`, what lies between the two: gamma for each token of the turn before its last, where gamma counts
            tokens.
    """

    position: tuple[int, ...]
    turn: tuple[int, ...]
    reward: tuple[float, ...]
    next_position: tuple[int, ...]
    discount: tuple[float, ...]
    to_go: tuple[float, ...]
    value_position: tuple[int, ...]
    value_action: tuple[int, ...]
    value_discount: tuple[float, ...]

    @property
    def state_to_go(self) -> tuple[float, ...]:
        """`[M]`, what was earned from each state on where V is learnt, discounted."""
        pairs = zip(self.value_action, self.value_discount, strict=True)
        return tuple(discount * self.to_go[action] for action, discount in pairs)

    def scaled(self, factor: float) -> Backup:
        """Return it with all rewards times a number."""
        return replace(self, reward=tuple(factor * r for r in self.reward), to_go=tuple(factor * r for r in self.to_go))


def backup(
    spans: Sequence[Span],
    *,
    last: int,
    done: bool,
    kind: str = "turn",
    discount: float = 1.0,
    unit: str = "turn",
    later: float = 0.0,
) -> Backup:
    """Return what the tokens of the agent learn from.

    Args:
        spans: the agent's turns, in order and apart.
        last: position of the last token of the dialogue: the state after it, where it was cut off.
        done: False bootstraps from that state.
        kind: "turn" or "token".
        discount: gamma, from 0 to 1.
        unit: gamma counts the agent's turns or the agent's tokens.
        later: what is earned after the last span, discounted to its last token: what Monte-Carlo knows beside the spans.

    Raises:
        DataError: spans that overlap or lie after `last`, or an unknown kind or unit.
    """
    _check(spans, last, kind, discount, unit)
    after_turn = [span.start - 1 for span in spans[1:]] + [NO_STATE if done else last]
    to_go = turns_to_go(spans, discount, unit, later)
    per_token = discount if unit == "token" else 1.0
    per_turn = discount if unit == "turn" else 1.0
    columns: dict[str, list[float]] = {name: [] for name in ("reward", "discount", "to_go", "value_discount")}
    indices: dict[str, list[int]] = {
        name: [] for name in ("position", "turn", "next_position", "value_position", "value_action")
    }
    for k, span in enumerate(spans):
        first = len(indices["position"])
        end = first + span.stop - span.start - 1  # the action that ends the turn
        for i, token in enumerate(range(span.start, span.stop)):
            ahead = span.stop - 1 - token  # tokens of the turn after this one
            indices["position"].append(token - 1)
            indices["turn"].append(k)
            columns["to_go"].append(per_token**ahead * to_go[k])
            if kind == "token" and ahead:
                columns["reward"].append(0.0)
                indices["next_position"].append(token)
                columns["discount"].append(per_token)
            else:
                columns["reward"].append(per_token**ahead * span.reward)
                indices["next_position"].append(after_turn[k])
                columns["discount"].append(per_turn * per_token ** (ahead + 1))
            if kind == "token" or i == 0:
                indices["value_position"].append(token - 1)
                indices["value_action"].append(first + i if kind == "token" else end)
                columns["value_discount"].append(1.0 if kind == "token" else per_token**ahead)
    return Backup(**{name: tuple(values) for name, values in {**columns, **indices}.items()})  # type: ignore[arg-type]


def turns_to_go(spans: Sequence[Span], discount: float, unit: str, later: float = 0.0) -> list[float]:
    """Return, at the last token of each turn, its reward and those of later turns, discounted; `later` as in `backup`."""
    found: list[float] = []
    for k in reversed(range(len(spans))):
        if found:
            later = found[-1] * discount ** turn_steps(spans[k + 1], unit)
        found.append(spans[k].reward + later)
    return found[::-1]


def turn_steps(span: Span, unit: str) -> int:
    """Return how often gamma counts between the last token of the turn before and the last token of this one."""
    return 1 if unit == "turn" else span.stop - span.start


def _check(spans: Sequence[Span], last: int, kind: str, discount: float, unit: str) -> None:
    if kind not in BACKUPS or unit not in UNITS:
        raise DataError(
            f"expected a backup out of {', '.join(BACKUPS)} and a unit out of {', '.join(UNITS)}, got {kind}, {unit}"
        )
    if not 0 <= discount <= 1:
        raise DataError(f"expected a discount from 0 to 1, got {discount}")
    for before, span in zip([None, *spans], spans, strict=False):
        if before is not None and span.start <= before.stop:
            raise DataError(
                f"turns of the agent at [{before.start}, {before.stop}) and [{span.start}, {span.stop}) touch"
            )
    if not spans or spans[-1].stop > last + 1:
        raise DataError(f"expected turns of the agent within {last + 1} tokens")

"""The double-T maze in text, as in LMRL-Gym: the agent is told where it is and moves until it stands on the goal.

    #############
    #     #     #        25 cells to start from; the goal G is at row 8, column 6 (both count from 0)
    ### ##### ###        "move up", "move down", "move left", "move right"; case and white space around do not matter
    ### ##### ###
    ### ##### ###        reward -1 a move, also against a wall, which leaves the agent where it is
    ###       ###               0 the move that reaches the goal; the episode is done
    ###### ######              -4 any other text, which leaves the agent where it is
    ###### ######        after 100 texts the episode is truncated
    ######G######
    #############

Nothing is left to luck, so the seed of an episode changes nothing. From a uniform start the best return is -6.84, and moving
at random earns -85.1.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.envs.common import Policy, play, row_value
from llmrl.rollout.environment import Step
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message

Cell = tuple[int, int]

TASK = "maze"
LAYOUT = (
    "#############",
    "#     #     #",
    "### ##### ###",
    "### ##### ###",
    "### ##### ###",
    "###       ###",
    "###### ######",
    "###### ######",
    "###### ######",
    "#############",
)
GOAL: Cell = (8, 6)
MOVES: dict[str, Cell] = {"move up": (-1, 0), "move down": (1, 0), "move left": (0, -1), "move right": (0, 1)}
CAP = 100
OBSERVATIONS = ("short", "long")

_FREE = frozenset((r, c) for r, line in enumerate(LAYOUT) for c, cell in enumerate(line) if cell == " ")
STARTS: tuple[Cell, ...] = tuple(sorted(_FREE - {GOAL}))
_SIDES = {"above you": (-1, 0), "below you": (1, 0), "to your left": (0, -1), "to your right": (0, 1)}
_POSITION = re.compile(r"you are at row (\d+) column (\d+)", re.IGNORECASE)
_INVALID = ("go up", "move north", "turn left", "wait")  # what the logged agent says where it says something else


class Maze:
    """One walk.

    Args:
        row: `start` is a free cell, [row, column]; `observation` is "short" (the default: the position alone) or "long"
            (the goal, the position and the walls around it).
        seed: not used, there is no luck.

    Raises:
        DataError: the start is no free cell, or there is no such observation.
    """

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, row: Mapping[str, Any], seed: int) -> None:
        start = row.get("start")
        if not isinstance(start, list | tuple) or tuple(start) not in STARTS:
            raise DataError(
                f"row {row.get('id', '?')}: expected 'start' to be a free cell [row, column], got {start!r:.80}"
            )
        self.observation = row_value(row, "observation", OBSERVATIONS, "short")
        self.cell: Cell = (int(start[0]), int(start[1]))
        self.steps = 0

    def observe(self) -> list[Message]:
        """Say where the agent is."""
        return [Message("user", describe(self.cell, self.observation))]

    def step(self, answer: Message) -> Step:
        """Move, and say where the agent is now."""
        action = parse(answer.content)
        self.steps += 1
        self.cell, reward = transition(self.cell, action)
        done = self.cell == GOAL
        return Step(
            [Message("user", "You are at the goal.")] if done else self.observe(),
            rewards={"reward": reward},
            done=done,
            truncated=not done and self.steps >= CAP,
            metadata={"invalid": action is None, "cell": self.cell},
        )


def parse(text: str) -> str | None:
    """Return the move that a text asks for, a key of `MOVES`, or None."""
    action = text.strip().lower()
    return action if action in MOVES else None


def transition(cell: Cell, action: str | None) -> tuple[Cell, float]:
    """Return where a move leads from a cell other than the goal, and its reward; None stands for an invalid text."""
    if action is None:
        return cell, -4.0
    reached = (cell[0] + MOVES[action][0], cell[1] + MOVES[action][1])
    if reached not in _FREE:
        return cell, -1.0
    return reached, 0.0 if reached == GOAL else -1.0


def describe(cell: Cell, observation: str = "short") -> str:
    """Return what the agent is told in a cell."""
    here = f"You are at row {cell[0]} column {cell[1]}."
    if observation == "short":
        return here
    walls = [side for side, (down, right) in _SIDES.items() if (cell[0] + down, cell[1] + right) not in _FREE]
    around = (
        f"There {'is a wall' if len(walls) == 1 else 'are walls'} {', '.join(walls)}." if walls else "No wall is near."
    )
    return f"The goal is at row {GOAL[0]} column {GOAL[1]}. {here} {around}"


def rows(observation: str = "short") -> list[dict[str, Any]]:
    """Return a row for each of the 25 starts."""
    return [{"id": f"maze-{r}-{c}", "start": [r, c], "observation": observation} for r, c in STARTS]


def best_values() -> dict[Cell, float]:
    """Return the best return from each start, by value iteration over the moves that are left."""
    values = dict.fromkeys(STARTS, 0.0)
    for _ in range(CAP):
        values = {cell: max(_action_values(cell, values)) for cell in STARTS}
    return values


def optimum() -> float:
    """Return the best expected return over `rows()`."""
    return sum(best_values().values()) / len(STARTS)


def random_return() -> float:
    """Return the expected return over `rows()` of an agent that draws each move uniformly from the four."""
    values = dict.fromkeys(STARTS, 0.0)
    for _ in range(CAP):
        values = {cell: sum(_action_values(cell, values)) / len(MOVES) for cell in STARTS}
    return sum(values.values()) / len(STARTS)


def best_action(history: Sequence[Message]) -> str:
    """Return the best move after a history, of which the last position told matters alone.

    Raises:
        DataError: no message of the world tells a position.
    """
    return _BEST[position(history)]


def position(history: Sequence[Message]) -> Cell:
    """Return the last position that the world told.

    Raises:
        DataError: there is none, or it is not a cell to move from.
    """
    for message in reversed(history):
        found = None if message.role == AGENT else _POSITION.search(message.content)
        if found:
            cell = (int(found[1]), int(found[2]))
            if cell in _BEST:
                return cell
            raise DataError(f"maze: row {cell[0]} column {cell[1]} is no cell to move from")
    raise DataError(
        f"maze: expected 'You are at row R column C.' in the history, got {len(history)} messages without it"
    )


def logs(count: int, seed: int, observation: str = "short") -> list[Dialogue]:
    """Return mediocre walks from uniform starts, played through `Maze`.

    Every other walk moves at random. The rest move best, but for a share of random moves, drawn for each walk between 50 and
    80 %. 2 % of all texts are invalid.

    Args:
        count: how many walks.
        seed: the same arguments give the same walks.
        observation: see `Maze`.
    """
    return [_logged(seed, number, observation) for number in range(count)]


def agent(luck: random.Random, provenance: Mapping[str, Any]) -> Policy:
    """Return the walker of the logs, which draws from `luck`; a dialogue's `provenance` says how often it moves at random."""
    at_random = float(provenance["random_moves"])

    def policy(history: Sequence[Message]) -> str:
        if luck.random() < 0.02:
            return luck.choice(_INVALID)
        return luck.choice(list(MOVES)) if luck.random() < at_random else best_action(history)

    return policy


def is_best(history: Sequence[Message], text: str) -> bool:
    """Tell whether a text of the agent is as good as any after a history."""
    cell, action = position(history), parse(text)
    if action is None:
        return False
    values = dict(zip(MOVES, _action_values(cell, best_values()), strict=True))
    return values[action] > max(values.values()) - 1e-9


def best_texts(history: Sequence[Message]) -> tuple[str, ...]:
    """Return the best move after a history, in its one wording."""
    return (best_action(history),)


def _logged(seed: int, number: int, observation: str) -> Dialogue:
    luck = random.Random(derive_seed(seed, TASK, number, "policy"))
    start = luck.choice(STARTS)
    at_random = 1.0 if number % 2 == 0 else luck.uniform(0.5, 0.8)
    world = derive_seed(seed, TASK, number, "world")
    row = {"start": list(start), "observation": observation}
    provenance = {"seed": world, "row": row, "random_moves": at_random}
    name = f"{TASK}-{seed}-{number}"
    return play(Maze(row, world), agent(luck, provenance), id=name, task=TASK, provenance=provenance)


def _action_values(cell: Cell, values: Mapping[Cell, float]) -> list[float]:
    """Return the value of each move, where `values` holds what is earned after it; the goal is the end."""
    reached = [transition(cell, action) for action in MOVES]
    return [reward + values.get(to, 0.0) for to, reward in reached]


def _best_moves() -> dict[Cell, str]:
    values = best_values()
    best = {
        cell: max(zip(_action_values(cell, values), MOVES, strict=True), key=lambda pair: pair[0]) for cell in STARTS
    }
    return {cell: action for cell, (_, action) in best.items()}


_BEST = _best_moves()

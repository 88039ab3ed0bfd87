"""Twenty questions on a table: the world hides one of 20 objects, the agent asks for its 9 attributes and guesses.

    "Is it ATTRIBUTE?"       answered "Yes." or "No.", reward -1 (see `ATTRIBUTES`)
    "Is it OBJECT?"          reward 0 where it is the hidden one, and the episode is done; else "No.", reward -1 (see `OBJECTS`)
    any other text           answered "I do not understand.", reward -1

Case, punctuation and white space do not matter. After 20 texts the episode is done: their number is part of the rules, as the
name says. Nothing is left to luck: the hidden object is in the row, and the seed of an episode changes nothing. The best return
is -3.9, and texts drawn at random earn -14.1.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.envs.common import Policy, normalised, play, row_value
from llmrl.rollout.environment import Step
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message

TASK = "twenty_questions"
CAP = 20
ATTRIBUTES = (
    "alive",
    "an animal",
    "something to eat",
    "made of metal",
    "bigger than a person",
    "found in a kitchen",
    "able to fly",
    "electric",
    "used for travel",
)
# one column an attribute, in the order above
_TABLE = {
    "a bear": "xx..x....",
    "a horse": "xx..x...x",
    "a cat": "xx.......",
    "an eagle": "xx....x..",
    "a fish": "xxx......",
    "an oak": "x...x....",
    "a rose": "x........",
    "an apple": "..x......",
    "a loaf": "..x..x...",
    "a fridge": "...xxx.x.",
    "an oven": "...x.x.x.",
    "a spoon": "...x.x...",
    "a cup": ".....x...",
    "a lamp": ".......x.",
    "a book": ".........",
    "a hammer": "...x.....",
    "a bicycle": "...x....x",
    "a tram": "...xx..xx",
    "a plane": "...xx.x.x",
    "a kite": "......x..",
}
OBJECTS: tuple[str, ...] = tuple(_TABLE)
HAS: dict[str, frozenset[str]] = {
    thing: frozenset(a for a, mark in zip(ATTRIBUTES, marks, strict=True) if mark == "x")
    for thing, marks in _TABLE.items()
}

_OPENING = "I am thinking of something. What is it?"
_FOUND = "Yes, you have found it."
_INVALID = "I do not understand."
_ASKED = re.compile(r"is it ([a-z ]+)")
_Candidates = frozenset[str]


class TwentyQuestions:
    """One game.

    Args:
        row: `object` is the hidden one of `OBJECTS`.
        seed: not used, there is no luck.

    Raises:
        DataError: there is no such object.
    """

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, row: Mapping[str, Any], seed: int) -> None:
        self.hidden = row_value(row, "object", OBJECTS)
        self.asked = 0

    def observe(self) -> list[Message]:
        """Open the game."""
        return [Message("user", _OPENING)]

    def step(self, answer: Message) -> Step:
        """Answer a question, or judge a guess."""
        about = parse(answer.content)
        self.asked += 1
        found = about == self.hidden
        if about is None:
            reply = _INVALID
        elif found:
            reply = _FOUND
        else:
            reply = "Yes." if about in HAS[self.hidden] else "No."
        return Step(
            [Message("user", reply)],
            rewards={"reward": 0.0 if found else -1.0},
            done=found or self.asked >= CAP,
            metadata={"invalid": about is None, "about": about},
        )


def question(about: str) -> str:
    """Return the text that asks for an attribute or guesses an object."""
    return f"Is it {about}?"


def parse(text: str) -> str | None:
    """Return the attribute or object that a text is about, or None."""
    found = _ASKED.fullmatch(normalised(text))
    return found[1] if found and (found[1] in ATTRIBUTES or found[1] in OBJECTS) else None


def rows() -> list[dict[str, Any]]:
    """Return a row for each object."""
    return [{"id": f"{TASK}-{thing.split()[1]}", "object": thing} for thing in OBJECTS]


def optimum() -> float:
    """Return the best expected return over `rows()`, by dynamic programming on the objects that are still possible."""
    return _best(frozenset(OBJECTS), CAP)[0]


def random_return() -> float:
    """Return the expected return over `rows()` of an agent that draws each text uniformly from all questions and guesses."""
    missed = 1 - 1 / (len(ATTRIBUTES) + len(OBJECTS))
    return -sum(missed**turn for turn in range(1, CAP + 1))


def best_action(history: Sequence[Message]) -> str:
    """Return the best text after a history.

    Raises:
        DataError: no text is left.
    """
    possible, left = read(history)
    if left <= 0:
        raise DataError(f"twenty questions: all {CAP} texts are used up, none is left")
    return question(_best(possible, left)[1])


def read(history: Sequence[Message]) -> tuple[frozenset[str], int]:
    """Return the objects that are possible after a history, and how many texts are left to the agent.

    The answers may come from a model instead of this module: one that would leave no object tells nothing.
    """
    possible, left, about = frozenset(OBJECTS), CAP, None
    for message in history:
        if message.role == AGENT:
            left, about = left - 1, parse(message.content)
        elif about is not None and (answer := normalised(message.content)) in ("yes", "no"):
            yes, no = _split(possible, about)
            possible = (yes if answer == "yes" else no) or possible
    return possible, left


def logs(count: int, seed: int) -> list[Dialogue]:
    """Return mediocre games with uniform objects, played through `TwentyQuestions`.

    The logged agent asks for attributes at random, also for those that tell nothing more. It repeats an earlier text one time
    in six, guesses a possible object too early one time in ten, and guesses too late: where one object is left it asks on every
    other time.

    Args:
        count: how many games.
        seed: the same count and seed give the same games.
    """
    return [_logged(seed, number) for number in range(count)]


def agent(luck: random.Random, provenance: Mapping[str, Any]) -> Policy:
    """Return the asker of the logs, which draws from `luck`; nothing of a dialogue's `provenance` changes it."""

    def policy(history: Sequence[Message]) -> str:
        said = [message.content for message in history if message.role == AGENT]
        if said and luck.random() < 1 / 6:
            return luck.choice(said)
        possible, _ = read(history)
        if luck.random() < (0.1 if len(possible) > 1 else 0.5):
            return question(luck.choice(sorted(possible)))
        return question(luck.choice(ATTRIBUTES))

    return policy


def is_best(history: Sequence[Message], text: str) -> bool:
    """Tell whether a text of the agent asks what `best_action` asks; another one that is as good is not known for it."""
    return parse(text) == parse(best_action(history))


def best_texts(history: Sequence[Message]) -> tuple[str, ...]:
    """Return the best text after a history, in its one wording."""
    return (best_action(history),)


def _logged(seed: int, number: int) -> Dialogue:
    luck = random.Random(derive_seed(seed, TASK, number, "policy"))
    hidden = luck.choice(OBJECTS)
    world = derive_seed(seed, TASK, number, "world")
    row, name = {"object": hidden}, f"{TASK}-{seed}-{number}"
    provenance = {"seed": world, "row": row}
    return play(TwentyQuestions(row, world), agent(luck, provenance), id=name, task=TASK, provenance=provenance)


def _split(possible: _Candidates, about: str) -> tuple[_Candidates, _Candidates]:
    """Return the objects for which the answer is yes, and those for which it is no."""
    yes = frozenset(thing for thing in possible if about == thing or about in HAS[thing])
    return yes, possible - yes


@cache
def _best(possible: _Candidates, left: int) -> tuple[float, str]:
    """Return the best expected return with `left` texts to go, and the attribute or object to ask for.

    What cannot beat the best found so far even if every later split were free to choose is not looked into.
    """
    if left == 0:
        return 0.0, ""
    plans = []
    for about in (*ATTRIBUTES, *sorted(possible)):
        yes, no = _split(possible, about)
        if about in OBJECTS or (yes and no):  # an attribute with one answer costs a text and tells nothing
            bound = _mean(about in OBJECTS, len(yes), len(no), _bound(len(yes), left - 1), _bound(len(no), left - 1))
            plans.append((bound, about, yes, no))
    best, chosen = float("-inf"), ""
    for bound, about, yes, no in sorted(plans, key=lambda plan: -plan[0]):
        if bound <= best:
            break
        guess = about in OBJECTS
        after = (0.0 if guess or not yes else _best(yes, left - 1)[0]), (_best(no, left - 1)[0] if no else 0.0)
        value = _mean(guess, len(yes), len(no), *after)
        if value > best:
            best, chosen = value, about
    return best, chosen


@cache
def _bound(count: int, left: int) -> float:
    """Return what no table with `count` possible objects can beat: questions may split them in any way."""
    if left == 0 or count == 0:
        return 0.0
    found = _mean(True, 1, count - 1, 0.0, _bound(count - 1, left - 1))
    splits = [(k, count - k) for k in range(1, count // 2 + 1)]
    return max([found, *(_mean(False, a, b, _bound(a, left - 1), _bound(b, left - 1)) for a, b in splits)])


def _mean(guess: bool, yes: int, no: int, value_yes: float, value_no: float) -> float:
    """Return the expected return of a question; a guess that is right is free and ends the game."""
    return ((0 if guess else yes * (value_yes - 1)) + no * (value_no - 1)) / (yes + no)

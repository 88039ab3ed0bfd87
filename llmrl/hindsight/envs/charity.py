"""A charity talk in words: the agent calls somebody of a hidden type and asks for money; the best return is 1.80.

The user wants facts, wants a story, or is frugal and wants a small request; each type is as likely. The agent has five acts:

    ask         the user says what they want; it may be asked again
    facts, story, small
                an appeal. The one that the user wants adds 1 to their warmth, up to 2; more of it changes nothing.
                Any other annoys them: the second annoyance ends the talk without money.
    request     the user pays as many dollars as their warmth is, and the talk ends

Every turn of the agent costs 0.05, the last one too. A talk ends after five of the agent's turns; time is part of the rules, so
that it is done then and not truncated. A sentence that stands for no act annoys the user (see `charity_words`).

The seed chooses which of its sentences the user takes in each turn, whatever was said before: two agents that play with one
seed meet the same words. What the user wants is in the row.

The behaviour policy of `logs` asks only as its first act, and rarely. It never repeats an appeal that helped, and never makes
the small request after the user said that it is wanted. So no logged talk has a warmth of 2. The policy earns 0.05, and the
best that can be put together from what it does earns 0.55.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from llmrl.errors import DataError
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.envs.charity_words import ACTS, APPEALS, WORDS, heard, understand
from llmrl.hindsight.envs.common import Policy, play, row_value
from llmrl.rollout.environment import Step
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message

TASK = "charity"
TYPES = APPEALS  # a user is named after the appeal that they want
TURNS, MAX_WARMTH, PATIENCE, COST = 5, 2, 2, 0.05


@dataclass(frozen=True)
class Talk:
    """What both sides know of a talk that goes on."""

    warmth: int = 0
    annoyances: int = 0
    turns: int = 0


@dataclass(frozen=True)
class Outcome:
    """What follows an act: the talk after it, the user's reply (a key of `Words.replies`), the reward, whether it is over."""

    talk: Talk
    reply: str
    reward: float
    over: bool


@dataclass(frozen=True)
class Belief:
    """What the agent knows: the talk, and the types that the user may be, each as likely."""

    types: frozenset[str] = frozenset(TYPES)
    talk: Talk = Talk()


class Charity:
    """One talk.

    Args:
        row: `type` is what the user wants, "facts", "story" or "small"; `words` is "short" (the default) or "long".
        seed: of the sentences that the user takes.

    Raises:
        DataError: there is no such type or set of words.
    """

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, row: Mapping[str, Any], seed: int) -> None:
        self.wants = row_value(row, "type", TYPES)
        self.words = row_value(row, "words", list(WORDS), "short")
        luck = random.Random(seed)
        self._luck = [luck.random() for _ in range(TURNS + 1)]
        self.talk = Talk()

    def observe(self) -> list[Message]:
        """Answer the call."""
        return [self._say("opening")]

    def step(self, answer: Message) -> Step:
        """React to what the agent says."""
        act, exact = understand(answer.content, self.words)
        outcome = respond(self.talk, self.wants, act)
        self.talk = outcome.talk
        return Step(
            [self._say(outcome.reply)],
            rewards={"reward": outcome.reward},
            done=outcome.over,
            metadata={"invalid": act is None, "off_template": not exact, "act": act, "reply": outcome.reply},
        )

    def _say(self, reply: str) -> Message:
        sentences = WORDS[self.words].replies[reply]
        return Message("user", sentences[int(self._luck[self.talk.turns] * len(sentences))])


def respond(talk: Talk, wants: str, act: str | None) -> Outcome:
    """Return what follows an act; None stands for a sentence that nobody understands."""
    warmth, annoyances, turns = talk.warmth, talk.annoyances, talk.turns + 1
    if act == "request":
        return Outcome(Talk(warmth, annoyances, turns), f"gives {warmth}", warmth - COST, True)
    if act == "ask":
        reply = f"wants {wants}"
    elif act == wants:
        warmth = min(warmth + 1, MAX_WARMTH)
        reply = "convinced" if warmth == MAX_WARMTH else "helped"
    else:
        annoyances += 1
        reply = "annoyed" if annoyances < PATIENCE else "leaves"
    if reply != "leaves" and turns == TURNS:
        reply = "no time"
    return Outcome(Talk(warmth, annoyances, turns), reply, -COST, reply in ("leaves", "no time"))


def rows(words: str = "short") -> list[dict[str, Any]]:
    """Return a row for each of the three types."""
    return [{"id": f"charity-{wants}", "type": wants, "words": words} for wants in TYPES]


def behaviour(belief: Belief) -> dict[str, float]:
    """Return the probability of each act of the logged agent; acts that it never takes are missing."""
    if belief.talk.warmth:
        others = [appeal for appeal in APPEALS if appeal not in belief.types]
        return {"request": 0.25, **dict.fromkeys(others, 0.75 / len(others))}
    if len(belief.types) > 1:
        blind = {"facts": 0.425, "story": 0.425, "small": 0.05, "request": 0.1}
        return blind if belief.talk.turns else {"ask": 0.05, **{act: 0.95 * share for act, share in blind.items()}}
    if belief.types == {"small"}:
        return {"facts": 0.2, "story": 0.2, "request": 0.6}
    return {"request": 0.5, **{appeal: 0.2 if appeal in belief.types else 0.15 for appeal in APPEALS}}


Choice = Literal["best", "best logged", "behaviour", "random"]


@cache
def value(belief: Belief, choice: Choice) -> float:
    """Return the expected return from a belief on of an agent that chooses its acts in one of four ways.

    Args:
        belief: what the agent knows.
        choice: "best"; "best logged": the best of the acts that `behaviour` may take; "behaviour"; "random": any of the five.
    """
    values = {act: act_value(belief, act, choice) for act in ACTS}
    if choice == "best":
        return max(values.values())
    if choice == "random":
        return sum(values.values()) / len(values)
    shares = behaviour(belief)
    if choice == "best logged":
        return max(values[act] for act in shares)
    return sum(share * values[act] for act, share in shares.items())


def act_value(belief: Belief, act: str, choice: Choice) -> float:
    """Return the expected return of an act, after which the agent chooses as `value` says."""
    total, told = 0.0, defaultdict(set)
    for wants in belief.types:
        outcome = respond(belief.talk, wants, act)
        total += outcome.reward
        if not outcome.over:
            told[outcome.reply, outcome.talk].add(wants)
    after = sum(len(types) * value(Belief(frozenset(types), talk), choice) for (_, talk), types in told.items())
    return (total + after) / len(belief.types)


def optimum() -> float:
    """Return the best expected return over `rows()`: expectimax over what the agent can know."""
    return value(Belief(), "best")


def logged_optimum() -> float:
    """Return the best expected return over `rows()` of an agent that takes no act where the behaviour policy never does."""
    return value(Belief(), "best logged")


def behaviour_return() -> float:
    """Return the expected return over `rows()` of the behaviour policy."""
    return value(Belief(), "behaviour")


def random_return() -> float:
    """Return the expected return over `rows()` of an agent that draws each act uniformly from the five."""
    return value(Belief(), "random")


def read(history: Sequence[Message]) -> tuple[Belief, str]:
    """Return what the agent knows after a history, and the set of words that is spoken ("short" where that is open).

    The user's sentences may come from a model instead of this module: one that is no sentence of the sets tells nothing, and of
    two that contradict each other the later one is believed.
    """
    types, warmth, annoyances, turns = set(TYPES), 0, 0, 0
    words, act = "short", None
    for message in history:
        if message.role == AGENT:
            turns += 1
            act, _ = understand(message.content, words)
            continue
        words, reply = heard(message.content) or (words, "")
        if reply.startswith("wants "):
            types = {reply.removeprefix("wants ")}
        elif reply in ("helped", "convinced"):
            warmth = 1 if reply == "helped" else MAX_WARMTH
            types = {act} if act in TYPES else types
        elif reply == "annoyed":
            annoyances += 1
            types = types - {act} or types
    return Belief(frozenset(types), Talk(warmth, annoyances, turns)), words


def best_act(history: Sequence[Message]) -> str:
    """Return the best act after a history, given what the user told in it.

    Raises:
        DataError: the talk is over by its rules.
    """
    belief, _ = read(history)
    if belief.talk.turns >= TURNS or belief.talk.annoyances >= PATIENCE:
        raise DataError(f"charity: the talk is over after {len(history)} messages, no act is left")
    return max(ACTS, key=lambda act: act_value(belief, act, "best"))


def best_action(history: Sequence[Message]) -> str:
    """Return the first sentence of the best act after a history.

    Raises:
        DataError: the talk is over by its rules.
    """
    _, words = read(history)
    return WORDS[words].acts[best_act(history)][0]


def logs(count: int, seed: int, words: str = "short") -> list[Dialogue]:
    """Return talks of the behaviour policy with users of uniform type, played through `Charity`.

    Args:
        count: how many talks.
        seed: the same arguments give the same talks.
        words: "short" or "long"; the acts of both are the same.
    """
    return [_logged(seed, number, words) for number in range(count)]


def agent(luck: random.Random, provenance: Mapping[str, Any]) -> Policy:
    """Return the agent of the logs, which draws from `luck`; `provenance` is that of a dialogue, for the words of its row."""
    words = str(provenance["row"].get("words", "short"))

    def policy(history: Sequence[Message]) -> str:
        shares = behaviour(read(history)[0])
        # two draws a turn for any set of words, so that the acts do not depend on it
        act, sentence = luck.choices(list(shares), list(shares.values()))[0], luck.random()
        sentences = WORDS[words].acts[act]
        return sentences[int(sentence * len(sentences))]

    return policy


def is_best(history: Sequence[Message], text: str) -> bool:
    """Tell whether a text of the agent is as good as any after a history, given what the user told in it."""
    belief, words = read(history)
    act, _ = understand(text, words)
    if act is None:
        return False
    return act_value(belief, act, "best") > value(belief, "best") - 1e-9


def best_texts(history: Sequence[Message]) -> tuple[str, ...]:
    """Return the sentences of the best act after a history."""
    return WORDS[read(history)[1]].acts[best_act(history)]


def _logged(seed: int, number: int, words: str) -> Dialogue:
    luck = random.Random(derive_seed(seed, TASK, number, "policy"))
    row = {"type": luck.choice(TYPES), "words": words}
    world = derive_seed(seed, TASK, number, "world")
    provenance = {"seed": world, "row": row}
    name = f"{TASK}-{seed}-{number}"
    return play(Charity(row, world), agent(luck, provenance), id=name, task=TASK, provenance=provenance)

"""Forward models: a dialogue from an edited turn on, to its end.

`Replay` goes back into a scripted environment, in the state in which the user was, with the agent of the logs: the truth about
what that user would have said. `ModelForward` lets models speak both sides. What it says decides what is learnt: a user who is
easier to please than people are teaches the agent that anything goes, which `realism` measures.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.regeneration.asking import Asker
from llmrl.hindsight.regeneration.edits import BadAnswer
from llmrl.hindsight.regeneration.prompts import END, USER
from llmrl.hindsight.regeneration.validation import is_endless
from llmrl.rollout.environment import Environment
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.users import users_view
from llmrl.types import Message


@dataclass(frozen=True)
class Continuation:
    """A dialogue that was played to its end.

    Attributes:
        messages: all of it, the prefix and the edited turn included.
        rewards: of each message where the world gives them, else None.
        done, truncated: exactly one is true.
        made: (index, who, prompt hash, seed) of each message that is new, in order.
    """

    messages: tuple[Message, ...]
    rewards: tuple[float, ...] | None
    done: bool
    truncated: bool
    made: tuple[tuple[int, str, str | None, int], ...]


class Forward(Protocol):
    """Continues dialogues; can be called from many threads."""

    name: str
    agent_name: str

    def complete(self, source: Dialogue, prefix: Sequence[Message], seed: int) -> Continuation:
        """Return the whole dialogue.

        Args:
            source: the dialogue that the prefix comes from.
            prefix: ends with a turn of the agent.
            seed: of everything that is drawn.

        Raises:
            BadAnswer: the user or the agent says what cannot be used, or the environment is not where it was.
            BudgetSpent, RequestError, EngineError: a model could not be asked.
        """
        ...


class Replay:
    """A scripted environment and the agent of its logs.

    Args:
        module: of `llmrl.hindsight.envs`.
        make: `make(row, seed) -> Environment`.
        name: of who answers.
    """

    agent_name = "scripted"

    def __init__(
        self, module: ModuleType, make: Callable[[Mapping[str, Any], int], Environment], name: str = "scripted"
    ) -> None:
        self.name, self._module, self._make = name, module, make

    def complete(self, source: Dialogue, prefix: Sequence[Message], seed: int) -> Continuation:
        """Play up to the last turn of the prefix as it went, and on. See `Forward`."""
        world, luck = source.provenance.get("seed"), random.Random(derive_seed(seed, "agent"))
        row = source.provenance.get("row")
        if not isinstance(world, int) or not isinstance(row, Mapping):
            raise BadAnswer("no way back", "provenance has no seed and row of the environment it was played in")
        agent = self._module.agent(luck, source.provenance)
        environment = self._make(row, world)
        messages, rewards, made = list(environment.observe()), [], []
        rewards = [0.0] * len(messages)
        while True:
            at = len(messages)
            known = at < len(prefix)
            said = prefix[at] if known else Message(AGENT, agent(messages))
            if at >= len(prefix):
                made.append((at, "agent", None, derive_seed(seed, "agent")))
            if at == len(prefix) - 1:
                environment = self.at_the_edit(environment)
            step = environment.step(said)
            messages += [said, *step.messages]
            rewards += [float(sum(step.rewards.values())), *(0.0 for _ in step.messages)]
            if at >= len(prefix) - 1:
                made += [(at + 1 + i, "user", None, world) for i in range(len(step.messages))]
            if tuple(messages[: len(prefix)]) != tuple(prefix[: len(messages)]):
                raise BadAnswer("no way back", f"the environment says something else at turn {at + 1} than the log")
            if (step.done or step.truncated) and len(messages) < len(prefix):
                raise BadAnswer("no way back", f"the environment ends at turn {len(messages) - 1}, before the edit")
            if step.done or step.truncated:
                return Continuation(tuple(messages), tuple(rewards), step.done, step.truncated, tuple(made))

    def at_the_edit(self, environment: Environment) -> Environment:
        """Return who answers from the edited turn on; for studies of users that are not like those of the logs."""
        return environment


class ModelForward:
    """Models that speak the user's side and the agent's.

    Args:
        user: the user, as "user".
        agent: the agent, as "agent".
        turns: most turns of the agent; a dialogue that is longer is cut off.
        words: most words of what either says.
        persona: the user's system message, or a function from a dialogue to it.
        end: what the user says at the end.
    """

    def __init__(
        self,
        user: Asker,
        agent: Asker,
        *,
        turns: int,
        words: int,
        persona: Callable[[Dialogue], str] | str = USER,
        end: str = END,
    ) -> None:
        self.name, self.agent_name = user.name, agent.name
        self._user, self._agent = user, agent
        self._turns, self._words, self._end = turns, words, end
        self._persona = persona if callable(persona) else lambda dialogue: persona

    def complete(self, source: Dialogue, prefix: Sequence[Message], seed: int) -> Continuation:
        """Ask user and agent in turn. See `Forward`."""
        messages = list(prefix)
        made: list[tuple[int, str, str | None, int]] = []
        persona = self._persona(source)
        while True:
            own = derive_seed(seed, "user", len(messages))
            answer = self._user.ask(users_view(messages, persona), own)
            text, _, over = answer.text.partition(self._end) if self._end in answer.text else (answer.text, "", None)
            done = over is not None
            if text.strip() or not done:
                made.append((len(messages), "user", answer.prompt_hash, own))
                messages.append(Message("user", self._usable(text, "user", answer.cut and not done)))
            turns = sum(message.role == AGENT for message in messages)
            if done or turns >= self._turns:
                return Continuation(tuple(messages), None, done, not done, tuple(made))
            own = derive_seed(seed, "agent", len(messages))
            answer = self._agent.ask(messages, own)
            made.append((len(messages), "agent", answer.prompt_hash, own))
            messages.append(Message(AGENT, self._usable(answer.text, "agent", answer.cut)))

    def _usable(self, text: str, who: str, cut: bool) -> str:
        said = text.strip()
        if not said:
            raise BadAnswer(f"{who}: empty text", f"the {who} said nothing", text)
        if cut or len(said.split()) > self._words:
            raise BadAnswer(
                f"{who}: too long", f"the {who} said {len(said.split())} words, at most {self._words}", text
            )
        if is_endless(said):
            raise BadAnswer(f"{who}: repetition", f"the {who} repeats itself: {said[:80]!r}", text)
        return said

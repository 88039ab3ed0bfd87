"""Who says what should have been said: a script that knows the rules, any model, and the controls beside them.

A controller with hindsight reads the whole dialogue and how it ended. `Foresight` asks the same model with nothing but what the
agent knew at that turn, at a turn drawn at random: the difference is what hindsight is worth. `RandomEdits` says anything that
agents said somewhere in the logs: the difference is what more, and more varied, data is worth.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs.common import Policy
from llmrl.hindsight.regeneration.asking import Asker
from llmrl.hindsight.regeneration.edits import BadAnswer, Edit, Refused, edit_schema, parse_edits
from llmrl.hindsight.regeneration.prompts import controller_prompt, prefix_prompt
from llmrl.hindsight.regeneration.validation import words_of
from llmrl.rollout.seeds import derive_seed


@dataclass(frozen=True)
class Task:
    """What a controller is to do.

    Attributes:
        dialogue: the one that is edited.
        turns: of the agent, those that may be edited.
        edits: most turns to edit; as many as `turns` for all that were at fault.
        candidates: utterances for each.
        seed: of this dialogue in this round.
    """

    dialogue: Dialogue
    turns: tuple[int, ...]
    edits: int
    candidates: int
    seed: int


@dataclass(frozen=True)
class Proposal:
    """What a controller answered.

    Attributes:
        edits: those that could be read.
        seed: of its luck.
        prompt: hash of what it was asked; None of a script.
        by_turn: prompt and seed of turns that were asked for one by one.
        refused: answers of which nothing could be read, where others could.
    """

    edits: list[Edit]
    seed: int
    prompt: str | None = None
    by_turn: Mapping[int, tuple[str | None, int]] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)

    def origin(self, turn: int) -> tuple[str | None, int]:
        """Return the prompt's hash and the seed of an edit of this turn."""
        return self.by_turn.get(turn, (self.prompt, self.seed))


class Controller(Protocol):
    """Proposes edits; can be called from many threads."""

    name: str

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Return edits, none where nothing was at fault.

        Args:
            task: what to do.
            attempt: 0, and one more for each time that nothing could be used.
            complaint: why the last one could not.

        Raises:
            BadAnswer: nothing in the answer can be read.
            BudgetSpent, RequestError, EngineError: it could not be asked.
        """
        ...


class Scripted:
    """Knows the rules of an environment: turns that were not as good as any, given what the user had told by then.

    Args:
        module: of `llmrl.hindsight.envs`.
    """

    name = "scripted"

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Draw among the turns at fault, and among the wordings of what is best there. See `Controller`."""
        seed = derive_seed(task.seed, "controller", attempt)
        luck = random.Random(seed)
        history = task.dialogue.messages
        faulty = [i for i in task.turns if not self._module.is_best(history[:i], history[i].content)]
        chosen = sorted(luck.sample(faulty, min(task.edits, len(faulty))))
        edits: list[Edit] = []
        for turn in chosen:
            texts = list(self._module.best_texts(history[:turn]))
            luck.shuffle(texts)
            said = texts[: task.candidates]
            edits += [Edit(turn, "not the best by the rules", text, i) for i, text in enumerate(said)]
        return Proposal(edits, seed)


class ModelController:
    """A model that is shown the whole dialogue and its outcome.

    Args:
        asker: the model, as "controller".
        usual: mean return of the logs.
    """

    def __init__(self, asker: Asker, usual: float) -> None:
        self.name, self._asker, self._usual = asker.name, asker, usual

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Ask for edits. See `Controller`."""
        schema = edit_schema(task.turns, task.edits, task.candidates)
        messages = controller_prompt(
            task.dialogue, task.turns, task.edits, task.candidates, schema, self._usual, complaint
        )
        return _asked(self._asker, messages, derive_seed(task.seed, "controller", attempt), schema)


class Foresight:
    """The control without hindsight: turns drawn at random, each asked for with what the agent knew at it and no more.

    Args:
        asker: the model, as "controller"; or the agent of an environment's logs, see `scripted`.
    """

    def __init__(self, asker: Asker) -> None:
        self.name, self._asker = f"{asker.name} without hindsight", asker

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Ask for what the agent should have said, turn by turn. See `Controller`."""
        seed = derive_seed(task.seed, "controller", attempt)
        # why the last one was refused may be something that the user says later: that must not come back this way
        again = complaint and "another one is needed, that says something else in the agent's own words."
        found, refused, by_turn = list[Edit](), list[Refused](), dict[int, tuple[str | None, int]]()
        for turn in sorted(random.Random(seed).sample(task.turns, min(task.edits, len(task.turns)))):
            schema = edit_schema([turn], 1, task.candidates)
            messages = prefix_prompt(task.dialogue, turn, task.candidates, schema, again)
            try:
                said = _asked(self._asker, messages, derive_seed(seed, turn), schema)
            except BadAnswer as bad:
                refused.append(bad.refused)
                continue
            by_turn[turn] = said.prompt, said.seed
            found += [edit for edit in said.edits if edit.turn == turn]
            refused += [
                Refused("another turn", f"asked for turn {turn}, answered for {edit.turn}", edit)
                for edit in said.edits
                if edit.turn != turn
            ]
        return Proposal(found, seed, by_turn=by_turn, refused=refused)


class ScriptedForesight:
    """The same without a model: what the agent of the logs would say if it were in that place again.

    Args:
        module: of `llmrl.hindsight.envs`; its `agent` speaks.
    """

    name = "scripted without hindsight"

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Draw turns at random, and the agent's words. See `Controller`."""
        seed = derive_seed(task.seed, "controller", attempt)
        luck = random.Random(seed)
        chosen = sorted(luck.sample(task.turns, min(task.edits, len(task.turns))))
        agent: Policy = self._module.agent(luck, task.dialogue.provenance)
        history = task.dialogue.messages
        edits = [Edit(turn, "said again", agent(history[:turn]), i) for turn in chosen for i in range(task.candidates)]
        return Proposal(edits, seed)


class RandomEdits:
    """The control of more data: any other utterance that agents said in the logs, at turns drawn at random.

    Args:
        dialogues: whose utterances are drawn, each different one alike.
    """

    name = "random"

    def __init__(self, dialogues: Sequence[Dialogue]) -> None:
        self._said = sorted({d.messages[i].content for d in dialogues for i in d.agent_turns})

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Draw turns and utterances. See `Controller`."""
        seed = derive_seed(task.seed, "controller", attempt)
        luck = random.Random(seed)
        edits = []
        for turn in sorted(luck.sample(task.turns, min(task.edits, len(task.turns)))):
            now = words_of(task.dialogue.messages[turn].content)
            others = [text for text in luck.sample(self._said, min(len(self._said), 64)) if words_of(text) != now]
            edits += [Edit(turn, "random", text, i) for i, text in enumerate(others[: task.candidates])]
        if not edits:
            raise BadAnswer("same text", "agents say nothing else in all of the logs")
        return Proposal(edits, seed)


# a grammar of JSON lets white space stand anywhere, and a weak model goes on with it for ever
_BLANK = (
    ", after nothing but white space: start vLLM with --structured-outputs-config "
    '\'{"backend": "xgrammar", "disable_any_whitespace": true}\''
)


def _asked(asker: Asker, messages: list, seed: int, schema: dict) -> Proposal:
    answer = asker.ask(messages, seed, schema)
    if answer.cut:
        raise BadAnswer(
            "cut off", f"the answer was cut off at its most tokens{_BLANK * answer.text[-20:].isspace()}", answer.text
        )
    return Proposal(parse_edits(answer.text), seed, answer.prompt_hash)

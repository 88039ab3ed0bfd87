"""Rounds of regeneration: each edits what the round before it made, at or after the turn that was edited last.

    round 1: logs          -> edit, play on, reward -> new dialogues
    round 2: those of round 1 -> edit, play on, reward -> ...

One edit mends one fault; what is played on from there has the faults of the agent that plays. Rounds put the repairs in a row.
A dialogue is one job, independent of all others: its luck is a hash of the run's seed and of where the dialogue comes from, so
the order of answers changes nothing, and neither does a run that was cut off. Who is asked is no part of it: two controllers
meet the same luck.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from llmrl.errors import DataError, EngineError, RequestError
from llmrl.hindsight.dialogues import AGENT, BadDialogue, Dialogue
from llmrl.hindsight.regeneration.budget import BudgetSpent
from llmrl.hindsight.regeneration.controllers import Controller, Proposal, Task
from llmrl.hindsight.regeneration.edits import BadAnswer, Edit, Refused
from llmrl.hindsight.regeneration.forward import Continuation, Forward
from llmrl.hindsight.regeneration.rewards import Reward
from llmrl.hindsight.regeneration.validation import Limits, check_edit
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message

_MOST_TRIES = 10  # jobs for each dialogue that is wanted
_GIVE_UP = 5  # dialogues in a row that nobody answered for: the endpoint is gone


@dataclass(frozen=True)
class Parts:
    """What regenerates: who edits, who plays on, who judges."""

    controller: Controller
    forward: Forward
    reward: Reward


@dataclass(frozen=True)
class Settings:
    """How.

    Attributes:
        rounds: how often.
        edits: most turns edited of one dialogue in a round; 0: all that were at fault.
        candidates: utterances for each turn; each is played on.
        retries: how often a controller is asked again when nothing of its answer can be used.
        concurrency: dialogues under way.
        seed: of everything.
        tag: part of the ids of what is made: dialogues of two runs on the same logs can then be learnt together.
        counts: dialogues to make in each round, where they are to be as many as another run made; else one job a dialogue.
    """

    rounds: int = 1
    edits: int = 1
    candidates: int = 1
    retries: int = 2
    concurrency: int = 16
    seed: int = 0
    tag: str = ""
    counts: tuple[int, ...] | None = None


@dataclass
class Outcome:
    """What became of one dialogue in one round.

    Attributes:
        made: new dialogues.
        refused: what could not be used, with the attempt.
        attempts: how often the controller was asked.
        unfinished: "budget" or the error of a request: it may go otherwise another time.
    """

    made: list[Dialogue] = field(default_factory=list)
    refused: list[tuple[int, Refused]] = field(default_factory=list)
    attempts: int = 0
    no_fault: bool = False
    unfinished: str | None = None


@dataclass(frozen=True)
class Round:
    """What one round made: its jobs in order, with the dialogue that each is of; `wanted` is how many were to be made."""

    number: int
    jobs: list[tuple[Dialogue, Outcome]]
    wanted: int | None = None

    @property
    def made(self) -> list[Dialogue]:
        """New dialogues, in order."""
        return [dialogue for _, outcome in self.jobs for dialogue in outcome.made]

    def trim(self) -> None:
        """Let go of what was made beyond what is wanted: one job may make several."""
        if self.wanted is None:
            return
        left = self.wanted
        for _, outcome in self.jobs:
            outcome.made = outcome.made[:left]
            left -= len(outcome.made)

    def reasons(self) -> Counter[str]:
        """Return how often each reason was given."""
        return Counter(refused.reason for _, outcome in self.jobs for _, refused in outcome.refused)


def regenerate(
    dialogues: Sequence[Dialogue],
    parts: Parts,
    settings: Settings,
    progress: Callable[[int, int, int], None] = lambda number, done, total: None,
    stop: Callable[[], None] = lambda: None,
) -> list[Round]:
    """Return what each round made.

    Args:
        dialogues: the logs.
        parts, settings: see there.
        progress: called with (round, done, total) after each dialogue.
        stop: called when the run ends early, to let no more requests through.

    Raises:
        EngineError: an endpoint or engine is gone; answers up to then are kept by the askers.
        DataError: there are no dialogues.
    """
    limits, found, lost = Limits.of(dialogues), list[Round](), LostInARow()
    pool = list(dialogues)
    seen = {(root_of(d), _texts(d.messages)) for d in dialogues}
    before = max((int(d.provenance.get("regenerated", {}).get("round", 0)) for d in dialogues), default=0)
    for step in range(settings.rounds):
        if not pool or (settings.counts is not None and step >= len(settings.counts)):
            break
        number = before + step + 1  # what was regenerated earlier, and is among the logs now, keeps its numbers
        work = _Work(parts, settings, limits, number, lost)
        done = Round(number, [], None if settings.counts is None else settings.counts[step])
        for jobs in _batches(pool, settings, done):
            outcomes = _run(work, jobs, settings.concurrency, partial(progress, number), stop)
            new = list(zip([dialogue for dialogue, _ in jobs], outcomes, strict=True))
            _drop_twins(new, seen)
            done.jobs.extend(new)
            if any(outcome.unfinished for outcome in outcomes):
                break
        done.trim()
        found.append(done)
        pool = done.made
    if not found:
        raise DataError("there are no dialogues to regenerate")
    return found


def root_of(dialogue: Dialogue) -> str:
    """Return the id of the log that a dialogue goes back to."""
    return str(dialogue.provenance.get("regenerated", {}).get("source", dialogue.id))


def lineage_of(dialogue: Dialogue) -> str:
    """Return where a dialogue comes from: the log's id and the edits since, whoever made them."""
    return root_of(dialogue) + str(dialogue.provenance.get("regenerated", {}).get("edits", ""))


def open_turns(dialogue: Dialogue) -> tuple[int, ...]:
    """Return the turns of the agent that may be edited: all of a log, those from the last edit on of what was made."""
    first = int(dialogue.provenance.get("regenerated", {}).get("turn", 0))
    return tuple(i for i in dialogue.agent_turns if i >= first)


def _batches(pool: Sequence[Dialogue], settings: Settings, done: Round) -> Iterator[list[tuple[Dialogue, int]]]:
    """Yield what is to be done as (dialogue, repetition): each once; or again and again, until there are as many as wanted.

    The order in which they come again is drawn by the seed. `done` grows from batch to batch.
    """
    if done.wanted is None:
        yield [(dialogue, 0) for dialogue in pool]
        return
    wanted, start = done.wanted, 0
    order = sorted(pool, key=lambda d: derive_seed(settings.seed, "order", done.number, lineage_of(d)))
    while (left := wanted - len(done.made)) > 0 and start < _MOST_TRIES * wanted:
        yield [(order[i % len(order)], i // len(order)) for i in range(start, start + left)]
        start += left


class LostInARow:
    """Counts dialogues that nobody answered for; after several in a row the endpoint is taken for gone."""

    def __init__(self) -> None:
        self._lost = 0

    def count(self, error: str | None) -> None:
        """Count one dialogue, with the error that it ended in.

        Raises:
            EngineError: it is the last of several in a row.
        """
        self._lost = 0 if error is None else self._lost + 1
        if self._lost >= _GIVE_UP:
            raise EngineError(
                f"{self._lost} dialogues in a row got no answer; the last: {error}\nanswers up to then are kept, the same "
                "command goes on with them"
            )


@dataclass(frozen=True)
class _Work:
    parts: Parts
    settings: Settings
    limits: Limits
    number: int
    lost: LostInARow

    def job(self, dialogue: Dialogue, repetition: int) -> Outcome:
        """Edit one dialogue and play it on."""
        outcome = Outcome()
        turns = open_turns(dialogue)
        edits = self.settings.edits or len(turns)
        seed = derive_seed(self.settings.seed, "regenerate", self.number, lineage_of(dialogue), repetition)
        task = Task(dialogue, turns, edits, self.settings.candidates, seed)
        try:
            usable, proposal = self._propose(task, outcome)
            for edit in usable:
                self._play(task, edit, proposal, repetition, outcome)
        except BudgetSpent:
            outcome.unfinished = "budget"
        except EngineError as error:
            outcome.unfinished = str(error)
        return outcome

    def _propose(self, task: Task, outcome: Outcome) -> tuple[list[Edit], Proposal]:
        """Return edits that can be used, and the answer they are from; ask again while there is none."""
        complaint = None
        for attempt in range(self.settings.retries + 1):
            outcome.attempts += 1
            try:
                proposal = self.parts.controller.propose(task, attempt, complaint)
            except BadAnswer as bad:
                outcome.refused.append((attempt, bad.refused))
                complaint = bad.refused.detail
                continue
            except (RequestError, DataError) as error:
                reason = "request refused" if isinstance(error, RequestError) else "cannot be edited"
                outcome.refused.append((attempt, Refused(reason, str(error))))
                break  # the same question will be refused again
            if not proposal.edits and not proposal.refused:
                outcome.no_fault = True
                return [], proposal
            usable, refused = self._sort(task, proposal.edits)
            refused = [*proposal.refused, *refused]
            outcome.refused += [(attempt, one) for one in refused]
            if usable:
                return usable, proposal
            complaint = refused[0].detail
        return [], Proposal([], task.seed)

    def _sort(self, task: Task, edits: Sequence[Edit]) -> tuple[list[Edit], list[Refused]]:
        usable, refused, seen = list[Edit](), list[Refused](), set[tuple[int, str]]()
        for edit in edits:
            wrong = check_edit(edit, task.dialogue, task.turns, self.limits)
            key = (edit.turn, edit.utterance.strip())
            if wrong is None and key in seen:
                wrong = Refused("duplicate", "the same utterance for the same turn twice", edit)
            if wrong is None and len({turn for turn, _ in seen} | {edit.turn}) > task.edits:
                wrong = Refused("more than asked for", f"edits of more than {task.edits} turns", edit)
            if wrong is None and sum(turn == edit.turn for turn, _ in seen) >= task.candidates:
                wrong = Refused("more than asked for", f"more than {task.candidates} utterances for one turn", edit)
            if wrong is None:
                # numbered here: a controller may name one turn twice
                usable.append(replace(edit, candidate=sum(turn == edit.turn for turn, _ in seen)))
                seen.add(key)
            else:
                refused.append(wrong)
        return usable, refused

    def _play(self, task: Task, edit: Edit, proposal: Proposal, repetition: int, outcome: Outcome) -> None:
        """Play on from one edit, and add what came of it."""
        source, name = task.dialogue, _name(self.number, edit, repetition)
        prefix = (*source.messages[: edit.turn], Message(AGENT, edit.utterance.strip()))
        seed = derive_seed(task.seed, "forward", name)
        try:
            played = self.parts.forward.complete(source, prefix, seed)
            rewards = self.parts.reward.rewards(played, source.task, seed)
            outcome.made.append(self._dialogue(source, edit, proposal, played, rewards, name))
        except BadAnswer as bad:
            refused = bad.refused
            outcome.refused.append((0, Refused(refused.reason, refused.detail, edit, refused.answer)))
        except BadDialogue as bad_dialogue:
            outcome.refused.append((0, Refused(bad_dialogue.reason, str(bad_dialogue), edit)))
        except (RequestError, DataError) as error:
            reason = "request refused" if isinstance(error, RequestError) else "cannot be played on"
            outcome.refused.append((0, Refused(reason, str(error), edit)))

    def _dialogue(
        self,
        source: Dialogue,
        edit: Edit,
        proposal: Proposal,
        played: Continuation,
        rewards: Sequence[float],
        name: str,
    ) -> Dialogue:
        before = source.provenance.get("regenerated", {})
        kept = [one for one in before.get("turns", []) if one["turn"] < edit.turn]
        names = {"agent": self.parts.forward.agent_name, "user": self.parts.forward.name}
        prompt, luck = proposal.origin(edit.turn)
        turns = [_made(edit.turn, "controller", self.parts.controller.name, prompt, luck, self.number)]
        turns += [_made(i, who, names[who], asked, own, self.number) for i, who, asked, own in played.made]
        provenance = {
            **{key: value for key, value in source.provenance.items() if key != "regenerated"},
            "regenerated": {
                "source": root_of(source),
                "edits": f"{before.get('edits', '')}~{name}",
                "parent": source.id,
                "round": self.number,
                "turn": edit.turn,
                "said": source.messages[edit.turn].content,
                "diagnosis": edit.diagnosis,
                "parent_return": source.total,
                "reward": self.parts.reward.name,
                "reward_sd": self.parts.reward.sd,
                "turns": kept + turns,
            },
        }
        return Dialogue(
            id=f"{source.id}~{'.'.join(part for part in (self.settings.tag, name) if part)}",
            messages=played.messages,
            rewards=tuple(rewards),
            done=played.done,
            truncated=played.truncated,
            task=source.task,
            provenance=provenance,
        )


def _made(turn: int, by: str, model: str, prompt: str | None, seed: int, number: int) -> dict[str, Any]:
    return {"turn": turn, "by": by, "model": model, "prompt": prompt, "seed": seed, "round": number}


def _name(number: int, edit: Edit, repetition: int) -> str:
    return f"{number}.{edit.turn}.{edit.candidate}" + (f".{repetition}" if repetition else "")


def _run(
    work: _Work,
    jobs: Sequence[tuple[Dialogue, int]],
    concurrency: int,
    progress: Callable[[int, int], None],
    stop: Callable[[], None],
) -> list[Outcome]:
    """Do all jobs and return what became of them, in order.

    Raises:
        EngineError: several in a row got no answer.
    """
    outcomes = list[Outcome]()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="regenerate") as pool:
        try:
            for future in [pool.submit(work.job, *job) for job in jobs]:  # in their order, whoever is done first
                outcome = future.result()
                outcomes.append(outcome)
                progress(len(outcomes), len(jobs))
                work.lost.count(None if outcome.unfinished == "budget" else outcome.unfinished)
        except BaseException:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _drop_twins(jobs: Sequence[tuple[Dialogue, Outcome]], seen: set[tuple[str, str]]) -> None:
    """Take out dialogues that are another one of the same log word for word."""
    for _, outcome in jobs:
        unique = []
        for dialogue in outcome.made:
            key = (root_of(dialogue), _texts(dialogue.messages))
            if key in seen:
                made = dialogue.provenance["regenerated"]
                edit = Edit(made["turn"], made["diagnosis"], dialogue.messages[made["turn"]].content)
                outcome.refused.append((0, Refused("duplicate", "the dialogue is there already, word for word", edit)))
                continue
            seen.add(key)
            unique.append(dialogue)
        outcome.made = unique


def _texts(messages: Sequence[Message]) -> str:
    return "\n".join(f"{m.role}:{m.content}" for m in messages)

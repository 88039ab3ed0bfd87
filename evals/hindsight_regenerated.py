"""Regenerated logs of the charity talk for evals/hindsight.py: by the command, and with controllers and users at fault.

    hindsight        the scripted controller: turns that were not the best, given what the user had told by then
    random           as many edits, each any utterance of the logs at any turn
    no hindsight     as many edits, each what the agent of the logs says when it is in that place again
    leaking          the controller acts on what it knows from the end, the user's type, before they told it
    noisy 30, 60     so many in a hundred of its edits are random ones
    agreeable        the controller is as `hindsight`; the user finds every appeal helpful

The last four are what can go wrong. `realism` of each is kept; it compares users, so it cannot notice a controller.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llmrl.hindsight.dialogues import Dialogue, read_dialogues
from llmrl.hindsight.envs import charity
from llmrl.hindsight.envs.charity_words import WORDS, understand
from llmrl.hindsight.regeneration.controllers import Proposal, RandomEdits, Scripted, Task
from llmrl.hindsight.regeneration.edits import Edit
from llmrl.hindsight.regeneration.forward import Replay
from llmrl.hindsight.regeneration.options import RegenerateConfig
from llmrl.hindsight.regeneration.realism import compare
from llmrl.hindsight.regeneration.rewards import RuleReward
from llmrl.hindsight.regeneration.rounds import Parts, Settings, regenerate
from llmrl.hindsight.regeneration.run import run
from llmrl.jsonl import write_objects
from llmrl.rollout.environment import Step
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message

ROUNDS = 3
PREFIXES = 300


class Leaking(Scripted):
    """Knows the user's type, and writes what is best for it, told or not."""

    name = "leaking"

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Draw among the turns that were not the best for this user."""
        seed = derive_seed(task.seed, "controller", attempt)
        luck, row = random.Random(seed), task.dialogue.provenance["row"]
        faulty = {}
        for turn in task.turns:
            history = task.dialogue.messages
            belief = charity.Belief(frozenset({row["type"]}), charity.read(history[:turn])[0].talk)
            best = max(charity.ACTS, key=lambda act, belief=belief: charity.act_value(belief, act, "best"))
            if understand(history[turn].content, row["words"])[0] != best:
                faulty[turn] = best
        chosen = luck.sample(sorted(faulty), min(task.edits, len(faulty)))
        edits = [Edit(turn, "leaks", luck.choice(WORDS[row["words"]].acts[faulty[turn]])) for turn in chosen]
        return Proposal(edits, seed)


class Noisy:
    """The scripted controller, but for a share of its edits, which are random."""

    def __init__(self, share: float, dialogues: list[Dialogue]) -> None:
        self.name, self._share = f"noisy {share:g}", share
        self._good, self._bad = Scripted(charity), RandomEdits(dialogues)

    def propose(self, task: Task, attempt: int = 0, complaint: str | None = None) -> Proposal:
        """Draw who edits."""
        bad = random.Random(derive_seed(task.seed, "noise", attempt)).random() < self._share
        return (self._bad if bad else self._good).propose(task, attempt, complaint)


class Agreeable(charity.Charity):
    """A user who finds every appeal helpful.

    Args:
        talk: the talk up to here.
    """

    def __init__(self, talk: charity.Charity) -> None:
        vars(self).update(vars(talk))

    def step(self, answer: Message) -> Step:
        """Take any appeal for the one that is wanted."""
        act, _ = understand(answer.content, self.words)
        wants, self.wants = self.wants, act if act in charity.APPEALS else self.wants
        try:
            return super().step(answer)
        finally:
            self.wants = wants


class AgreeableReplay(Replay):
    """The true user up to the edit, an agreeable one from there on."""

    def at_the_edit(self, environment: Any) -> Any:
        """Put another user in the place of the true one."""
        return Agreeable(environment)


def regenerated(folder: Path, source: str, seed: int) -> dict[str, Any]:
    """Write `folder/SOURCE.jsonl` from the logs beside it, once, and return what its report says."""
    path = folder / f"{source}.jsonl"
    report = path.with_suffix(".found.json")
    if not report.is_file():
        found = (
            _by_command(folder, path, source, seed) if source in _CONTROLS else _at_fault(folder, path, source, seed)
        )
        kept = ("rounds", "realism", "made", "refused")
        report.write_text(json.dumps({key: found[key] for key in kept}), encoding="utf-8")
    return dict(json.loads(report.read_text(encoding="utf-8")))


def up_to(folder: Path, source: str, rounds: int, *, copies: bool = False) -> Path:
    """Return the file of the first rounds of a source; with `copies`, one that does not say which turns are another's."""
    if rounds >= ROUNDS and not copies:
        return folder / f"{source}.jsonl"
    path = folder / f"{source}-{rounds}{'-copies' if copies else ''}.jsonl"
    whole = read_dialogues([folder / f"{source}.jsonl"]).dialogues
    chosen = [d.to_json() for d in whole if d.provenance["regenerated"]["round"] <= rounds]
    for row in chosen if copies else ():
        row["provenance"].pop("regenerated")
    write_objects(path, chosen)
    return path


_CONTROLS = {"hindsight": "none", "random": "random", "no hindsight": "no_hindsight"}


def _by_command(folder: Path, path: Path, source: str, seed: int) -> dict[str, Any]:
    match = None if source == "hindsight" else str(folder / "hindsight.jsonl")
    return run(
        RegenerateConfig(
            data=[str(folder / "logs.jsonl.gz")], output=str(path), control=_CONTROLS[source], match=match, rounds=ROUNDS,
            calibration=PREFIXES, seed=seed, overwrite=True, quiet=True,
        )
    )  # fmt: skip


def _at_fault(folder: Path, path: Path, source: str, seed: int) -> dict[str, Any]:
    logs = read_dialogues([folder / "logs.jsonl.gz"]).dialogues
    replay = AgreeableReplay if source == "agreeable" else Replay
    controllers: dict[str, Callable[[], Any]] = {
        "leaking": partial(Leaking, charity),
        "noisy 30": partial(Noisy, 0.3, logs),
        "noisy 60": partial(Noisy, 0.6, logs),
        "agreeable": partial(Scripted, charity),
    }
    parts = Parts(controllers[source](), replay(charity, charity.Charity), RuleReward(logs, exact=True))
    realism = compare(logs, parts.forward, parts.reward, count=PREFIXES, seed=seed, concurrency=1)
    rounds = regenerate(logs, parts, Settings(rounds=ROUNDS, seed=seed, concurrency=1))
    made = [dialogue for one in rounds for dialogue in one.made]
    write_objects(path, [dialogue.to_json() for dialogue in made])
    told = [{"round": one.number, "made": len(one.made), "refused": dict(one.reasons())} for one in rounds]
    return {
        "rounds": told,
        "realism": realism,
        "made": len(made),
        "refused": dict(sum((one.reasons() for one in rounds), Counter())),
    }

"""Whether a forward model is like the people in the logs: it goes on from real prefixes, and is compared with what really came.

    real:      prefix, turn of the agent  ->  what the user really said, what was really earned
    simulated: the same prefix and turn   ->  what the forward model says, what it earns

At equal prefixes, and with the same kind of agent, a faithful model earns as much. One that earns more is easier to please than
people are; what is learnt from it will not hold. That is the alarm. Prefixes should be of logs that it was not trained on.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrl.errors import DataError, EngineError, RequestError
from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.regeneration.budget import BudgetSpent
from llmrl.hindsight.regeneration.edits import BadAnswer
from llmrl.hindsight.regeneration.forward import Continuation, Forward
from llmrl.hindsight.regeneration.rewards import Reward
from llmrl.hindsight.regeneration.rounds import LostInARow
from llmrl.intervals import draw_means, interval
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message

_DRAWS = 2000
_FEWEST = 10  # prefixes below which nothing can be said
_AGREES = re.compile(
    r"\b(?:yes|yeah|yep|sure|ok|okay|agree|agreed|gladly|absolutely|definitely|of course|sounds? (?:good|great|fair)"
    r"|good (?:idea|point)|great|like (?:this|that|it)|love|convinced|happy to|willing|fine|deal|thanks?|thank you)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(r"\b(?:no|not|never|nothing|sorry|enough|goodbye)\b|n't\b", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """What really came after a prefix, and what the forward model made of it: what each earned, and the user's next words."""

    dialogue: str
    turn: int
    real: float
    simulated: float
    real_reply: str
    simulated_reply: str
    real_turns: int
    simulated_turns: int


def agrees(text: str) -> bool:
    """Tell whether a text sounds like agreement: a rough count of words, the same for people and models."""
    return bool(_AGREES.search(text)) and not _DENIES.search(text)


def compare(
    dialogues: Sequence[Dialogue],
    forward: Forward,
    reward: Reward,
    *,
    count: int,
    seed: int,
    concurrency: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Return how a forward model differs from what really came, see `report`.

    Args:
        dialogues: real ones, best held out from its training.
        forward, reward: of the regeneration.
        count: prefixes, one of a dialogue.
        seed: of the choice of dialogues and turns, and of what is said.
        concurrency: dialogues under way.
        progress: called with (done, total).
        stop: called when it ends early, to let no more requests through.

    Raises:
        EngineError: nobody answered for several prefixes in a row.
    """
    chosen = sorted(dialogues, key=lambda d: derive_seed(seed, "realism", d.id))[:count]
    done = itertools.count(1)

    def one(dialogue: Dialogue) -> Pair | str | EngineError:
        try:
            return _pair(dialogue, forward, reward, derive_seed(seed, "realism", dialogue.id))
        except BadAnswer as bad:
            return bad.refused.reason
        except BudgetSpent:
            return "budget"
        except RequestError:
            return "request refused"
        except DataError:
            return "cannot be played on"
        except EngineError as error:
            return error
        finally:
            progress(next(done), len(chosen))

    found, in_a_row = list[Pair | str | EngineError](), LostInARow()
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for result in pool.map(one, chosen):
                found.append(result)
                in_a_row.count(str(result) if isinstance(result, EngineError) else None)
        except BaseException:
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    pairs = [one for one in found if isinstance(one, Pair)]
    lost = ["no answer" if isinstance(one, EngineError) else one for one in found if not isinstance(one, Pair)]
    return report(pairs, lost, seed)


def _pair(dialogue: Dialogue, forward: Forward, reward: Reward, seed: int) -> Pair:
    turn = random.Random(seed).choice(dialogue.agent_turns)
    prefix = dialogue.messages[: turn + 1]
    played = forward.complete(dialogue, prefix, derive_seed(seed, "forward"))
    earned = sum(reward.rewards(played, dialogue.task, seed))
    # the same judge for both: what it errs in both alike is no difference of the users
    same = Continuation(dialogue.messages, dialogue.rewards if played.rewards is not None else None, True, False, ())
    real = sum(reward.rewards(same, dialogue.task, seed))
    return Pair(
        dialogue.id, turn, real, earned, _reply(dialogue.messages, turn), _reply(played.messages, turn),
        _turns(dialogue.messages), _turns(played.messages),
    )  # fmt: skip


def report(pairs: Sequence[Pair], lost: Sequence[str], seed: int) -> dict[str, Any]:
    """Return means of both, their difference with its interval, and `alarms`.

    Args:
        pairs: see `Pair`.
        lost: why others could not be played on.
        seed: of the bootstrap over dialogues.

    Returns:
        `prefixes`, `lost` by reason, and for `earned`, `reply_words`, `agreement` and `agent_turns`: `real`, `simulated` and
        `difference` (value, low, high). `alarms`: a sentence each.
    """
    found: dict[str, Any] = {
        "prefixes": len(pairs),
        "lost": {reason: lost.count(reason) for reason in sorted(set(lost))},
    }
    if not pairs:
        return {**found, "alarms": ["the forward model could not be compared with the logs at all"]}
    # where a log ends with the agent's turn, no reply is there to compare with
    replied = [(p.real_reply, p.simulated_reply) for p in pairs if p.real_reply and p.simulated_reply]
    columns = {
        "earned": [(p.real, p.simulated) for p in pairs],
        "reply_words": [(len(real.split()), len(simulated.split())) for real, simulated in replied],
        "agreement": [(float(agrees(real)), float(agrees(simulated))) for real, simulated in replied],
        "agent_turns": [(p.real_turns, p.simulated_turns) for p in pairs],
    }
    for name, values in columns.items():
        if not values:
            found[name] = None
            continue
        both = np.array(values, dtype=float)
        difference = both[:, 1] - both[:, 0]
        draws = draw_means(difference[:, None], _DRAWS, seed)[:, 0]
        found[name] = {
            "real": float(both[:, 0].mean()),
            "simulated": float(both[:, 1].mean()),
            "difference": interval(float(difference.mean()), draws, None, basic=False),
        }
    return {**found, "alarms": _alarms(found, len(pairs))}


def _alarms(found: dict[str, Any], pairs: int) -> list[str]:
    if pairs < _FEWEST:
        return [f"only {pairs} prefixes could be compared with the logs, which says nothing"]
    told = []
    words = {
        "earned": "simulated users, with the agent that plays on, give more than real ones gave after the same words",
        "agreement": "simulated users agree more often than real ones did after the same words",
    }
    for name, text in words.items():
        one = found[name]
        if one is not None and one["difference"]["low"] > 0:
            told.append(
                f"{text}: {one['simulated']:.3g} against {one['real']:.3g}, {one['difference']['value']:+.3g} "
                f"[{one['difference']['low']:+.3g}, {one['difference']['high']:+.3g}]; what is learnt from them may not hold"
            )
    return told


def _reply(messages: Sequence[Message], turn: int) -> str:
    """Return what the user says right after a turn; "" where they say nothing more."""
    after = next((m for m in messages[turn + 1 :] if m.role != "tool"), None)
    return after.content if after is not None and after.role == "user" else ""


def _turns(messages: Sequence[Message]) -> int:
    return sum(message.role == AGENT for message in messages)

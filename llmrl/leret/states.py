"""Which context of a hop goes on to the next one.

    bucket    the paper's rule: candidates of one average precision are a bucket, its weight is that AP, and 0.5 more for
              the best bucket; a bucket is drawn, then one of its candidates, all alike. So a bucket of AP 0 is only drawn
              where it is the best
    top1      one of the best, all alike
    softmax   in proportion to exp(value / temperature)
    beam      the m best contexts; of candidates that retrieved the same one stays

A context with AP 1 is solved and never drawn, as in the paper; a question whose contexts are all solved has no next hop.
`keep_solved` hands one solved context over as well, in which the right thing is to stop.

`probabilities` is the rule, `next_states` draws from it with a seed that is a hash of run seed, question and hop: the order
in which candidates arrive changes nothing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from llmrl.errors import DataError, UsageError, did_you_mean
from llmrl.leret.records import Candidate, level
from llmrl.rollout.seeds import derive_seed

STATE_RULES = ("bucket", "top1", "softmax", "beam")
BEST_BONUS = 0.5


@dataclass(frozen=True)
class StateRule:
    """How the next states are chosen.

    Args:
        name: one of STATE_RULES.
        temperature: of softmax, above 0.
        beam: contexts a question of beam, at least 1.
        keep_solved: also hand over one solved context.
    """

    name: str = "bucket"
    temperature: float = 0.25
    beam: int = 2
    keep_solved: bool = False

    def __post_init__(self) -> None:
        if self.name not in STATE_RULES:
            raise UsageError(f"unknown state rule '{self.name}'{did_you_mean(self.name, STATE_RULES)}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise UsageError(f"the temperature of the softmax rule must be above 0, got {self.temperature}")
        if self.beam < 1:
            raise UsageError(f"a beam holds at least 1 context, got {self.beam}")


@dataclass(frozen=True)
class NextStates:
    """What a question goes on with: the candidates whose `state_after` is explored, and a solved one where it is kept."""

    open: tuple[Candidate, ...]
    solved: Candidate | None = None


def is_solved(candidate: Candidate) -> bool:
    """Return whether its context has average precision 1: all gold documents, and above everything else."""
    return level(candidate.ap) >= 1


def next_states(candidates: Sequence[Candidate], rule: StateRule, seed: int) -> NextStates:
    """Choose the next states of one question.

    Args:
        candidates: all that were tried for the question in one hop, in any order; with a beam from several states.
        rule: how to choose.
        seed: of the run.

    Returns:
        None to `beam` open candidates, best first where there are several, and with `keep_solved` one of the solved.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.order)
    if not ordered:
        return NextStates(())
    _check_one_hop(ordered)
    rng = random.Random(derive_seed(seed, ordered[0].question_id, ordered[0].hop, "next state"))
    solved = [candidate for candidate in ordered if is_solved(candidate) and not candidate.stopped]
    kept = _draw(solved, [1.0] * len(solved), rng) if rule.keep_solved and solved else None
    if rule.name == "beam":
        return NextStates(_beam(ordered, rule, rng), kept)
    weights = probabilities(ordered, rule)
    return NextStates((_draw(ordered, weights, rng),) if any(weights) else (), kept)


def probabilities(candidates: Sequence[Candidate], rule: StateRule) -> list[float]:
    """Return for each candidate the probability that it is chosen; for beam that it is among the chosen.

    They sum to 1 (beam: to the number of contexts chosen), or to 0 where every candidate is solved or stopped.
    """
    values = {i: level(c.ap) for i, c in enumerate(candidates) if _is_open(c)}
    shares = dict.fromkeys(range(len(candidates)), 0.0)
    if not values:
        return list(shares.values())
    best = max(values.values())
    if rule.name == "beam":
        shares |= _beam_shares(candidates, values, rule.beam)
    elif rule.name == "softmax":
        shares |= _normalised({i: math.exp((value - best) / rule.temperature) for i, value in values.items()})
    elif rule.name == "top1":
        shares |= _normalised({i: float(value == best) for i, value in values.items()})
    else:
        sizes = {value: list(values.values()).count(value) for value in values.values()}
        weight = {value: value + BEST_BONUS * (value == best) for value in sizes}
        shares |= _normalised({i: weight[value] / sizes[value] for i, value in values.items()})
    return list(shares.values())


def _is_open(candidate: Candidate) -> bool:
    return not is_solved(candidate) and not candidate.stopped


def _normalised(weights: dict[int, float]) -> dict[int, float]:
    total = math.fsum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


def _contexts(
    candidates: Sequence[Candidate], values: dict[int, float]
) -> dict[tuple[tuple[str, ...], ...], list[int]]:
    """Index the open candidates by what was retrieved on the way."""
    alike: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for i in values:
        alike.setdefault(candidates[i].state_after.hops, []).append(i)
    return alike


def _beam_shares(candidates: Sequence[Candidate], values: dict[int, float], beam: int) -> dict[int, float]:
    """Return the chance of each to be in the beam: ties at its edge are drawn from, and so are candidates of one context."""
    alike = _contexts(candidates, values)
    worth = {context: values[members[0]] for context, members in alike.items()}
    shares: dict[int, float] = {}
    for context, members in alike.items():
        above = sum(value > worth[context] for value in worth.values())
        level_with = sum(value == worth[context] for value in worth.values())
        chance = min(1.0, max(0.0, (beam - above) / level_with))
        shares |= dict.fromkeys(members, chance / len(members))
    return shares


def _beam(ordered: Sequence[Candidate], rule: StateRule, rng: random.Random) -> tuple[Candidate, ...]:
    values = {i: level(c.ap) for i, c in enumerate(ordered) if _is_open(c)}
    drawn = [members[int(rng.random() * len(members))] for members in _contexts(ordered, values).values()]
    # a random number beside each value breaks ties without favouring whoever comes first in the alphabet
    ranked = sorted(drawn, key=lambda i: (-values[i], rng.random()))
    return tuple(ordered[i] for i in ranked[: rule.beam])


def _draw(candidates: Sequence[Candidate], weights: Sequence[float], rng: random.Random) -> Candidate:
    return rng.choices(candidates, weights)[0]


def _check_one_hop(ordered: Sequence[Candidate]) -> None:
    first, last = ordered[0], ordered[-1]
    if (first.question_id, first.hop) != (last.question_id, last.hop):
        raise DataError(
            f"expected candidates of one question and hop, got {first.question_id} hop {first.hop} "
            f"and {last.question_id} hop {last.hop}"
        )

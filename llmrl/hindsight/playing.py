"""Playing a policy in an environment whose best return is known, through the engine that all episodes are played with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.errors import DataError, UsageError
from llmrl.hindsight.envs import charity, maze, twenty_questions
from llmrl.intervals import draw_means, draw_means_within, interval
from llmrl.rollout.episodes import run_episodes
from llmrl.rollout.protocols import Engine
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.shards import read_shards
from llmrl.types import Episode, SamplingConfig

BOOTSTRAP = 2000


@dataclass(frozen=True)
class Environment:
    """An environment by name.

    Attributes:
        module: has `rows` and `optimum`.
        make: its class.
        turns: most turns of an episode, by its own rules.
        tokens: most tokens of an answer.
        variants: the argument of `rows` and `logs` that chooses one, and the choices.
    """

    module: ModuleType
    make: Any
    turns: int
    tokens: int
    variants: tuple[str, tuple[str, ...]] | None = None

    def rows(self, variant: str | None) -> list[dict[str, Any]]:
        """Return the rows that are played; `variant` is the choice of words or of observation.

        Raises:
            UsageError: there is no such choice.
        """
        return list(self.module.rows(**self.variant_option(variant)))

    def variant_option(self, variant: str | None) -> dict[str, str]:
        """Return the variant as an argument of `rows` and `logs`.

        Raises:
            UsageError: there is no such choice.
        """
        if variant is None:
            return {}
        if self.variants is None or variant not in self.variants[1]:
            known = "has none" if self.variants is None else f"has {', '.join(self.variants[1])}"
            raise UsageError(f"--variant {variant}: {self.make.__name__} {known}")
        return {self.variants[0]: variant}


ENVIRONMENTS = {
    "maze": Environment(maze, maze.Maze, maze.CAP, 16, ("observation", maze.OBSERVATIONS)),
    "charity": Environment(charity, charity.Charity, charity.TURNS, 48, ("words", tuple(charity.WORDS))),
    "twenty-questions": Environment(twenty_questions, twenty_questions.TwentyQuestions, twenty_questions.CAP, 32),
}


def play(
    engine: Engine,
    environment: Environment,
    rows: Sequence[Mapping[str, Any]],
    count: int,
    sampling: SamplingConfig,
    folder: Path,
    *,
    seed: int,
    window: int | None = None,
    fingerprint: str = "",
    progress: bool = False,
) -> list[Episode]:
    """Play `count` episodes and return them in order; the luck of an episode is that of (seed, row, number).

    The rows are played in turn, in an order that the seed draws: where `count` is no multiple of them, those that are played
    once more are a random sample.

    Args:
        window: exchanges that the policy reads, see `run_episodes`.
        fingerprint: of the policy; `folder` takes episodes of one, and goes on where it was left.

    Raises:
        DataError: episodes failed.
    """
    order = sorted(rows, key=lambda row: derive_seed(seed, row["id"]))
    numbered = [
        {**order[i % len(order)], "id": f"{order[i % len(order)]['id']}-{i // len(order)}"} for i in range(count)
    ]
    run_episodes(
        engine,
        numbered,
        environment.make,
        sampling,
        output=folder,
        seed=seed,
        max_turns=environment.turns,
        window=window,
        fingerprint=fingerprint,
        progress=progress,
    )
    stored = read_shards(folder)
    episodes = [Episode.from_json(stored[(row["id"], 0)]) for row in numbered]
    failed = [episode for episode in episodes if episode.error]
    if failed:
        raise DataError(
            f"{len(failed)} of {count} episodes failed; the first, {failed[0].row_id}: {failed[0].error}\nthe others are "
            f"kept in {folder}; the same command plays these again"
        )
    return episodes


def report_of(episodes: Sequence[Episode], environment: Environment, *, scripted: bool = True) -> dict[str, Any]:
    """Return the mean return with its 95% interval, the best there is, and what was no action.

    Args:
        episodes: of `play`.
        environment: theirs.
        scripted: its own user was played with, of whom the best return is known.
    """
    returns = np.array([episode.returns.get("reward", 0.0) for episode in episodes])
    steps = [step for episode in episodes for step in episode.metadata.get("steps", [])]
    cut = [episode.metadata.get("truncated_by") for episode in episodes if episode.truncated]
    found = {
        "return": interval(float(returns.mean()), _draws(episodes, returns), None, basic=False),
        "optimum": float(environment.module.optimum()) if scripted else None,
        "invalid_share": sum(bool(step.get("invalid")) for step in steps) / len(steps),
        "off_template_share": sum(bool(step.get("off_template")) for step in steps) / len(steps),
        "truncated_share": len(cut) / len(episodes),
        "context_share": cut.count("context") / len(episodes),
        "episodes": len(episodes),
        "turns": len(steps),
        "returns": returns.tolist(),
    }
    return (
        found if scripted else {**found, "unheard_share": sum(bool(step.get("unheard")) for step in steps) / len(steps)}
    )


def _draws(episodes: Sequence[Episode], returns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return means of bootstrap draws: within each start, a fixed set of them, where all were played twice or more."""
    starts = [episode.row_id.rpartition("-")[0] for episode in episodes]
    groups = [sorted(set(starts)).index(start) for start in starts]
    if min(Counter(starts).values()) > 1:
        return draw_means_within(returns, groups, BOOTSTRAP, 0)
    return draw_means(returns[:, None], BOOTSTRAP, 0)[:, 0]

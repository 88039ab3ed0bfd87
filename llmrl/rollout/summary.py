"""What a run of episodes came to, in numbers and in words."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from llmrl.types import Episode


@dataclass(frozen=True)
class EpisodeSummary:
    """What one call of `run_episodes` did in one process.

    Attributes:
        resumed: episodes that an earlier run had finished; they are in none of the other numbers.
        done: episodes that their environment ended.
        truncated: episodes that a limit cut, by limit.
        failed: episodes that ended with an error, by place and type of the error.
        turns: sampled turns.
        sampled_tokens: tokens with a loss mask of 1.
        seconds: wall-clock time.
        rewards: mean over the episodes that did not fail of each named reward's sum; one without it counts as 0.
        rewrites: segments that began because a chat template rewrote history.
        abandoned: threads that were left behind in an environment or engine that did not come back in time.
    """

    resumed: int
    done: int
    truncated: dict[str, int]
    failed: dict[str, int]
    turns: int
    sampled_tokens: int
    seconds: float
    rewards: dict[str, float]
    rewrites: int
    abandoned: int

    @property
    def episodes(self) -> int:
        """Episodes that ended in this call, whichever way."""
        return self.done + sum(self.truncated.values()) + sum(self.failed.values())

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens a second, over everything the run waited for."""
        return self.sampled_tokens / self.seconds if self.seconds > 0 else 0.0

    def sentence(self) -> str:
        """Return the numbers that are not zero in one line."""
        parts = [f"{self.done} done", *(f"{count} {name}" for name, count in _ends(self))]
        parts += [f"{self.resumed} kept from before"] if self.resumed else []
        rewards = "".join(f"; mean {name} {mean:.4g}" for name, mean in self.rewards.items())
        return (
            f"{self.episodes} episodes ({', '.join(parts)}): {self.turns} turns, {self.sampled_tokens} sampled tokens "
            f"in {self.seconds:.1f} s ({self.tokens_per_second:.0f} tokens/s){rewards}"
        )

    def table(self) -> str:
        """Return all numbers, one a line."""
        lines = [
            ("episodes", self.episodes),
            ("kept from before", self.resumed),
            ("done", self.done),
            *_ends(self),
            ("turns", self.turns),
            ("sampled tokens", self.sampled_tokens),
            ("tokens/s", f"{self.tokens_per_second:.0f}"),
            *((f"mean {name}", f"{mean:.4g}") for name, mean in self.rewards.items()),
            ("rewrites", self.rewrites),
            ("threads left behind", self.abandoned),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _ends(summary: EpisodeSummary) -> list[tuple[str, int]]:
    cut = [(f"truncated by {cause}", count) for cause, count in sorted(summary.truncated.items())]
    return cut + [(f"failed in {cause}", count) for cause, count in sorted(summary.failed.items())]


class Tally:
    """Counts episodes as they end."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._done = self._turns = self._tokens = self._rewrites = 0
        self._truncated: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._rewards: dict[str, float] = {}

    def add(self, episode: Episode) -> None:
        """Count one episode."""
        sampled = [turn for turn in episode.turns if turn.is_sampled]
        self._turns += len(sampled)
        self._tokens += sum(sum(turn.loss_mask) for turn in sampled)
        self._rewrites += max(0, episode.segments - 1)
        if episode.error is not None:
            self._failed[": ".join(episode.error.split(": ")[:2])] += 1
            return
        self._done += episode.done
        if episode.truncated:
            self._truncated[episode.metadata["truncated_by"]] += 1
        for name, value in episode.returns.items():
            self._rewards[name] = self._rewards.get(name, 0.0) + value

    def summary(self, *, resumed: int, abandoned: int) -> EpisodeSummary:
        """Return what was counted."""
        scored = self._done + self._truncated.total()
        return EpisodeSummary(
            resumed=resumed,
            done=self._done,
            truncated=dict(self._truncated),
            failed=dict(self._failed),
            turns=self._turns,
            sampled_tokens=self._tokens,
            seconds=time.monotonic() - self._begun,
            rewards={name: total / scored for name, total in sorted(self._rewards.items())},
            rewrites=self._rewrites,
            abandoned=abandoned,
        )

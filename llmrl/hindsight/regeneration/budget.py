"""What asking models may cost, and what it did cost: tokens, requests, and how long nobody was being asked.

A request is let through only if the most that it can take is left, so a budget is a promise: what is spent never exceeds it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmrl.errors import LlmrlError


class BudgetSpent(LlmrlError):
    """The next request might go over the budget."""


@dataclass
class Cost:
    """What one request took; whoever makes it fills this in.

    Attributes:
        prompt, completion: tokens.
    """

    prompt: int = 0
    completion: int = 0


@dataclass
class Meter:
    """Counts over all threads.

    Attributes:
        tokens, requests: most that may be spent; None is no limit.
        spent: tokens of this process.
        spent_before: those of kept answers that it used.
        asked, known: requests by role ("controller", "user", ...) that were made, and that an earlier answer served.
    """

    tokens: int | None = None
    requests: int | None = None
    spent: int = 0
    spent_before: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def __post_init__(self) -> None:
        self._lock = threading.Condition()
        self._stopped = False
        self._reserved, self._under_way = 0, 0
        self._first: float | None = None
        self._last = self._idle_since = self._idle = self._under_way_seconds = 0.0

    @contextmanager
    def request(self, role: str, most: int) -> Iterator[Cost]:
        """Let one request through; the block makes it, and fills in what it took.

        Args:
            role: to count by.
            most: tokens that it can take: prompt and longest answer.

        Where others under way might take what is left, it waits for them: most take less than they can.

        Raises:
            BudgetSpent: so much is not left.
        """
        cost = Cost()
        with self._lock:
            while self.tokens is not None and self._all() + self._reserved + most > self.tokens:
                if self._all() + most > self.tokens:
                    raise BudgetSpent(
                        f"the budget is spent: {self._all()} of {self.tokens} tokens, and the next request may take {most}"
                    )
                self._lock.wait()
            if self._stopped:
                raise BudgetSpent("the run is stopped")
            if self.requests is not None and sum((self.asked + self.known).values()) >= self.requests:
                raise BudgetSpent(f"the budget is spent: {self.requests} requests are made")
            begun = time.monotonic()
            self._reserved += most
            self.asked[role] += 1
            if self._first is None:
                self._first = begun
            elif not self._under_way:
                self._idle += begun - self._idle_since
            self._under_way += 1
        try:
            yield cost
        finally:
            with self._lock:
                now = time.monotonic()
                self._reserved -= most
                self.spent += cost.prompt + cost.completion
                self.prompt_tokens[role] += cost.prompt
                self.completion_tokens[role] += cost.completion
                self.seconds[role] += now - begun
                self._under_way_seconds += now - begun
                self._under_way -= 1
                self._last = self._idle_since = now
                self._lock.notify_all()

    @contextmanager
    def at_most(self, share: float) -> Iterator[None]:
        """Let the block spend no more than this share of the whole budget; what it leaves is there afterwards."""
        before = self.tokens, self.requests
        self.tokens, self.requests = (None if most is None else math.ceil(share * most) for most in before)
        try:
            yield
        finally:
            self.tokens, self.requests = before

    def _all(self) -> int:
        return self.spent + self.spent_before

    def stop(self) -> None:
        """Let no more requests through: those who play dialogues on end after the one that is under way."""
        with self._lock:
            self._stopped = True

    def remember(self, role: str, tokens: int = 0) -> None:
        """Count a question that an earlier answer served; the budget counts it too, for it was paid."""
        with self._lock:
            self.known[role] += 1
            self.spent_before += tokens

    def to_json(self) -> dict[str, Any]:
        """Return the counts; `idle_share` is the part of the time, from the first request to the last answer, without any."""
        time_span = self._last - self._first if self._first is not None else 0.0
        roles = sorted({*self.asked, *self.known})
        return {
            "tokens": self.spent,
            "tokens_of_kept_answers": self.spent_before,
            "requests": sum(self.asked.values()),
            "answers_known": sum(self.known.values()),
            "budget_tokens": self.tokens,
            "budget_requests": self.requests,
            "seconds": time_span,
            "idle_share": self._idle / time_span if time_span > 0 else None,
            "under_way_mean": self._under_way_seconds / time_span if time_span > 0 else None,
            "roles": {
                role: {
                    "requests": self.asked[role],
                    "known": self.known[role],
                    "prompt_tokens": self.prompt_tokens[role],
                    "completion_tokens": self.completion_tokens[role],
                    "seconds_each": self.seconds[role] / self.asked[role] if self.asked[role] else None,
                }
                for role in roles
            },
        }

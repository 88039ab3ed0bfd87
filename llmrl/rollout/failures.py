"""When failures of single rows end a run: the rule of `llmrl rollout` and of episodes."""

from __future__ import annotations

from collections.abc import Iterable

from llmrl.errors import EngineError

_ROWS = 3


class EngineDied(Exception):
    """The run's own engine failed while it sampled, and the request is not the cause; `error` is the engine's."""

    def __init__(self, error: EngineError) -> None:
        super().__init__(str(error))
        self.error = error


class FailureCount:
    """Counts rows that an engine did not answer, one after another.

    One such row may be at fault itself: it is recorded with its error and the others go on. Several different ones
    with no answered row in between are not: what they all ask is gone, and the rows left are better kept for later. A
    row that failed in an earlier run does not count, so each run gets past what stopped the one before.

    Args:
        before: Ids of rows that failed in an earlier run.
        limit: How many different rows end the run.
    """

    def __init__(self, before: Iterable[str] = (), *, limit: int = _ROWS) -> None:
        self._before = frozenset(before)
        self._limit = limit
        self._failed: set[str] = set()

    def add(self, row_id: str, error: BaseException | None) -> None:
        """Count what became of a row, after it was recorded; None is an answer, other errors than engines' say nothing.

        Raises:
            EngineError: It is not the rows.
        """
        if error is None:
            self._failed.clear()
        elif isinstance(error, EngineError) and row_id not in self._before:
            self._failed.add(row_id)
            if len(self._failed) >= self._limit:
                raise EngineError(f"{error} ({len(self._failed)} rows failed one after another)") from error

"""Searching with all queries of a hop at once: equal ones once, passages unseen so far, empty answers watched, time kept."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llmrl.leret.context import SearchState
from llmrl.leret.retriever import EmptyWatch, Hit, Retriever, retrieve


class Searcher:
    """A retriever as the hops use it.

    Args:
        retriever: what searches.
        k: passages a search.
        unseen_only: later hops return passages that the state has not seen, the next best in their place.

    Attributes:
        seconds: wall-clock time spent searching.
        searches: what was searched for; equal queries of one call count once.
    """

    def __init__(self, retriever: Retriever, k: int, *, unseen_only: bool = False) -> None:
        self.retriever, self.k, self.unseen_only = retriever, k, unseen_only
        self.watch = EmptyWatch()
        self.seconds, self.searches = 0.0, 0

    def search(self, wanted: Sequence[tuple[SearchState, str]]) -> list[list[Hit]]:
        """Return the hits of each (state, query); a blank query is no search and has none.

        Raises:
            RetrieverError: the retriever failed, or finds nothing for most queries.
        """
        begun = time.perf_counter()
        keys = [(query, state.seen if self.unseen_only else frozenset[str]()) for state, query in wanted]
        distinct = [key for key in dict.fromkeys(keys) if key[0].strip()]
        hits = retrieve(
            self.retriever,
            [query for query, _ in distinct],
            self.k,
            seen=[seen for _, seen in distinct],
            watch=self.watch,
        )
        found = dict(zip(distinct, hits, strict=True))
        self.searches += len(distinct)
        self.seconds += time.perf_counter() - begun
        return [found.get(key, []) for key in keys]

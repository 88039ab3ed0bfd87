"""Searching with all queries of a hop at once: equal ones once, passages unseen so far, empty answers watched, time kept.

Of several processes each searches for its share of the queries, and all have the answers: an index is asked no more often
than by one process. What a query finds does not depend on its batch, so the results are the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llmrl.leret.context import SearchState
from llmrl.leret.retriever import EmptyWatch, Hit, Retriever, retrieve


class Searcher:
    """A retriever as the hops use it. Every process of a run calls it, with the same queries.

    Args:
        retriever: what searches.
        k: passages a search.
        unseen_only: later hops return passages that the state has not seen, the next best in their place.

    Attributes:
        watch: stops a run whose searches mostly come back empty. A blank query where nothing was found before is such a
            search; where something was found it is the end of one, and does not count.
        seconds: wall-clock time spent searching.
        searches: what was searched for; equal queries of one call count once.
    """

    def __init__(self, retriever: Retriever, k: int, *, unseen_only: bool = False) -> None:
        self.retriever, self.k, self.unseen_only = retriever, k, unseen_only
        self.watch, self._watched = EmptyWatch(), True
        self.seconds, self.searches = 0.0, 0

    def search(self, wanted: Sequence[tuple[SearchState, str]]) -> list[list[Hit]]:
        """Return the hits of each (state, query); a blank query is no search and has none.

        Raises:
            RetrieverError: the retriever failed, or (NothingFoundError) finds nothing for most queries.
        """
        begun = time.perf_counter()
        keys = [(query, state.seen if self.unseen_only else frozenset[str]()) for state, query in wanted]
        distinct = [key for key in dict.fromkeys(keys) if key[0].strip()]
        found = dict(zip(distinct, self._shared(distinct), strict=True))
        results = [found.get(key, []) for key in keys]
        self.searches += len(distinct)
        self.seconds += time.perf_counter() - begun
        if self._watched:
            rows = zip(wanted, results, strict=True)
            counted = [(query, hits) for (state, query), hits in rows if query.strip() or not state.seen]
            self.watch.record(self.retriever.name, [query for query, _ in counted], [hits for _, hits in counted])
        return results

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Let searches within a `with` block come back empty: of a row that is measured, this is what is found out."""
        before, self._watched = self._watched, False
        try:
            yield
        finally:
            self._watched = before

    def _shared(self, wanted: Sequence[tuple[str, Collection[str]]]) -> list[list[Hit]]:
        """Search for every n-th of (query, seen ids), n being the number of processes; return the hits of all."""
        group = _process_group()
        rank, world = (group.get_rank(), group.get_world_size()) if group is not None else (0, 1)
        mine = wanted[rank::world]
        hits = retrieve(self.retriever, [query for query, _ in mine], self.k, seen=[seen for _, seen in mine])
        if group is None or world == 1:
            return hits
        shares: list[list[list[Hit]]] = [[] for _ in range(world)]
        group.all_gather_object(shares, hits)
        return [shares[i % world][i // world] for i in range(len(wanted))]


def _process_group() -> Any:
    """Return torch.distributed where processes have joined; torch is not loaded for it."""
    torch = sys.modules.get("torch")
    joined = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed if torch is not None and joined else None

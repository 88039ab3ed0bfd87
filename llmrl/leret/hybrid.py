"""Several retrievers as one, by reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009).

    score(d) = sum over retrievers that returned d of  1 / (c + rank of d),  c = 60, ranks from 1

Scores of different retrievers never meet, only ranks do.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmrl.errors import UsageError
from llmrl.leret.corpus import Corpus, fingerprint
from llmrl.leret.retriever import Hit, Retriever, check_query_batch

RANK_CONSTANT = 60


class HybridRetriever:
    """Reciprocal rank fusion.

    Args:
        retrievers: over one corpus; two or more.
        corpus: breaks ties; a passage that is not in it comes after those that are.
        depth: hits of each retriever that are fused, or k where k is more.
        rank_constant: how little the first ranks stand out.

    Raises:
        UsageError: fewer than two retrievers, or a depth or constant below 1.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        corpus: Corpus,
        *,
        depth: int = 100,
        rank_constant: int = RANK_CONSTANT,
    ) -> None:
        if len(retrievers) < 2:
            raise UsageError(f"a hybrid fuses two or more retrievers, got {len(retrievers)}")
        if depth < 1 or rank_constant < 1:
            raise UsageError(f"expected depth and rank_constant from 1, got {depth} and {rank_constant}")
        self._retrievers, self._positions = tuple(retrievers), corpus.positions
        self._depth, self._constant = depth, rank_constant
        self.name = "hybrid(" + "+".join(r.name for r in self._retrievers) + ")"
        settings = {"kind": "hybrid", "depth": depth, "rank_constant": rank_constant}
        self.fingerprint = fingerprint([settings, corpus.fingerprint, [r.fingerprint for r in self._retrievers]])

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the passages with the highest fused score; no hit where no retriever has one. See `Retriever`."""
        queries = check_query_batch(queries, k)
        found = [retriever.search(queries, max(self._depth, k)) for retriever in self._retrievers]
        return [self._fuse(lists, k) for lists in zip(*found, strict=True)]

    def _fuse(self, lists: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
        scores = fuse_ranks([[hit.id for hit in hits] for hits in lists], self._constant)
        known = {hit.id: hit for hits in lists for hit in hits}
        last = len(self._positions)
        order = sorted(scores, key=lambda name: (-scores[name], self._positions.get(name, last), name))
        return [Hit(name, known[name].title, known[name].text, scores[name]) for name in order[:k]]


def fuse_ranks(lists: Sequence[Sequence[str]], rank_constant: int = RANK_CONSTANT) -> dict[str, float]:
    """Return id -> fused score of ranked lists of ids, each without repeats."""
    scores: dict[str, float] = {}
    for ids in lists:
        for rank, name in enumerate(ids, start=1):
            scores[name] = scores.get(name, 0.0) + 1.0 / (rank_constant + rank)
    return scores

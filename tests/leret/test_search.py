"""All queries of a hop at once: equal ones once, blank ones not at all, unseen passages only, empty answers watched."""

import pytest
from explore_world import CORPUS, ChainRetriever

from llmrl.leret.bm25 import BM25Retriever
from llmrl.leret.context import SearchState, extend
from llmrl.leret.retriever import RetrieverError
from llmrl.leret.search import Searcher

START = SearchState("q5")


def ids(found):
    return [[hit.id for hit in hits] for hits in found]


def test_equal_queries_are_searched_for_once_and_blank_ones_never():
    retriever = ChainRetriever()
    searcher = Searcher(retriever, 2)
    other = SearchState("q6")
    found = searcher.search([(START, "alder dam"), (START, " "), (other, "alder dam"), (START, ""), (other, "freda")])
    assert ids(found) == [["d0", "d1"], [], ["d0", "d1"], [], ["d5", "p5"]]
    assert retriever.batches == [(["alder dam", "freda"], 2)]
    assert searcher.searches == 2
    assert searcher.search([]) == []


def test_unseen_only_puts_the_next_best_in_the_place_of_what_the_state_has_seen():
    seen = extend(START, "freda", ChainRetriever().search(["freda"], 2)[0])
    wanted = [(START, "freda born"), (seen, "freda born")]
    assert ids(Searcher(ChainRetriever(), 2).search(wanted)) == [["p5", "p0"], ["p5", "p0"]]
    assert ids(Searcher(ChainRetriever(), 2, unseen_only=True).search(wanted)) == [["p5", "p0"], ["p0", "p1"]]


@pytest.mark.parametrize("make", [ChainRetriever, lambda: BM25Retriever(CORPUS)])
def test_k_above_the_corpus_returns_what_there_is(make):
    for unseen_only in (False, True):
        (hits,) = Searcher(make(), 1000, unseen_only=unseen_only).search([(START, "dam")])
        assert len(hits) == 10


def test_a_retriever_that_mostly_finds_nothing_stops_the_run_with_the_count():
    searcher = Searcher(ChainRetriever(), 3)
    with pytest.raises(
        RetrieverError, match=r"80 of the last 100 searches with chain came back empty \(96 of 120 in all"
    ):
        searcher.search([(START, f"zzz {i}" if i % 5 else f"dam {i}") for i in range(120)])


def test_every_call_counts_and_not_every_query():
    """One query that finds nothing, written again and again, is most of a run."""
    searcher = Searcher(ChainRetriever(), 3)
    with pytest.raises(RetrieverError, match=r"60 of the last 100 searches with chain came back empty \(60 of 100"):
        searcher.search([(START, "zzz")] * 60 + [(START, f"dam {i}") for i in range(40)])
    assert searcher.searches == 41


def test_a_blank_query_counts_where_nothing_was_found_and_ends_a_search_where_something_was():
    found = extend(START, "freda", ChainRetriever().search(["freda"], 2)[0])
    searcher = Searcher(ChainRetriever(), 3)
    searcher.search([(found, "")] * 3 + [(START, "dam")])
    searcher.watch.finish()
    assert (searcher.watch.total, searcher.watch.blank_queries) == (1, 0)
    searcher.search([(START, " ")] * 2)
    with pytest.raises(RetrieverError, match=r"2 of the last 3 searches .* 2 of them with a blank query"):
        searcher.watch.finish()


def test_a_row_that_is_measured_may_find_nothing():
    searcher = Searcher(ChainRetriever(), 3)
    with searcher.unwatched():
        searcher.search([(START, "zzz")] * 200)
    assert searcher.watch.total == 0
    with pytest.raises(RetrieverError, match="100 of the last 100"):
        searcher.search([(START, "zzz")] * 100)


def test_half_a_surrogate_pair_is_searched_for_as_something_else():
    assert ids(Searcher(BM25Retriever(CORPUS), 1).search([(START, "foxglove \ud800")])) == [["d5"]]

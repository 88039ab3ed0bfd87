import threading

import pytest

from llmrl.errors import DataError, UsageError
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.retriever import EmptyWatch, Hit, RetrieverError, check_query_batch, open_retriever, retrieve

CORPUS = Corpus(tuple(Passage(name, name, f"text of {name}") for name in "abcdef"))


class Scripted:
    """Answers each query with the ids it spells; "!" raises."""

    name, fingerprint = "scripted", "sha256:0"

    def __init__(self):
        self.calls = []

    def search(self, queries, k):
        self.calls.append((list(queries), k))
        if any("!" in query for query in queries):
            raise ConnectionError("the index is gone\nand more")
        return [[Hit(c, c, "", 1.0 / (i + 1)) for i, c in enumerate(q[:k])] for q in queries]


def ids(results):
    return ["".join(hit.id for hit in hits) for hits in results]


def test_retrieve_cuts_at_k_and_drops_repeats():
    class Generous(Scripted):
        def search(self, queries, k):
            return super().search(queries, 100)

    assert ids(retrieve(Generous(), ["abcd", "", "aab"], 3)) == ["abc", "", "ab"]


def test_retrieve_fills_up_where_passages_were_seen():
    scripted = Scripted()
    found = retrieve(scripted, ["abcdef", "abcdef", "abc"], 2, seen=[{"a", "b"}, (), {"b", "z"}])
    assert ids(found) == ["cd", "ab", "ac"]
    # a query's depth is its own: k and what it has seen
    assert scripted.calls == [(["abcdef"], 2), (["abcdef", "abc"], 4)]
    with pytest.raises(UsageError, match=r"one set of seen ids a query \(2\), got 1"):
        retrieve(scripted, ["a", "b"], 2, seen=[()])


def test_retrieve_names_retriever_and_query_of_a_failure():
    with pytest.raises(RetrieverError) as error:
        retrieve(Scripted(), ["ab", "c!", "d"], 3)
    assert str(error.value) == "retriever scripted failed on the query 'c!': ConnectionError: the index is gone"


def test_retrieve_lets_refusals_through():
    class Refusing(Scripted):
        def search(self, queries, k):
            raise DataError("a refusal")

    with pytest.raises(DataError, match=r"^a refusal$"):
        retrieve(Refusing(), ["ab"], 3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([[]], "expected a list of hits for each of 2 queries (the first: 'ab'), got 1 lists"),
        (None, "got NoneType"),
        ([[], ["text"]], "query 'c': expected hits with a text as id and a number as score, got 'text'"),
        ([[], [Hit("a", "", "", float("nan"))]], "query 'c': expected hits"),
        ([[], [Hit(3, "", "", 1.0)]], "query 'c': expected hits"),
    ],
)
def test_retrieve_refuses_what_is_no_answer(answer, words):
    class Broken(Scripted):
        def search(self, queries, k):
            return answer

    with pytest.raises(RetrieverError) as error:
        retrieve(Broken(), ["ab", "c"], 3)
    assert words in str(error.value)
    assert "scripted" in str(error.value)


def test_check_query_batch_mends_half_a_surrogate_pair():
    assert check_query_batch(["caf\u00e9", "a\ud800b"], 1) == ["caf\u00e9", "a?b"]


# --- empty answers ----------------------------------------------------------------------------------------------------


def feed(watch, pattern):
    """One batch of one query a character: "." is empty."""
    for c in pattern:
        watch.record("r", [f"query {c}"], [[] if c == "." else [Hit(c, c, "", 1.0)]])


def test_empty_watch_stops_when_most_of_the_last_calls_are_empty():
    watch = EmptyWatch(share=0.5, calls=10)
    feed(watch, "." * 5 + "a" * 30 + "." * 5)
    with pytest.raises(RetrieverError) as error:
        feed(watch, ".")
    assert str(error.value).splitlines() == [
        "6 of the last 10 searches with r came back empty (11 of 41 in all, 0 of them with a blank query), such as "
        "'query .', 'query .', 'query .'",
        "check that the retriever holds the right passages and that the model writes queries",
    ]


def test_empty_watch_waits_for_enough_calls_and_finish_does_not():
    watch = EmptyWatch(share=0.5, calls=10)
    feed(watch, "....aa...")
    with pytest.raises(RetrieverError, match="7 of the last 9 searches"):
        watch.finish()
    watch = EmptyWatch(share=0.5, calls=10)
    watch.finish()
    feed(watch, "..aa")
    watch.finish()
    assert (watch.total, watch.empty) == (4, 2)


def test_empty_watch_counts_every_call_and_blank_queries():
    watch, queries = EmptyWatch(share=0.9, calls=6), ["ab", "", " ", ""]
    watch.record("r", queries, retrieve(Scripted(), queries, 3))
    assert (watch.total, watch.empty, watch.blank_queries) == (4, 2, 2)  # a blank is a letter here


def test_empty_watch_counts_from_threads():
    watch = EmptyWatch(share=1.0, calls=50)
    threads = [threading.Thread(target=feed, args=(watch, "a." * 500)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert (watch.total, watch.empty) == (4000, 2000)


@pytest.mark.parametrize("options", [{"share": 1.1}, {"calls": 0}])
def test_empty_watch_refuses(options):
    with pytest.raises(UsageError, match="expected a share"):
        EmptyWatch(**options)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_open_retriever_by_kind(tmp_path):
    plain = open_retriever("bm25", CORPUS, bm25={"k1": 0.9})
    cached = open_retriever("bm25", CORPUS, bm25={"k1": 0.9}, cache=tmp_path / "cache.sqlite")
    fused = open_retriever("hybrid", CORPUS, hybrid_of=("bm25", "bm25"), depth=10)
    http = open_retriever("http", CORPUS, http={"url": "http://127.0.0.1:1", "name": "colbert"})
    assert [r.name for r in (plain, cached, fused, http)] == ["bm25", "bm25", "hybrid(bm25+bm25)", "colbert"]
    assert plain.fingerprint == cached.fingerprint
    assert plain.search(["text c"], 3) == cached.search(["text c"], 3) == cached.search(["text c"], 3)
    assert [hit.id for hit in fused.search(["c"], 3)[0]] == ["c"]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("bm52", {}, "unknown retriever 'bm52'; did you mean 'bm25'?"),
        ("dense", {}, "a dense retriever needs an encoder"),
        ("http", {}, "needs the URL"),
        ("hybrid", {"hybrid_of": ("bm25", "hybrid")}, "a hybrid cannot be made of 'hybrid'"),
        ("hybrid", {"hybrid_of": ("bm25",)}, "fuses two or more retrievers, got 1"),
        ("dense", {"dense": {"encoder": "./nowhere"}}, "not found: ./nowhere (encoder)"),
    ],
)
def test_open_retriever_refuses(kind, options, words):
    with pytest.raises(UsageError) as error:
        open_retriever(kind, CORPUS, **options)
    assert words in str(error.value)

import json
import multiprocessing
import os
import sqlite3
import threading

import pytest

from llmrl.errors import DataError, OutputError
from llmrl.leret.bm25 import BM25Retriever
from llmrl.leret.cache import CachedRetriever
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.retriever import Hit, RetrieverError

CORPUS = Corpus(tuple(Passage(name, f"title {name}", f"text {name}") for name in "abcdef"))


class Counting:
    """BM25 that remembers what it was asked."""

    def __init__(self, fingerprint=None):
        self._bm25 = BM25Retriever(CORPUS)
        self.name, self.fingerprint, self.asked = "counting", fingerprint or self._bm25.fingerprint, []

    def search(self, queries, k):
        self.asked.append((list(queries), k))
        return self._bm25.search(queries, k)


def contents(path):
    with sqlite3.connect(path) as database:
        return database.execute("SELECT fingerprint, k, query, hits FROM answers ORDER BY query, k").fetchall()


def test_answers_are_those_of_the_retriever_and_asked_once(tmp_path):
    path = tmp_path / "folder" / "cache.sqlite"
    inner = Counting()
    queries = ["title a", "", "text e", "title a", "zebra"]
    wanted = BM25Retriever(CORPUS).search(queries, 3)
    cached = CachedRetriever(inner, path, CORPUS)
    assert cached.search(queries, 3) == wanted
    assert inner.asked == [(["title a", "", "text e", "zebra"], 3)]
    assert (cached.hits, cached.misses) == (1, 4)
    assert cached.search(queries, 3) == wanted
    assert inner.asked[1:] == [(["", "zebra"], 3)]  # an empty answer is asked for again
    assert (cached.hits, cached.misses) == (4, 6)
    cached.close()
    again = CachedRetriever(Counting(), path, CORPUS)  # another process, later
    assert again.search(queries, 3) == wanted
    assert (again.hits, again.misses) == (3, 2)
    assert (again.name, again.fingerprint) == ("counting", inner.fingerprint)


def test_the_key_is_fingerprint_k_and_query(tmp_path):
    first, second = Counting(), Counting("sha256:other")
    one, two = (CachedRetriever(inner, tmp_path / "c", CORPUS) for inner in (first, second))
    for turn, (query, k) in enumerate((("title a", 3), ("title a", 2), ("Title a", 3), ("title a ", 3))):
        for cached in (one, two) if turn % 2 else (two, one):
            cached.search([query], k)
    assert len(first.asked) == len(second.asked) == 4
    one.search(["title a", "title f"], 3)
    assert first.asked[4:] == [(["title f"], 3)]


def test_results_of_one_call_are_no_shared_lists(tmp_path):
    cached = CachedRetriever(Counting(), tmp_path / "c", CORPUS)
    first, second = cached.search(["title a", "title a"], 3)
    first.clear()
    assert second == cached.search(["title a"], 3)[0] != []


def test_entries_are_ids_and_scores(tmp_path):
    inner = Counting()
    CachedRetriever(inner, tmp_path / "c", CORPUS).search(["text c"], 2)
    score = inner.search(["text c"], 1)[0][0].score
    ((fingerprint, k, query, hits),) = contents(tmp_path / "c")
    assert (fingerprint, k, query) == (inner.fingerprint, 2, b"text c")
    assert json.loads(hits)[0] == ["c", score]
    assert len(json.loads(hits)) == 2


def test_hits_outside_the_corpus_keep_their_text(tmp_path):
    class Remote(Counting):
        def search(self, queries, k):
            hits = [
                Hit("z", "title z", "é\n", 1 / 3),
                Hit("a", "title a", "another text", 0.1),
                Hit("b", "title b", "text b", 0),
            ]
            return [hits[:k] for _ in queries]

    wanted = Remote().search(["q"], 3)
    assert CachedRetriever(Remote(), tmp_path / "c", CORPUS).search(["q"], 3) == wanted
    assert CachedRetriever(Counting(), tmp_path / "c", CORPUS).search(["q"], 3) == wanted
    assert [len(row) for row in json.loads(contents(tmp_path / "c")[0][3])] == [4, 4, 2]


def test_many_queries_and_odd_ones(tmp_path):
    inner = Counting()
    cached = CachedRetriever(inner, tmp_path / "c", CORPUS)
    queries = [f"title {i}" for i in range(1203)] + ["\ud800 title", "'; DROP TABLE text; --", "text\x00b"]
    first = cached.search(queries, 3)
    assert all(first)
    assert cached.search(queries, 3) == first
    assert [len(asked) for asked, _ in inner.asked] == [256, 256, 256, 256, 182]


def test_what_a_server_found_before_it_died_is_kept(tmp_path):
    class Dying(Counting):
        def search(self, queries, k):
            if len(self.asked) == 2:
                raise RetrieverError("gone")
            return super().search(queries, k)

    queries = [f"title {i}" for i in range(700)]
    with pytest.raises(RetrieverError, match="gone"):
        CachedRetriever(Dying(), tmp_path / "c", CORPUS).search(queries, 3)
    assert len(contents(tmp_path / "c")) == 512
    again = Counting()
    CachedRetriever(again, tmp_path / "c", CORPUS).search(queries, 3)
    assert [len(asked) for asked, _ in again.asked] == [188]


def test_a_retriever_that_fails_leaves_nothing(tmp_path):
    class Failing(Counting):
        def search(self, queries, k):
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        CachedRetriever(Failing(), tmp_path / "c", CORPUS).search(["a"], 3)

    class Short(Counting):
        def search(self, queries, k):
            return []

    with pytest.raises(RetrieverError, match="for each of 1 queries"):
        CachedRetriever(Short(), tmp_path / "c", CORPUS).search(["a"], 3)
    assert contents(tmp_path / "c") == []


def test_threads_share_one(tmp_path):
    cached = CachedRetriever(Counting(), tmp_path / "c", CORPUS)
    queries = [f"title {c} text" for c in "abcdef"] * 20
    wanted = BM25Retriever(CORPUS).search(queries, 3)
    wrong = []

    def run():
        for query, hits in zip(queries, wanted, strict=True):
            if cached.search([query], 3) != [hits]:
                wrong.append(query)

    threads = [threading.Thread(target=run) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []
    assert cached.hits + cached.misses == 4 * len(queries)
    assert len(contents(tmp_path / "c")) == 6


def fill(path, start, out):
    try:
        start.wait(30)
        cached = CachedRetriever(Counting(), path, CORPUS)
        found = [cached.search([f"title {c} {i}" for c in "abc"], 3) for i in range(30)]
        wanted = [BM25Retriever(CORPUS).search([f"title {c} {i}" for c in "abc"], 3) for i in range(30)]
        out.put("same" if found == wanted else "differs")
    except BaseException as error:
        out.put(repr(error))


def test_processes_share_one_from_its_first_moment(tmp_path):
    context = multiprocessing.get_context("fork")
    start, out = context.Event(), context.Queue()
    children = [context.Process(target=fill, args=(tmp_path / "c", start, out)) for _ in range(4)]
    [child.start() for child in children]
    start.set()
    assert [out.get(timeout=60) for _ in children] == ["same"] * 4
    [child.join() for child in children]
    assert len(contents(tmp_path / "c")) == 90


def test_a_fork_opens_its_own_connection(tmp_path):
    cached = CachedRetriever(Counting(), tmp_path / "c", CORPUS)
    wanted = cached.search(["title a"], 3)
    before = cached._connection
    context = multiprocessing.get_context("fork")
    out = context.Queue()

    def child():
        out.put((cached.search(["title a"], 3) == wanted, cached._connection is not before, os.getpid()))

    process = context.Process(target=child)
    process.start()
    same, own, _ = out.get(timeout=60)
    process.join()
    assert same
    assert own
    assert cached.search(["title a", "title b"], 3)[0] == wanted[0]


# --- what is no cache -------------------------------------------------------------------------------------------------


def opened(path):
    return CachedRetriever(Counting(), path, CORPUS)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "c").write_text("a note of somebody " * 100)
    with pytest.raises(DataError, match="is not a usable retrieval cache: file is not a database; delete it"):
        opened(tmp_path / "c")
    assert (tmp_path / "c").read_text().startswith("a note")


def test_a_foreign_database_is_refused_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "c") as database:
        database.execute("CREATE TABLE answers (fingerprint, k, query, hits)")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(DataError, match="a database of something else; delete it or name another file"):
        opened(tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == before


def test_another_version_is_refused(tmp_path):
    opened(tmp_path / "c").close()
    with sqlite3.connect(tmp_path / "c") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(DataError, match="its version is 99, this llmrl writes 1"):
        opened(tmp_path / "c")


def test_a_damaged_file_is_refused(tmp_path):
    cached = opened(tmp_path / "c")
    cached.search([f"title {i}" for i in range(2000)], 3)
    cached.close()
    data = bytearray((tmp_path / "c").read_bytes())
    data[4096:] = b"\x55" * (len(data) - 4096)
    (tmp_path / "c").write_bytes(data)
    with pytest.raises(DataError, match=r"is not a usable retrieval cache: .*malformed"):
        opened(tmp_path / "c").search(["title 3"], 3)


@pytest.mark.parametrize("hits", ["[[", "[3]", '[["a"]]', '[["unheard", 1.0]]', '[["a", "x"]]'])
def test_a_damaged_entry_is_refused(tmp_path, hits):
    cached = opened(tmp_path / "c")
    cached.search(["title a"], 3)
    with sqlite3.connect(tmp_path / "c") as database:
        database.execute("UPDATE answers SET hits = ?", (hits,))
    with pytest.raises(DataError, match="an entry that cannot be read"):
        cached.search(["title a"], 3)
    cached.search(["title b"], 3)  # the lock was given back


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path):
    with pytest.raises(OutputError, match="unable to open database file; name another file"):
        opened(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the folder of the retrieval cache"):
        opened(tmp_path / "file" / "c")


def test_a_server_that_was_mended_is_asked_again(tmp_path):
    inner = Counting()
    broken = CachedRetriever(inner, tmp_path / "c", CORPUS)
    inner.search = lambda queries, k: [[] for _ in queries]
    assert broken.search(["title a"], 3) == [[]]
    assert CachedRetriever(Counting(), tmp_path / "c", CORPUS).search(["title a"], 3)[0][0].id == "a"

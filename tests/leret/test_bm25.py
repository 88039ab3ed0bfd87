import builtins
import math
import random
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest

from llmrl.errors import DataError, UsageError, VersionError
from llmrl.leret.bm25 import BM25Retriever, best_positions
from llmrl.leret.corpus import Corpus, Passage

CORPUS = Corpus(
    (
        Passage("fox", "Red fox", "The fox runs."),
        Passage("whale", "Blue whale", "A whale swims in the sea"),
        Passage("sea", "Sea", "The sea and the sea bird"),
        Passage("bird", "Bird song", "Birds' song"),
        Passage("stone", "Stone", "It is a stone"),
    )
)
# stemmed and stopped by hand
TERMS = {
    "fox": ["red", "fox", "fox", "run"],
    "whale": ["blue", "whale", "whale", "swim", "sea"],
    "sea": ["sea", "sea", "sea", "bird"],
    "bird": ["bird", "song", "bird", "song"],
    "stone": ["stone", "stone"],
}


@pytest.fixture(scope="module")
def bm25():
    return BM25Retriever(CORPUS)


def expected(query_terms, k1=1.5, b=0.75):
    """Okapi BM25 as the textbook writes it, with Lucene's idf."""
    average = sum(map(len, TERMS.values())) / len(TERMS)
    scores = {}
    for name, terms in TERMS.items():
        for term in set(query_terms):
            df = sum(term in other for other in TERMS.values())
            idf = math.log(1 + (len(TERMS) - df + 0.5) / (df + 0.5))
            tf = terms.count(term)
            scores[name] = scores.get(name, 0) + idf * tf / (tf + k1 * (1 - b + b * len(terms) / average))
    return {name: score for name, score in scores.items() if score > 0}


@pytest.mark.parametrize(
    ("query", "terms"),
    [
        ("sea birds", ["sea", "bird"]),
        ("Whales swimming in the sea", ["whale", "swim", "sea"]),
        ("the SEA's fox?", ["sea", "fox"]),
        ("running stones, unheard words", ["run", "stone"]),
        ("blue song", ["blue", "song"]),
    ],
)
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_scores_are_those_of_the_formula(query, terms, k1, b):
    hits = BM25Retriever(CORPUS, k1=k1, b=b).search([query], 5)[0]
    wanted = expected(terms, k1, b)
    assert {hit.id: hit.score for hit in hits} == pytest.approx(wanted, rel=1e-5)
    assert [hit.id for hit in hits] == sorted(wanted, key=lambda name: -wanted[name])


def test_one_score_by_hand(bm25):
    # "sea": df 2, idf log 2.4; length 4 of 3.8 on average: 1.5 (.25 + .75 * 4 / 3.8) = 1.55921
    hit = bm25.search(["sea birds"], 1)[0][0]
    assert (hit.id, hit.title, hit.text) == ("sea", "Sea", "The sea and the sea bird")
    assert hit.score == pytest.approx(0.875469 * (3 / 4.55921 + 1 / 2.55921), rel=1e-5)


def test_repeated_terms_count_once_and_their_order_does_not_matter(bm25):
    once, often, turned = bm25.search(["sea bird blue", "sea seas sea bird bird blue", "blue bird sea"], 5)
    assert once == often == turned


@pytest.mark.parametrize("query", ["", "   \n", "the of and", "zebra quark", "?!", "🙂", "\ud800", "_"])
def test_nothing_in_common_is_no_hit(bm25, query):
    assert bm25.search([query], 3) == [[]]


def test_passages_without_a_common_term_are_never_returned(bm25):
    assert [hit.id for hit in bm25.search(["stone"], 5)[0]] == ["stone"]


def test_k_above_the_corpus_returns_all_that_match(bm25):
    assert {hit.id for hit in bm25.search(["fox whale sea bird stone"], 50)[0]} == set(TERMS)
    assert [len(hits) for hits in bm25.search(["fox whale sea", "", "bird"], 2)] == [2, 0, 2]
    assert bm25.search([], 3) == []


@pytest.mark.parametrize(("queries", "k"), [("sea", 3), ([3], 3), ([None], 3), (["sea"], 0), (["sea"], True)])
def test_search_refuses_what_is_no_batch(bm25, queries, k):
    with pytest.raises(UsageError, match="expected"):
        bm25.search(queries, k)


def test_ties_are_in_order_of_the_corpus():
    texts = [Passage(f"p{i}", "", "same words") for i in range(50)] + [Passage("best", "same", "same same words")]
    found = BM25Retriever(Corpus(tuple(texts))).search(["same"], 7)[0]
    assert [hit.id for hit in found] == ["best", "p0", "p1", "p2", "p3", "p4", "p5"]


def test_best_positions_equals_a_full_sort():
    generator = np.random.default_rng(0)
    for size in (1, 2, 63, 100):
        scores = generator.integers(-1, 4, size).astype(np.float32)
        for k in (1, 2, size, size + 5):
            wanted = sorted((i for i in range(size) if scores[i] > 0), key=lambda i: (-scores[i], i))[:k]
            assert best_positions(scores, k) == wanted


def test_search_from_threads_equals_search_alone():
    words = [f"w{i}ing" for i in range(300)]
    draw = random.Random(0)
    corpus = Corpus(tuple(Passage(f"p{i}", "", " ".join(draw.choices(words, k=20))) for i in range(200)))
    queries = [" ".join(draw.choices([*words, "w7ed", "w8s", "unknowns"], k=5)) for _ in range(200)]
    retriever = BM25Retriever(corpus)
    alone = retriever.search(queries, 3)
    wrong = []

    def run():
        wrong.extend(i for i, query in enumerate(queries) if retriever.search([query], 3)[0] != alone[i])

    threads = [threading.Thread(target=run) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert wrong == []


def test_words_are_compared_without_case_form_and_markup():
    corpus = Corpus(
        (
            Passage("a", "&quot;J&quot; Is for Judgment", "Café in ＡＢＣ"),
            Passage("b", "Grafton\u2019s", "C. Lewis 1955"),
        )
    )
    retriever = BM25Retriever(corpus)
    found = retriever.search(["j", "cafe\u0301", "abc", "quot", "grafton", "GRAFTON's", "1955", "s"], 2)
    assert [[hit.id for hit in hits] for hits in found] == [["a"], ["a"], ["a"], [], ["b"], ["b"], ["b"], []]


def test_fingerprint_names_corpus_and_settings(bm25):
    other = Corpus((*CORPUS.passages[:4], Passage("stone", "Stone", "It is the stone")))
    prints = [bm25.fingerprint, *(BM25Retriever(c, k1=k).fingerprint for c, k in ((CORPUS, 0.9), (other, 1.5)))]
    assert len(set(prints)) == 3
    assert BM25Retriever(CORPUS).fingerprint == bm25.fingerprint


def test_refusals(monkeypatch):
    with pytest.raises(UsageError, match=r"k1 above 0 and b in \[0, 1\], got k1=0, b=0.75"):
        BM25Retriever(CORPUS, k1=0)
    with pytest.raises(DataError, match="none of 1 passages has a word to index"):
        BM25Retriever(Corpus((Passage("a", "The", "of and"),)))
    real = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name == "bm25s":
            raise ModuleNotFoundError("No module named 'bm25s'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = " ".join(f"'{requirement}'" for requirement in project["optional-dependencies"]["leret"])
    with pytest.raises(VersionError) as error:
        BM25Retriever(CORPUS)
    assert str(error.value).endswith(f"pip install {wanted}")

import pytest

from llmrl.errors import UsageError
from llmrl.leret.bm25 import BM25Retriever
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.hybrid import HybridRetriever, fuse_ranks
from llmrl.leret.retriever import Hit

CORPUS = Corpus(tuple(Passage(name, f"title {name}", f"text of {name}") for name in "abcdef"))


class Fixed:
    """Returns the same ranking for every query but a blank one."""

    def __init__(self, ranking, name="fixed"):
        self.name, self.fingerprint, self.ranking, self.asked = name, f"sha256:{ranking}", ranking, []

    def search(self, queries, k):
        self.asked.append(k)
        return [
            [Hit(c, f"title {c}", f"text of {c}", 9.0 - i) for i, c in enumerate(self.ranking[:k])] if q.strip() else []
            for q in queries
        ]


def test_scores_are_sums_of_reciprocal_ranks():
    hybrid = HybridRetriever([Fixed("abc"), Fixed("cda")], CORPUS)
    found = hybrid.search(["q"], 3)[0]
    # a: 1/61 + 1/63, c: 1/63 + 1/61, d: 1/62, b: 1/62; ties in order of the corpus
    assert [hit.id for hit in found] == ["a", "c", "b"]
    assert [hit.score for hit in found] == pytest.approx([124 / 3843, 124 / 3843, 1 / 62], abs=1e-12)
    assert found[0] == Hit("a", "title a", "text of a", found[0].score)


def test_one_retriever_with_no_hit_leaves_the_other_order():
    hybrid = HybridRetriever([Fixed(""), Fixed("fab")], CORPUS)
    assert [[hit.id for hit in hits] for hits in hybrid.search(["q", " "], 10)] == [["f", "a", "b"], []]


def test_depth_bounds_what_is_fused():
    first, second = Fixed("abcdef"), Fixed("fedcba")
    ids = [[h.id for h in HybridRetriever([first, second], CORPUS, depth=d).search(["q"], 2)[0]] for d in (1, 2)]
    assert ids == [["a", "f"], ["a", "f"]]
    assert first.asked == [2, 2]  # never fewer than k
    HybridRetriever([first, second], CORPUS, depth=5).search(["q"], 2)
    assert first.asked == [2, 2, 5]


def test_depth_changes_the_ranking():
    first, second = Fixed("abc"), Fixed("dec")
    shallow = HybridRetriever([first, second], CORPUS, depth=1).search(["q"], 1)
    deep = HybridRetriever([first, second], CORPUS, depth=3).search(["q"], 1)
    assert [shallow[0][0].id, deep[0][0].id] == ["a", "c"]  # 2/63 is more than 1/61


def test_ties_are_in_order_of_the_corpus():
    turned = Corpus(CORPUS.passages[::-1])
    hybrid = HybridRetriever([Fixed("ab"), Fixed("ba")], turned)
    assert [hit.id for hit in hybrid.search(["q"], 2)[0]] == ["b", "a"]


def test_ties_of_passages_outside_the_corpus_come_last():
    hybrid = HybridRetriever([Fixed("zb"), Fixed("ay")], CORPUS)
    assert [hit.id for hit in hybrid.search(["q"], 4)[0]] == ["a", "z", "b", "y"]


def test_fuse_ranks_with_another_constant():
    assert fuse_ranks([["x", "y"], ["y"]], 1) == pytest.approx({"x": 1 / 2, "y": 1 / 3 + 1 / 2})
    assert fuse_ranks([]) == {}


def test_fingerprint_covers_parts_depth_and_corpus():
    parts = [Fixed("ab"), Fixed("cd")]
    other = Corpus(CORPUS.passages[:5])
    prints = [
        HybridRetriever(parts, CORPUS).fingerprint,
        HybridRetriever(parts[::-1], CORPUS).fingerprint,
        HybridRetriever(parts, CORPUS, depth=7).fingerprint,
        HybridRetriever(parts, CORPUS, rank_constant=7).fingerprint,
        HybridRetriever(parts, other).fingerprint,
    ]
    assert len(set(prints)) == 5
    assert HybridRetriever(parts, CORPUS).fingerprint == prints[0]


def test_over_a_real_index_no_hit_stays_no_hit():
    bm25 = BM25Retriever(CORPUS)
    hybrid = HybridRetriever([bm25, bm25], CORPUS)
    assert hybrid.search(["unheard", ""], 3) == [[], []]
    assert [h.id for h in hybrid.search(["text c"], 99)[0]] == [h.id for h in bm25.search(["text c"], 99)[0]]


@pytest.mark.parametrize("options", [{"depth": 0}, {"rank_constant": 0}])
def test_refusals(options):
    with pytest.raises(UsageError, match="from 1"):
        HybridRetriever([Fixed("a"), Fixed("b")], CORPUS, **options)
    with pytest.raises(UsageError, match="two or more"):
        HybridRetriever([Fixed("a")], CORPUS)

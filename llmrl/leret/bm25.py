"""BM25 in process: bm25s's index over stemmed words of title and text, with exact ties and an explicit "no hit".

    score(q, d) = sum over distinct terms t of q of  log(1 + (N - df + 1/2) / (df + 1/2)) * tf / (tf + k1 (1 - b + b |d| / avg))

which is Lucene's form (Kamphuis et al., ECIR 2020). Two things of bm25s are not used: its top k, which gives arbitrary
passages with score 0 where nothing matches, raises above the corpus' size and breaks ties at random; and its tokenizer.
Nothing leaves the process.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmrl.errors import DataError, UsageError, VersionError
from llmrl.leret.corpus import Corpus, fingerprint
from llmrl.leret.retriever import Hit, check_query_batch

# Lucene's English list
STOP_WORDS = frozenset(
    ("a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of", "on",
     "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with")
)  # fmt: skip
_POSSESSIVE = re.compile(r"['\u2019]s\b")
_WORD = re.compile(r"[^\W_]+")


class BM25Retriever:
    """BM25 over title + text. Title words count like words of the text.

    Args:
        corpus: the passages.
        k1: how slowly repeated terms saturate, above 0.
        b: how far a passage's length counts, in [0, 1].

    Raises:
        UsageError: k1 or b out of range.
        DataError: the corpus has no word that is indexed.
        VersionError: bm25s or PyStemmer is not installed.
    """

    name = "bm25"

    def __init__(self, corpus: Corpus, *, k1: float = 1.5, b: float = 0.75) -> None:
        if not (k1 > 0 and 0 <= b <= 1):
            raise UsageError(f"expected k1 above 0 and b in [0, 1], got k1={k1}, b={b}")
        bm25s, stemmer = _packages()
        self._corpus, self._stemmer, self._lock = corpus, stemmer.Stemmer("english"), threading.Lock()
        stems: dict[str, str] = {}
        terms: dict[str, int] = {}
        documents = [self._index_terms(passage.both, stems, terms) for passage in corpus.passages]
        if not terms:
            raise DataError(
                f"none of {len(corpus)} passages has a word to index: expected words that are not stop words"
            )
        self._terms = terms
        # of the words in the corpus; a query's other words are stemmed when they come
        self._known = {word: terms[stem] for word, stem in stems.items()}
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        self._index.index((documents, dict(terms)), create_empty_token=False, show_progress=False)
        self.fingerprint = fingerprint([{"kind": "bm25", "k1": k1, "b": b}, corpus.fingerprint, list(terms), documents])

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        """Return the best passages that share a term with the query; see `Retriever`."""
        return [self._best(query, k) for query in check_query_batch(queries, k)]

    def query_terms(self, query: str) -> list[int]:
        """Return the distinct terms of a query that occur in the corpus, in the order of the index."""
        words = _words(query)
        found = {self._known[word] for word in words if word in self._known}
        others = [word for word in words if word not in self._known and word not in STOP_WORDS]
        if others:
            with self._lock:  # a stemmer has state
                stems = self._stemmer.stemWords(others)
            found.update(self._terms[stem] for stem in stems if stem in self._terms)
        return sorted(found)  # sums of floats depend on their order: the same terms give the same score

    def _best(self, query: str, k: int) -> list[Hit]:
        terms = self.query_terms(query)
        if not terms:
            return []
        scores = self._index.get_scores_from_ids(terms)
        hits = []
        for i in best_positions(scores, k):
            passage = self._corpus.passages[i]
            hits.append(Hit(passage.id, passage.title, passage.text, float(scores[i])))
        return hits

    def _index_terms(self, text: str, stems: dict[str, str], terms: dict[str, int]) -> list[int]:
        found = []
        for word in _words(text):
            if word not in STOP_WORDS:
                stem = stems.get(word)
                if stem is None:
                    stem = stems[word] = self._stemmer.stemWord(word)
                found.append(terms.setdefault(stem, len(terms)))
        return found


def best_positions(scores: np.ndarray, k: int) -> list[int]:
    """Return the positions of the k highest scores above 0, best first, ties in order of position.

    Args:
        scores: `[N]`.
        k: may exceed N.
    """
    candidates = np.flatnonzero(scores > 0)
    if len(candidates) > k:
        values = scores[candidates]
        lowest = np.partition(values, len(values) - k)[len(values) - k]
        candidates = candidates[values >= lowest]  # all that tie with the k-th
    order = np.argsort(-scores[candidates], kind="stable")[:k]
    return [int(i) for i in candidates[order]]


def _words(text: str) -> list[str]:
    return _WORD.findall(_POSSESSIVE.sub("", unicodedata.normalize("NFKC", text).lower()))


def _packages() -> tuple[Any, Any]:
    try:
        import bm25s
        import Stemmer
    except ImportError as error:
        raise VersionError(
            f"the BM25 retriever needs bm25s and PyStemmer ({error}): pip install 'bm25s>=0.3.16,<0.4' 'PyStemmer>=3,<4'"
        ) from error
    return bm25s, Stemmer

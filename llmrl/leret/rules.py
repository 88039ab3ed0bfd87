"""Queries written by rules: policies without a model, the baseline to beat, and what a small policy is taught first.

A rule reads the question and the passages found so far, in the order of the prompt, and copies words. It sees of a passage
what the prompt shows: the title and the first `shown_words` words. The parts that rules are made of:

    question    every word of the question
    content     its words without function words
    rest        its content words that are in no title of a passage: what is still to be found
    names       capitalised words of a passage that stand nowhere before it and not in its title, each once: where to go on

Words are runs of letters and digits; two are the same if they differ in case alone. Order, punctuation and repeated words
mean nothing to BM25. A rule whose parts are all empty copies the content words, or else the whole question.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Protocol

SHOWN_WORDS = 40
_POSSESSIVE = re.compile(r"['\u2019]s\b")
_WORD = re.compile(r"[^\W_]+")

_FUNCTION_WORDS = (
    "a about after all also am an and another any are as at be been before being both but by can could d did do does during "
    "each either for from had has have having he her his how i if in into is it its ll m me more most my no nor not of on one "
    "or other our out over re s same she should so some such t than that the their them then there these they this those to "
    "two under until up us ve was we were what when where whether which while who whom whose why will with would you your"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


class Shown(Protocol):
    """What a rule reads of a passage."""

    @property
    def title(self) -> str:
        """Its title."""

    @property
    def text(self) -> str:
        """Its text."""


Rule = Callable[[str, Sequence[Shown]], str]


def words(text: str) -> list[str]:
    """Return the runs of letters and digits of `text`; HTML entities are resolved, possessive endings dropped."""
    return _WORD.findall(_POSSESSIVE.sub("", unicodedata.normalize("NFKC", html.unescape(text))))


def content(question: str) -> list[str]:
    """Return the words of the question without function words."""
    return [word for word in words(question) if word.casefold() not in FUNCTION_WORDS]


def rest(question: str, passages: Sequence[Shown]) -> list[str]:
    """Return the content words of the question that no passage has in its title."""
    covered = _keys(word for passage in passages for word in words(passage.title))
    return [word for word in content(question) if word.casefold() not in covered]


def capitalised(question: str) -> list[str]:
    """Return the content words of the question that begin with a capital letter."""
    return [word for word in content(question) if word[0].isupper()]


def names(question: str, passages: Sequence[Shown], index: int, shown_words: int = SHOWN_WORDS) -> list[str]:
    """Return the capitalised words of one passage that are not in the question, an earlier passage or its title, each once."""
    shown = [words(" ".join(passage.text.split()[:shown_words])) for passage in passages[: index + 1]]
    titles = [word for passage in passages[: index + 1] for word in words(passage.title)]
    seen = _keys([*words(question), *titles, *chain.from_iterable(shown[:-1])]) | FUNCTION_WORDS
    found: dict[str, str] = {}
    for word in shown[-1]:
        if word[0].isupper() and word.casefold() not in seen:
            found.setdefault(word.casefold(), word)
    return list(found.values())


def best_title(question: str, passages: Sequence[Shown]) -> int | None:
    """Return the index of the passage with the greatest share of its title in the question; the first of equals."""
    asked = _keys(content(question))

    def share(index: int) -> float:
        title = _keys(words(passages[index].title)) - FUNCTION_WORDS
        return len(title & asked) / max(1, len(title))

    return max(range(len(passages)), key=share, default=None)


def _keys(found: Iterable[str]) -> frozenset[str]:
    return frozenset(word.casefold() for word in found)


def _names_of(question: str, passages: Sequence[Shown], index: int | None) -> list[str]:
    return names(question, passages, index) if index is not None and index < len(passages) else []


def _rule(*parts: Callable[[str, Sequence[Shown]], list[str]]) -> Rule:
    def write(question: str, passages: Sequence[Shown]) -> str:
        query = [word for part in parts for word in part(question, passages)]
        return " ".join(query or content(question) or words(question) or [question])

    return write


RULES: dict[str, Rule] = {
    "question": _rule(lambda q, p: words(q)),
    "content": _rule(lambda q, p: content(q)),
    "capitals": _rule(lambda q, p: capitalised(q)),
    "rest": _rule(rest),
    "names-1": _rule(lambda q, p: _names_of(q, p, 0)),
    "question+names-1": _rule(lambda q, p: words(q), lambda q, p: _names_of(q, p, 0)),
    "rest+names-1": _rule(rest, lambda q, p: _names_of(q, p, 0)),
    "rest+names-2": _rule(rest, lambda q, p: _names_of(q, p, 1)),
    "rest+names-best": _rule(rest, lambda q, p: _names_of(q, p, best_title(q, p))),
}

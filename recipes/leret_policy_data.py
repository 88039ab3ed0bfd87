"""Search states and queries of recipes/leret_policy.py: what the small policy reads, and what each instruction asks for.

A state is a question and what one BM25 search brought. Three kinds, all from training questions and passages:

    as it is    a training question
    renamed     a training question; capitalised words, and a few others, are replaced everywhere in the state
    made up     a question word before pieces of a passage; renamed as well

Replacements come from all passages, each word as likely as another, and some are misspelt into words that do not exist: the
policy learns to copy what it reads, not to remember names. Queries are written by the rules of llmrl.leret.rules.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llmrl.errors import DataError
from llmrl.leret.bm25 import BM25Retriever
from llmrl.leret.corpus import Corpus, Passage, load_corpus
from llmrl.leret.partitions import share_of
from llmrl.leret.prompts import PromptFormat, PromptStyle
from llmrl.leret.questions import Question, load_questions
from llmrl.leret.rules import FUNCTION_WORDS, RULES, SHOWN_WORDS, capitalised, content, words

INSTRUCTION = "Write a search query."
INSTRUCTIONS = {
    "question": "Repeat the question.",
    "content": "Repeat the question without function words.",
    "capitals": "Repeat the capitalised words of the question.",
    "rest": "Repeat the words of the question that no title has.",
    "names-1": "List the new names of passage 1.",
    "question+names-1": "Repeat the question and list the new names of passage 1.",
    "rest+names-1": "Repeat the words that no title has and list the new names of passage 1.",
    "rest+names-2": "Repeat the words that no title has and list the new names of passage 2.",
    "rest+names-best": "Repeat the words that no title has and list the new names of the passage that fits best.",
}
FIRST_HOP = ("question", "content", "capitals")
LATER_HOPS = tuple(name for name in INSTRUCTIONS if name != "capitals")

_ASKING = (
    "Who,What,Which,Where,When,Were,Are,Is,Did,Does,In,In which,In what,What is,What was,Who is,Who was,Which film,Which band,"
    "What year was,Where was,When was,Who directed the,Are both,Which of,Who founded,What is the name of the,How many,"
    "What nationality is the,Where was the director of,What is the date of birth of the,When did the,Whose,What city is"
)
_WORD = re.compile(r"[^\W_]+")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Pool:
    """A data set: passages, their index, training questions, and those that are kept out of training."""

    corpus: Corpus
    retriever: BM25Retriever
    train: tuple[Question, ...]
    validation: tuple[Question, ...]


def load_pools(passages: Sequence[str], questions: Sequence[str], validation_share: float) -> list[Pool]:
    """Read the files, the n-th of `passages` with the n-th of `questions`, and index the passages.

    Raises:
        UsageError, DataError: a file is missing or broken, or a side of the split has no question.
    """
    pools = []
    for passage_file, question_file in zip(passages, questions, strict=True):
        corpus = load_corpus(passage_file)
        found = load_questions(question_file, corpus).questions
        kept = [share_of(question.text) < validation_share for question in found]
        train = tuple(question for question, out in zip(found, kept, strict=True) if not out)
        if not train:
            raise DataError(
                f"{question_file}: no question is left for training; add questions or lower --validation_share"
            )
        validation = tuple(question for question, out in zip(found, kept, strict=True) if out)
        pools.append(Pool(corpus, BM25Retriever(corpus), train, validation))
    return pools


def prompt_format() -> PromptFormat:
    """Return the prompt the policy is made for; it is saved beside the weights."""
    styles = tuple(
        PromptStyle(name, text, hops=(1,) if name == "capitals" else None if name in FIRST_HOP else (2, 3, 4))
        for name, text in INSTRUCTIONS.items()
    )
    return PromptFormat(instruction=INSTRUCTION, passage_words=SHOWN_WORDS, styles=styles, max_tokens=80)


@dataclass(frozen=True)
class State:
    """A question and the passages found so far."""

    question: str
    passages: tuple[Passage, ...]


class StateMaker:
    """Makes states over one or more corpora, each with its retriever and training questions.

    Args:
        pools: the data sets; questions are drawn from their training side.
    """

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = pools
        upper: dict[str, None] = {}
        lower: dict[str, None] = {}
        for pool in pools:
            for passage in pool.corpus.passages:
                for word in words(f"{passage.title} {passage.text}"):
                    if word.casefold() not in FUNCTION_WORDS and not word[0].isdigit():
                        (upper if word[0].isupper() else lower)[word] = None
        self.upper, self.lower = list(upper), list(lower)

    def make(self, rng: random.Random, kind: str | None = None, count: int = 3) -> State:
        """Return a state with `count` passages at most.

        Its kind is "plain", "renamed" or "made up", by default drawn 15, 50 and 35 times in 100.
        """
        kind = kind or rng.choices(("plain", "renamed", "made up"), (15, 50, 35))[0]
        pool = rng.choices(self.pools, [len(p.train) for p in self.pools])[0]
        question = self._invent(pool.corpus, rng) if kind == "made up" else rng.choice(pool.train).text
        state = State(question, self._search(pool.retriever, question, count, rng))
        return state if kind == "plain" else self._rename(state, rng)

    def _invent(self, corpus: Corpus, rng: random.Random) -> str:
        text: list[str] = []
        passage = rng.choice(corpus.passages)
        for _ in range(rng.choice((1, 1, 2))):
            found = words(passage.text)
            length = rng.randint(3, 12)
            first = rng.randrange(max(1, len(found) - length))
            text += found[first : first + length]
            if rng.random() < 0.5:
                text += words(passage.title)
            passage = rng.choice(corpus.passages)
        return f"{rng.choice(_ASKING.split(','))} {' '.join(text)}?"

    def _search(self, retriever: BM25Retriever, question: str, count: int, rng: random.Random) -> tuple[Passage, ...]:
        how, found = rng.random(), content(question)
        query = question
        if how < 0.15:
            query = " ".join(capitalised(question))
        elif how < 0.35:
            query = " ".join(rng.sample(found, (len(found) + 1) // 2))
        hits = retriever.search([query], count)[0] or retriever.search([question], count)[0]
        return tuple(Passage(hit.id, hit.title, " ".join(hit.text.split()[:SHOWN_WORDS])) for hit in hits)

    def _rename(self, state: State, rng: random.Random) -> State:
        share = rng.choices((0.0, 0.5, 1.0), (1, 2, 2))[0]
        share_lower = rng.choices((0.0, 0.15, 0.6), (5, 4, 1))[0]
        misspell = rng.choice((0.0, 0.1, 0.4))
        new: dict[str, str] = {}

        def replace(match: re.Match[str]) -> str:
            word = match.group()
            if word.casefold() in FUNCTION_WORDS:
                return word
            if word not in new:
                new[word] = word
                if word[0].isdigit():
                    if rng.random() < share:
                        new[word] = "".join(str(rng.randrange(10)) if c.isdigit() else c for c in word)
                elif rng.random() < (share if word[0].isupper() else share_lower):
                    other = rng.choice(self.upper if word[0].isupper() else self.lower)
                    new[word] = _misspelt(other, rng) if rng.random() < misspell else other
            return new[word]

        passages = (Passage(p.id, _WORD.sub(replace, p.title), _WORD.sub(replace, p.text)) for p in state.passages)
        return State(_WORD.sub(replace, state.question), tuple(passages))


def _misspelt(word: str, rng: random.Random) -> str:
    letters = list(word)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(1, len(letters)) if len(letters) > 1 else 0
        letters[at : at + rng.randint(0, 1)] = rng.choice(_LETTERS)
    return "".join([word[0], *letters[1:]])


def queries(state: State, names: Sequence[str]) -> list[str]:
    """Return what each of the named rules writes for a state."""
    return [RULES[name](state.question, state.passages) for name in names]

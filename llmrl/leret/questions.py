"""Questions with their gold passages, and claims that have gold titles but no passages (HoVer).

A gold document is a set of acceptable passage ids: the one named in `gold_ids`, or else all passages that carry the title.
A question with a gold document that the corpus lacks can never be solved: it is excluded, and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmrl.errors import DataError
from llmrl.jsonl import id_field, read_objects, text_field, text_list
from llmrl.leret.corpus import Corpus, normalise_title, refuse_duplicates

_NO_GOLD, _NOT_HERE = "no gold document named", "gold document not in the corpus"


@dataclass(frozen=True)
class Question:
    """A question or claim.

    Attributes:
        id: unique in its file.
        text: what is asked.
        gold: for each gold document the ids that count as it; empty until resolved against a corpus.
        type: such as "bridge" or "comparison", as the file says.
        answers: accepted answers; of a claim its label.
        hops: number of documents needed, where the file says so.
        gold_titles: titles as the file spells them.
        gold_ids: passage ids as the file names them.
    """

    id: str
    text: str
    gold: tuple[frozenset[str], ...] = ()
    type: str | None = None
    answers: tuple[str, ...] = ()
    hops: int | None = None
    gold_titles: tuple[str, ...] = ()
    gold_ids: tuple[str, ...] = ()


class Excluded(NamedTuple):
    """A question that was left out: `what` is the id or title that is missing."""

    id: str
    reason: str
    what: str


@dataclass(frozen=True)
class QuestionSet:
    """Questions whose gold documents are all in one corpus, in the file's order, and what was left out."""

    questions: tuple[Question, ...]
    excluded: tuple[Excluded, ...]
    corpus_fingerprint: str

    def __len__(self) -> int:
        return len(self.questions)

    def summary(self) -> str:
        """Return one line: how many are kept, how many excluded, by reason, with the first ids."""
        line = f"{len(self.questions)} questions"
        if self.excluded:
            counts = Counter(e.reason for e in self.excluded)
            reasons = "; ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            line += f", {len(self.excluded)} excluded ({reasons}): {_named(self.excluded)}"
        return line


def load_questions(paths: Path | str | Sequence[Path | str], corpus: Corpus) -> QuestionSet:
    """Read questions from .jsonl or .jsonl.gz files and find their gold documents in `corpus`.

    Fields: id, question (or claim), answer / answers / answer_aliases, type, hops (or num_hops), gold_ids, gold_titles.
    `gold_ids` is used where it is given, else `gold_titles` by normalised title.

    Raises:
        UsageError: a file is not there.
        DataError: a broken row (FILE:LINE), duplicate ids, no question, or none whose gold documents are in the corpus.
    """
    return resolve_gold(load_claims(paths), corpus)


def load_claims(paths: Path | str | Sequence[Path | str]) -> tuple[Question, ...]:
    """Read questions or claims without a corpus: `gold` stays empty. This is all that HoVer's claims allow.

    Raises:
        UsageError: a file is not there.
        DataError: a broken row (FILE:LINE), duplicate ids, no row.
    """
    files = [paths] if isinstance(paths, Path | str) else list(paths)
    questions: list[Question] = []
    for file in files:
        before = len(questions)
        questions += [_question(row, where) for where, row in read_objects(file)]
        if len(questions) == before:
            raise DataError(
                f"{file} is empty: expected questions, one a line, with id, question and gold_ids or gold_titles"
            )
    refuse_duplicates([q.id for q in questions], "questions")
    return tuple(questions)


def resolve_gold(questions: Iterable[Question], corpus: Corpus) -> QuestionSet:
    """Fill `gold` from `gold_ids`, or from `gold_titles` where there are no ids.

    Two gold documents with the same acceptable ids count once.

    Raises:
        DataError: no question is left.
    """
    kept: list[Question] = []
    excluded: list[Excluded] = []
    for question in questions:
        if question.gold_ids:
            wanted = question.gold_ids
            found = [frozenset((name,)) if name in corpus.by_id else frozenset[str]() for name in wanted]
        else:
            wanted = question.gold_titles
            found = [frozenset(corpus.by_title.get(normalise_title(title), ())) for title in wanted]
        missing = [name for name, ids in zip(wanted, found, strict=True) if not ids]
        if not wanted:
            excluded.append(Excluded(question.id, _NO_GOLD, ""))
        elif missing:
            excluded.append(Excluded(question.id, _NOT_HERE, ", ".join(missing)))
        else:
            kept.append(replace(question, gold=tuple(dict.fromkeys(found))))
    if not kept:
        raise DataError(
            f"all {len(excluded)} questions were excluded ({excluded[0].reason if excluded else 'there were none'}): "
            f"{_named(excluded)}\nname the passages file that belongs to these questions"
        )
    return QuestionSet(tuple(kept), tuple(excluded), corpus.fingerprint)


def _question(row: dict[str, Any], where: str) -> Question:
    text = text_field(row, "question", where) or text_field(row, "claim", where)
    if not text.strip():
        raise DataError(f"{where}: expected a text in 'question' (or 'claim'), found none")
    answers = [text_field(row, "answer", where)] if row.get("answer") is not None else []
    answers += [*text_list(row, "answers", where), *text_list(row, "answer_aliases", where)]
    if not answers and "claim" in row:
        answers = [text_field(row, "label", where)]
    hops = row.get("hops", row.get("num_hops"))
    if hops is not None and (not isinstance(hops, int) or isinstance(hops, bool) or hops < 1):
        raise DataError(f"{where}: expected a whole number from 1 in 'hops', got {hops!r:.60}")
    return Question(
        id=id_field(row, where),
        text=text,
        type=text_field(row, "type", where) or None,
        answers=tuple(dict.fromkeys(answer for answer in answers if answer)),
        hops=hops,
        gold_titles=text_list(row, "gold_titles", where),
        gold_ids=text_list(row, "gold_ids", where),
    )


def _named(excluded: Sequence[Excluded], shown: int = 5) -> str:
    names = [f"{e.id} ({e.what})" if e.what else e.id for e in excluded[:shown]]
    return ", ".join(names) + (", ..." if len(excluded) > shown else "")

"""Passages and the corpus they make: read once, checked, with one fingerprint that every artefact carries."""

from __future__ import annotations

import hashlib
import html
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.errors import DataError
from llmrl.jsonl import id_field, read_objects, text_field

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Passage:
    """What a retriever returns: an id, a title (may be empty) and a text."""

    id: str
    title: str
    text: str

    @property
    def both(self) -> str:
        """Title and text in one without HTML entities, as every retriever here indexes them."""
        return html.unescape(f"{self.title}\n{self.text}" if self.title else self.text)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Passages in a fixed order, which breaks ties of every retriever.

    Attributes:
        passages: in order.
        by_id: id -> passage.
        positions: id -> index into `passages`.
        by_title: normalised title -> ids, in order; passages without a title are not in it.
        fingerprint: hash of all ids, titles and texts in order.

    Raises:
        DataError: no passage, an id that occurs twice, a passage without title and text.
    """

    passages: tuple[Passage, ...]
    by_id: dict[str, Passage] = field(init=False, repr=False)
    positions: dict[str, int] = field(init=False, repr=False)
    by_title: dict[str, tuple[str, ...]] = field(init=False, repr=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        passages = tuple(self.passages)
        if not passages:
            raise DataError("the corpus is empty: expected at least one passage with id, title and text")
        refuse_duplicates([p.id for p in passages], "passages")
        bare = [p.id for p in passages if not p.both.strip()]
        if bare:
            raise DataError(
                f"{len(bare)} passages without title and text: {_some(bare)}; give them a text or remove them"
            )
        titles: dict[str, list[str]] = {}
        for passage in passages:
            if title := normalise_title(passage.title):
                titles.setdefault(title, []).append(passage.id)
        derived = {
            "passages": passages,
            "by_id": {p.id: p for p in passages},
            "positions": {p.id: i for i, p in enumerate(passages)},
            "by_title": {title: tuple(ids) for title, ids in titles.items()},
            "fingerprint": fingerprint([p.id, p.title, p.text] for p in passages),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.passages)


def load_corpus(paths: Path | str | Sequence[Path | str]) -> Corpus:
    """Read a corpus from one or more .jsonl or .jsonl.gz files with the fields id, title and text.

    Other fields are ignored. A title or a text may be missing, not both.

    Raises:
        UsageError: a file is not there.
        DataError: a broken row (FILE:LINE), duplicate ids, a passage without words, no passage at all.
    """
    files = [paths] if isinstance(paths, Path | str) else list(paths)
    passages: list[Passage] = []
    for file in files:
        before = len(passages)
        for where, row in read_objects(file):
            title, text = text_field(row, "title", where), text_field(row, "text", where)
            if not (title.strip() or text.strip()):
                raise DataError(f"{where}: a passage without 'title' and 'text'; give it a text or remove it")
            passages.append(Passage(id_field(row, where), title, text))
        if len(passages) == before:
            raise DataError(f"{file} is empty: expected passages, one a line, with id, title and text")
    return Corpus(tuple(passages))


def normalise_title(title: str) -> str:
    """Return the form in which titles of different dumps are compared.

    HTML entities, compatibility forms of Unicode, underscores, white space and case are levelled. What stands in
    parentheses stays: "X (film)" is not "X".
    """
    plain = unicodedata.normalize("NFKC", html.unescape(title)).replace("_", " ")
    return " ".join(plain.split()).casefold()


def refuse_duplicates(ids: Iterable[str], what: str) -> None:
    """Raise when an id occurs twice.

    Raises:
        DataError: with the number of such ids and the first of them.
    """
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} ids of {what} occur more than once: {_some(twice)}; every id must be unique")


def fingerprint(parts: Iterable[Any]) -> str:
    """Return a hash of JSON values in order, in the form of `llmrl.fingerprints`: "sha256:" and 32 hex digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode() + b"\n")
    return "sha256:" + digest.hexdigest()[:32]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

"""What a model is asked for a search query with, and how its answer is read.

One function makes the messages for exploration, training, evaluation and serving, so what is trained is what is
served. A `PromptStyle` is one way of asking; the bare one (`BARE`) is what training teaches and what is used
afterwards, the others only make exploration diverse.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrl.errors import ConfigError, DataError, LlmrlError
from llmrl.files import write_json
from llmrl.leret.corpus import Passage
from llmrl.types import Message, Record

PROMPT_FILE = "search_prompt.json"
BARE = "bare"
ECHO_HEADERS = ("Question:",)  # of the prompt; a query that repeats it copies the prompt
_QUOTES = "\"'`“”"
_THINKING, _THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Demo(Record):
    """One worked example: a question, what had been found, and a query that found more.

    `passages` are (title, text) pairs as they stood in the prompt; `hop` is the one it was written in, counted from 1.
    """

    question: str
    passages: tuple[tuple[str, str], ...]
    query: str
    hop: int = 0

    _error = ConfigError

    def __post_init__(self) -> None:
        self._need(isinstance(self.question, str), "question", "text")
        self._need(
            _is_list(self.passages) and all(map(_is_shown, self.passages)), "passages", "a list of [title, text]"
        )
        self._set(passages=tuple((title, text) for title, text in self.passages))
        self._need(isinstance(self.query, str) and bool(self.query.strip()), "query", "text")
        self._need_int("hop")


@dataclass(frozen=True)
class PromptStyle(Record):
    """One way of asking.

    Attributes:
        name: what reports call it; "bare" is the style that is trained.
        instruction: the line that says what to write.
        demos: worked examples, shown as turns of the dialogue before the question.
        hops: the hops it is used at, counted from 1; None is all.
    """

    name: str
    instruction: str
    demos: tuple[Demo, ...] = ()
    hops: tuple[int, ...] | None = None

    _error = ConfigError

    def __post_init__(self) -> None:
        self._need(isinstance(self.name, str) and bool(self.name.strip()), "name", "text")
        self._need("/" not in self.name and "|" not in self.name, "name", "text without / and |")
        self._need(isinstance(self.instruction, str), "instruction", "text")
        self._need(_is_list(self.demos), "demos", "a list of worked examples")
        self._set(demos=tuple(demo if isinstance(demo, Demo) else Demo.from_json(demo) for demo in self.demos))
        if self.hops is not None:
            self._need(_is_list(self.hops) and all(map(_is_hop, self.hops)), "hops", "numbers from 1")
            self._set(hops=tuple(self.hops))

    def at(self, hop: int) -> bool:
        """Tell whether it is used at `hop`, counted from 1."""
        return self.hops is None or hop in self.hops


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_shown(passage: Any) -> bool:
    """Tell a passage as a prompt shows it, (title, text), from anything else."""
    return _is_list(passage) and len(passage) == 2 and all(isinstance(part, str) for part in passage)


def _is_hop(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


DEFAULT_INSTRUCTION = (
    "Write one search query for the passages that are still missing to answer the question. "
    "Reply with the query alone, on one line."
)


@dataclass(frozen=True)
class PromptFormat(Record):
    """How questions and passages become messages; it travels with a trained model as `search_prompt.json`.

    Attributes:
        instruction: of the bare style.
        system: a system message, or None.
        passage_words: a passage's text is cut to this many words; None keeps it whole.
        question_again: repeat the question behind the passages. A causal model reads the passages without knowing what
            comes after them; the second copy has seen them.
        styles: further styles that the model was made to know, used by exploration.
        max_tokens: of a query.
        template_options: given to the chat template, such as `enable_thinking`.
    """

    instruction: str = DEFAULT_INSTRUCTION
    system: str | None = None
    passage_words: int | None = None
    question_again: bool = True
    styles: tuple[PromptStyle, ...] = ()
    max_tokens: int = 64
    template_options: dict[str, Any] = field(default_factory=dict)

    _error = ConfigError

    def __post_init__(self) -> None:
        self._need(isinstance(self.instruction, str), "instruction", "text")
        self._need(self.system is None or isinstance(self.system, str), "system", "text, or null")
        if self.passage_words is not None:
            self._need_int("passage_words")
        self._need_int("max_tokens", 1)
        self._need(_is_list(self.styles), "styles", "a list of styles")
        self._need(isinstance(self.template_options, dict), "template_options", "names with values")
        styles = tuple(s if isinstance(s, PromptStyle) else PromptStyle.from_json(s) for s in self.styles)
        self._set(styles=styles, template_options=dict(self.template_options))
        names = [style.name for style in styles]
        self._need(len({BARE, *names}) == len(names) + 1, "styles", "distinct names, none of them 'bare'")

    @property
    def bare(self) -> PromptStyle:
        """The style that is trained and used."""
        return PromptStyle(BARE, self.instruction)

    def messages(self, style: PromptStyle, question: str, passages: Sequence[Passage]) -> tuple[Message, ...]:
        """Return the dialogue that asks for the next query.

        Args:
            style: how to ask.
            question: what is to be answered.
            passages: what was found so far, in the order the merge rule gives.
        """
        shown = [(passage.title, passage.text) for passage in passages]
        messages = [Message("system", self.system)] if self.system else []
        for demo in style.demos:
            messages += [
                Message("user", self._text(style.instruction, demo.question, demo.passages)),
                Message("assistant", demo.query),
            ]
        return (*messages, Message("user", self._text(style.instruction, question, shown)))

    def _text(self, instruction: str, question: str, passages: Sequence[tuple[str, str]]) -> str:
        lines = [f"Question: {one_line(question)}"]
        if passages:
            lines += [
                f"[{number}] {one_line(title)} | {self.shorten(text)}"
                for number, (title, text) in enumerate(passages, start=1)
            ]
            lines += [f"Question: {one_line(question)}"] if self.question_again else []
        return "\n".join([*lines, instruction] if instruction else lines)

    def shorten(self, text: str) -> str:
        """Cut a passage's text to `passage_words` words, on one line."""
        words = text.split()
        return " ".join(words if self.passage_words is None else words[: self.passage_words])


def one_line(text: str) -> str:
    """Return `text` with every run of white space as one space."""
    return " ".join(text.split())


def read_query(answer: str) -> str:
    """Return the query in a model's answer: its first line with words, without a label or quotes around it; "" if none.

    What a reasoning model thinks before it answers is no query, finished or not.
    """
    answer = answer.rpartition(_THOUGHT)[2] if _THOUGHT in answer else answer.partition(_THINKING)[0]
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    label, colon, rest = line.partition(":")
    if colon and label.strip().lower() in ("query", "search query", "search"):
        line = rest.strip()
    while len(line) > 1 and line[0] in _QUOTES and line[-1] in _QUOTES and not {line[0], line[-1]} & set(line[1:-1]):
        line = line[1:-1].strip()
    return one_line(line) if line.strip(_QUOTES + " ") else ""


@dataclass(frozen=True)
class SearchSetup(Record):
    """What a trained policy needs to be used as it was trained; saved beside its weights.

    Attributes:
        format: the prompt.
        hops: searches a question.
        k: passages a search.
        merge: the order of passages in the prompt.
        unseen_only: hops after the first return passages that were not found before.
        question_first: hop 1 searches with the question itself, and the model writes from hop 2 on.
        notes: where it comes from: corpus and retriever fingerprints, reward, seed.
    """

    format: PromptFormat = field(default_factory=PromptFormat)
    hops: int = 2
    k: int = 3
    merge: str = "hop_order"
    unseen_only: bool = False
    question_first: bool = False
    notes: dict[str, str] = field(default_factory=dict)

    _error = ConfigError

    def __post_init__(self) -> None:
        if not isinstance(self.format, PromptFormat):
            self._set(format=PromptFormat.from_json(self.format))
        self._need_int("hops", 1)
        self._need_int("k", 1)

    def save(self, folder: Path | str) -> None:
        """Write `search_prompt.json` into a model's or an adapter's folder."""
        write_json(Path(folder) / PROMPT_FILE, self.to_json())


def load_setup(*folders: Path | str | None) -> SearchSetup | None:
    """Return the setup in the first of `folders` that holds one, or None.

    Raises:
        DataError: the file is not what `SearchSetup.save` writes.
    """
    for folder in folders:
        path = Path(folder) / PROMPT_FILE if folder else None
        if path is not None and path.is_file():
            try:
                return SearchSetup.from_json(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, LlmrlError) as error:
                raise DataError(f"{path}: not a search prompt: {error}") from None
    return None


def load_styles(path: Path | str) -> tuple[PromptStyle, ...]:
    """Read styles from a JSON file: a list of objects with `name`, `instruction`, and optionally `demos` and `hops`.

    Raises:
        ConfigError: not found, not JSON, or a style is not valid; the message names the file and the style.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"not found: {path} (--prompts)")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{path}: expected a list of styles, each with a name and an instruction")
    styles = []
    for number, row in enumerate(rows, start=1):
        try:
            styles.append(PromptStyle.from_json(row))
        except LlmrlError as error:
            raise ConfigError(f"{path}: style {number}: {error}") from None
    names = [style.name for style in styles]
    twice = next((name for name in names if names.count(name) > 1 or name == BARE), None)
    if twice is not None:
        raise ConfigError(f"{path}: the name '{twice}' is taken; each style needs one of its own, other than 'bare'")
    return tuple(styles)

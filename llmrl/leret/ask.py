"""Asking for queries: a model through the shared engine's episodes, or fixed rules with no model at all.

An episode is one question in one state asked in one style, with one answer; the hops are a loop around it, because
what goes on to the next hop is chosen among all answers of this one. Episodes bring what long runs need: seeds that do
not depend on order, shards that survive a kill, rows shared over processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmrl.errors import DataError
from llmrl.leret.corpus import Passage
from llmrl.leret.prompts import PromptFormat, PromptStyle, read_query
from llmrl.rollout.chat import Conversation
from llmrl.rollout.environment import Step
from llmrl.rollout.episodes import run_episodes
from llmrl.rollout.protocols import Engine
from llmrl.rollout.shards import read_shards
from llmrl.training.distributed import barrier, rank, world_size
from llmrl.types import FinishReason, Message, SamplingConfig


@dataclass(frozen=True)
class Ask:
    """One question in one state, asked in one style. `key` names it within its hop."""

    key: str
    question: str
    passages: tuple[Passage, ...]
    style: PromptStyle


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        query: the query that was read from it; "" means that nothing more is to be searched.
        token_ids: as the engine sampled them, the end token included; empty for a rule.
        exact: the sampled tokens are the query, white space around it and an end token, nothing else, so they can be trained
            on as they are.
        finish: why sampling stopped; None for a rule.
    """

    query: str
    token_ids: tuple[int, ...] = ()
    exact: bool = False
    finish: str | None = None


@dataclass
class AskTally:
    """What asking cost: wall-clock seconds; and over all processes and what lay there before, answers and their tokens,
    and episodes that failed, with the first error.
    """

    seconds: float = 0.0
    tokens: int = 0
    answers: int = 0
    failed: int = 0
    failure: str = ""

    @property
    def prompts(self) -> int:
        """Prompts that were to be answered."""
        return self.answers + self.failed

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of prompts without an answer."""
        return {"failed": self.failed, "prompts": self.prompts, "first": self.failure}

    def failures(self) -> str:
        """Return how many prompts got no answer, with the first error."""
        return f"{self.failed} of {self.prompts} prompts got no answer ({self.failure:.120})"


class Asker(Protocol):
    """Answers asks; `fingerprint` names what it answers with, `tally` counts."""

    fingerprint: str
    tally: AskTally

    def ask(
        self, asks: Sequence[Ask], *, samples: int, temperature: float, seed: int, folder: Path
    ) -> dict[tuple[str, int], Answer]:
        """Return the answer to each (key, sample); a pair whose episode failed is not in it."""
        ...

    def recount(self, folder: Path) -> None:
        """Count what an earlier run asked in this folder and the folders in it, and nobody asks again."""
        ...


class EngineAsker:
    """Asks a model.

    Args:
        engine: what answers.
        prompt_format: how a question becomes messages.
        fingerprint: names model and adapter; a folder takes answers of one.
        concurrency: most requests under way.
        quiet: show no bar.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_format: PromptFormat,
        fingerprint: str,
        *,
        concurrency: int = 256,
        quiet: bool = False,
    ) -> None:
        self.engine, self.format, self.fingerprint = engine, prompt_format, fingerprint
        self.concurrency, self.quiet = concurrency, quiet
        self.tally = AskTally()
        self._control = frozenset(engine.tokenizer.all_special_ids)

    def ask(
        self, asks: Sequence[Ask], *, samples: int, temperature: float, seed: int, folder: Path
    ) -> dict[tuple[str, int], Answer]:
        """Sample; what `folder` holds of an earlier run is kept.

        Raises:
            EngineError: the engine died; the same call goes on later.
            DataError: every ask failed.
        """
        if not asks:
            return {}
        begun = time.perf_counter()
        # sorted, the rows are the same run in any order of the questions, and those of one question are neighbours in time:
        # vLLM shares a prefix that is in its cache
        rows = [
            {"id": ask.key, "messages": [m.to_json() for m in self.messages(ask)]}
            for ask in sorted(asks, key=lambda ask: ask.key)
        ]
        run_episodes(
            self.engine,
            rows,
            _OneAnswer,
            SamplingConfig(temperature=temperature, max_tokens=self.format.max_tokens),
            output=folder,
            samples=1 if temperature == 0 else samples,
            seed=seed,
            max_turns=1,
            concurrency=self.concurrency,
            source="leret",
            fingerprint=self.fingerprint,
            template_options=self.format.template_options,
            rank=rank(),
            world=world_size(),
            progress=not self.quiet,
        )
        barrier()
        self.tally.seconds += time.perf_counter() - begun
        answers, errors = self._read(read_shards(folder))
        if not answers:
            raise DataError(
                f"none of {len(rows)} prompts got an answer; the first: {errors[0] if errors else 'nothing ran'}"
            )
        return answers

    def recount(self, folder: Path) -> None:
        """Count what an earlier run asked in this folder and the folders in it, and nobody asks again."""
        for path in sorted(folder.rglob("run.json")):
            self._read(read_shards(path.parent))

    def messages(self, ask: Ask) -> tuple[Message, ...]:
        """Return the dialogue of one ask."""
        return self.format.messages(ask.style, ask.question, ask.passages)

    def _read(
        self, records: Mapping[tuple[str, int], dict[str, Any]]
    ) -> tuple[dict[tuple[str, int], Answer], list[str]]:
        """Return the answers and the errors, and count both."""
        answers: dict[tuple[str, int], Answer] = {}
        errors: list[str] = []
        for key, record in sorted(records.items()):
            turn = next((turn for turn in record["turns"] if turn["policy_version"]), None)
            if record["error"] is not None or turn is None:
                errors.append(record["error"] or "no answer")
                continue
            answers[key] = _answer(turn, self._control)
            self.tally.tokens += len(turn["token_ids"])
        self.tally.answers += len(answers)
        self.tally.failed += len(errors)
        self.tally.failure = self.tally.failure or (errors[0] if errors else "")
        return answers, errors


class _OneAnswer:
    """An episode of one answer, which is searched with later, all queries of a hop together."""

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, row: Mapping[str, Any], seed: int) -> None:
        self._messages = [Message.from_json(message) for message in row["messages"]]

    def observe(self) -> Sequence[Message]:
        return self._messages

    def step(self, answer: Message) -> Step:
        return Step(done=True)


def _answer(turn: Mapping[str, Any], control: Collection[int]) -> Answer:
    text, ids = turn["message"]["content"], tuple(turn["token_ids"])
    query = read_query(text)
    ended = turn["finish_reason"] == FinishReason.STOP
    # the text shows no control token, so one in the middle of the answer would be trained unseen
    plain = text.strip() == query and not any(token in control for token in ids[:-1])
    return Answer(query, ids, ended and plain, turn["finish_reason"])


class RuleAsker:
    """Writes queries by rules, each style being named after one: no model, no sampling."""

    def __init__(self, rules: Mapping[str, Callable[[str, Sequence[Passage]], str]]) -> None:
        self.rules = dict(rules)
        self.fingerprint = "rules"
        self.tally = AskTally()

    def ask(
        self, asks: Sequence[Ask], *, samples: int, temperature: float, seed: int, folder: Path
    ) -> dict[tuple[str, int], Answer]:
        """Return one answer an ask."""
        begun = time.perf_counter()
        answers = {(ask.key, 0): Answer(self.rules[ask.style.name](ask.question, ask.passages)) for ask in asks}
        self.tally.seconds += time.perf_counter() - begun
        self.tally.answers += len(answers)
        return answers

    def recount(self, folder: Path) -> None:
        """Count nothing: rules are asked anew, in no time."""


def prompt_ids(
    tokenizer: Any, messages: Iterable[Message], template_options: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the ids a model is prompted with for `messages`: the same function that episodes use."""
    conversation = Conversation(tokenizer, template_options=template_options)
    conversation.add(*messages)
    return conversation.prompt()


def written_ids(
    tokenizer: Any, messages: Sequence[Message], query: str, template_options: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the ids of a query that was not sampled as it stands: what the template writes for it, up to the end token.

    Raises:
        DataError: the template writes an answer otherwise than it asks for one, or without an end token behind it.
    """
    options = {**(template_options or {}), "tokenize": False}
    shown = [message.to_json() for message in messages]
    before = tokenizer.apply_chat_template(shown, add_generation_prompt=True, **options)
    answered = tokenizer.apply_chat_template([*shown, {"role": "assistant", "content": query}], **options)
    if not answered.startswith(before):
        raise DataError(
            "the chat template writes an answer otherwise than it asks for one; its queries cannot be trained"
        )
    # by the conversation, which spells the name of a control token in a query as ordinary text
    conversation = Conversation(tokenizer, template_options=template_options)
    conversation.add(*messages, Message("assistant", query))
    whole = tuple(token for turn in conversation.turns for token in turn.token_ids)
    prompt = prompt_ids(tokenizer, messages, template_options)
    # where the boundary merges into one token, the answer is encoded by itself, as it would have been sampled
    ids = (
        whole[len(prompt) :]
        if whole[: len(prompt)] == prompt
        else tuple(tokenizer.encode(answered[len(before) :], add_special_tokens=False))
    )
    special = set(tokenizer.all_special_ids)
    end = next((i for i, token in enumerate(ids) if token in special), None)
    if end is None:
        raise DataError("the chat template writes no end token behind an answer; a model could not learn to stop")
    return ids[: end + 1]

"""A dialogue by its token ids: what a chat template adds is encoded, what a model sampled stays as it was sampled.

The context of each prompt is the context before, the sampled ids as they are, and the encoding of what the template
writes after that answer: the end of the turn (only what of it was not sampled), the new messages, the generation
prompt. Where that begins is found by rendering once more with a mark in place of the answer, so the boundary does not
depend on what the model said and no sampled text is encoded.

The template must still say of the past what the model saw. White space at the two ends of an answer is left out of
that comparison: many templates trim it, while the context keeps the answer as it was sampled. Any other difference
(a template that drops the thinking of earlier turns, or moves the system text along) is a rewrite: the whole context
is encoded anew as a segment of its own, and the sampled tokens stay in the segment they were sampled in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from llmrl.errors import ConfigError, DataError, ModelError
from llmrl.rollout.protocols import Sample
from llmrl.types import Message, Turn

# Plain ASCII, so that a template's tojson, trim or split leaves them whole; content that spells one is cut in two.
_CUT = "@llmrl:cut;"  # text on its two sides is encoded apart
_MARK = "@llmrl:mark%d;"
_ANSWER = "@llmrl:answer;"
_RESERVED = "@llmrl:"

SPECIAL_TOKENS = ("spell", "allow")
AGENT = "assistant"


def extension(before: str, said: str, rendered: str, blind: str, mark: str) -> str | None:
    """Return what a template wrote after an answer, or None where it rewrote what came before.

    Args:
        before: What it rendered for the prompt of that answer, the generation prompt included.
        said: The text of the answer.
        rendered: What it renders now, with the answer and the messages after it.
        blind: The same with `mark` as the text of the answer.
        mark: A text that occurs in nothing else that is rendered.
    """
    _, found, tail = blind.rpartition(mark)
    middle = rendered[len(before) : len(rendered) - len(tail)]
    kept = rendered == before + middle + tail and middle.strip() == said.strip()
    return tail if found and kept else None


@dataclass(frozen=True)
class _Step:
    """What the messages since the last answer make of the context."""

    turns: tuple[Turn, ...]
    context: tuple[int, ...]  # of the whole segment
    text: str  # what the template rendered for it


class Conversation:
    """One dialogue as the model sees it: messages in, token ids out, turns for an `Episode`.

    The order is `add`, `prompt`, an engine, `answer`, and again. `prompt` changes nothing, so a failed request can be
    repeated; only `answer` makes the prompt part of the record. An answer stands in later prompts as the text the
    model wrote, calls to tools included; `tool_calls` are recorded beside it and not rendered, because a template
    would write them in its own form. Where a template takes tool messages only after such calls (gpt-oss, Gemma 4),
    `prompt` refuses; send what the tool said as a user message there.

    Args:
        tokenizer: Any Hugging Face tokenizer with a chat template.
        tools: JSON schemas of the tools, given to the template.
        template_options: Further variables of the template, such as `enable_thinking`; `chat_template` replaces the
            template itself.
        special_tokens: What the name of a control token (`<|im_end|>`) does in a message or a tool: "spell" encodes it as
            ordinary text, so that no observation can end its own turn; "allow" lets it become the control token.
            The text of an answer is always spelled, should a rewrite encode it.
        window: The model reads the system messages of the opening and this many exchanges, the last ones; an exchange is
            what was said to the model up to and with its answer. None is all of them. A message that leaves the window
            rewrites the context.

    Raises:
        ModelError: the tokenizer has no chat template, or the template does not show the tools.
        DataError: the template refuses the messages (from `prompt` and `turns`), or a call comes out of order.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        special_tokens: str = "spell",
        window: int | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise ConfigError(f"window: expected 1 exchange or more, or None for all, got {window}")
        if special_tokens not in SPECIAL_TOKENS:
            raise ConfigError(
                f"special_tokens: expected one of {', '.join(SPECIAL_TOKENS)}, got {special_tokens!r:.60}"
            )
        self.tokenizer = tokenizer
        self._window = window
        self._encoded: dict[str, tuple[int, ...]] = {}
        self._control = _control_tokens(tokenizer, len(tokenizer))
        self._spell = special_tokens == "spell"
        self._options = dict(template_options or {})
        self._options["chat_template"] = _template(tokenizer, self._options.get("chat_template"), tools)
        self._options["tools"] = self._safe([dict(tool) for tool in tools], self._spell) if tools else None
        self._messages: list[Message] = []
        self._shown: list[dict[str, Any]] = []  # the messages as the template gets them
        self._rewards: dict[int, Mapping[str, float]] = {}  # of the messages since the last answer
        self._turns: tuple[Turn, ...] = ()  # up to the last answer, as are the next three
        self._recorded = 0  # messages
        self._context: tuple[int, ...] = ()
        self._text = ""  # what the template rendered for the prompt of the last answer
        self._steps: dict[bool, _Step] = {}  # by whether the generation prompt is in it; True once prompt() was called

    def add(self, *messages: Message, rewards: Mapping[str, float] | None = None) -> None:
        """Add what the model reads next; an assistant message here was not sampled and is not trained on.

        Args:
            messages: Of any role, in order.
            rewards: Named rewards that came with them, recorded on the turn of the last one.

        Raises:
            DataError: a control token in a message cannot be spelled, or rewards come without a message.
        """
        shown = [self._safe(message.to_json(), self._spell) for message in messages]
        if rewards and not messages:
            raise DataError("add() got rewards and no message to put them on; use reward() for the last answer")
        self._messages += messages
        self._shown += shown
        if rewards:
            self._rewards[len(self._messages) - 1] = dict(rewards)
        self._steps = {}

    def prompt(self) -> tuple[int, ...]:
        """Return the ids to sample from: the context of the current segment with the generation prompt.

        Raises:
            DataError: nothing was added since the last answer, the template refuses the messages, or it leaves one out.
        """
        if self._recorded == len(self._messages):
            raise DataError("prompt() found no message since the last answer; add() one for the model to react to")
        return self._step(True).context

    def answer(
        self,
        sample: Sample,
        *,
        tool_calls: Sequence[Mapping[str, Any]] = (),
        rewards: Mapping[str, float] | None = None,
    ) -> Message:
        """Record what was sampled from the last prompt, and return it as a message.

        Args:
            sample: From the engine.
            tool_calls: The calls that were read out of its text.
            rewards: Named rewards of this answer; `reward` can add others later.

        Raises:
            DataError: there is no prompt that it can answer, or the sample is empty.
        """
        step = self._steps.get(True)
        if step is None:
            raise DataError("answer() found no prompt since the last message; sample from what prompt() returns")
        if not sample.token_ids:
            why = f"finish reason {sample.finish_reason}"
            raise DataError(f"the sample has no tokens ({why}): there is nothing to record, sample again")
        message = Message(AGENT, sample.text, tool_calls=tuple(dict(call) for call in tool_calls))
        turn = Turn(
            message,
            token_ids=sample.token_ids,
            loss_mask=(1,) * len(sample.token_ids),
            logprobs=sample.logprobs,
            segment=step.turns[-1].segment,
            policy_version=sample.policy_version,
            finish_reason=sample.finish_reason,
            rewards=dict(rewards or {}),
        )
        self._turns += (*step.turns, turn)
        self._context = step.context + turn.token_ids
        self._text = step.text
        self._messages.append(message)
        self._shown.append(self._safe({"role": AGENT, "content": message.content}, False))
        self._recorded = len(self._messages)
        self._rewards, self._steps = {}, {}
        return message

    def reward(self, rewards: Mapping[str, float]) -> None:
        """Put named rewards on the last sampled turn.

        Raises:
            DataError: nothing was sampled yet, or the turn has a reward of that name.
        """
        if not self._turns:
            raise DataError("reward() found no sampled turn yet; give the rewards of an observation to add()")
        last = self._turns[-1]
        twice = sorted(last.rewards.keys() & rewards.keys())
        if twice:
            raise DataError(f"the last answer has a reward {', '.join(twice)} already; give the second another name")
        self._turns = (*self._turns[:-1], replace(last, rewards={**last.rewards, **rewards}))

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The record so far. Messages that no prompt was made of yet stand at its end without a generation prompt."""
        if self._recorded == len(self._messages):
            return self._turns
        return self._turns + (self._steps.get(True) or self._step(False)).turns

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages as they were added and answered."""
        return tuple(self._messages)

    @property
    def segments(self) -> int:
        """One, and one more for each rewrite."""
        return self.rewrites + 1

    @property
    def rewrites(self) -> int:
        """How often the template rewrote history."""
        turns = self.turns
        return turns[-1].segment if turns else 0

    def _step(self, generation: bool) -> _Step:
        if generation not in self._steps:
            self._steps[generation] = self._take_step(generation)
        return self._steps[generation]

    def _take_step(self, generation: bool) -> _Step:
        text = rendered = self._render(self._shown, generation)
        self._refuse_left_out(generation)
        shown, new, goes_on = self._shown, rendered, False
        if self._turns:
            tail = self._tail(rendered, generation)
            if tail is not None:
                new, goes_on = tail, True
            else:
                shown = self._spelled()
                new = rendered = self._render(shown, generation)
        ids = self._new_ids(new, goes_on)
        segment = self._turns[-1].segment + (not goes_on) if self._turns else 0
        bounds = self._bounds(shown, rendered, new, ids, goes_on)
        turns = tuple(
            Turn(self._messages[i], ids[start:end], segment=segment, rewards=dict(self._rewards.get(i, {})))
            for i, start, end in zip(range(self._recorded, len(shown)), bounds, bounds[1:], strict=False)
        )
        return _Step(turns, (self._context if goes_on else ()) + ids, text)

    def _tail(self, rendered: str, generation: bool) -> str | None:
        last = self._recorded - 1
        blind = [*self._shown[:last], {**self._shown[last], "content": _ANSWER}, *self._shown[last + 1 :]]
        said = self._shown[last]["content"]
        return extension(self._text, said, rendered, self._render(blind, generation), _ANSWER)

    def _spelled(self) -> list[dict[str, Any]]:
        """Return the messages with what was sampled spelled too: after a rewrite its text is encoded."""
        shown = list(self._shown)
        for i, turn in enumerate(self._turns):
            if turn.is_sampled:
                shown[i] = {**shown[i], "content": self._safe(turn.message.content, True)}
        return shown

    def _render(self, messages: Sequence[Mapping[str, Any]], generation: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    in_window(messages, self._window), add_generation_prompt=generation, tokenize=False, **self._options
                )
            )
        except Exception as error:  # a template raises whatever its filters and its own checks raise
            roles = ", ".join(str(message["role"]) for message in messages)
            why = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"the chat template refuses the messages ({roles}): {why:.300}") from error

    def _refuse_left_out(self, generation: bool) -> None:
        """A template may pass over a role it does not know; the model would then act without having seen the message."""
        new = range(self._recorded, len(self._shown))
        texts = {i: _MARK % i for i in new if self._messages[i].role != AGENT and self._messages[i].content}
        marked = [{**m, "content": texts[i]} if i in texts else m for i, m in enumerate(self._shown)]
        rendered = self._render(marked, generation)
        for i, mark in texts.items():
            if mark not in rendered:
                role = self._messages[i].role
                raise DataError(
                    f"the chat template leaves out the {role} message '{self._messages[i].content:.40}' at this place; give "
                    "it a role that the template writes, such as user"
                )

    def _new_ids(self, text: str, goes_on: bool) -> tuple[int, ...]:
        """Encode what the template added, less the end token that was sampled already."""
        if goes_on:
            ids = self._encode(text.lstrip(), True)
            if ids and ids[0] == self._context[-1] and ids[0] in self._control:
                return tuple(ids[1:])
        return tuple(self._encode(text, goes_on))

    def _encode(self, text: str, goes_on: bool) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(text.split(_CUT)):
            ids += self._plain_ids(piece) if i == 0 and not goes_on else self._ids_after_text(piece)
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        if text not in self._encoded:  # the same pieces come back turn after turn
            self._encoded[text] = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return list(self._encoded[text])

    def _ids_after_text(self, text: str) -> list[int]:
        """Encode without the space that sentencepiece puts before the first word of a text."""
        ids = self._plain_ids(text)
        if not ids or ids[0] in self._control:
            return ids
        newline, both = self._plain_ids("\n"), self._plain_ids("\n" + text)
        return both[len(newline) :] if both[: len(newline)] == newline else ids

    def _bounds(
        self, shown: Sequence[Mapping[str, Any]], rendered: str, new: str, ids: tuple[int, ...], goes_on: bool
    ) -> list[int]:
        """Share the new ids out to the new messages: each has those up to where a dialogue that ended with it differs.

        Only the sum of them is what the model saw; a message that a template merges into the next has one token at
        least, because a turn with text and without tokens cannot be told from one that was never encoded.
        """
        bounds, last = [0], len(shown) - 1
        for i in range(self._recorded, last):
            try:
                cut = _common(self._render(shown[: i + 1], False), rendered)
            except DataError:  # a template may want a user message before it renders anything
                cut = 0
            part = self._new_ids(new[: max(0, cut - (len(rendered) - len(new)))], goes_on)
            end = _common(part, ids)
            bounds.append(max(bounds[-1], min(max(end, bounds[-1] + 1), len(ids) - (last - i))))
        return [*bounds, len(ids)]

    def _safe(self, value: Any, spell: bool) -> Any:
        """Cut every text of a JSON value where it would become one of our marks or, to spell it, a control token."""
        if isinstance(value, Mapping):
            return {key: self._safe(v, spell) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._safe(v, spell) for v in value]
        if not isinstance(value, str):
            return value
        text = value.replace(_RESERVED, _cut(_RESERVED))
        names = self._control_names(text) if spell else set()
        while names:
            for name in sorted(names, key=len, reverse=True):
                text = text.replace(name, _cut(name))
            left = self._control_names(text)
            if left >= names:
                raise DataError(
                    f"a message holds the control token {min(left)!r}, which this tokenizer cannot write as text; take it "
                    "out, or pass special_tokens='allow' to let messages hold control tokens"
                )
            names = left
        return text

    def _control_names(self, text: str) -> set[str]:
        names = set()
        for piece in text.split(_CUT):
            found = {i: self._control[i] for i in self._plain_ids(piece) if i in self._control}
            # a character outside of the vocabulary becomes the unknown token without naming it
            names |= {name for i, name in found.items() if i != self.tokenizer.unk_token_id or name in piece}
        return names


def in_window(messages: Sequence[Mapping[str, Any]], exchanges: int | None) -> list[Mapping[str, Any]]:
    """Return the system messages of the opening and the last exchanges, see `Conversation`; None returns all messages."""
    roles = [message["role"] for message in messages]
    begins = [i + 1 for i, pair in enumerate(pairwise(roles)) if pair[0] == AGENT != pair[1]]
    if exchanges is None or len(begins) < exchanges:
        return list(messages)
    opening = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    return [*messages[:opening], *messages[max(opening, begins[-exchanges]) :]]


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _cut(name: str) -> str:
    return name[:1] + _CUT + name[1:]


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: Any, size: int) -> dict[int, str]:
    """Return the text of each token that decoding leaves out; `size` makes a tokenizer that grew another one."""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)), **added}


def _template(tokenizer: Any, chosen: str | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
    if chosen is None and not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template; take that of an instruct model, or pass one as "
            "template_options={'chat_template': ...}"
        )
    try:
        template = str(tokenizer.get_chat_template(chosen, tools or None))
    except ValueError as error:
        raise ModelError(f"no chat template chosen: {' '.join(str(error).split()):.300}") from error
    if tools and not re.search(r"\btools\b", template):
        raise ModelError(
            "this chat template shows no tools to the model; take one for tool use, or describe them in a message"
        )
    return template

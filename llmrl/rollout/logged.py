"""A logged dialogue by token ids: what an agent said somewhere else, as the model at hand would have said it.

The contexts are those that `Conversation` makes for an engine, so a policy that is trained on logs sees in service what it saw
in training. An answer is encoded apart from its prompt, as if it had been sampled, and ends with the token by which the
template ends a turn. Decoding it gives the logged text back, or the dialogue is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmrl.errors import DataError, ModelError
from llmrl.rollout.chat import AGENT, Conversation
from llmrl.types import Message, Turn

_MARK = "@llmrl:logged;"


class LoggedConversation(Conversation):
    """A `Conversation` whose answers are given as text."""

    def say(self, message: Message) -> Message:
        """Record an answer that was logged; it follows `prompt`.

        Raises:
            DataError: decoding its tokens does not give the text back, or it holds a control token.
            ModelError: the template ends an answer with no control token, so a policy could not stop.
        """
        step = self._steps.get(True)
        if step is None:
            raise DataError("say() found no prompt since the last message: call prompt() first")
        ids = (*self._said(message.content), self._end_token())
        turn = Turn(message, ids, (1,) * len(ids), segment=step.turns[-1].segment)
        self._turns += (*step.turns, turn)
        self._context = step.context + ids
        self._text = step.text
        self._messages.append(message)
        self._shown.append(self._safe({"role": AGENT, "content": message.content}, False))
        self._recorded = len(self._messages)
        self._rewards, self._steps = {}, {}
        return message

    def _said(self, text: str) -> list[int]:
        """Return the tokens of an answer: as they follow other text, or, where that cannot be told, as they stand alone."""
        if names := self._control_names(text):
            raise DataError(
                f"an answer holds the control token {min(names)!r}, which would end or begin a turn: take it out"
            )
        newline = self._plain_ids("\n")
        follows, alone = self._ids_after_text(text), self._plain_ids(text)
        before = self._decode(newline)
        if self._decode([*newline, *follows]) == before + text:
            return follows
        if (found := self._decode(alone)) == text:
            return alone
        raise DataError(
            f"the tokens of an answer decode to another text, {found!r:.60} instead of {text!r:.60}: this tokenizer cannot "
            "write it; take white space from its ends, or another model"
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _end_token(self) -> int:
        shown = [*self._shown, {"role": AGENT, "content": _MARK}]
        _, _, tail = self._render(shown, False).rpartition(_MARK)
        ids = self._ids_after_text(tail.lstrip()) if tail.strip() else []
        if not ids or ids[0] not in self._control:
            raise ModelError(
                f"the chat template writes {tail!r:.40} after an answer, no control token first: a policy could not "
                "end its turn; take a template that ends each turn with a token of its own"
            )
        return ids[0]


def encode_messages(
    tokenizer: object,
    messages: Sequence[Message],
    *,
    open_end: bool = False,
    special_tokens: str = "spell",
    window: int | None = None,
) -> tuple[Turn, ...]:
    """Return the turns of a logged dialogue with their token ids; the agent's have a loss mask of ones.

    Args:
        tokenizer: with a chat template.
        messages: what was said; the assistant is the agent.
        open_end: add the generation prompt behind the last message, where the dialogue was cut off and could go on.
        special_tokens, window: see `Conversation`; a window that messages leave gives several segments.

    Raises:
        DataError: the template refuses or leaves out a message, rewrites what came before, or an answer cannot be written.
        ModelError: there is no template, or one without an end of turns.
    """
    talk = LoggedConversation(tokenizer, special_tokens=special_tokens, window=window)
    for message in messages:
        if message.role != AGENT:
            talk.add(message)
            continue
        if message.tool_calls:
            raise DataError("calls to tools in a logged dialogue are read from its text: put them into the content")
        if message is messages[0]:
            raise DataError(
                "the agent speaks first, and nothing stands before it that a template could render: begin the dialogue with a "
                "system message that says what the agent is to do"
            )
        talk.prompt()
        talk.say(message)
    if open_end and messages and messages[-1].role != AGENT:
        talk.prompt()
    turns = talk.turns
    if turns and turns[-1].segment and window is None:
        raise DataError(
            "the chat template rewrites what was said before (it drops or moves text of earlier turns): take another"
        )
    return turns

"""The charity talk with a user who is a model: one that learnt from logs, or an LLM that is told the rules.

The rules of the talk are the user's to keep: what they say decides how it goes on. The agent earns what it costs, -0.05 a turn,
and the dollars that the user says they give. No best return is known of it; 1.80 is that of a user who keeps the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.hindsight.envs.charity import COST, TURNS, TYPES
from llmrl.hindsight.envs.charity_words import WORDS, understand
from llmrl.hindsight.envs.common import normalised, row_value
from llmrl.rollout.environment import Step
from llmrl.rollout.users import Chat, as_user
from llmrl.types import Message

_WANTS = {
    "facts": "facts and numbers",
    "story": "a story about one person",
    "small": "to be asked for a very small amount, because money is tight",
}


class CharityTalk:
    """One talk with a model as the user.

    Args:
        row: see `llmrl.hindsight.envs.charity.Charity`.
        seed: of what the user says.
        chat: the model.
        told: give it `instructions` as its persona, not `persona` alone.
    """

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, row: Mapping[str, Any], seed: int, chat: Chat, *, told: bool = False) -> None:
        wants = row_value(row, "type", TYPES)
        self.words = row_value(row, "words", list(WORDS), "short")
        self._speak = as_user(chat, instructions(wants, self.words) if told else persona(wants), seed)
        self.messages: list[Message] = []
        self.turns = 0

    def observe(self) -> list[Message]:
        """Answer the call."""
        return [self._say()]

    def step(self, answer: Message) -> Step:
        """Let the user react to what the agent says."""
        self.messages.append(answer)
        self.turns += 1
        said = self._say()
        reply = reply_of(said.content)
        gives = reply.removeprefix("gives ") if reply and reply.startswith("gives ") else None
        over = gives is not None or reply in ("leaves", "no time") or self.turns == TURNS
        act, exact = understand(answer.content, self.words)
        metadata = {
            "invalid": act is None,
            "off_template": not exact,
            "act": act,
            "reply": reply,
            "unheard": reply is None,
        }
        return Step([said], rewards={"reward": float(gives or 0) - COST}, done=over, metadata=metadata)

    def _say(self) -> Message:
        self.messages.append(Message("user", self._speak(tuple(self.messages))))
        return self.messages[-1]


def reply_of(text: str) -> str | None:
    """Return the reply that a user's text stands for, a key of `Words.replies`: that of the last sentence of theirs in it.

    What holds none of these sentences means nothing, however it sounds: a model that talks around them is counted, not guessed.
    """
    plain = f" {normalised(text)} "
    places = [
        (plain.rfind(f" {normalised(sentence)} "), reply)
        for words in WORDS.values()
        for reply, sentences in words.replies.items()
        for sentence in sentences
    ]
    place, reply = max(places)
    return reply if place >= 0 else None


def persona(wants: str) -> str:
    """Return the system message of a model that learnt from logs how users of each type talk."""
    return f"You are called by a charity. You want {wants}."


def instructions(wants: str, words: str = "short") -> str:
    """Return the system message of an LLM that never saw a log: the user's rules, and sentences for what there is to say."""
    said = {reply: sentences[0] for reply, sentences in WORDS[words].replies.items()}
    return f"""You play a person who is called by a charity. You want {_WANTS[wants]}. Do not say so unless you are asked.
Your warmth begins at 0. React to the last thing that the caller said with one of these sentences, word for word:
- the call begins: {said["opening"]}
- they ask what you want: {said[f"wants {wants}"]}
- they give you what you want: your warmth grows by 1, up to 2. At 1: {said["helped"]} At 2: {said["convinced"]}
- they give you something else: the first time: {said["annoyed"]} The second time: {said["leaves"]}
- they ask for money: at warmth 0: {said["gives 0"]} At 1: {said["gives 1"]} At 2: {said["gives 2"]}
- after their fifth turn, if they did not ask for money: {said["no time"]}"""

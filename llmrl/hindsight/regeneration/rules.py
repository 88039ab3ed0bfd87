"""What a finished dialogue earned, by the words in it, for data sets whose outcome can be read.

A rule reads texts that models wrote too. `agreement` says on the logs, where the outcome is known, how far it can be trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from llmrl.errors import UsageError
from llmrl.hindsight.dialogues import AGENT
from llmrl.hindsight.envs.charity import COST
from llmrl.hindsight.envs.charity_users import reply_of
from llmrl.types import Message

Rule = Callable[[Sequence[Message]], tuple[float, ...]]
"""Messages of a finished dialogue to a reward for each."""

_MOST_DOLLARS = 2.0  # that a participant of PersuasionForGood was paid and could give away
_AMOUNT = re.compile(
    r"\$\s?(?P<dollars>\d[\d,]*(?:\.\d+)?|\.\d+)|(?P<number>\d+(?:\.\d+)?|\.\d+)\s?(?P<unit>\$|dollars?|bucks?|cents?|¢)"
    r"|\b(?P<word>one|two|a) dollars?\b|\b(?P<half>half)\b|\b(?P<all>all of (?:it|my)|full (?:amount|payment)|everything)\b",
    re.IGNORECASE,
)
_REFUSES = re.compile(
    r"\b(?:not|never|cannot|unable to|rather not)\b[^.!?,;]{0,25}\b(?:donat|giv|contribut|afford|interested)"
    r"|n['’]t\b(?! mind)[^.!?,;]{0,25}\b(?:donat|giv|contribut|afford)|\bno,? thank|\bno interest in (?:donat|giv)(?!\w* more)",
    re.IGNORECASE,
)
_GIVES = re.compile(
    r"\b(?:donat\w*|giv(?:e|ing)|contribut\w*|spare|sure|yes|ok|okay|willing|(?:like|love) to)\b", re.IGNORECASE
)
_DEAL = re.compile(
    r"I propose this deal: I get (\d) food, (\d) water, (\d) firewood; you get (\d) food, (\d) water, (\d) firewood",
    re.IGNORECASE,
)
_WORTH = re.compile(r"(High|Medium|Low) priority, (\d) points a package: (food|water|firewood)", re.IGNORECASE)
_ISSUES = ("food", "water", "firewood")
_ALL_POINTS, _NO_DEAL = 36, 5


def charity_rule(messages: Sequence[Message]) -> tuple[float, ...]:
    """Return what the charity talk earned: its cost a turn, and the dollars that the user says they give."""
    rewards = [-COST if message.role == AGENT else 0.0 for message in messages]
    last = max(i for i, message in enumerate(messages) if message.role == AGENT)
    replies = [reply_of(message.content) for message in messages[last + 1 :]]
    given = [int(reply.removeprefix("gives ")) for reply in replies if reply and reply.startswith("gives ")]
    rewards[last] += float(sum(given[-1:]))
    return tuple(rewards)


def donation_rule(messages: Sequence[Message]) -> tuple[float, ...]:
    """Return the dollars that the user of PersuasionForGood says last that they give, from 0 to 2; a refusal takes it back.

    A promise is not a donation; how well it tells the donation is for `agreement` to say.
    """
    promised = 0.0
    for i, message in enumerate(messages):
        if message.role != "user":
            continue
        text = message.content
        if _REFUSES.search(text):
            promised = 0.0
            continue
        amount = _amount(text)
        asked = _amount(messages[i - 1].content) if i and messages[i - 1].role == AGENT else None
        if amount is not None and _GIVES.search(text):
            promised = amount
        elif asked is not None and re.match(
            r"\W*(?:yes|sure|ok|okay|of course|alright|absolutely)\b", text, re.IGNORECASE
        ):
            promised = asked
    return at_the_end(messages, min(promised, _MOST_DOLLARS))


def camp_rule(messages: Sequence[Message]) -> tuple[float, ...]:
    """Return what the agent of CaSiNo earned: its points by the last deal that was accepted, as a share of all 36.

    Who accepts must not be who proposed. No deal, and walking away, are worth the 5 points of the rules.
    """
    worth = {issue.lower(): int(points) for _, points, issue in _WORTH.findall(messages[0].content)}
    points, offer = float(_NO_DEAL), None
    for message in messages:
        if found := _DEAL.search(message.content):
            offer = (message.role, [int(n) for n in found.groups()])
        elif "i accept this deal" in message.content.lower() and offer is not None and offer[0] != message.role:
            mine = offer[1][:3] if offer[0] == AGENT else offer[1][3:]
            points = float(sum(count * worth.get(issue, 0) for count, issue in zip(mine, _ISSUES, strict=True)))
    return at_the_end(messages, points / _ALL_POINTS)


RULES: dict[str, Rule] = {"charity": charity_rule, "persuasion_for_good": donation_rule, "casino": camp_rule}
"""By the task of a dialogue."""


def rule_of(task: str) -> Rule:
    """Return the rule of a task.

    Raises:
        UsageError: there is none.
    """
    if task not in RULES:
        raise UsageError(
            f"--reward rule: there is no rule for dialogues of task {task!r}, only for {', '.join(sorted(RULES))} and for "
            "--forward scripted; take --reward judge=MODEL or regression=MODEL"
        )
    return RULES[task]


def _amount(text: str) -> float | None:
    """Return the last sum of money that a text names, in dollars."""
    found = None
    for match in _AMOUNT.finditer(text):
        if match["dollars"]:
            found = float(match["dollars"].replace(",", ""))
        elif match["number"]:
            found = float(match["number"]) / (100 if match["unit"].lower().startswith(("cent", "¢")) else 1)
        elif match["word"]:
            found = 2.0 if match["word"].lower() == "two" else 1.0
        elif match["half"]:
            found = _MOST_DOLLARS / 2
        else:
            found = _MOST_DOLLARS
    return found


def at_the_end(messages: Sequence[Message], reward: float) -> tuple[float, ...]:
    """Return rewards of which the agent's last turn has all."""
    last = max(i for i, message in enumerate(messages) if message.role == AGENT)
    return tuple(reward if i == last else 0.0 for i in range(len(messages)))

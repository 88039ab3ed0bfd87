"""Whether an edit can be used: pure functions of the edit, its dialogue and the logs.

The hardest of them is leakage. A controller has read to the end; the agent at that turn had not. An utterance that takes up
what the user says only later would teach the agent to guess, and its value would be that of a guess that is always right.
Quotations can be found (words that run alike, names, numbers, rare words); knowledge that shows in no word cannot be. The words
that say nothing, and capitals that make a name, are those of English: in other languages more is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmrl.hindsight.dialogues import AGENT, Dialogue
from llmrl.hindsight.regeneration.edits import Edit, Refused
from llmrl.types import Message

# words that a quotation has at least: one of them new; one not said before; signs of a script without spaces
_RUN, _LONG_RUN, _RUN_OF_SIGNS = 4, 6, 8
_RARE = 2  # rare words of the user's that are too many
_COMMON = 3  # a word is the agents' own when they say it in so many dialogues
_LEAST_WORDS, _LEAST_CHARACTERS = 30, 200  # that an utterance may have however short those of the logs are
_SPACELESS = (
    "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # Thai, Lao, Japanese, Chinese: a sign is a word here
)
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+(?:['’][^\W_]+)*")
_SIGN = re.compile(rf"[{_SPACELESS}]")
_BEGINS = re.compile(r"(?:\A|\n|[.!?:])[\s\"'“‘(]*\Z")  # what stands before the first word of a sentence
_OTHERS = re.compile(r"<\|[^|\n]{1,40}\|>|^\s*(?:user|assistant|agent|system)\s*:", re.IGNORECASE | re.MULTILINE)
_RUNNING = re.compile(r"(\S)\1{19}")
# English words that say nothing by themselves; a run of these alone is no quotation
_FUNCTION = frozenset(
    """
    a about after again all also am an and any are as at be because been before being but by can could did do does
    doing for from get give go good had has have he help her here him his how i i'd i'll i'm i've if in into is it it's
    its just know let like make me more most much my no not now of on one only or other our out over please really say
    see she so some such tell than thank thanks that that's the their them then there these they thing think this those
    time to today too up us very want was way we well were what when where which who why will with would yes you you'd
    you'll you're you've your
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Limits:
    """What the logs say is usual.

    Attributes:
        words, characters: most of an utterance: half as many again as the agent's longest has.
        common: words that agents say in several dialogues, in lower case.
    """

    words: int
    characters: int
    common: frozenset[str]

    @classmethod
    def of(cls, dialogues: Iterable[Dialogue]) -> Limits:
        """Return the limits that a set of dialogues gives."""
        longest, characters, in_dialogues = 0, 0, Counter[str]()
        for dialogue in dialogues:
            said = [words_of(dialogue.messages[i].content) for i in dialogue.agent_turns]
            longest = max(longest, *(len(words) for words in said))
            characters = max(characters, *(len(dialogue.messages[i].content) for i in dialogue.agent_turns))
            in_dialogues.update({word for words in said for word in words})
        common = frozenset(word for word, count in in_dialogues.items() if count >= _COMMON)
        most = max(_LEAST_CHARACTERS, characters + characters // 2)
        return cls(max(_LEAST_WORDS, longest + longest // 2), most, common)


def check_edit(edit: Edit, dialogue: Dialogue, allowed: Sequence[int], limits: Limits) -> Refused | None:
    """Return why an edit cannot be used, or None; the first of these that holds is the reason.

    Args:
        edit: of a controller.
        dialogue: that it was made for.
        allowed: turns of the agent that may be edited.
        limits: of the logs.
    """
    messages, said = dialogue.messages, edit.utterance.strip()
    if not 0 <= edit.turn < len(messages):
        return _refuse(edit, "turn out of range", f"turn {edit.turn} of a dialogue with turns 0 to {len(messages) - 1}")
    if messages[edit.turn].role != AGENT:
        return _refuse(edit, "not the agent's turn", f"turn {edit.turn} is the {messages[edit.turn].role}'s")
    if edit.turn not in allowed:
        return _refuse(edit, "turn not open", f"turn {edit.turn} lies before the last edit; open are {list(allowed)}")
    words = words_of(said)
    if not words:
        return _refuse(edit, "empty text", f"the utterance has no words: {said[:80]!r}")
    if any("\ud800" <= character <= "\udfff" for character in said):
        return _refuse(edit, "broken text", "half of a surrogate pair")
    if words == words_of(messages[edit.turn].content):
        return _refuse(edit, "same text", "the utterance is what was said")
    if is_endless(said):
        return _refuse(edit, "repetition", f"the utterance repeats itself: {said[:80]!r}")
    if len(words) > limits.words or len(said) > limits.characters:
        return _refuse(
            edit, "too long", f"{len(words)} words, at most {limits.words} (and {limits.characters} characters)"
        )
    if other := _OTHERS.search(said):
        return _refuse(edit, "not the agent's words alone", f"the utterance holds {other[0].strip()!r}")
    if leak := leaked(said, messages, edit.turn, limits.common):
        return _refuse(edit, "leak", f"the user says only later: {leak}")
    return None


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return [word.removesuffix("'s") for word in _WORD.findall(text.lower().replace("’", "'"))]


def is_endless(text: str) -> bool:
    """Tell whether a text goes round in circles: three words four times, few new words, one sign on and on."""
    if _RUNNING.search(text):
        return True
    words = words_of(text)
    if len(words) < 12:
        return False
    threes = Counter(zip(words, words[1:], words[2:], strict=False))
    return max(threes.values()) >= 4 or len(set(words)) < len(words) / 3


def leaked(text: str, messages: Sequence[Message], turn: int, common: frozenset[str] = frozenset()) -> str | None:
    """Return what a text takes up that the world said only after `turn`, or None.

    Args:
        text: what the agent is to say at `turn`.
        messages: of the whole dialogue.
        turn: index of the turn that it replaces.
        common: words that are the agents' own.

    Returns:
        The words: four running, one of them new, or six, one of them not said before; a number or name; or two rare words.
        What was said before, what the agent itself said before the world did, and the agents' own words are not new.
    """
    known = " ".join(message.content for message in messages[:turn])
    later: list[str] = []
    for message in messages[turn:]:
        if message.role == AGENT:
            if not later:
                known += " " + message.content
        else:
            later.append(message.content)
    told = "\n".join(later)  # a message begins a sentence, and no quotation goes over its end
    before, after = set(words_of(known)), words_of(told)
    mine = words_of(text)
    fresh = {word for word in after if word not in before and word not in common and word not in _FUNCTION}
    said_later = [words_of(text) for text in later]
    for length in (_RUN, _LONG_RUN, _RUN_OF_SIGNS):
        quoted = _runs(mine, length) & {run for words in said_later for run in _runs(words, length)}
        for run in sorted(quoted - _runs(words_of(known), length)):
            if _tells(run, fresh, before):
                return " ".join(run)
    names = _names(told)
    telling = [word for word in mine if word in fresh and (word in names or any(c.isdigit() for c in word))]
    if telling:
        return telling[0]
    rare = sorted({word for word in mine if word in fresh and word not in _FUNCTION and len(word) > 3})
    return ", ".join(rare) if len(rare) >= _RARE else None


def _runs(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _tells(run: Sequence[str], fresh: set[str], before: set[str]) -> bool:
    """Tell whether words that run alike are a quotation, and not a way of speaking."""
    signs = sum(_SIGN.match(word) is not None for word in run)
    if signs:
        return len(run) >= _RUN_OF_SIGNS or signs < len(run)
    said = sum(word not in _FUNCTION and word not in before for word in run)
    return any(word in fresh for word in run) or (len(run) >= _LONG_RUN and said >= 1)


def _names(text: str) -> set[str]:
    """Return, in lower case, words that begin with a capital where no sentence begins."""
    found = {
        match[0].lower().replace("’", "'").removesuffix("'s")
        for match in _WORD.finditer(text)
        if match[0][0].isupper()
        and not _BEGINS.search(text[max(0, match.start() - 8) : match.start()] if match.start() else "")
    }
    return found - _FUNCTION


def _refuse(edit: Edit, reason: str, detail: str) -> Refused:
    return Refused(reason, detail, edit)

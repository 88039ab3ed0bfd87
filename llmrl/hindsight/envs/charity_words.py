"""The sentences of the charity talk, and how the agent's are understood.

Two sets: "short" (2 sentences an act, 4 to 6 words) and "long" (4 sentences an act, 8 to 14 words); every reply of the user
has 2. Each sentence of the agent holds a key word of its own act and none of another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmrl.hindsight.envs.common import normalised

APPEALS = ("facts", "story", "small")
ACTS = ("ask", *APPEALS, "request")
KEY_WORDS: dict[str, frozenset[str]] = {
    "ask": frozenset({"know", "prefer", "matters"}),
    "facts": frozenset({"facts", "numbers", "report", "percent"}),
    "story": frozenset({"story", "maria", "girl"}),
    "small": frozenset({"small", "tiny", "coin", "cent", "cents", "penny"}),
    "request": frozenset({"donate", "donation", "give", "contribute"}),
}


@dataclass(frozen=True)
class Words:
    """One set of sentences: what stands for each act of the agent, and for each reply of the user."""

    acts: Mapping[str, tuple[str, ...]]
    replies: Mapping[str, tuple[str, ...]]


WORDS: dict[str, Words] = {
    "short": Words(
        acts={
            "ask": ("What would you like to know?", "Tell me what you prefer."),
            "facts": ("The facts prove our work.", "The numbers show real results."),
            "story": ("Hear the story of Amina.", "Maria found a home again."),
            "small": ("Even one cent would help.", "A small coin is enough."),
            "request": ("Will you donate something today?", "Please make a donation now."),
        },
        replies={
            "opening": ("Hello, what is this about?", "Yes, who is calling me?"),
            "wants facts": ("I trust only real numbers.", "Show me the facts first."),
            "wants story": ("I like to hear stories.", "Tell me about one child."),
            "wants small": ("I can only spare cents.", "My money is very tight."),
            "helped": ("That sounds good to me.", "I begin to like this."),
            "convinced": ("I am fully convinced now.", "You have won me over."),
            "annoyed": ("That does not help me.", "I do not like this."),
            "leaves": ("Enough, I hang up now.", "Goodbye, I am leaving now."),
            "gives 0": ("No, you get no money.", "Sorry, I give you nothing."),
            "gives 1": ("Fine, take one dollar then.", "Here is one dollar, goodbye."),
            "gives 2": ("Gladly, here are two dollars.", "Yes, please take two dollars."),
            "no time": ("I have no more time.", "Time is over, I must go."),
        },
    ),
    "long": Words(
        acts={
            "ask": (
                "Before I go on, may I ask what you would like to know?",
                "What matters most to you when somebody asks for your help?",
                "People differ, so please tell me which kind of reason you prefer.",
                "I would like to know what would make this worthwhile for you.",
            ),
            "facts": (
                "Independent auditors report that most of our money reaches the children directly.",
                "The facts are that ten thousand children got school meals last year.",
                "Our numbers show that nine in ten pupils now finish their school.",
                "Ninety percent of our budget pays for food, books and medicine.",
            ),
            "story": (
                "Let me tell you the story of Amina, who lost her home.",
                "Maria walked for two days until our doctors found her and helped.",
                "A girl from the mountains wrote to us about her first day at school.",
                "There is a story I remember about a boy and his new shoes.",
            ),
            "small": (
                "Even a few cents a week would already buy one school book.",
                "All that I am asking for today is one very small coin.",
                "A penny a day is enough to begin with, and nobody needs more.",
                "You could start with something tiny, such as the change in your pocket.",
            ),
            "request": (
                "Would you be willing to donate to the children through us today?",
                "May I ask you now to make a donation to our charity?",
                "Please decide today how much you want to give to these children.",
                "I hope that you will contribute to our work right now.",
            ),
        },
        replies={
            "opening": (
                "Hello, I have a few minutes, so what is this call about?",
                "Good morning, who are you and what can I do for you?",
            ),
            "wants facts": (
                "I want to see evidence, such as numbers and reports, before I decide.",
                "Please show me plain facts, because promises alone do not convince me.",
            ),
            "wants story": (
                "I would rather hear about one real child than about a budget.",
                "Tell me a story about somebody whose life has really changed.",
            ),
            "wants small": (
                "My money is tight this month, so I can spare very little.",
                "I never spend much at once, so please keep it really small.",
            ),
            "helped": (
                "That sounds good, and I am beginning to like what you do.",
                "I see, that is a fair point and it speaks to me.",
            ),
            "convinced": (
                "You have won me over, and I am now fully convinced.",
                "There is nothing more to explain, because I believe in your work.",
            ),
            "annoyed": (
                "Honestly, that does not interest me and you are losing my patience.",
                "I do not see why you are telling me any of this.",
            ),
            "leaves": (
                "That is enough, I am going to hang up now, goodbye.",
                "You do not listen to me at all, so I am leaving.",
            ),
            "gives 0": (
                "No, I am sorry, but you will get no money from me.",
                "I do not think so, today I am giving nothing at all.",
            ),
            "gives 1": (
                "All right, I can let you have one dollar, but no more.",
                "Fine, here is one dollar for the children, and now goodbye.",
            ),
            "gives 2": (
                "Gladly, please take these two dollars and thank you for calling.",
                "Yes, of course, here are two dollars for your good work.",
            ),
            "no time": (
                "I am sorry, but my time is over and I must go.",
                "We have talked for too long, so I have to leave you.",
            ),
        },
    ),
}


_ACT_OF = {name: {normalised(t): act for act, ts in w.acts.items() for t in ts} for name, w in WORDS.items()}
_REPLY_OF = {
    normalised(t): (name, reply) for name, w in WORDS.items() for reply, texts in w.replies.items() for t in texts
}


def understand(text: str, words: str) -> tuple[str | None, bool]:
    """Return the act that a sentence of the agent stands for, and whether it is a sentence of the set.

    Any other sentence stands for the one act that it holds key words of; without one, or with several, for None.
    """
    plain = normalised(text)
    act = _ACT_OF[words].get(plain)
    if act is not None:
        return act, True
    found = [name for name, keys in KEY_WORDS.items() if keys & set(plain.split())]
    return (found[0] if len(found) == 1 else None), False


def heard(text: str) -> tuple[str, str] | None:
    """Return the set and the reply that a sentence of the user belongs to, or None."""
    return _REPLY_OF.get(normalised(text))

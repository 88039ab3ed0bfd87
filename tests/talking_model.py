"""What a model behind an endpoint answers when dialogues are regenerated: a function of the messages and the seed alone."""

import json
import random
import re

SAID = (
    "What would you like to know?",
    "A small coin is enough.",
    "Hear the story of Amina.",
    "Will you donate something today?",
)
HEARD = ("That sounds good to me.", "I do not like this.", "I trust only real numbers.")
OVER = ("Here is one dollar, goodbye. [END]", "[END]", "Sorry, I give you nothing. [END]")


def role_of(body):
    """Tell who is asked: controller, judge, user or agent."""
    system = body["messages"][0]["content"]
    for mark, role in (
        ("You review", "controller"),
        ("You are shown", "controller"),
        ("You judge", "judge"),
        ("You are the user", "user"),
    ):
        if system.startswith(mark):
            return role
    return "agent"


def turns_of(body):
    """Return the numbers of the agent's turns in a transcript."""
    return [int(n) for n in re.findall(r"^\[(\d+)\] Agent", body["messages"][-1]["content"], re.MULTILINE)]


def say(body, bad=0.25):
    """Answer a request; a share of a controller's answers cannot be used."""
    luck = random.Random(json.dumps([body["messages"], body["seed"]]))
    role = role_of(body)
    if role == "controller":
        wrong = luck.random() < bad
        if wrong and luck.random() < 0.5:
            return completion("The agent should have been nicer.")
        turn = luck.choice([0, 99]) if wrong else luck.choice(turns_of(body))
        edit = {"turn": turn, "diagnosis": "it never asked", "utterances": [luck.choice(SAID)]}
        return completion(json.dumps({"edits": [edit]}))
    if role == "judge":
        return completion(json.dumps({"reason": "so it is", "score": luck.randint(0, 10)}))
    if role == "user":
        return completion(luck.choice(OVER if luck.random() < 0.4 else HEARD))
    return completion(luck.choice(SAID))


def completion(text):
    """Return a whole answer of an endpoint, with usage."""
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 50, "completion_tokens": len(text.split())}
    return 200, json.dumps({"choices": [choice], "usage": usage})

"""Users who are models: the user's side of logs, what their words mean, and whom they are asked of."""

import pytest
from chat_endpoint import ChatServer
from hindsight_models import dialogue

from llmrl.errors import UsageError
from llmrl.hindsight.dialogues import BadDialogue, Dialogue
from llmrl.hindsight.envs import charity
from llmrl.hindsight.envs.charity_users import CharityTalk, instructions, persona, reply_of
from llmrl.hindsight.envs.charity_words import WORDS
from llmrl.hindsight.envs.common import play
from llmrl.hindsight.users import open_user, user_side
from llmrl.rollout.users import OPENER, as_user
from llmrl.types import Message


def texts(messages):
    return [(m.role[0], m.content) for m in messages]


def test_the_users_side_of_a_dialogue():
    one = dialogue("a", "Hello.", "Hi, who is it?", "Ann.", "Goodbye.", rewards=(0.5, 1.0))
    found = user_side(one, "You are Ann.")
    said = [("s", "You are Ann."), ("u", OPENER), ("a", "Hello."), ("u", "Hi, who is it?"), ("a", "Ann.")]
    assert texts(found.messages) == said
    assert (found.total, found.id, found.provenance["side"]) == (0, "a", "user")


def test_what_only_the_agent_sees_is_no_part_of_it():
    messages = (
        Message("system", "Sell."),
        Message("user", "Hello."),
        Message("assistant", "Buy?"),
        Message("user", "No."),
    )
    found = user_side(Dialogue("a", messages, (0.0,) * 4), "P")
    assert texts(found.messages)[2:] == [("a", "Hello."), ("u", "Buy?"), ("a", "No.")]


def test_a_dialogue_in_which_the_user_says_nothing():
    with pytest.raises(BadDialogue):
        user_side(Dialogue("a", (Message("system", "Sell."), Message("assistant", "Buy?")), (0.0, 1.0)), "P")


def test_a_model_is_asked_what_it_was_trained_on():
    """Every prompt of `as_user` in a talk is the beginning of what `user_side` makes of that talk."""
    asked = []

    def chat(messages, seed):
        asked.append(tuple(messages))
        return "Hello." if len(asked) == 1 else "Well."

    speak = as_user(chat, "You are Ann.", 0)
    talk = [Message("user", speak([]))]
    talk += [Message("assistant", "Hi.")]
    talk += [Message("user", speak(talk))]
    found = user_side(Dialogue("a", tuple(talk), (0.0,) * 3), "You are Ann.").messages
    assert [found[: len(prompt)] for prompt in asked] == asked
    assert [len(prompt) for prompt in asked] == [2, 4]


@pytest.mark.parametrize("words", sorted(WORDS))
def test_a_model_that_keeps_the_rules_gives_what_the_script_gives(words):
    """The scripted user behind the interface of a model: same act, same reward, same end."""
    for row in charity.rows(words):
        for seed in range(3):
            script = charity.Charity(row, seed)
            world = CharityTalk(row, seed, lambda messages, _, s=script: reply(s, messages))
            mine = play(world, charity.best_action, id="m", task="charity")
            theirs = play(charity.Charity(row, seed), charity.best_action, id="m", task="charity")
            assert (mine.messages, mine.rewards, mine.done) == (theirs.messages, theirs.rewards, theirs.done)


def reply(script, messages):
    """Answer as a script would; the messages are the user's own view."""
    if len(messages) == 2:
        return script.observe()[0].content
    return script.step(Message("assistant", messages[-1].content)).messages[0].content


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Here is one dollar, goodbye.", "gives 1"),
        ("OK! Gladly, here are two dollars...", "gives 2"),
        ("Hello, what is this about? No, you get no money.", "gives 0"),  # the last one counts
        ("that does NOT help me", "annoyed"),
        ("Nothing annoys me more than calls.", None),
        ("I might give two dollars if you had a story.", None),
        ("Who is this?", None),
    ],
)
def test_what_a_users_words_mean(text, found):
    assert reply_of(text) == found


def test_every_sentence_of_the_script_means_its_reply():
    for words in WORDS.values():
        for name, sentences in words.replies.items():
            assert {reply_of(text) for text in sentences} == {name}


def test_a_talk_ends_after_five_turns_whatever_the_user_says():
    world = CharityTalk(charity.rows()[0], 0, lambda messages, seed: "Who is this?")
    world.observe()
    steps = [world.step(Message("assistant", "Even one cent would help.")) for _ in range(charity.TURNS)]
    assert [step.done for step in steps] == [False] * 4 + [True]
    assert sum(step.rewards["reward"] for step in steps) == pytest.approx(-0.25)


def test_who_plays_without_logs_is_told_the_rules():
    told = instructions("facts", "long")
    assert all(
        sentences[0] in told for name, sentences in WORDS["long"].replies.items() if not name.startswith("wants")
    )
    assert len({persona(wants) for wants in charity.TYPES}) == 3


def test_an_endpoint_is_asked_with_the_rules():
    with ChatServer() as server:
        server.answers = ["Hello, what is this about?"]
        with open_user(server.url, "m", None, 48) as chat:
            world = CharityTalk(charity.rows()[1], 5, chat, told=True)
            assert world.observe()[0].content == "Hello, what is this about?"
        (request,) = server.requests
    assert request["messages"][0]["content"] == instructions("story", "short")
    assert (request["model"], request["max_tokens"]) == ("m", 48)


@pytest.mark.parametrize(
    ("user", "model", "key", "says"),
    [
        ("http://127.0.0.1:1/v1", None, None, "expected --user_model"),
        ("a/folder", "m", None, "go with the URL"),
        ("a/folder", None, "KEY", "go with the URL"),
    ],
)
def test_options_of_users_that_do_not_fit(user, model, key, says):
    with pytest.raises(UsageError, match=says), open_user(user, model, key, 8):
        pass

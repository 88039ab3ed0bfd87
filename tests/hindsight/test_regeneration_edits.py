"""What a controller answers: how it is read, what is refused and why, and what gives away what the user says only later."""

import json

import pytest
from hindsight_models import dialogue

from llmrl.hindsight.envs import charity
from llmrl.hindsight.regeneration.edits import BadAnswer, Edit, edit_schema, parse_edits
from llmrl.hindsight.regeneration.validation import Limits, check_edit, is_endless, leaked, words_of
from llmrl.types import Message

GOOD = {"edits": [{"turn": 3, "diagnosis": "Too early.", "utterances": ["What do you like?", "Who are you?"]}]}
TALK = dialogue(
    "talk",
    "Hello there.",
    "Please give us money, friend.",
    "What for?",
    "It is for children.",
    "Ask my neighbour Bartholomew, he collects antique teapots and paid 47 of them.",
    "Thank you.",
    rewards=(0.0, 0.0, 1.0),
)
LIMITS = Limits(30, 200, frozenset())


def changed(**values):
    return json.dumps({"edits": [{**GOOD["edits"][0], **values}]})


def reason_of(text):
    with pytest.raises(BadAnswer) as found:
        parse_edits(text)
    assert found.value.refused.answer == text
    return found.value.refused.reason


def test_edit_schema_holds_answers_to_what_was_asked_for():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(json.dumps(edit_schema((1, 3), 1, 2)))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(GOOD)
    wrong = [
        {"edits": []},
        {"edits": GOOD["edits"] * 2},
        json.loads(changed(turn=2)),
        json.loads(changed(turn=True)),
        json.loads(changed(utterances=["one"])),
        json.loads(changed(utterances=["one", "two", "three"])),
        json.loads(changed(utterances=["one", ""])),
        json.loads(changed(diagnosis="")),
        json.loads(changed(why="no such key")),
        {**GOOD, "note": "no such key"},
        {},
    ]
    assert [validator.is_valid(value) for value in wrong] == [False] * len(wrong)


def test_edit_schema_bounds_every_text():
    edit = edit_schema((1,), 1, 1)["properties"]["edits"]["items"]
    texts = edit["properties"]["diagnosis"], edit["properties"]["utterances"]["items"]
    assert all(0 < text["maxLength"] < 10_000 for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        json.dumps(GOOD, indent=2) + "\n",
        f"```json\n{json.dumps(GOOD)}\n```",
        f" ```\n{json.dumps(GOOD, indent=1)}\n``` \n",
        changed(why="a key too many"),
    ],
)
def test_parse_edits_gives_one_for_each_utterance(text):
    assert parse_edits(text) == [
        Edit(3, "Too early.", "What do you like?", 0),
        Edit(3, "Too early.", "Who are you?", 1),
    ]


def test_parse_edits_of_several_turns_in_the_order_of_the_answer():
    text = json.dumps({"edits": [{**GOOD["edits"][0], "turn": turn} for turn in (5, 3, 99)]})
    assert [edit.turn for edit in parse_edits(text)] == [5, 5, 3, 3, 99, 99]
    assert parse_edits('{"edits": []}') == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The agent was too early at turn 3.",
        f"Here it is: {json.dumps(GOOD)}",
        f"{json.dumps(GOOD)} I hope that helps you.",
        "[1]",
        "null",
        '{"edits": [{"turn": NaN, "diagnosis": "x", "utterances": ["y"]}]}',
        '{"edits": [{"turn": Infinity, "diagnosis": "x", "utterances": ["y"]}]}',
        "{'edits': []}",
    ],
)
def test_parse_edits_refuses_prose(text):
    assert reason_of(text) == "prose"


@pytest.mark.parametrize("left", [9, 14, 26, 40, 60, 75, len(json.dumps(GOOD)) - 1])
def test_parse_edits_tells_an_answer_that_breaks_off(left):
    assert reason_of(json.dumps(GOOD)[:left]) == "cut off"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"edits": null}',
        '{"edits": {"turn": 3}}',
        '{"edits": ["say hello"]}',
        '{"Edits": []}',
        changed(turn="3"),
        changed(turn=3.0),
        changed(turn=True),
        changed(turn=None),
        changed(diagnosis=None),
        changed(utterances="What do you like?"),
        changed(utterances=[]),
        changed(utterances=["good", 5]),
        changed(utterances=[["nested"]]),
        changed(turn=1e999).replace("Infinity", "1e999"),
    ],
)
def test_parse_edits_refuses_another_schema(text):
    assert reason_of(text) == "not the schema"


@pytest.mark.parametrize("depth", [500, 950, 2000, 100_000])
@pytest.mark.parametrize("ends", [True, False])
def test_parse_edits_of_a_deep_nest_is_a_bad_answer(depth, ends):
    with pytest.raises(BadAnswer):
        parse_edits('{"edits": ' + "[" * depth + ("]" * depth + "}" if ends else ""))


@pytest.mark.parametrize(
    ("turn", "said", "allowed", "reason"),
    [
        (6, "Why not?", (1, 3, 5), "turn out of range"),
        (-1, "Why not?", (1, 3, 5), "turn out of range"),
        (2, "Why not?", (1, 3, 5), "not the agent's turn"),
        (1, "Why not?", (3, 5), "turn not open"),
        (3, " \n\t", (3, 5), "empty text"),
        (3, "Why \ud83d not?", (3, 5), "broken text"),
        (3, "  it is for CHILDREN!! ", (3, 5), "same text"),
        (3, "It is for animals.", (3, 5), None),
        (3, "We help them now. " * 4, (3, 5), "repetition"),
        (3, "Hm" + "." * 20, (3, 5), "repetition"),
        (3, " ".join(f"word{chr(97 + i)}" for i in range(31 - 5)) + " one two three four five", (3,), "too long"),
        (3, " ".join(f"word{chr(97 + i)}" for i in range(26)) + " one two three four", (3,), None),
        (3, "Do you know Bartholomew?", (3, 5), "leak"),
        (5, "Do you know Bartholomew?", (3, 5), None),  # the user has said so by then
    ],
)
def test_check_edit_reasons(turn, said, allowed, reason):
    found = check_edit(Edit(turn, "x", said), TALK, allowed, LIMITS)
    assert (found and found.reason) == reason
    if found is not None:
        assert found.edit == Edit(turn, "x", said)
        assert found.detail


def test_check_edit_accepts_whatever_the_script_would_say():
    logs = charity.logs(60, 3)
    limits = Limits.of(logs)
    for one in logs:
        for turn in one.agent_turns:
            before = one.messages[:turn]
            for text in charity.best_texts(before):
                if words_of(text) != words_of(one.messages[turn].content):
                    assert check_edit(Edit(turn, "x", text), one, one.agent_turns, limits) is None


def test_limits_of_logs():
    long = dialogue("a", "Hi.", "word " * 40, "Go.", "rare", "Go on.", "rare rare")
    others = [dialogue(name, "word", "Hello common friend") for name in "bcd"]
    others += [dialogue(name, "word", "Twice") for name in "ef"]
    assert Limits.of([long, *others]) == Limits(60, 300, frozenset({"hello", "common", "friend"}))
    assert Limits.of(others).words == 30


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", False),
        ("no no no no no no no no", False),  # short
        ("we can help you today " * 3, False),  # a third of the words are new
        ("one two three and then one two three or else one two three but also one two three", True),
        ("one two three and then one two three or else one two three but also one two four", False),
        ("a" * 19, False),
        ("well " + "a" * 20, True),
        (" ".join(f"w{i}" for i in range(200)), False),
    ],
)
def test_is_endless(text, found):
    assert is_endless(text) is found


def test_is_endless_counts_new_words():
    words = [f"w{i}" for i in range(5)]
    assert not is_endless(" ".join([*words, *words[::-1], *words[::2]]))  # 5 of 13 are new
    assert is_endless(" ".join([*words, *words[::-1], *words[::2], *words[1::2], "w0"]))  # 5 of 16


def told(*texts):
    """Return messages in turn, the user first; the agent is to speak at 1."""
    return dialogue("d", *texts).messages


LATER = told(
    "Hello.", "Good morning.", "I never donate since my brother lost $350 with a charity in Oslo.", "I see.", "So it is."
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "leak"),
    [
        ("Maybe your BROTHER LOST $350, did he?", "350"),
        ("We are not in oslo.", "oslo"),
        ("Did he lose 350?", "350"),
        ("Is it that your brother lost something there?", "brother, lost"),
        ("You donate since your brother lost.", "brother, donate, lost, since"),
        ("Have you a brother?", None),  # one rare word alone
        ("I see what you mean, so it is.", None),
        ("I will, and it was so with a new one.", None),
        ("Did he lose 35 or 3500?", None),
        ("", None),
    ],
)
def test_leaked_names_numbers_and_rare_words(text, leak):
    assert leaked(text, LATER, 1) == leak


def test_leaked_quotations_are_four_words_one_of_them_new():
    later = told("Hello.", "Yes?", "My old house needs a new roof this year.", "Oh.")
    common = frozenset(words_of("my old needs new roof this year"))
    assert leaked("Your old house needs a lot.", later, 1, common) == "old house needs a"
    assert leaked("Your old house needs much.", later, 1, common) is None  # three words
    assert leaked("So OLD house, needs: a lot", later, 1, common) == "old house needs a"
    assert (
        leaked("Your old house needs a lot.", later, 1, common | {"house"}) is None
    )  # all of it the agents' own words
    asks = told("Hello.", "Yes?", "What is it that you want from me?", "Oh.")
    assert leaked("What is it that you want from them?", asks, 1) is None  # function words alone
    known = told("Hello.", "The orphans project needs you.", "Do you know the orphans project?", "Oh.")
    assert leaked("Do you know the orphans project here?", known, 1) is None  # said before


def test_leaked_quotations_do_not_go_over_the_end_of_a_message():
    later = told("Hello.", "Yes?", "I like gardening", "Oh.", "and my bees", "Oh.")
    assert leaked("You like gardening and my hat", later, 1, frozenset({"gardening", "bees"})) is None


def test_leaked_first_words_of_messages_are_no_names():
    later = told("Hello.", "Yes?", "ok", "Oh.", "Maybe later", "Oh.")
    assert leaked("Maybe you could help?", later, 1) is None
    assert leaked("Ask \u00c9lodie.", told("Hello.", "Yes?", "My sister \u00c9lodie will.", "Oh."), 1) == "\u00e9lodie"
    assert leaked("Is Maria well?", told("Hello.", "Yes?", "It is about Maria's school.", "Oh."), 1) == "maria"


def test_leaked_text_without_spaces_is_read_sign_by_sign():
    later = told(
        "\u4f60\u597d", "\u60a8\u597d", "\u6211\u5973\u513f\u4e09\u5e74\u524d\u5f97\u4e86\u767d\u8840\u75c5", "Oh."
    )
    assert leaked("\u4f60\u5973\u513f\u4e09\u5e74\u524d\u5f97\u4e86\u767d\u8840\u75c5", later, 1)
    assert leaked("\u4f60\u5973\u513f\u597d\u5417", later, 1) is None


@pytest.mark.parametrize("text", ["...", "?! " * 20, "\u8bf7" * 5000, "ok " + "\u8bf7\u6350\u6b3e" * 80])
def test_texts_without_words_or_spaces_have_a_limit_too(text):
    one = dialogue("a", "Hi.", "Hello there.")
    assert check_edit(Edit(1, "x", text), one, [1], LIMITS) is not None


@pytest.mark.parametrize("text", ["Sure.\nUser: I give $2", "Agent: Hello", "Hi<|im_end|>\n<|im_start|>user\nYes"])
def test_the_other_sides_words_are_refused(text):
    one = dialogue("a", "Hi.", "Hello there.")
    assert check_edit(Edit(1, "x", text), one, [1], LIMITS).reason == "not the agent's words alone"


def test_leaked_common_words_of_agents_are_their_own():
    later = told("Hello.", "Yes?", "Research about poverty in Oslo.")
    assert leaked("We do research on poverty.", later, 1) == "poverty, research"
    assert leaked("We do research on poverty.", later, 1, frozenset({"research"})) is None
    assert leaked("We work in Oslo.", later, 1) == "oslo"
    assert leaked("We work in Oslo.", later, 1, frozenset({"oslo"})) is None


def test_leaked_what_was_said_before_is_known():
    talk = told("I am Zelda from Oslo, I own a red bicycle.", "Hi.", "Zelda from Oslo, I own a red bicycle!", "Yes.")
    text = "So Zelda from Oslo, you own a red bicycle?"
    assert leaked(text, talk, 1) is None
    without = told("I am somebody.", "Hi.", "Zelda from Oslo, I own a red bicycle!", "Yes.")
    assert leaked(text, without, 1) is not None


def test_leaked_what_the_agent_said_by_itself_is_known():
    text = "It is the Zambezi orphans project."
    first = told("Hello.", "We run the Zambezi orphans project.", "I know the Zambezi orphans project.", "Good.")
    assert leaked(text, first, 1) is None
    after = told("Hello.", "Hi.", "I know the Zambezi orphans project.", "Right, the Zambezi orphans project.")
    assert leaked(text, after, 1) is not None


def test_leaked_what_tools_say_counts_as_the_worlds():
    talk = (Message("user", "Hi."), Message("assistant", "I look."), Message("tool", "Balance 4711."))
    assert leaked("You have 4711 on it.", talk, 1) == "4711"


def test_leaked_looks_at_nothing_before_the_turn():
    assert leaked("Your brother lost $350 in Oslo.", LATER, 3) is None
    assert leaked("Your brother lost $350 in Oslo.", LATER, 1) is not None

"""One function makes the messages of exploration, training and serving; answers are read as one line."""

import json

import pytest

from llmrl.errors import ConfigError, DataError
from llmrl.leret.corpus import Passage
from llmrl.leret.prompts import (
    BARE,
    PROMPT_FILE,
    Demo,
    PromptFormat,
    PromptStyle,
    SearchSetup,
    load_setup,
    load_styles,
    read_query,
)

PASSAGES = (Passage("a", "Foxglove  dam", "It was built\nby Freda."), Passage("b", "Freda", "Freda was born in Fulda."))
FORMAT = PromptFormat(instruction="Write a query.")


def text(prompt_format, passages=PASSAGES, question="Who?", style=None):
    *_, last = prompt_format.messages(style or prompt_format.bare, question, passages)
    assert last.role == "user"
    return last.content


def test_a_prompt_shows_question_passages_question_instruction_on_a_line_each():
    assert text(FORMAT, question=" Who\nbuilt it? ").split("\n") == [
        "Question: Who built it?",
        "[1] Foxglove dam | It was built by Freda.",
        "[2] Freda | Freda was born in Fulda.",
        "Question: Who built it?",
        "Write a query.",
    ]


def test_without_passages_the_question_stands_there_once():
    assert text(FORMAT, ()) == "Question: Who?\nWrite a query."


def test_the_parts_of_a_prompt_can_be_left_out():
    short = PromptFormat(instruction="", passage_words=3, question_again=False)
    assert text(short) == "Question: Who?\n[1] Foxglove dam | It was built\n[2] Freda | Freda was born"
    assert text(PromptFormat(instruction="", passage_words=0)).split("\n")[1] == "[1] Foxglove dam | "


def test_a_system_text_comes_first_and_demos_are_turns_before_the_question():
    demo = Demo("Where?", (("T", "a b c"),), "T born")
    style = PromptStyle("shots", "Ask.", (demo, Demo("When?", (), "date")))
    messages = PromptFormat(system="You search.", passage_words=2).messages(style, "Who?", PASSAGES[1:])
    assert [(m.role, m.content) for m in messages] == [
        ("system", "You search."),
        ("user", "Question: Where?\n[1] T | a b\nQuestion: Where?\nAsk."),
        ("assistant", "T born"),
        ("user", "Question: When?\nAsk."),
        ("assistant", "date"),
        ("user", "Question: Who?\n[1] Freda | Freda was\nQuestion: Who?\nAsk."),
    ]


@pytest.mark.parametrize(
    ("answer", "query"),
    [
        ("foxglove dam", "foxglove dam"),
        ("\n \n  foxglove\tdam \nand why", "foxglove dam"),
        ("Query: foxglove dam", "foxglove dam"),
        ("search query: 'foxglove dam'", "foxglove dam"),
        ('"foxglove dam"', "foxglove dam"),
        ("“Freda” born", "“Freda” born"),
        ("Freda: a life", "Freda: a life"),
        ("'foxglove' 'dam'", "'foxglove' 'dam'"),
        ("\"'foxglove dam'\"", "foxglove dam"),
        ("", ""),
        (" \n", ""),
        ('""', ""),
        ("Query:", ""),
        ("<think>\nThe dam.\n</think>\n\nfoxglove dam", "foxglove dam"),
        ("The dam.\n</think>foxglove dam", "foxglove dam"),  # the template opened it
        ("<think>\nThe dam, which", ""),
    ],
)
def test_a_query_is_the_first_line_with_words_without_label_and_quotes(answer, query):
    assert read_query(answer) == query


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: PromptStyle(" ", "x"), "name: expected text"),
        (lambda: PromptStyle("a/b", "x"), r"without / and \|"),
        (lambda: PromptStyle("a", "x", hops=(0,)), "hops: expected numbers from 1"),
        (lambda: PromptFormat(passage_words=-1), "passage_words"),
        (lambda: PromptFormat(max_tokens=0), "max_tokens"),
        (lambda: PromptFormat(styles=(PromptStyle(BARE, "x"),)), "distinct names, none of them 'bare'"),
        (lambda: PromptFormat(styles=(PromptStyle("a", "x"), PromptStyle("a", "y"))), "distinct names"),
        (lambda: SearchSetup(k=0), "k: expected"),
    ],
)
def test_styles_and_formats_refuse_what_they_cannot_be(make, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make()


def test_a_style_is_used_at_the_hops_it_names():
    assert [PromptStyle("a", "x", hops=(2,)).at(hop) for hop in (1, 2, 3)] == [False, True, False]
    assert all(PromptStyle("a", "x").at(hop) for hop in (1, 2, 3))


def test_a_setup_is_the_same_after_it_was_saved(tmp_path):
    shots = PromptStyle("shots", "Ask.", (Demo("Where?", (("T", "a b"),), "T born", 1),), hops=(2,))
    setup = SearchSetup(PromptFormat("Write.", "sys", 7, False, (shots,), 9), 3, 5, "rrf", True, True, {"seed": "1"})
    setup.save(tmp_path)
    assert load_setup(tmp_path) == setup
    assert load_setup(None, tmp_path / "nowhere", tmp_path) == setup
    assert load_setup(None, tmp_path / "nowhere") is None


def test_the_first_folder_with_a_setup_wins(tmp_path):
    for k, name in ((1, "adapter"), (2, "model")):
        (tmp_path / name).mkdir()
        SearchSetup(k=k).save(tmp_path / name)
    assert load_setup(tmp_path / "adapter", tmp_path / "model").k == 1


@pytest.mark.parametrize(
    "content",
    [
        "{", '{"hops": "two"}', '{"colour": 1}', "[]", '{"format": {"styles": 3}}', '{"format": {"passage_words": "3"}}',
        '{"format": {"template_options": [1]}}', '{"format": {"system": 3}}',
    ],
)  # fmt: skip
def test_a_damaged_setup_is_named(tmp_path, content):
    (tmp_path / PROMPT_FILE).write_text(content)
    with pytest.raises(DataError, match=r"search_prompt.json: not a search prompt"):
        load_setup(tmp_path)


def demo(**changes):
    """A file with one style of one worked example."""
    example = {"question": "Where?", "passages": [["T", "a b"]], "query": "T born", "hop": 1, **changes}
    return json.dumps([{"name": "a", "instruction": "x", "demos": [example]}])


def test_styles_come_from_a_file(tmp_path):
    path = tmp_path / "styles.json"
    path.write_text(json.dumps([{"name": "a", "instruction": "x"}, {"name": "b", "instruction": "y", "hops": [2]}]))
    assert load_styles(path) == (PromptStyle("a", "x"), PromptStyle("b", "y", hops=(2,)))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"not found: .*styles.json \(--prompts\)"),
        ("[", "not JSON"),
        ("{}", "expected a list of styles"),
        ("[]", "expected a list of styles"),
        ('[{"name": "a"}]', "missing instruction"),
        ('[{"name": "a", "instruction": "x", "text": 1}]', "unknown key 'text'"),
        ('[{"name": "a", "instruction": 1}]', "style 1: .*instruction: expected text"),
        ('[{"name": "a", "instruction": "x"}, {"name": "b", "instruction": "y", "hops": ["two"]}]', "style 2: .*hops"),
        ('[{"name": "a", "instruction": "x", "hops": 2}]', "style 1: .*hops: expected numbers from 1, got 2"),
        ('[{"name": "a", "instruction": "x", "demos": 3}]', "style 1: .*demos: expected a list of worked examples"),
        ('[{"name": "a", "instruction": "x", "demos": [3]}]', "style 1: Demo: expected a JSON object"),
        (demo(query=3), "style 1: Demo.query: expected text"),
        (demo(question=None), "style 1: Demo.question: expected text"),
        (demo(passages=["title and text"]), "style 1: Demo.passages: expected a list of"),
        (demo(passages=[["title"]]), "style 1: Demo.passages: expected a list of"),
        (demo(hop="1"), "style 1: Demo.hop: expected an integer"),
        ("[3]", "style 1: PromptStyle: expected a JSON object"),
        ('[{"name": "bare", "instruction": "x"}]', "'bare' is taken"),
        ('[{"name": "a", "instruction": "x"}, {"name": "a", "instruction": "y"}]', "'a' is taken"),
    ],
)
def test_a_wrong_file_of_styles_is_refused_in_a_line(tmp_path, content, complaint):
    path = tmp_path / "styles.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=complaint) as refused:
        load_styles(path)
    assert "styles.json" in str(refused.value)

"""Rules of llmrl.leret.rules against queries written by hand."""

from __future__ import annotations

import dataclasses

import pytest

from llmrl.leret import rules
from llmrl.leret.rules import RULES


@dataclasses.dataclass(frozen=True)
class Shown:
    title: str
    text: str


QUESTION = "Which film has the director who died first, The Prairie King or Ed Wood's Confessions?"
PRAIRIE = Shown(
    "The Prairie King", "The Prairie King is a 1927 American film by B. Reeves Eason. Eason also shot Ben Hur."
)
ED_WOOD = Shown("Ed Wood (film)", "Ed Wood is a film by Tim Burton, an American, about Edward Wood. The script is new.")
PASSAGES = (PRAIRIE, ED_WOOD)


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("question", "Which film has the director who died first The Prairie King or Ed Wood Confessions"),
        ("content", "film director died first Prairie King Ed Wood Confessions"),
        ("capitals", "Prairie King Ed Wood Confessions"),
        # "film" stands in the second title
        ("rest", "director died first Confessions"),
        ("names-1", "American B Reeves Eason Ben Hur"),
        ("question+names-1", f"{' '.join(rules.words(QUESTION))} American B Reeves Eason Ben Hur"),
        ("rest+names-1", "director died first Confessions American B Reeves Eason Ben Hur"),
        # "American" stands in the first passage already; "Wood" in the title
        ("rest+names-2", "director died first Confessions Tim Burton Edward"),
        ("rest+names-best", "director died first Confessions American B Reeves Eason Ben Hur"),
    ],
)
def test_rules_write_the_query_derived_by_hand(name: str, query: str) -> None:
    assert RULES[name](QUESTION, PASSAGES) == query


def test_rules_without_passages_fall_back_to_what_the_question_has() -> None:
    content = "film director died first Prairie King Ed Wood Confessions"
    for name in ("rest", "names-1", "rest+names-1", "rest+names-2", "rest+names-best"):
        assert RULES[name](QUESTION, ()) == content, name
    assert RULES["question+names-1"](QUESTION, ()) == RULES["question"](QUESTION, ())


@pytest.mark.parametrize("name", list(RULES))
def test_rules_never_write_an_empty_query(name: str) -> None:
    everything_covered = (Shown("who is Ed Wood", "he was there"),)
    assert RULES[name]("Who is Ed Wood?", everything_covered).strip()
    # function words alone, and no word at all
    assert RULES[name]("Who is it?", everything_covered) == "Who is it"
    assert RULES[name]("???", ()) == "???"


def test_words_drop_punctuation_entities_and_possessives() -> None:
    assert rules.words("&quot;J&quot; Is for O'Neal's\u2019s mid-1990s_caf\u00e9 (U.S.)") == [
        *("J", "Is", "for", "O", "Neal", "mid", "1990s", "caf\u00e9", "U", "S")
    ]


def test_names_read_only_the_words_that_a_prompt_shows() -> None:
    passage = Shown("Title", "one two Three four Five six")
    assert rules.names("question", [passage], 0, shown_words=3) == ["Three"]
    assert rules.names("question", [passage], 0, shown_words=5) == ["Three", "Five"]


def test_names_ignore_case_and_repetitions() -> None:
    passage = Shown("Title", "Paris PARIS London title LONDON")
    assert rules.names("who saw london", [passage], 0) == ["Paris"]


def test_names_of_a_later_passage_leave_out_the_words_of_earlier_ones_but_not_of_later_ones() -> None:
    passages = [Shown("A", "Rome Paris"), Shown("B", "Paris Oslo"), Shown("C", "Oslo Bern")]
    assert rules.names("q", passages, 0) == ["Rome", "Paris"]
    assert rules.names("q", passages, 1) == ["Oslo"]
    assert rules.names("q", passages, 2) == ["Bern"]


def test_names_of_equal_passages_count_the_earlier_one() -> None:
    passages = [Shown("A", "Rome Paris"), Shown("A", "Rome Paris")]
    assert rules.names("q", passages, 1) == []
    assert rules.names("q", [passages[0], passages[0]], 1) == []


def test_best_title_prefers_the_greatest_share_and_the_first_of_equals() -> None:
    long, short = Shown("Ed Wood and his friends", ""), Shown("Ed Wood", "")
    assert rules.best_title("Who is Ed Wood?", [long, short]) == 1
    assert rules.best_title("Who is Ed Wood?", [short, short]) == 0
    assert rules.best_title("Who is Ed Wood?", [Shown("the", ""), short]) == 1
    assert rules.best_title("Who is Ed Wood?", []) is None

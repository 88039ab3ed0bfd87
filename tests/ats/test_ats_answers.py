import math
import re
import string
from decimal import Decimal

import numpy as np
import pytest

from llmrl.ats.answers import (
    CONFIDENCES,
    answer_confidence,
    answer_confidences,
    answer_tokens,
    before_end,
    chosen_letter,
    exact_match,
    final_number,
    first_line,
    grade,
    letter_match,
    normalise,
    numeric_match,
    plain_prompt,
    question_text,
)
from llmrl.errors import ConfigError, DataError

# --- prompts ----------------------------------------------------------------------------------------------------------


def test_question_text_is_the_mmlu_format():
    fields = {"question": " 2+2? ", "choices": ["3", "4 ", "5", "6"], "answer": 1}
    assert question_text(fields) == plain_prompt(fields) == "2+2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"


def test_question_text_of_a_free_question():
    assert question_text({"question": "Who? ", "answers": ["me"]}) == "Who?"
    assert plain_prompt({"question": "Who? ", "answers": ["me"]}) == "Question: Who?\nAnswer:"


# --- grading ----------------------------------------------------------------------------------------------------------


def squad_normalize(text):
    """As published with SQuAD v1.1 (evaluate-v1.1.py), written down from its description: the order matters."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@pytest.mark.parametrize(
    "text",
    [
        "The U.S.A.",
        "an apple, a day",
        "High-jump",
        "AN",
        "theatre  of\tthe absurd",
        "'Tis",
        "$5.00",
        "a_b",
        "R&B (music)",
        "",
    ],
)
def test_normalise_equals_squads_on_ascii(text):
    assert normalise(text) == squad_normalize(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S.A.", "usa"),
        ("“Café” – the bar", "café bar"),
        ("don’t", "dont"),
        ("ＰＡＲＩＳ！", "paris"),
        ("ﬁne", "fine"),
        ("東京。", "東京"),
        ("ÉCOLE", "école"),
        ("¿Qué?", "qué"),
        ("a\u00a0b", "b"),  # a no-break space is a space
    ],
)
def test_normalise_unicode(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("paris.", ["Paris"], True),
        ("The City of Paris", ["Paris", "city of paris"], True),
        ("Paris, Texas", ["Paris"], False),
        ("Lyon", ["Paris", "City of Paris"], False),
        ("cafe", ["Café"], False),
        ("don't", ["Don’t"], True),
        ("", ["Paris"], False),
        ("  \n", ["Paris"], False),
        ("", [""], False),
        # nothing is left of them, and they are not the same
        ("the", ["A"], False),
        ("A", ["a"], True),
        ("...", ["!!!"], False),
        ("...", ["..."], True),
        ("Paris", [], False),
    ],
)
def test_exact_match(answer, references, right):
    assert exact_match(answer, references) is right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("3 apples and 4 pears, so 7", "7"),
        ("7*6 = 42\n#### 42\nand then 13 more", "42"),
        ("#### 1\n#### 2", "2"),
        ("It costs $1,234.50.", "1234.5"),
        ("between 1,2 and 3,4", "4"),
        ("1,2345", "2345"),
        ("the answer is -10", "-10"),
        ("minus \u22125", "-5"),
        ("-$5", "-5"),
        ("12-5", "5"),  # a difference, not minus five
        ("x-5", "5"),
        ("18.00 dollars", "18"),
        ("４２", "42"),
        ("42 ####", "42"),
        ("12% of 50 is 6.", "6"),
        ("no number", None),
        ("", None),
        ("####", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_final_number_of_thousands_of_digits():
    assert final_number("1" + "0" * 6000) == Decimal(10) ** 6000


def test_numeric_match_any_reference():
    assert numeric_match("so 1,000 it is", ["#### 5", "#### 1000"])
    assert not numeric_match("so 999", ["#### 5", "#### 1000"])
    assert not numeric_match("none", ["none"])


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        (" (C)\n", 2),
        ("**d**", 3),
        ("B. Paris", 1),
        ("C) because A is wrong", 2),
        ("The answer is B", 1),
        ("Answer: (D).", 3),
        ("A dog barks, so the correct answer is C, not D", 2),
        ("I say the answer is A. No, the answer is B!", 1),
        ("option C", 2),
        ("E", None),  # of four
        ("A dog", None),
        ("Both", None),
        ("The answer is France", None),
        ("The answer is a dog", None),
        ("1", None),
        ("", None),
        ("Ä", None),
    ],
)
def test_chosen_letter_of_four(text, index):
    assert chosen_letter(text, 4) == index


def test_letter_match():
    assert letter_match("The answer is B.", 1, 4)
    assert not letter_match("The answer is B.", 2, 4)
    assert not letter_match("no idea", 0, 4)
    assert letter_match("E", 4, 5)


def test_grade_by_number_where_a_reference_is_a_worked_solution():
    assert grade("thus 8 in all", ["4+4 #### 8"])
    assert not grade("8 or 9", ["4+4 #### 8"])
    assert not grade("thus 8 in all", ["8"])
    assert grade("8.", ["8"])


# --- what of a generation is the answer -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"), [(" Paris \nQuestion: next", "Paris"), ("Paris", "Paris"), ("\nParis", ""), ("", "")]
)
def test_first_line(text, line):
    assert first_line(text) == line


@pytest.mark.parametrize(("ids", "count"), [([5, 6, 2, 7], 2), ([2], 0), ([], 0), ([5, 6], 2), ([5, 3, 2], 1)])
def test_before_end(ids, count):
    assert before_end(ids, {2, 3}) == count


class Pieces:
    """A tokenizer whose ids are places in a list of byte strings."""

    def __init__(self, *pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("pieces", "text", "count"),
    [
        ((" Par", "is", "\n"), " Paris", 2),
        ((" Par", "is\n"), " Paris", 2),  # the token holds letters of the answer
        ((" Par", "is", " ", "\n"), " Paris ", 2),
        (("Paris",), "Paris", 1),
        (("\n",), "", 0),
        ((), "", 0),
        # three bytes of one character, of which each alone reads as the replacement character
        ((b"\xe6", b"\xbc", b"\xa2", "\n"), "漢", 3),
        (("a", "b", "a", "b", "\n"), "abab", 4),
    ],
)
def test_answer_tokens(pieces, text, count):
    assert answer_tokens(Pieces(*pieces), list(range(len(pieces))), text) == count


# --- confidence -------------------------------------------------------------------------------------------------------

# three tokens of probability 1/2, 1/4 and 1/8
HALVES = [math.log(p) for p in (0.5, 0.25, 0.125)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", 0.875 / 3),
        ("geometric_mean", 0.25),
        ("product", 1 / 64),
        ("min", 0.125),
        ("first", 0.5),
        ("last", 0.125),
        ("letters", 0.5 / 0.875),
    ],
)
def test_answer_confidence_by_hand(how, expected):
    assert answer_confidence(HALVES, how) == pytest.approx(expected, rel=1e-12)
    # of other answers' tokens nothing comes in, wherever they stand
    logprobs = np.array([math.log(0.9), *HALVES[:2], math.log(0.1), HALVES[2]])
    found = answer_confidences(logprobs, np.array([7, 3, 3, 9, 3]), how)
    alone = {"letters": [1.0, 1.0]}.get(how, [0.9, 0.1])
    assert found == pytest.approx([expected, *alone], rel=1e-12)


@pytest.mark.parametrize("how", CONFIDENCES)
def test_answer_confidence_of_one_token_is_its_probability(how):
    assert answer_confidence([math.log(0.3)], how) == pytest.approx(1.0 if how == "letters" else 0.3, rel=1e-12)


@pytest.mark.parametrize("how", CONFIDENCES)
def test_answer_confidence_stays_within_0_and_1(how):
    # float32 rounding may put a certain token above zero
    assert answer_confidence([1e-7, 1e-7], how) == pytest.approx(0.5 if how == "letters" else 1.0)
    assert answer_confidence([1e-7], how) <= 1.0
    assert 0.0 <= answer_confidence([-1e4, -math.inf, 0.0], how) <= 1.0
    assert 0.0 <= answer_confidence([-math.inf, -math.inf], how) <= 1.0


def test_answer_confidence_letters_do_not_underflow():
    assert answer_confidence([-2000.0, -2000.0 - math.log(3)], "letters") == pytest.approx(0.75, rel=1e-12)


def test_answer_confidences_against_a_loop():
    rng = np.random.default_rng(0)
    answers = rng.integers(-5, 40, 400)
    logprobs = -rng.exponential(2.0, 400)
    loops = {
        "mean": lambda p: np.mean(p),
        "geometric_mean": lambda p: np.prod(p) ** (1 / len(p)),
        "product": np.prod,
        "min": np.min,
        "first": lambda p: p[0],
        "last": lambda p: p[-1],
        "letters": lambda p: np.max(p) / np.sum(p),
    }
    assert set(loops) == set(CONFIDENCES)
    for how, loop in loops.items():
        expected = [loop(np.exp(logprobs[answers == a])) for a in sorted(set(answers.tolist()))]
        assert answer_confidences(logprobs, answers, how) == pytest.approx(expected, rel=1e-9)


def test_answer_confidences_of_nothing_is_nothing():
    assert answer_confidences(np.zeros(0), np.zeros(0, dtype=int), "mean").shape == (0,)


def test_answer_confidence_refuses():
    with pytest.raises(DataError, match="an answer without tokens has no confidence"):
        answer_confidence([], "product")
    with pytest.raises(ConfigError, match="answer confidence 'geometric': not a choice; did you mean 'geometric_mean'"):
        answer_confidence([0.0], "geometric")
    with pytest.raises(DataError, match="not a number"):
        answer_confidence([math.nan], "mean")
    with pytest.raises(DataError, match="expected one answer a logprob"):
        answer_confidences(np.zeros(3), np.zeros(2), "mean")

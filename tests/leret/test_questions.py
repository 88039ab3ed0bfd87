import json

import pytest

from llmrl.errors import DataError
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.questions import Excluded, Question, load_claims, load_questions, resolve_gold

CORPUS = Corpus(
    (
        Passage("p1", "Paris", "A city."),
        Passage("p2", "Paris", "A hero."),
        Passage("p3", "Tom &amp; Jerry", "A cartoon."),
        Passage("p4", "Rome", "Another city."),
    )
)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(tmp_path, *rows):
    return load_questions(write(tmp_path / "questions.jsonl", *rows), CORPUS)


def test_gold_ids_come_before_titles(tmp_path):
    row = {"id": "q", "question": "Who?", "gold_ids": ["p2", "p4"], "gold_titles": ["Paris", "Rome"], "type": "bridge"}
    found = load(tmp_path, {**row, "answer": "yes", "answer_aliases": ["yes", "aye"], "hops": 2, "level": "hard"})
    assert found.questions == (
        Question(
            id="q",
            text="Who?",
            gold=(frozenset({"p2"}), frozenset({"p4"})),
            type="bridge",
            answers=("yes", "aye"),
            hops=2,
            gold_titles=("Paris", "Rome"),
            gold_ids=("p2", "p4"),
        ),
    )
    assert found.excluded == ()
    assert found.corpus_fingerprint == CORPUS.fingerprint


def test_gold_titles_accept_every_passage_of_that_title(tmp_path):
    found = load(tmp_path, {"id": 1, "question": "?", "gold_titles": ["PARIS", "Tom_& Jerry"]}).questions[0]
    assert found.id == "1"
    assert found.gold == (frozenset({"p1", "p2"}), frozenset({"p3"}))


def test_equal_gold_documents_count_once(tmp_path):
    rows = [
        {"id": "a", "question": "?", "gold_ids": ["p1", "p1", "p2"]},
        {"id": "b", "question": "?", "gold_titles": ["Paris", "paris", "Rome"]},
    ]
    assert [len(q.gold) for q in load(tmp_path, *rows).questions] == [2, 2]


def test_questions_whose_gold_is_missing_are_named_and_counted(tmp_path):
    found = load(
        tmp_path,
        {"id": "a", "question": "?", "gold_ids": ["p1", "p9", "p8"]},
        {"id": "b", "question": "?", "gold_titles": ["Rome"]},
        {"id": "c", "question": "?", "gold_titles": ["Paris (city)"]},
        {"id": "d", "question": "?"},
    )
    assert [q.id for q in found.questions] == ["b"]
    here = "gold document not in the corpus"
    assert found.excluded == (
        Excluded("a", here, "p9, p8"),
        Excluded("c", here, "Paris (city)"),
        Excluded("d", "no gold document named", ""),
    )
    assert found.summary() == (
        "1 questions, 3 excluded (2 gold document not in the corpus; 1 no gold document named): a (p9, p8), "
        "c (Paris (city)), d"
    )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "a", "question": "?", "gold_ids": ["p9"]}], "all 1 questions were excluded"),
        ([], "is empty: expected questions"),
        ([{"id": "a", "question": "?", "gold_ids": ["p1"]}] * 2, "1 ids of questions occur more than once: a"),
        ([{"id": "a", "question": " "}], "questions.jsonl:1: expected a text in 'question'"),
        ([{"question": "?"}], "questions.jsonl:1: expected an 'id'"),
        ([{"id": "a", "question": "?", "gold_ids": "p1"}], "expected a list of texts in 'gold_ids', got 'p1'"),
        ([{"id": "a", "question": "?", "gold_ids": [None]}], "expected a list of texts in 'gold_ids'"),
        ([{"id": "a", "question": "?", "hops": "two"}], "expected a whole number from 1 in 'hops', got 'two'"),
    ],
)
def test_load_questions_refuses(tmp_path, rows, words):
    with pytest.raises(DataError) as error:
        load(tmp_path, *rows)
    assert words in str(error.value)


HOVER = {
    "id": "h1",
    "claim": "Paris is in Rome.",
    "label": "NOT_SUPPORTED",
    "num_hops": 2,
    "hpqa_id": "5ac",
    "supporting_facts": [["Paris", 0]],
    "gold_titles": ["Paris", "Youth (2015 film)"],
}


def test_load_claims_reads_hover_without_passages(tmp_path):
    claims = load_claims(write(tmp_path / "claims.jsonl", HOVER))
    assert claims == (
        Question(
            id="h1",
            text="Paris is in Rome.",
            answers=("NOT_SUPPORTED",),
            hops=2,
            gold_titles=("Paris", "Youth (2015 film)"),
        ),
    )
    assert claims[0].gold == ()
    with pytest.raises(DataError, match=r"h1 \(Youth \(2015 film\)\)\nname the passages file"):
        resolve_gold(claims, CORPUS)

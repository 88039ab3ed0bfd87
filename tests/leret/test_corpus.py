import gzip
import json

import pytest

from llmrl.errors import DataError, UsageError
from llmrl.jsonl import write_objects
from llmrl.leret.corpus import Corpus, Passage, load_corpus, normalise_title

ROWS = [
    {"id": "a", "title": "X (film)", "text": "A film."},
    {"id": "b", "title": "X", "text": "A letter.", "source": "somewhere"},
    {"id": 7, "title": "x_(FILM)", "text": "Another."},
    {"id": "d", "text": "No title."},
]


def write(path, rows):
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["passages.jsonl", "passages.jsonl.gz"])
def test_load_corpus_reads_plain_and_gzip(tmp_path, name):
    corpus = load_corpus(write(tmp_path / name, ROWS))
    assert [p.id for p in corpus.passages] == ["a", "b", "7", "d"]
    assert corpus.by_id["b"] == Passage("b", "X", "A letter.")
    assert corpus.positions["7"] == 2
    assert corpus.by_title == {"x (film)": ("a", "7"), "x": ("b",)}
    assert len(corpus) == 4


def test_load_corpus_reads_several_files_in_order(tmp_path):
    first, second = write(tmp_path / "1.jsonl", ROWS[2:]), write(tmp_path / "2.jsonl.gz", ROWS[:2])
    assert [p.id for p in load_corpus([first, second]).passages] == ["7", "d", "a", "b"]


def test_fingerprint_depends_on_content_and_order_only(tmp_path):
    found = load_corpus(write(tmp_path / "a.jsonl", ROWS)).fingerprint
    assert found.startswith("sha256:")
    assert len(found) == 7 + 32
    assert load_corpus(write(tmp_path / "b.jsonl.gz", [{**row, "extra": 1} for row in ROWS])).fingerprint == found
    others = [ROWS[::-1], ROWS[:3], [{**ROWS[0], "text": "A film"}, *ROWS[1:]], [{**ROWS[0], "id": "A"}, *ROWS[1:]]]
    others.append([{"id": "a", "title": "X (film) A", "text": "film."}, *ROWS[1:]])
    prints = {load_corpus(write(tmp_path / "c.jsonl", rows)).fingerprint for rows in others}
    assert len(prints | {found}) == 6


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROWS[0], '{"id": \n'], "bad.jsonl:2: not JSON"),
        ([ROWS[0], "[1]\n"], "bad.jsonl:2: expected an object, got list"),
        ([{"title": "t", "text": "x"}], "bad.jsonl:1: expected an 'id'"),
        ([{"id": True, "text": "x"}], "bad.jsonl:1: expected an 'id'"),
        ([{"id": "a", "text": 5}], "bad.jsonl:1: expected a text in 'text', got 5"),
        ([ROWS[0], "\n", {"id": "e", "title": " ", "text": ""}], "bad.jsonl:3: a passage without 'title' and 'text'"),
        (['{"id": "a", "text": "\\ud800"}\n'], "half of a surrogate pair in 'text'"),
        ([*ROWS, ROWS[1], {"id": "7", "text": "z"}], "2 ids of passages occur more than once: b, 7"),
        ([], "is empty: expected passages"),
    ],
)
def test_load_corpus_refuses(tmp_path, rows, words):
    with pytest.raises(DataError) as error:
        load_corpus(write(tmp_path / "bad.jsonl", rows))
    assert words in str(error.value)


def test_load_corpus_refuses_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="not found"):
        load_corpus(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="a folder: expected a file"):
        load_corpus(tmp_path)
    (tmp_path / "a.csv").write_text("id,text")
    with pytest.raises(DataError, match="another kind of file"):
        load_corpus(tmp_path / "a.csv")
    whole = gzip.compress(json.dumps(ROWS[0]).encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match="not a whole gzip file"):
        load_corpus(tmp_path / "cut.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "a", "text": "ok"}\n{"id": "b", "text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:2: not UTF-8 \(byte 24"):
        load_corpus(tmp_path / "latin.jsonl")


def test_corpus_refuses_what_the_loader_refuses():
    with pytest.raises(DataError, match="the corpus is empty"):
        Corpus(())
    with pytest.raises(DataError, match="1 ids of passages occur more than once: a"):
        Corpus((Passage("a", "t", ""), Passage("a", "u", "")))
    with pytest.raises(DataError, match="1 passages without title and text: a"):
        Corpus((Passage("a", " ", "\n"),))


@pytest.mark.parametrize(
    ("title", "normal"),
    [
        ("&quot;J&quot; Is for Judgment", '"j" is for judgment'),
        ("Caf\u0065\u0301", "caf\u00e9"),
        ("Tom_&amp;_Jerry", "tom & jerry"),
        ("A\u00a0 B\n", "a b"),
        ("\uff38 (Film)", "x (film)"),
        ("STRASSE", "strasse"),
        ("Stra\u00dfe", "strasse"),
    ],
)
def test_normalise_title(title, normal):
    assert normalise_title(title) == normal
    assert normalise_title(normal) == normal


def test_normalise_title_keeps_parentheses():
    assert normalise_title("X (film)") != normalise_title("X")


def test_write_objects_is_the_same_bytes_at_any_time(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_objects(tmp_path / name, ROWS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert [p.id for p in load_corpus(tmp_path / "a.jsonl.gz").passages] == ["a", "b", "7", "d"]
    with pytest.raises(UsageError, match=r"ends in \.jsonl"):
        write_objects(tmp_path / "a.json", ROWS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz"]

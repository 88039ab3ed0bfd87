import gzip
import json

import pytest
from token_support import ANSWER, QUESTION

from llmrl.ats.data import level_of, read_rows
from llmrl.errors import DataError, UsageError


def write(path, text):
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


# --- reading ----------------------------------------------------------------------------------------------------------

FORMS = [
    {"text": "Once upon a time"},
    {"prompt": "Q: 1+1", "completion": " 2"},
    {"messages": [QUESTION, ANSWER]},
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_read_rows_jsonl_of_every_form(name, tmp_path):
    extra = [{**fields, "id": 7, "unused": None} for fields in FORMS]
    path = write(tmp_path / name, "\n".join(map(json.dumps, extra)) + "\n")
    rows = read_rows([path])
    assert [r.fields for r in rows] == FORMS
    assert [r.where for r in rows] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert {r.source for r in rows} == {path}


def test_read_rows_parquet_of_every_form(tmp_path):
    import pyarrow
    import pyarrow.parquet

    # one table: the columns a row does not use are null
    path = str(tmp_path / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(FORMS, pyarrow.schema([
        ("text", pyarrow.string()), ("prompt", pyarrow.string()), ("completion", pyarrow.string()),
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))),
    ])), path)  # fmt: skip
    rows = read_rows([path])
    assert [r.fields for r in rows] == FORMS
    assert rows[2].where == f"{path}:3"


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_read_rows_text_file_is_one_row(name, tmp_path):
    path = write(tmp_path / name, "Once upon\na time.\n")
    (found,) = read_rows([path])
    assert found.fields == {"text": "Once upon\na time.\n"}
    assert found.where == path


def test_read_rows_line_numbers_count_blank_lines_and_byte_order_marks_do_not_matter(tmp_path):
    path = write(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": "b\xe2\x80\xa8c"}\n')
    rows = read_rows([path])
    assert [r.where for r in rows] == [f"{path}:1", f"{path}:4"]
    assert rows[1].fields["text"] == "b\u2028c"


def test_read_rows_example_texts(text_files):
    rows = read_rows([str(file) for file in text_files])
    assert len(rows) == 64 + len(text_files) - 1
    assert {r.source for r in rows} == {str(file) for file in text_files}


def test_read_rows_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"not found: .*nothing\.jsonl"):
        read_rows([str(tmp_path / "nothing.jsonl")])


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl is empty: expected rows with 'messages'"),
        ("a.txt", " \n", r"a\.txt is empty"),
        ("a.jsonl", GOOD + "{'text': 1}\n", r"a\.jsonl:2: not JSON \(.* at column 2\)"),
        ("a.jsonl", GOOD + "[1, 2]\n", r"a\.jsonl:2: expected an object .* got list"),
        ("a.jsonl", GOOD + GOOD + '{"text": 5}', r"a\.jsonl:3: 'text' must be a string, got int"),
        ("a.jsonl", GOOD + '{"prompt": "a"}', r"a\.jsonl:2: 'completion' must be a string, got NoneType"),
        ("a.jsonl", GOOD + '{"prompt": ["a"], "completion": "b"}', r"a\.jsonl:2: 'prompt' must be a string, got list"),
        ("a.jsonl", '{"messages": "hi"}', r"a\.jsonl:1: 'messages' must be a list of objects"),
        ("a.jsonl", '{"messages": []}', r"a\.jsonl:1: 'messages' must be a list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', r"a\.jsonl:1: 'messages' must be"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}', r"a\.jsonl:1: 'messages' must be"),
        ("a.jsonl", '{"message": []}', r"a\.jsonl:1: needs .*; has: message; did you mean 'messages'\?"),
        ("a.jsonl", '{"id": 1, "complection": "b"}', r"has: id, complection; did you mean 'completion'\?"),
        ("a.jsonl", "{}", r"a\.jsonl:1: needs .*; has: nothing"),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8 \(byte 27\)"),
        ("a.txt", b"fine\nfine\n\xe9", r"a\.txt:3: not UTF-8"),
        ("a.parquet", "no parquet", r"a\.parquet is not a parquet file"),
        ("a.jsonl", GOOD + '{"text": "a\\ud800b"}', r"a\.jsonl:2: half of a surrogate pair in the text"),
        ("a.jsonl", '{"prompt": "a", "completion": "\\udc00"}', r"a\.jsonl:1: half of a surrogate pair"),
        (
            "a.jsonl",
            GOOD + '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud83d"}]}',
            r"a\.jsonl:2: half of a surrogate pair",
        ),
        ("a.jsonl", GOOD + '{"text": "a", "id": ' + "7" * 5000 + "}", r"a\.jsonl:2: not JSON that can be read \("),
        ("a.jsonl", GOOD + "[" * 100_000, r"a\.jsonl:2: not JSON"),
        ("a.jsonl", GOOD + '{"text": ' + '{"a": ' * 100_000, r"a\.jsonl:2: not JSON"),
        ("a.csv", "text\nhi\n", r"a\.csv: unknown kind of file; expected one of \.jsonl"),
    ],
)
def test_read_rows_refuses_with_file_and_line(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_rows([path])


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_read_rows_broken_gzip(damage, tmp_path):
    whole = gzip.compress(GOOD.encode() * 50)
    flipped = whole[:20] + bytes([whole[20] ^ 0xFF]) + whole[21:]
    content = {"truncated": whole[:-12], "not gzip": b"plain text", "flipped": flipped}[damage]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        read_rows([str(path)])


def test_read_rows_folder(tmp_path):
    with pytest.raises(DataError, match="is a folder: name the files in it"):
        read_rows([str(tmp_path)])


def test_read_rows_unknown_data_set_name():
    with pytest.raises(DataError, match="nobody/nothing is neither a file here nor a data set"):
        read_rows(["nobody/nothing"])


# --- questions --------------------------------------------------------------------------------------------------------

CHOICES = {"question": "2+2?", "choices": ["3", "4", "5"], "answer": 1}
FREE = {"question": "Capital of France?", "answers": ["Paris", "City of Paris"]}


def read(tmp_path, *rows):
    return read_rows([write(tmp_path / "q.jsonl", "\n".join(map(json.dumps, rows)))])


def test_read_rows_multiple_choice_by_index_or_letter(tmp_path):
    rows = read(tmp_path, {**CHOICES, "subject": "sums"}, {**CHOICES, "answer": "B"}, {**CHOICES, "answer": " c "})
    assert [row.fields for row in rows] == [CHOICES, CHOICES, {**CHOICES, "answer": 2}]


@pytest.mark.parametrize(
    "fields",
    [
        {"answers": ["Paris", "City of Paris", "Paris"]},
        {"answer": ["Paris", "City of Paris"]},
        {"answer": {"value": "Paris", "aliases": ["Paris", "City of Paris"], "normalized_aliases": ["paris"]}},
    ],
    ids=["answers", "answer", "hub"],
)
def test_read_rows_free_answers_under_the_names_of_the_public_sets(fields, tmp_path):
    (row,) = read(tmp_path, {"id": "tri1", "question": FREE["question"], **fields, "false_answer": "Lyon"})
    assert row.fields == FREE
    assert row.id == "tri1"


def test_read_rows_worked_solutions(tmp_path):
    hub, local = read(
        tmp_path, {"question": "?", "answer": "1+1 #### 2"}, {"question": "?", "solution": "#### 2", "final": "2"}
    )
    assert hub.fields["answers"] == ["1+1 #### 2"]
    assert local.fields["answers"] == ["#### 2"]


@pytest.mark.parametrize("name", ["mc1", "mc1_targets"])
def test_read_rows_truthfulqa_deals_the_choices_out_anew(name, tmp_path):
    """In the file the right one always comes first."""
    texts = ["right", "wrong", "also wrong", "no"]
    labels = [1, 0, 0, 0]
    targets = (
        [[t, x] for t, x in zip(texts, labels, strict=True)] if name == "mc1" else {"choices": texts, "labels": labels}
    )
    rows = read(tmp_path, *[{"question": f"Question {i}?", name: targets, "mc2": targets} for i in range(200)])
    assert all(sorted(row.fields["choices"]) == sorted(texts) for row in rows)
    assert all(row.fields["choices"][row.fields["answer"]] == "right" for row in rows)
    places = [sum(row.fields["answer"] == i for row in rows) for i in range(4)]
    assert min(places) > 30  # 50 each is expected, with a deviation of 6
    assert [row.fields for row in read(tmp_path, {"question": "Question 7?", name: targets})] == [rows[7].fields]


def test_read_rows_ids_are_the_files_own(tmp_path):
    rows = read(tmp_path, {**FREE, "id": 7}, {**FREE, "id": "a"}, FREE, {**FREE, "id": True}, {**FREE, "id": ""})
    assert [row.id for row in rows] == ["7", "a", None, None, None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**CHOICES, "choices": []}, r"'choices' must be a list of 2 to 26 texts, got 0 of them"),
        ({**CHOICES, "choices": ["4"]}, r"2 to 26 texts, got 1 of them"),
        ({**CHOICES, "choices": ["4"] * 27}, r"2 to 26 texts, got 27 of them"),
        ({**CHOICES, "choices": "3, 4"}, r"2 to 26 texts, got str"),
        ({**CHOICES, "choices": ["3", 4]}, r"'choices' must be texts that are not empty, got 4"),
        ({**CHOICES, "choices": ["3", " "]}, r"'choices' must be texts that are not empty, got ' '"),
        ({**CHOICES, "answer": 3}, r"index of a choice, 0 to 2, or its letter, A to C; got 3"),
        ({**CHOICES, "answer": -1}, r"0 to 2, .* got -1"),
        ({**CHOICES, "answer": True}, r"0 to 2, .* got True"),
        ({**CHOICES, "answer": 1.0}, r"0 to 2, .* got 1\.0"),
        ({**CHOICES, "answer": "D"}, r"0 to 2, .* got 'D'"),
        ({**CHOICES, "answer": "1"}, r"0 to 2, .* got '1'"),
        ({**CHOICES, "answer": "ä"}, r"0 to 2, .* got 'ä'"),
        ({**CHOICES, "answer": "four"}, r"0 to 2, .* got 'four'"),
        ({**CHOICES, "answer": None}, r"0 to 2, .* got None"),
        ({**CHOICES, "question": " "}, r"'question' is empty"),
        ({"question": 5, "answers": ["5"]}, r"'question' must be a string, got int"),
        ({"question": "?"}, r"'question' needs 'choices' with 'answer', or 'answers'; has: question"),
        ({"question": "?", "answers": []}, r"'answers' must be a text or a list of texts, got \[\]"),
        ({"question": "?", "answers": ["a", ""]}, r"'answers' must hold texts that are not empty, got ''"),
        ({"question": "?", "answer": 4}, r"'answer' must be a text or a list of texts, got 4"),
        ({"question": "?", "answers": ["a\ud800"]}, r"half of a surrogate pair"),
        (
            {"question": "?", "mc1": [["a", 1], ["b", 1]]},
            r"'mc1' must list choices, each with a label, and one label that is 1",
        ),
        ({"question": "?", "mc1": [["a", 1], ["b"]]}, r"'mc1' must list choices"),
        ({"question": "?", "mc1_targets": {"choices": ["a", "b"], "labels": [1]}}, r"'mc1_targets' must list choices"),
        ({"questoin": "?"}, r"did you mean 'question'\?"),
    ],
)
def test_read_rows_refuses_questions_with_file_and_line(row, message, tmp_path):
    with pytest.raises(DataError, match=rf"q\.jsonl:2: .*{message}"):
        read(tmp_path, FREE if "choices" not in row else CHOICES, row)


def test_level_of_multiple_choice_is_answer_and_of_the_rest_token(tmp_path):
    assert level_of(read(tmp_path, CHOICES, CHOICES)) == "answer"
    assert level_of(read(tmp_path, FREE, {"text": "a"}, FORMS[1])) == "token"


@pytest.mark.parametrize("other", [FREE, *FORMS])
def test_read_rows_refuses_multiple_choice_beside_other_forms(other, tmp_path):
    first, second = write(tmp_path / "a.jsonl", json.dumps(other)), write(tmp_path / "b.jsonl", json.dumps(CHOICES))
    with pytest.raises(
        DataError, match=r"b\.jsonl:1 is multiple choice and .*a\.jsonl:1 is not: .* one of them at a time"
    ):
        read_rows([first, second])

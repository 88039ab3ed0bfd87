import gzip
import json

import pytest
from transformers import AutoTokenizer

from llmrl.errors import DataError, UsageError
from llmrl.hyre.pairs import chat_text, one_prompt, plain_text, read_pair, read_pairs

ROW = {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "group": "ann", "other": 3}


def test_texts_and_messages_are_one_pair():
    messages = {
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No."}],
        "group": "ann",
    }
    assert read_pair(ROW, "f:1") == read_pair(messages, "f:1")


def test_a_dialogue_in_the_answers_belongs_to_the_prompt():
    """trl's implicit prompt: chosen and rejected are whole dialogues."""
    before = [{"role": "user", "content": "Why?"}]
    row = {name: [*before, {"role": "assistant", "content": ROW[name]}] for name in ("chosen", "rejected")}
    assert read_pair({**row, "group": "ann"}, "f:1") == read_pair(ROW, "f:1")


def test_files_are_read_in_order_plain_and_gzipped(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n\n" + json.dumps({**ROW, "group": 7, "margin": 0.5}) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.write(json.dumps({**ROW, "group": None}) + "\n")
    found = read_pairs([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"])
    assert [(pair.group, pair.margin, pair.where.rpartition("/")[2]) for pair in found] == [
        ("ann", 0.0, "a.jsonl:1"),
        ("7", 0.5, "a.jsonl:3"),
        ("", 0.0, "b.jsonl.gz:1"),
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chosen": None}, "expected an answer in 'chosen'"),
        ({"rejected": ""}, "expected an answer in 'rejected'"),
        ({"chosen": "  "}, "'chosen' is empty"),
        ({"chosen": "No."}, "the same text"),
        ({"chosen": 3}, "a text or a list of messages"),
        ({"prompt": [{"role": "user"}]}, "role and content in 'prompt'"),
        ({"margin": "wide"}, "a number in 'margin'"),
        ({"margin": float("nan")}, "a number in 'margin'"),
        ({"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "different dialogues"),
        ({"group": ["a"]}, "expected a text in 'group'"),
    ],
)
def test_bad_rows_name_the_line(change, says):
    with pytest.raises(DataError, match=says) as caught:
        read_pair({**ROW, **change}, "file.jsonl:7")
    assert "file.jsonl:7" in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UsageError, match="not found"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no rows"):
        read_pairs(tmp_path / "empty.jsonl")


def test_one_prompt():
    assert one_prompt([read_pair(ROW, "a"), read_pair({**ROW, "chosen": "So."}, "b")])
    assert not one_prompt([read_pair(ROW, "a"), read_pair({**ROW, "prompt": "How?"}, "b")])


def test_texts_for_models_with_and_without_a_template():
    pair = read_pair(ROW, "a")
    assert plain_text(pair.prompt, pair.chosen) == "Why?\n\nBecause."
    assert plain_text((), "Because.") == "Because."
    tokenizer = AutoTokenizer.from_pretrained("examples/tiny_lm")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}], return_dict=True
    )["input_ids"]
    assert tokenizer(chat_text(tokenizer, pair.prompt, pair.chosen))["input_ids"] == ids

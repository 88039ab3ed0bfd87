import gzip
import json

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmrl.ats.data import Row, make_windows, read_rows
from llmrl.errors import DataError, UsageError

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SENTENCES = [
    "The cat sat on the mat. What is the capital of France? Paris is the capital. <think>hm</think> user assistant"
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# drops the thoughts of every assistant turn but the last one, as templates of reasoning models do
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the generation prompt opens a thought that a finished turn need not hold
OPENS_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)

QUESTION = {"role": "user", "content": "What is the capital?"}
ANSWER = {"role": "assistant", "content": "Paris"}


@pytest.fixture(scope="module")
def plain():
    """A byte-level BPE tokenizer that adds no BOS, as Qwen's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        SENTENCES * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|bos|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def with_template(tokenizer, template):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


class Characters(transformers.PreTrainedTokenizer):
    """A tokenizer in Python, without offsets."""

    def __init__(self, **kwargs):
        self.letters = [chr(i) for i in range(32, 127)]
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {c: i for i, c in enumerate(self.letters)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.index(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]


def row(**fields):
    return Row(fields, "data.jsonl:1", "data.jsonl")


def scored_text(tokenizer, window):
    ids = [i for i, counts in zip(window.token_ids, window.scored, strict=True) if counts]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


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


# --- text -------------------------------------------------------------------------------------------------------------

LONG = "The cat sat on the mat. What is the capital of France? " * 20


@pytest.mark.parametrize("max_length", [2, 7, 50, 10_000])
def test_make_windows_text_covers_every_token_once_with_bos(max_length, stories_tokenizer):
    found = make_windows([row(text=LONG)], stories_tokenizer, max_length)
    ids = stories_tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert [i for w in found.windows for i in w.token_ids[1:]] == ids
    assert found.tokens == len(ids)
    for w in found.windows:
        assert len(w.token_ids) <= max_length
        assert w.token_ids[0] == stories_tokenizer.bos_token_id
        assert w.scored == [False] + [True] * (len(w.token_ids) - 1)
        assert (w.row, w.source, w.where) == (0, "data.jsonl", "data.jsonl:1")


@pytest.mark.parametrize("max_length", [7, 50, 10_000])
def test_make_windows_text_covers_every_token_once_without_bos(max_length, plain):
    found = make_windows([row(text=LONG)], plain, max_length)
    ids = plain(LONG)["input_ids"]
    assert plain.bos_token_id not in ids
    covered = [i for w in found.windows for i in w.token_ids]
    # a last window of one token has nothing to be predicted from
    assert covered == ids[: len(covered)]
    assert len(ids) - len(covered) in (0, 1)
    assert all(w.scored == [False] + [True] * (len(w.token_ids) - 1) for w in found.windows)


def test_make_windows_needs_no_pad_token(stories_tokenizer):
    assert stories_tokenizer.pad_token is None
    rows = [row(text="a cat"), row(text="a much longer text"), row(prompt="a", completion=" cat")]
    assert len(make_windows(rows, stories_tokenizer, 100).windows) == 3


# --- prompt and completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "completion", "scored"),
    [
        ("What is the capital?", " Paris is.", " Paris is."),
        ("", "The cat sat", None),
        ("What is", "\nThe cat", "\nThe cat"),
        ("naïve ∑", " 漢字 🙂", " 漢字 🙂"),
        # the space and the P are one token, which begins in the prompt
        ("The capital ", "Paris is the cat", " is the cat"),
    ],
)
def test_make_windows_scores_the_completion_of_jointly_encoded_text(prompt, completion, scored, plain):
    (found,) = make_windows([row(prompt=prompt, completion=completion)], plain, 200).windows
    assert found.token_ids == plain(prompt + completion)["input_ids"]
    expected = plain.decode(plain(completion)["input_ids"][1:]) if scored is None else scored
    if prompt.endswith(" "):
        assert plain("x Paris")["input_ids"][1:] == plain(" Paris")["input_ids"]
        assert scored_text(plain, found).endswith(scored)
        assert not scored_text(plain, found).startswith(" P")
    else:
        assert scored_text(plain, found) == expected


def test_make_windows_never_scores_the_bos_of_an_empty_prompt(stories_tokenizer):
    (found,) = make_windows([row(prompt="", completion="a cat")], stories_tokenizer, 200).windows
    assert found.token_ids[0] == stories_tokenizer.bos_token_id
    assert found.scored[0] is False
    assert all(found.scored[1:])


def test_make_windows_slow_tokenizer_encodes_the_parts():
    tokenizer = Characters()
    assert not tokenizer.is_fast
    (found,) = make_windows([row(prompt="ab ", completion="cd")], tokenizer, 200).windows
    assert found.token_ids == [ord(c) - 32 for c in "ab cd"]
    assert found.scored == [False, False, False, True, True]


# --- messages ---------------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "The cat"},
    QUESTION,
    {"role": "assistant", "content": "<think>hm</think>Paris"},
    {"role": "user", "content": "the mat?"},
    {"role": "assistant", "content": "<think>What</think>sat on"},
]


@pytest.mark.parametrize(
    ("template", "end"), [(CHATML, "<|im_end|>\n"), (LLAMA3, "<|eot_id|>")], ids=["chatml", "llama3"]
)
def test_make_windows_messages_scores_every_assistant_turn(template, end, plain):
    tokenizer = with_template(plain, template)
    (found,) = make_windows([row(messages=CHAT)], tokenizer, 500).windows
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(found.token_ids, clean_up_tokenization_spaces=False) == whole
    assert scored_text(tokenizer, found) == f"<think>hm</think>Paris{end}<think>What</think>sat on{end}"


def test_make_windows_messages_of_a_template_that_rewrites_history_gives_a_window_a_turn(plain):
    tokenizer = with_template(plain, REWRITING)
    first, second = make_windows([row(messages=CHAT)], tokenizer, 500).windows
    assert scored_text(tokenizer, first) == "<think>hm</think>Paris<|im_end|>\n"
    assert scored_text(tokenizer, second) == "<think>What</think>sat on<|im_end|>\n"
    assert "hm" not in tokenizer.decode(second.token_ids)
    assert first.row == second.row == 0


def test_make_windows_messages_generation_prompt_that_finished_turns_lack(plain):
    tokenizer = with_template(plain, OPENS_THOUGHT)
    (found,) = make_windows([row(messages=[QUESTION, ANSWER])], tokenizer, 500).windows
    assert scored_text(tokenizer, found).endswith("Paris<|im_end|>\n")
    assert "What is the capital" not in scored_text(tokenizer, found)


def test_make_windows_messages_generation_prompt_that_ends_in_a_space(plain):
    """The space and the answer's first word are one token: the header stays out of what is scored."""
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = with_template(plain, template + "{% if add_generation_prompt %}assistant: {% endif %}")
    assert plain("x Paris")["input_ids"][1:] == plain(" Paris")["input_ids"]
    two = [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "The mat"}]
    (found,) = make_windows([row(messages=two)], tokenizer, 500).windows
    assert tokenizer.decode(found.token_ids) == tokenizer.apply_chat_template(two, tokenize=False)
    assert scored_text(tokenizer, found) == " Paris\nThe mat\n"


def test_make_windows_messages_counts_turns_the_template_does_not_let_score(plain):
    # the first turn answers nothing
    chatml = with_template(plain, CHATML)
    opening = [ANSWER, QUESTION, ANSWER]
    rows = [row(messages=[QUESTION, ANSWER])] * 2 + [row(messages=opening), row(messages=[ANSWER])]
    found = make_windows(rows, chatml, 500)
    assert found.excluded == {"part_of_row_turn_not_scored": 1, "turn_not_scored": 1}
    assert [w.row for w in found.windows] == [0, 1, 2]
    # what the second turn follows is not what was there before it
    counting = with_template(plain, "{{ [messages | length, 3] | max }} " + CHATML)
    found = make_windows([row(messages=CHAT[1:])] * 2, counting, 500)
    assert found.excluded == {"part_of_row_turn_not_scored": 2}
    assert [scored_text(counting, w) for w in found.windows] == ["<think>hm</think>Paris<|im_end|>\n"] * 2
    with pytest.raises(DataError, match=r"2 of 2 rows cannot be used \(turn_not_scored 2\)"):
        make_windows(
            [row(messages=[QUESTION, ANSWER])] * 2, with_template(plain, "{{ messages | length }}" + CHATML), 9
        )


def test_make_windows_messages_without_a_template(plain):
    with pytest.raises(DataError, match=r"data\.jsonl:1: 'messages' need a chat template"):
        make_windows([row(messages=[QUESTION, ANSWER])], plain, 100)


def test_make_windows_messages_that_begin_with_the_assistant(plain):
    tokenizer = with_template(plain, CHATML)
    (found,) = make_windows([row(messages=[ANSWER, QUESTION, ANSWER])], tokenizer, 500).windows
    # the first turn has no prompt it could be an answer to
    assert scored_text(tokenizer, found) == "Paris<|im_end|>\n"


def test_make_windows_messages_the_template_refuses_name_the_row(plain):
    tokenizer = with_template(plain, ALTERNATING)
    with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template refuses .*roles must alternate"):
        make_windows([row(messages=[QUESTION, QUESTION, ANSWER])], tokenizer, 500)


# --- what is left out -------------------------------------------------------------------------------------------------


def test_make_windows_counts_what_is_left_out_by_reason(plain):
    tokenizer = with_template(plain, REWRITING)
    thoughtful = {"role": "assistant", "content": "<think>hm</think>Paris"}
    long_turn = {"role": "assistant", "content": LONG}
    rows = [row(prompt="What is", completion=" the cat") for _ in range(4)]
    rows += [row(prompt="What is", completion=LONG), row(prompt="What is", completion="")]
    rows += [row(messages=[QUESTION]), row(messages=[QUESTION, thoughtful, QUESTION, long_turn])]
    found = make_windows(rows, tokenizer, 60)
    assert found.rows == 8
    assert found.excluded == {"too_long": 1, "no_scored_tokens": 2, "part_of_row_too_long": 1}
    assert [w.row for w in found.windows] == [0, 1, 2, 3, 7]


def test_make_windows_half_left_out_is_fine_and_more_is_an_error(plain):
    good, bad = row(prompt="What", completion=" cat"), row(prompt="What", completion=LONG)
    assert len(make_windows([good, good, bad, bad], plain, 20).windows) == 2
    with pytest.raises(DataError, match=r"3 of 5 rows cannot be used \(too_long 3\).*\n.*20 tokens.*--max_length"):
        make_windows([good, good, bad, bad, bad], plain, 20)

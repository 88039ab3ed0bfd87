import pytest
from token_support import (
    ALTERNATING,
    ANSWER,
    CHATML,
    LLAMA3,
    OPENS_THOUGHT,
    QUESTION,
    REWRITING,
    Characters,
    plain_tokenizer,
    row,
    scored_text,
    with_template,
)

from llmrl.ats.windows import make_windows
from llmrl.errors import DataError


@pytest.fixture(scope="module")
def plain():
    return plain_tokenizer()


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

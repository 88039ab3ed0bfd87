"""Windows of multiple choice and of free answers."""

import copy
from pathlib import Path

import pytest
import transformers
from token_support import (
    ALTERNATING,
    CHATML,
    LLAMA3,
    OPENS_THOUGHT,
    Characters,
    plain_tokenizer,
    row,
    scored_text,
    with_template,
)
from tokenizers import Tokenizer, models, pre_tokenizers

from llmrl.ats.windows import make_windows
from llmrl.errors import DataError

TINY_LM = Path(__file__).resolve().parents[2] / "examples" / "tiny_lm"
CHOICES = {"question": "What sat on the mat? ", "choices": ["The dog", " the cat", "France"], "answer": 1}
ASKED = "What sat on the mat?\nA. The dog\nB. the cat\nC. France\nAnswer:"
FREE = {"question": "What is the capital?", "answers": ["Paris", "the city"]}

# a space on both sides of the answer
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def plain():
    return plain_tokenizer()


@pytest.fixture(scope="module")
def tiny_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TINY_LM)


@pytest.fixture(scope="module")
def no_template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


def one(rows, tokenizer, max_length=500):
    (window,) = make_windows([row(**fields) for fields in rows], tokenizer, max_length).windows
    return window


def texts(tokenizer, ids):
    return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]


def check_choice(window, tokenizer, right):
    assert sum(window.scored) == 1
    assert window.scored[-1]
    assert window.token_ids[-1] == window.choices[right]
    assert window.grade is None
    return tokenizer.decode(window.token_ids, clean_up_tokenization_spaces=False)


def test_make_windows_choices_without_a_template_are_letters_after_a_space(no_template):
    window = one([CHOICES], no_template)
    assert check_choice(window, no_template, 1) == f"{ASKED} B"
    assert texts(no_template, window.choices) == [" A", " B", " C"]
    assert window.token_ids == no_template(f"{ASKED} B")["input_ids"]


@pytest.mark.parametrize("answer", [0, 1, 2])
def test_make_windows_choices_the_windows_of_one_question_differ_in_the_letter_alone(answer, no_template):
    window = one([{**CHOICES, "answer": answer}], no_template)
    assert check_choice(window, no_template, answer) == f"{ASKED} {'ABC'[answer]}"


def test_make_windows_choices_where_a_space_is_a_token_before_some_letters(stories_tokenizer):
    """ "▁B" is one token, "▁A" and "▁C" are two: the letters follow the colon directly."""
    assert len(stories_tokenizer(" B", add_special_tokens=False)["input_ids"]) < len(
        stories_tokenizer(" A", add_special_tokens=False)["input_ids"]
    )
    window = one([CHOICES], stories_tokenizer)
    assert check_choice(window, stories_tokenizer, 1).endswith("\nAnswer:B")
    assert stories_tokenizer.convert_ids_to_tokens(list(window.choices)) == ["A", "B", "C"]
    assert window.token_ids[0] == stories_tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "before", "letters"),
    [
        (CHATML, "<|im_start|>assistant\n", "ABC"),
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n", "ABC"),
        (OPENS_THOUGHT, "<|im_start|>assistant\n", "ABC"),
        (LLAMA2, " [/INST] ", "ABC"),
    ],
    ids=["chatml", "llama3", "opens thought", "llama2"],
)
def test_make_windows_choices_stand_where_the_template_writes_the_answer(template, before, letters, plain):
    tokenizer = with_template(plain, template)
    window = one([CHOICES], tokenizer)
    text = check_choice(window, tokenizer, 1)
    end = f"{ASKED}<|im_end|>\n" if "im_start" in template else ASKED
    assert text.endswith(f"{end if template != LLAMA3 else ASKED + '<|eot_id|>'}{before}B")
    assert texts(tokenizer, window.choices) == list(letters)


def test_make_windows_choices_take_the_space_that_the_template_puts_before_an_answer(no_template):
    window = one([CHOICES], with_template(no_template, LLAMA2))
    assert texts(no_template, window.choices) == [" A", " B", " C"]


def test_make_windows_choices_of_the_chat_model_follow_its_generation_prompt(tiny_tokenizer):
    """What is scored is what the model would say next."""
    window = one([CHOICES], tiny_tokenizer)
    asked = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": ASKED}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert window.token_ids[:-1] == asked
    assert texts(tiny_tokenizer, window.choices) == ["A", "B", "C"]


@pytest.mark.parametrize("count", [2, 26])
def test_make_windows_choices_from_2_to_26(count, no_template, stories_tokenizer):
    fields = {"question": "Which?", "choices": [f"number {i}" for i in range(count)], "answer": count - 1}
    for tokenizer in (no_template, stories_tokenizer):
        window = one([fields], tokenizer)
        assert len(set(window.choices)) == count
        assert check_choice(window, tokenizer, count - 1)[-1] == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[count - 1]


def test_make_windows_choices_of_a_slow_tokenizer():
    tokenizer = Characters()
    tokenizer.letters.append("\n")
    window = one([CHOICES], tokenizer)
    assert window.choices == tuple(ord(c) - 32 for c in "ABC")
    # with a space the letters are a token each as well, behind one for the space
    assert window.token_ids[-2] == 0


def test_make_windows_choices_that_are_no_token_each_are_refused():
    words = {"[UNK]": 0, "Answer": 1, ":": 2, "A": 3, "B": 4}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    two = {**CHOICES, "choices": CHOICES["choices"][:2]}
    assert one([two], tokenizer).choices == (3, 4)
    # C is unknown: it has an id of its own, and so is D
    four = {**CHOICES, "choices": [*CHOICES["choices"], "nothing"]}
    with pytest.raises(
        DataError, match=r"data\.jsonl:1: this tokenizer does not write the answer letters A to D as one"
    ):
        make_windows([row(**four)], tokenizer, 100)


def test_make_windows_choices_that_are_too_long_are_left_out(no_template):
    long = {**CHOICES, "question": "What sat on the mat? " * 20}
    found = make_windows([row(**CHOICES), row(**long)], no_template, 60)
    assert found.excluded == {"too_long": 1}
    assert [w.row for w in found.windows] == [0]


def test_make_windows_choices_the_template_refuses_name_the_row(plain):
    template = ALTERNATING.replace("raise_exception('roles must alternate')", "''")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the chat template refuses .*no assistant"):
        one([CHOICES], with_template(plain, template + "{{ raise_exception('no assistant') }}"))


def test_make_windows_free_answers_score_the_first_reference(no_template, tiny_tokenizer):
    window = one([FREE], no_template)
    assert window.token_ids == no_template("Question: What is the capital?\nAnswer: Paris")["input_ids"]
    assert scored_text(no_template, window) == " Paris"
    assert (window.choices, window.grade) == (None, None)
    chat = one([FREE], tiny_tokenizer)
    assert scored_text(tiny_tokenizer, chat) == "Paris<|end|>"
    assert (
        tiny_tokenizer.decode(chat.token_ids) == "<|bos|><|user|>What is the capital?<|end|><|assistant|>Paris<|end|>"
    )

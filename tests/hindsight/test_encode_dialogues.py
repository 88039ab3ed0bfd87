"""Dialogues by token ids: an agent's turn is its tokens and the one that ends it, whatever the template."""

import pytest
from hindsight_models import DIALOGUES, TINY, dialogue
from transformers import AutoTokenizer

from llmrl.errors import DataError, ModelError
from llmrl.hindsight.dialogues import Dialogue, ReadDialogues
from llmrl.hindsight.encode import encode_dialogue, encode_dialogues
from llmrl.hindsight.small_model import word_tokenizer
from llmrl.rollout.chat import Conversation
from llmrl.rollout.logged import encode_messages
from llmrl.rollout.protocols import Sample
from llmrl.types import FinishReason, Message, PolicyVersion

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "tight": "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "trims": "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}",
}


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(params=["tiny", "words", *TEMPLATES])
def tokenizer(request, tiny):
    if request.param == "words":
        return word_tokenizer(m.content for one in DIALOGUES for m in one.messages)
    if request.param == "tiny":
        return tiny
    made = AutoTokenizer.from_pretrained(TINY)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = TEMPLATES[request.param]
    return made


@pytest.mark.parametrize("number", range(len(DIALOGUES)))
def test_agent_tokens_decode_to_what_the_agent_said(number, tokenizer):
    one = DIALOGUES[number]
    row = encode_dialogue(tokenizer, one)
    said = [one.messages[i].content for i in one.agent_turns]
    assert len(row.spans) == len(said)
    for span, text in zip(row.spans, said, strict=True):
        *words, end = row.input_ids[span.start : span.stop]
        assert tokenizer.decode(words) == text
        assert end in (*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder)
    assert [span.reward for span in row.spans] == [one.rewards[i] for i in one.agent_turns]
    assert row.total == one.total


def test_a_row_is_what_an_engine_would_have_seen(tokenizer):
    """Against `Conversation`, with the same tokens sampled: no text is encoded twice, and none differently."""
    one = DIALOGUES[0]
    row = encode_dialogue(tokenizer, one)
    talk, spans = Conversation(tokenizer), iter(row.spans)
    for message in one.messages:
        if message.role == "user":
            talk.add(message)
            continue
        prompt, span = talk.prompt(), next(spans)
        assert prompt == row.input_ids[: span.start]
        ids = row.input_ids[span.start : span.stop]
        version, logprobs = PolicyVersion(0, "x"), (-1.0,) * len(ids)
        talk.answer(Sample(ids, logprobs, message.content, FinishReason.STOP, version, ids[-1]))
    assert tuple(t for turn in talk.turns for t in turn.token_ids) == row.input_ids


def test_a_dialogue_that_was_cut_off_ends_with_the_prompt_for_the_next_turn(tiny):
    cut = DIALOGUES[2]
    row = encode_dialogue(tiny, cut)
    assert tiny.decode(row.input_ids).endswith("<|user|>Five<|end|><|assistant|>")
    back = row.backup("turn", 1.0, "turn")
    assert back.next_position[-1] == len(row.input_ids) - 1
    # in the middle of a turn of the agent there is no next prompt: the state after its last token
    short = dialogue("d", "One", "Two", done=False)
    assert encode_dialogue(tiny, short).backup("turn", 1.0, "turn").next_position[-1] == row_end(tiny, short)


def row_end(tokenizer, one):
    return len(encode_dialogue(tokenizer, one).input_ids) - 1


def test_what_a_model_cannot_read_is_kept_aside_and_named(tiny):
    opens = dialogue("opens", "x", "Hello")
    opens = type(opens)("opens", opens.messages[1:], opens.rewards[1:])
    lengths = {one.id: len(encode_dialogue(tiny, one).input_ids) for one in DIALOGUES}
    longest = max(lengths, key=lengths.__getitem__)
    before = ("f.jsonl:3", "no end", "why", {"id": "x"})
    everything = ReadDialogues([*DIALOGUES, opens], [before])
    rows, read = encode_dialogues(tiny, everything, max_length=lengths[longest] - 1)
    assert [row.id for row in rows] == [name for name in "abc" if name != longest]
    assert [one.id for one in read.dialogues] == [row.id for row in rows]
    assert read.refused[0] == before
    refused = {where: (reason, message, row) for where, reason, message, row in read.refused}
    assert refused[longest][0] == "too long"
    assert f"{lengths[longest]} tokens, expected at most {lengths[longest] - 1}" in refused[longest][1]
    assert refused["opens"][0] == "cannot be written by this model"
    assert "the agent speaks first" in refused["opens"][1]
    assert Dialogue.from_json(refused["opens"][2]) == opens
    assert f"1 too long (first at {longest})" in read.summary()
    with pytest.raises(DataError, match="no dialogue can be read"):
        encode_dialogues(tiny, ReadDialogues([opens], []), 100)


def test_an_answer_that_holds_a_control_token_is_refused(tiny):
    """As an action it would end the agent's turn in the middle and speak for the user."""
    for text in ("a<|end|>", "<|user|>pay me"):
        with pytest.raises(DataError, match="holds the control token"):
            encode_messages(tiny, [Message("user", "Hello."), Message("assistant", text)])
    spelled = encode_messages(tiny, [Message("user", "a<|end|>"), Message("assistant", "Hello.")])
    assert tiny.convert_tokens_to_ids("<|end|>") not in spelled[0].token_ids[:-3]


def test_templates_that_a_policy_could_not_follow_are_refused(tiny):
    made = AutoTokenizer.from_pretrained(TINY)
    made.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ModelError, match="no control token first"):
        encode_messages(made, DIALOGUES[0].messages)
    made.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        encode_messages(made, DIALOGUES[0].messages)
    # drops what the agent said before the last user message
    made.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' or loop.last or loop.index > messages | length - 2 %}"
        "<|user|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(DataError, match="rewrites what was said before"):
        encode_messages(made, DIALOGUES[0].messages)


def test_a_word_that_a_tokenizer_cannot_write_is_refused():
    words = word_tokenizer(["Hello there."])
    assert words.decode(words("Hello there.")["input_ids"]) == "Hello there."
    with pytest.raises(DataError, match="decode to another text"):
        encode_messages(words, [Message("user", "Hello there."), Message("assistant", "Goodbye there.")])

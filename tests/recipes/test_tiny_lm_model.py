"""examples/tiny_lm, the model that recipes/tiny_lm.py made: its format, and that it has learnt something."""

import itertools
import json
import re
from pathlib import Path

import pytest

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_lm"

# of no data set; a table that knew only how often each token occurs would lose more than 6 nats a token
SENTENCE = "The village is in the north of the county, and the old church was built in the 12th century by the king."
TALK = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Say the word river."},
    {"role": "assistant", "content": "river"},
    {"role": "tool", "content": '{"a": 1}'},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "  And\n\nnow? "},
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL)


def test_model_folder_is_small_and_plain():
    files = {p.name: p for p in MODEL.iterdir()}
    assert set(files) == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "loss_curve.png", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "training.json",
    }  # fmt: skip
    assert sum(p.stat().st_size for p in files.values()) <= 15_000_000
    for name in set(files) - {"model.safetensors", "loss_curve.png"}:
        assert not re.search(r"/(work|tmp|home|root|mnt)/", files[name].read_text()), name


def test_model_loads_in_bfloat16_with_heads_that_vllm_serves(model, tokenizer):
    import torch

    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 5e6 < sum(p.numel() for p in model.parameters()) < 10e6
    assert (config.head_dim, config.vocab_size, config.max_position_embeddings) == (32, 4096, 2048)
    assert len(tokenizer) == config.vocab_size
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert (ids, tokenizer.pad_token) == ([0, 1, 2], "<|pad|>")
    assert model.generation_config.eos_token_id == [2, tokenizer.convert_tokens_to_ids("<|end|>")]
    assert model.generation_config.pad_token_id == 0


@pytest.mark.parametrize(
    "text", ["a  b\t\n c .", " x", "don't , 1234", "日本語 🙂 é", "\x00\u2028", "<|user|>hi<|end|>", ""]
)
def test_tokenizer_gives_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_chat_template_only_ever_appends(tokenizer):
    for tools in (None, [{"type": "function", "function": {"name": "search"}}]):
        texts = [tokenizer.apply_chat_template(TALK[:n], tools=tools, tokenize=False) for n in range(1, len(TALK) + 1)]
        assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
        prompts = [
            tokenizer.apply_chat_template(TALK[:n], tools=tools, tokenize=False, add_generation_prompt=True)
            for n in range(1, len(TALK) + 1)
        ]
        assert prompts == [text + "<|assistant|>" for text in texts]
        ids = tokenizer.apply_chat_template(TALK, tools=tools, return_dict=False)
        assert ids == tokenizer(texts[-1])["input_ids"]
    assert tokenizer.apply_chat_template(TALK[:3], tokenize=False) == (
        "<|bos|><|system|>Answer briefly.<|end|><|user|>Say the word river.<|end|><|assistant|>river<|end|>"
    )


def test_chat_template_marks_the_assistants_words_and_writes_tool_calls(tokenizer):
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": "Rome"}}}
    talk = [{"role": "user", "content": "Look up Rome."}, {"role": "assistant", "tool_calls": [call]}]
    text = '<tool_call>{"name": "search", "arguments": {"query": "Rome"}}</tool_call>'
    assert tokenizer.apply_chat_template(talk, tokenize=False).endswith(f"<|assistant|>{text}<|end|>")
    encoded = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(marked) == f"{text}<|end|>"
    with pytest.raises(Exception, match="unknown role critic; expected system, user, assistant or tool"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "x"}], tokenize=False)


def test_model_answers_and_ends_its_turn(model, tokenizer):
    prompts = ["Say the word river.", "Hello!", "Count to 5.", "List three animals."]
    answers = []
    for prompt in prompts:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        out = model.generate(**encoded, max_new_tokens=120, do_sample=False)[0, encoded["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(out))
    assert all(answer.endswith("<|end|>") for answer in answers), answers
    assert answers[:3] == ["river<|end|>", "Hello! How can I help you?<|end|>", "1, 2, 3, 4, 5<|end|>"]


def test_model_has_learnt_english(model, tokenizer):
    import torch

    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(SENTENCE)["input_ids"]]])
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.6


def test_model_card_holds_the_figures_of_the_run():
    record = json.loads((MODEL / "training.json").read_text())
    card = (MODEL / "README.md").read_text()
    figures = record["figures"]
    assert f"{figures['validation_loss']:.3f} nats a token" in card
    assert f"| {figures['bits_per_byte']:.3f} (" in card
    assert f"{figures['steps']:,} of {record['arguments']['batch_tokens']:,} tokens" in card
    assert record["curve"][-1]["step"] == figures["steps"] == record["arguments"]["max_steps"]
    assert all(f"| {source} |" in card for source in record["data"]["documents_tokens_bytes"])
    assert figures["validation_loss"] < 3.5
    made = figures["made_up_instructions"]
    assert made["questions"] > 300
    assert made["greedy"] > made["temperature_1"] > 0.1

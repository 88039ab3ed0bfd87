"""Tokenizers with the chat templates of several families, what each family's text must be, and answers of every awkward kind.

The families' own formats are written down by hand in `FAMILIES`; the templates themselves are read from the installed trl.
"""

import importlib.resources
import random
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmrl.rollout.protocols import Sample
from llmrl.types import Episode, PolicyVersion

CORPUS = ["hello there, how are you today?", "the answer is four, and five is not", "tell me a story about a dog"]
VERSION = PolicyVersion(3, "abc")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 % 2 == 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# The system text stands before the last user message, wherever that is.
MOVING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n"
    "{{ messages[0].content + '\n' if loop.last and messages[0].role == 'system' }}{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"

QWEN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
LLAMA = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 1 May 2025"
LLAMA_SYSTEM = f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA_DATES}\n\n<|eot_id|>"
GEMMA = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
SPECIAL = sorted(set(re.findall(r"<\|?\w+\|?>", QWEN + LLAMA + GEMMA)))
# before all, each user message, the end token of an answer, behind it
FAMILIES = {
    "qwen3": ("", QWEN, "<|im_end|>", "\n"),
    "qwen2_5": (QWEN_SYSTEM, QWEN, "<|im_end|>", "\n"),
    "llama3": ("<s>", LLAMA, "<|eot_id|>", ""),
    "llama3_2": ("<s>" + LLAMA_SYSTEM, LLAMA, "<|eot_id|>", ""),
    "gemma": ("<s>", GEMMA, "<end_of_turn>", "\n"),
    "gemma3": ("<s>", GEMMA, "<end_of_turn>", "\n"),
    "mistral": ("<s>", "[INST] {} [/INST]", "</s>", ""),
}
OPTIONS = {"llama3_2": {"date_string": "1 May 2025"}}


def make_tokenizer(template, end="<|im_end|>", special=()):
    if template.endswith(".jinja"):
        template = (importlib.resources.files("trl") / "chat_templates" / template).read_text(encoding="utf-8")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=end, chat_template=template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [name for name in ("</s>", *SPECIAL, *special) if name != end]}
    )
    return tokenizer


TOKENIZERS = {
    name: make_tokenizer(MISTRAL if name == "mistral" else f"{name}.jinja", end)
    for name, (_, _, end, _) in FAMILIES.items()
}


def encode(tokenizer, text):
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def bytewise(tokenizer, text):
    """Encode byte by byte: a sequence that the tokenizer itself never gives, and that holds no special token."""
    (shown, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return tuple(tokenizer.convert_tokens_to_ids(list(shown)))


def sampled(tokenizer, ids, reason="stop", text=None):
    rng = random.Random(f"{ids}")
    said = tokenizer.decode(ids, skip_special_tokens=True) if text is None else text
    return Sample(tuple(ids), tuple(-rng.random() for _ in ids), said, reason, VERSION)


def say(tokenizer, text):
    return sampled(tokenizer, (*encode(tokenizer, text), tokenizer.eos_token_id))


def any_answer(tokenizer, rng):
    """One answer of each awkward kind there is; returns it and whether it ended with the end token."""
    end = tokenizer.eos_token_id
    text = rng.choice(["four", "the answer is five", "  four \n", "é ∑ 犬", "\n\n four", "a <b> c", " ", "not a dog?"])
    ids = encode(tokenizer, text)
    kind = rng.randrange(8)
    if kind == 0:
        return sampled(tokenizer, (*ids, end)), True
    if kind == 1:
        return sampled(tokenizer, (*bytewise(tokenizer, text), end)), True
    if kind == 2:
        return sampled(tokenizer, ids, "length"), False
    if kind == 3:  # cut inside a character
        return sampled(tokenizer, bytewise(tokenizer, "x犬")[:-1], "length"), False
    if kind == 4:  # the engine keeps the tokens of the stop string and takes them out of the text
        return sampled(tokenizer, encode(tokenizer, text + "STOP!"), text=text), False
    if kind == 5:
        return sampled(tokenizer, (end,)), True
    if kind == 6:  # max_tokens and the end token together, and the name of a control token in ordinary letters
        return sampled(tokenizer, (*bytewise(tokenizer, f"{tokenizer.eos_token} user"), end), "length"), True
    ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    return sampled(tokenizer, (*rng.choices(ordinary, k=rng.randrange(1, 9)), end)), True


def as_rollouts(conversation):
    return Episode("row", 0, conversation.turns, done=True).rollouts()

"""Tokenizers with chat templates of several families, made on the spot, and rows for them."""

import copy
import functools

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llmrl.ats.data import Row

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


@functools.cache
def plain_tokenizer():
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

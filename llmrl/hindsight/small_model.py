"""A language model small enough for a CPU, with a tokenizer of whole words, to learn one environment from nothing.

    make_small_model(logs, "runs/small")      # then: llmrl hindsight train --model runs/small

Every word of the texts is a token, so that decoding gives a text back as it was; a word that was not in them is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llmrl.hindsight.dialogues import Dialogue

_SPECIAL = ("<unk>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")
_TEMPLATE = """{{- '<|bos|>' -}}
{%- for message in messages -%}
{{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def make_small_model(
    dialogues: Iterable[Dialogue],
    folder: Path | str,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    context: int = 2048,
    seed: int = 0,
) -> Path:
    """Write a Llama of random weights and a tokenizer of the words of the dialogues; return the folder.

    Args:
        dialogues: whose words the model knows.
        folder: to write; what is in it is replaced.
        layers, width, heads: of the Llama; its MLP is four times as wide.
        context: most tokens of a row.
        seed: of the weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(message.content for dialogue in dialogues for message in dialogue.messages)
    tokenizer.model_max_length = context
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end,
        initializer_range=width**-0.5,  # the default, .02, is for wide models: attention would sleep for long
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def word_tokenizer(texts: Iterable[str]) -> Any:
    """Return a tokenizer whose tokens are the words of the texts, with the space before them, and marks of punctuation."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u2581"
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(replacement=space, prepend_scheme="never"), pre_tokenizers.Punctuation()]
    )
    words = sorted({piece for text in set(texts) for piece, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *words))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.decoder = decoders.Metaspace(replacement=space, prepend_scheme="never")
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|end|>",
        chat_template=_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip

"""Tokenizer and chat template of recipes/leret_policy.py, and its batches: one context, then several instructed queries.

The tokenizer is a byte-level BPE over words. Its normalizer turns everything but letters and digits into spaces, so a word
has the same pieces wherever it stands and a query is the same tokens as the words it copies. The marks of the prompt
("Question:", "[1]", "|") and each instruction are one token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PAD, END, SYSTEM, USER, ASSISTANT = SPECIALS = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
PASSAGE_MARKS = tuple(f"[{number}]" for number in range(1, 13))
TEXT_MARK, QUESTION_MARK = "|", "Question:"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('unknown role ' + message.role + '; expected system, user or assistant') -}}
{%- endif -%}
{{- '<|' + message.role + '|>' -}}
{%- set ns = namespace(text='') -%}
{%- if message.content is string -%}
{%- set ns.text = message.content -%}
{%- else -%}
{%- for part in message.content -%}{%- set ns.text = ns.text + part.text -%}{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- ns.text + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- ns.text -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], instructions: Sequence[str], vocab_size: int, max_length: int) -> Any:
    """Return a tokenizer of at most `vocab_size` pieces, special tokens, marks and instructions included."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = (QUESTION_MARK, TEXT_MARK, *PASSAGE_MARKS, *instructions)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"['\u2019]s\b"), " "),
            normalizers.Replace(Regex(r"&(quot|amp|lt|gt|#?[0-9a-z]{2,6});"), " "),
            normalizers.Replace(Regex(r"[^\p{L}\p{N}]+"), " "),
            normalizers.Strip(),
        ]
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class Example:
    """A prompt up to its instruction, and for each instruction the query that belongs to it, as tokens.

    A segment is the instruction, <|assistant|>, the query, <|end|>; the first two are given, the rest is learned.
    """

    context: tuple[int, ...]
    segments: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.segments))


GIVEN = 2


@dataclass(frozen=True)
class Batch:
    """What a step is computed from: the tokens of all examples one behind the other, N in all, without padding.

    Attributes:
        ids, positions: `[1, N]`. Positions of every segment go on from the end of its context.
        contexts: `[B, C]` indices of the contexts' tokens; N where there is none.
        segments: `[B, S, L]` indices of the segments' tokens; N where there is none.
        places: `[N]` where each token stands when these two are flattened and joined.
        predict: indices of the tokens from which the next one is learned.
        labels: the next token of each of them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    contexts: torch.Tensor
    segments: torch.Tensor
    places: torch.Tensor
    predict: torch.Tensor
    labels: torch.Tensor


def collate(examples: Sequence[Example]) -> Batch:
    """Return the batch of some examples."""
    import torch

    total, ids, positions, predict, labels = sum(map(len, examples)), [], [], [], []
    count = max(len(example.segments) for example in examples)
    contexts = torch.full((len(examples), max(len(example.context) for example in examples)), total)
    longest = max(len(piece) for example in examples for piece in example.segments)
    segments = torch.full((len(examples), count, longest), total)
    for row, example in enumerate(examples):
        start = len(example.context)
        contexts[row, :start] = torch.arange(len(ids), len(ids) + start)
        ids += example.context
        positions += range(start)
        for number, piece in enumerate(example.segments):
            first = len(ids)
            segments[row, number, : len(piece)] = torch.arange(first, first + len(piece))
            predict += range(first + GIVEN - 1, first + len(piece) - 1)
            labels += piece[GIVEN:]
            ids += piece
            positions += range(start, start + len(piece))
    joined = torch.cat([contexts.flatten(), segments.flatten()])
    places = torch.empty(total + 1, dtype=torch.int64)
    places[joined] = torch.arange(len(joined))
    numbers = (torch.tensor(part) for part in (predict, labels))
    return Batch(torch.tensor([ids]), torch.tensor([positions]), contexts, segments, places[:total], *numbers)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, scaling: float) -> torch.Tensor:
    """Return attention over a `Batch`: a token sees its context and, of the segments, its own; nothing ahead of itself.

    Args:
        query, key, value: `[N, H, D]`.
        batch: which tokens belong together.
        scaling: of the scores.

    Returns:
        `[N, H, D]`. The same as attention with an `[N, N]` mask, in a fraction of the time.
    """
    import torch

    rows, length = batch.contexts.shape
    _, count, longest = batch.segments.shape
    heads, size = query.shape[1:]
    joined, cut = torch.cat([batch.contexts.flatten(), batch.segments.flatten()]), rows * length
    spread = [_move(part, joined, batch.places) for part in (query, key, value)]
    context = [part[:cut].view(rows, length, heads, size).transpose(1, 2) for part in spread]
    all_own = [part[cut:].view(rows, count * longest, heads, size).transpose(1, 2) for part in spread]
    own = [part.unflatten(2, (count, longest)) for part in all_own]

    ahead = query.new_full((max(length, longest),) * 2, float("-inf")).triu(1)
    padding = torch.zeros_like(batch.contexts, dtype=query.dtype).masked_fill(
        batch.contexts == len(query), float("-inf")
    )
    scores = context[0] @ (context[1] * scaling).transpose(-1, -2) + ahead[:length, :length]
    first = torch.softmax(scores, dim=-1) @ context[2]
    to_context = all_own[0] @ (context[1] * scaling).transpose(-1, -2) + padding[:, None, None]
    to_own = own[0] @ (own[1] * scaling).transpose(-1, -2) + ahead[:longest, :longest]
    scores = torch.cat([to_context, to_own.flatten(2, 3)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    second = weights[..., :length] @ context[2]
    second = second + (weights[..., length:].unflatten(2, (count, longest)) @ own[2]).flatten(2, 3)
    both = torch.cat([part.transpose(1, 2).reshape(-1, heads, size) for part in (first, second)])
    return _move(both, batch.places, joined)


def _move(values: torch.Tensor, take: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Return `values[take]`, zero where `take` is past the end; `back` is the inverse, which makes the gradient a look-up."""
    import torch

    class Move(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return torch.cat([values, values.new_zeros(1, *values.shape[1:])]).index_select(0, take)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.cat([grad, grad.new_zeros(1, *grad.shape[1:])]).index_select(0, back)

    return Move.apply(values)  # type: ignore[no-any-return]

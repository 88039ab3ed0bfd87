"""Tokenizer, chat template and windows of recipes/tiny_lm.py: from documents to batches of tokens."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiny_lm_data

from llmrl.errors import DataError
from llmrl.files import publish_folder, staging_folder, write_json

if TYPE_CHECKING:
    import torch

SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")

# a digit is a piece of its own, so that sums are learnt by digit; otherwise words with their leading space, as GPT-2 has it
_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# each turn is rendered from itself alone, so a longer conversation never changes the text of a shorter one
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
{{- '<|system|>Tools:' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role ' + message.role + '; expected system, user, assistant or tool') -}}
{%- endif -%}
{%- set ns = namespace(text='') -%}
{%- if message.content is string -%}
{%- set ns.text = message.content -%}
{%- elif message.content -%}
{%- for part in message.content -%}{%- set ns.text = ns.text + part.text -%}{%- endfor -%}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set f = call.function or call -%}
{%- set arguments = f.arguments if f.arguments is string else f.arguments | tojson -%}
{%- set ns.text = ns.text + '<tool_call>{"name": ' + (f.name | tojson) + ', "arguments": ' + arguments + '}</tool_call>' -%}
{%- endfor -%}
{{- '<|' + message.role + '|>' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- ns.text + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- ns.text + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

Piece = tuple[int, int, int]


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """Return a byte-level BPE tokenizer of at most `vocab_size` pieces with the special tokens and the chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=[s for s in SPECIALS if s not in ("<|bos|>", "<|eos|>", "<|pad|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def render(document: tiny_lm_data.Document, tokenizer: Any) -> str:
    """Return what is trained on: <|bos|>, the text or the turns of the chat, <|eos|>."""
    if isinstance(document.content, str):
        return f"{tokenizer.bos_token}{document.content}{tokenizer.eos_token}"
    return str(tokenizer.apply_chat_template(document.content, tokenize=False)) + tokenizer.eos_token


@dataclasses.dataclass
class Documents:
    """The documents of one side as tokens, one behind the other."""

    tokens: torch.Tensor
    lengths: list[int]

    def __post_init__(self) -> None:
        self.starts = [0, *itertools.accumulate(self.lengths)]

    def fill(self, windows: list[list[Piece]], width: int, pad: int) -> torch.Tensor:
        """Return the tokens of packed windows, (windows, width), padded at their ends."""
        import torch

        batch = torch.full((len(windows), width), pad, dtype=torch.int64)
        for row, pieces in zip(batch, windows, strict=True):
            at = 0
            for document, start, stop in pieces:
                first = self.starts[document]
                row[at : at + stop - start] = self.tokens[first + start : first + stop]
                at += stop - start
        return batch


@dataclasses.dataclass
class Corpus:
    """Both sides, the folder of the tokenizer, and what is known about the data."""

    train: Documents
    held: Documents
    tokenizer_dir: Path
    facts: dict[str, Any]


def load_corpus(data_dir: Path, folder: Path, *, quiet: bool, **options: int) -> Corpus:
    """Return the tokens of the data, from `folder` when it was made with the same options, files and code.

    Args:
        data_dir: see recipes/tiny_lm_data.py.
        folder: where the tokens are kept.
        quiet: print nothing.
        options: seed, synthetic_rows, vocab_size, max_length.
    """
    from safetensors.torch import load_file

    files = {
        f"{data_set.folder}/{name}": _digest(data_dir / data_set.folder / name)
        for data_set in tiny_lm_data.SETS
        for name in data_set.files
        if (data_dir / data_set.folder / name).is_file()
    }
    code = [_digest(Path(path)) for path in (tiny_lm_data.__file__, __file__)]
    wanted = json.dumps({"files": files, "code": code, **options}, sort_keys=True)
    key = hashlib.sha256(wanted.encode()).hexdigest()
    facts_file = folder / "facts.json"
    if not facts_file.is_file() or json.loads(facts_file.read_text(encoding="utf-8"))["key"] != key:
        if not quiet:
            print("reading the data and training the tokenizer ...", flush=True)
        _make_corpus(data_dir, folder, {"key": key, "files": files}, **options)
    tensors = load_file(folder / "tokens.safetensors")
    sides = [Documents(tensors[side], tensors[f"{side}_lengths"].tolist()) for side in ("train", "held")]
    return Corpus(*sides, folder, json.loads(facts_file.read_text(encoding="utf-8")))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _make_corpus(
    data_dir: Path,
    folder: Path,
    facts: dict[str, Any],
    *,
    seed: int,
    synthetic_rows: int,
    vocab_size: int,
    max_length: int,
) -> None:
    import numpy as np
    import torch
    from safetensors.torch import save_file

    sides: dict[str, list[tiny_lm_data.Document]] = {"train": [], "held": []}
    for document in tiny_lm_data.read_documents(data_dir, seed=seed, synthetic_rows=synthetic_rows):
        sides["held" if tiny_lm_data.held_out(document.keys) else "train"].append(document)
    for side, documents in sides.items():
        if not documents:
            raise DataError(f"{data_dir} (--data_dir): no document on the {side} side; add data")
    texts = (tiny_lm_data.plain_text(document) for document in sides["train"])
    tokenizer = train_tokenizer(texts, vocab_size, max_length)
    tensors = {}
    counts: dict[str, dict[str, list[int]]] = {}
    for side, documents in sides.items():
        ids: list[Any] = []
        for start in range(0, len(documents), 2000):
            rendered = [render(document, tokenizer) for document in documents[start : start + 2000]]
            encoded = tokenizer.backend_tokenizer.encode_batch(rendered, add_special_tokens=False)
            ids += [np.asarray(e.ids, dtype=np.int32) for e in encoded]
        tensors[side] = torch.from_numpy(np.concatenate(ids))
        tensors[f"{side}_lengths"] = torch.tensor([len(i) for i in ids])
        for document, tokens in zip(documents, ids, strict=True):
            count = counts.setdefault(document.source, {}).setdefault(side, [0, 0, 0])
            sizes = (1, len(tokens), len(tiny_lm_data.plain_text(document).encode()))
            count[:] = [a + b for a, b in zip(count, sizes, strict=True)]
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    facts |= {"sha256": digest.hexdigest(), "documents_tokens_bytes": counts}
    facts["synthetic"] = [document.source == "synthetic" for document in sides["train"]]
    facts["held_sources"] = [document.source for document in sides["held"]]
    with staging_folder(folder) as staging:
        tokenizer.save_pretrained(staging)
        save_file(tensors, staging / "tokens.safetensors")
        write_json(staging / "facts.json", facts)
        publish_folder(staging, folder)


def pack(lengths: list[int], width: int, rng: random.Random, repeats: list[int] | None = None) -> list[list[Piece]]:
    """Share documents among windows of `width` tokens; every token is in exactly one, or in as many as `repeats` says.

    A document longer than a window is cut. The pieces come in random order and each goes where it leaves the least room,
    so a window begins where a document begins (or goes on) and is almost full.

    Returns:
        For each window its pieces as (document, first token, last token + 1), the windows in random order.
    """
    pieces = [
        (document, start, min(start + width, length))
        for document, length in enumerate(lengths)
        for _ in range(repeats[document] if repeats else 1)
        for start in range(0, length, width)
    ]
    rng.shuffle(pieces)
    windows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (tokens left, window), sorted
    for piece in pieces:
        size = piece[2] - piece[1]
        at = bisect.bisect_left(room, (size, 0))
        if at == len(room):
            left, window = width, len(windows)
            windows.append([])
        else:
            left, window = room.pop(at)
        windows[window].append(piece)
        if left > size:
            bisect.insort(room, (left - size, window))
    rng.shuffle(windows)
    return windows


class Windows:
    """The training windows of one width, epoch after epoch without end; a function of seed and position alone."""

    def __init__(self, documents: Documents, width: int, seed: int, pad: int, repeats: list[int] | None = None) -> None:
        self.documents, self.width, self.seed, self.pad, self.repeats = documents, width, seed, pad, repeats
        self.order: list[list[Piece]] = []
        self.epochs = 0

    def get(self, first: int, count: int) -> torch.Tensor:
        """Return windows `first` to `first + count - 1`, (count, width) tokens, padded at their ends."""
        while len(self.order) < first + count:
            rng = random.Random(f"{self.seed} {self.width} {self.epochs}")
            self.order += pack(self.documents.lengths, self.width, rng, self.repeats)
            self.epochs += 1
        return self.documents.fill(self.order[first : first + count], self.width, self.pad)

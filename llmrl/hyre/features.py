"""What a frozen base says of an answer: one vector a text.

The base is a sentence encoder (pooled and of norm 1, `llmrl.encoder`) or a causal LM (the last token's state after the final
norm, which is what a SequenceClassification model's `score` layer reads in transformers and in vLLM).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmrl.base_model import default_device, load_base
from llmrl.encoder import DEFAULT_ENCODER, Encoder, default_encoder
from llmrl.errors import DataError, ModelError
from llmrl.files import resolve_reference
from llmrl.heads import BaseReference
from llmrl.hyre.pairs import Messages, Pair, model_text, plain_text
from llmrl.modeling import local_folder
from llmrl.training.tracking import progress_bar

TEXTS = ("answer", "dialogue")


class Features(Protocol):
    """A base that turns texts into vectors."""

    kind: str
    width: int
    name: str
    identity: list[str]
    dtype: str

    def text(self, prompt: Messages, answer: str) -> str:
        """Return what is read of an answer to a prompt."""
        ...

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> Tensor:
        """Return `[N, H]` float32 on the CPU."""
        ...


class EncoderFeatures:
    """Vectors of a sentence encoder."""

    kind = "encoder"
    dtype = "float32"

    def __init__(self, name: str, *, max_length: int | None = None, batch_size: int = 64) -> None:
        self.name, self.batch_size = name, batch_size
        self.encoder = Encoder(name, max_length=max_length)
        self.identity = list(self.encoder.fingerprint)
        self.width = self.encoder.width
        self.cut = 0

    def text(self, prompt: Messages, answer: str) -> str:
        """Return prompt and answer as text."""
        return plain_text(prompt, answer)

    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> Tensor:
        """Return `[N, H]` float32 on the CPU; `cut` counts the texts that were longer than the encoder reads."""
        vectors, cut = self.encoder.embed(texts, self.batch_size, progress=not quiet, unit="text")
        self.cut += cut
        return vectors.cpu()


class CausalFeatures:
    """Last states of a causal LM."""

    kind = "causal_lm"

    def __init__(
        self,
        name: str,
        *,
        max_length: int | None = None,
        batch_size: int = 16,
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        self.base = load_base(name, dtype=dtype, revision=revision)
        self.name, self.batch_size, self.cut = name, batch_size, 0
        reference = self.base.reference
        self.reference: BaseReference = reference
        self.identity = [reference.weights, reference.tokenizer, reference.template]
        self.dtype = str(self.base.model.dtype).removeprefix("torch.")
        self.width = int(self.base.model.config.get_text_config().hidden_size)
        positions = getattr(self.base.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        self.max_length = min(max_length or positions, positions)

    def text(self, prompt: Messages, answer: str) -> str:
        """Return the dialogue in the model's chat template, or as plain text where it has none."""
        return model_text(self.base.tokenizer, prompt, answer)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> Tensor:
        """Return `[N, H]` float32 on the CPU.

        Raises:
            DataError: a text longer than the context; it is not cut, because its end is what is read.
        """
        model, tokenizer = self.base.model, self.base.tokenizer
        rows: list[list[int]] = [tokenizer(text)["input_ids"] for text in texts]
        for i, ids in enumerate(rows):
            if not 1 <= len(ids) <= self.max_length:
                raise DataError(f"text {i} has {len(ids)} tokens, expected 1 to {self.max_length}: {texts[i]!r:.60}")
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = torch.empty(len(rows), self.width)
        with progress_bar("features", len(rows), unit="text", quiet=quiet) as advance:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                found[batch] = last_states(model, [rows[i] for i in batch], default_device())
                advance(start + len(batch), len(rows))
        return found


def last_states(model: Any, rows: Sequence[Sequence[int]], device: str) -> Tensor:
    """Return the state after the final norm of each row's last token, `[B, H]` float32 on the CPU."""
    from llmrl.heads_forward import decoder_of, states_of

    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    decoder = decoder_of(model)
    states = states_of(decoder, decoder(input_ids=ids, attention_mask=mask, use_cache=False))
    last = torch.tensor([len(row) - 1 for row in rows], device=states.device)
    return states[torch.arange(len(rows), device=states.device), last].float().cpu()


def open_features(
    name: str | None,
    *,
    max_length: int | None = None,
    batch_size: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> Features:
    """Open a base: a sentence encoder or a causal LM, told apart by its architecture.

    Args:
        name: folder or hub name; None takes the installed package's MiniLM, else it from the hub.
        max_length: tokens read of a text.
        batch_size: texts at once.
        dtype: of a causal LM.
        revision: of a hub name.

    Raises:
        UsageError: a path that is not there.
        ModelError: it cannot be read.
    """
    size = {} if batch_size is None else {"batch_size": batch_size}
    if name is None or name == DEFAULT_ENCODER:  # known by its hub name wherever it lies
        found = EncoderFeatures(default_encoder(), max_length=max_length, **size)
        found.name = DEFAULT_ENCODER
        return found
    reference, _ = resolve_reference(name, "base")
    if is_causal_lm(reference):
        return CausalFeatures(reference, max_length=max_length, dtype=dtype, revision=revision, **size)
    return EncoderFeatures(reference, max_length=max_length, **size)


def is_causal_lm(name: str) -> bool:
    """Tell whether a model generates, by the architecture its config.json names.

    Raises:
        ModelError: it has no config.json that can be read.
    """
    try:
        path = local_folder(name) / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot open the base {name}: {reason}; expected a folder with config.json, or a hub name"
        ) from error
    return any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in fields.get("architectures") or ())


def embed_pairs(
    base: Features, pairs: Sequence[Pair], reads: str, *, cache_dir: Path | None = None, quiet: bool = True
) -> tuple[Tensor, Tensor]:
    """Return features of the chosen and of the rejected, `[N, H]` each; a text that comes several times is read once.

    Args:
        base: from `open_features`.
        pairs: N.
        reads: "answer" (the prompt is left out) or "dialogue".
        cache_dir: where vectors are kept between runs, by base, its dtype and texts; None keeps none.
        quiet: no progress bar.
    """
    texts = [
        base.text(pair.prompt if reads == "dialogue" else (), a) for pair in pairs for a in (pair.chosen, pair.rejected)
    ]
    unique = list(dict.fromkeys(texts))
    vectors = _kept(base, unique, cache_dir, quiet)
    index = {text: i for i, text in enumerate(unique)}
    rows = vectors[[index[text] for text in texts]]
    return rows[0::2].clone(), rows[1::2].clone()


def _kept(base: Features, texts: list[str], cache_dir: Path | None, quiet: bool) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    if cache_dir is None:
        return base.embed(texts, quiet=quiet)
    read_by = [base.kind, base.identity] if base.dtype == "float32" else [base.kind, base.identity, base.dtype]
    key = hashlib.sha256(json.dumps([*read_by, texts]).encode()).hexdigest()[:32]
    path = cache_dir / f"{key}.safetensors"
    if path.is_file():
        try:
            return load_file(str(path))["features"]
        except (SafetensorError, KeyError):
            path.unlink()  # cut off while it was written; made again
    found = base.embed(texts, quiet=quiet)
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({"features": found.contiguous()}, str(temporary))
    temporary.replace(path)
    return found

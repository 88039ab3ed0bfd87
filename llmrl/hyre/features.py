"""What a frozen base says of an answer: one vector a text.

The base is a sentence encoder (pooled and of norm 1, `llmrl.encoder`) or a causal LM (the last token's state after the final
norm, which is what a SequenceClassification model's `score` layer reads in transformers and in vLLM).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmrl.base_model import default_device, load_base
from llmrl.encoder import DEFAULT_ENCODER, Encoder, default_encoder
from llmrl.errors import DataError, ModelError, UsageError
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
        settings = self.encoder.settings
        self.identity = [*self.encoder.fingerprint, settings.pooling, f"{settings.max_length} tokens"]
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
        self.max_length, self.cuts = min(max_length or positions, positions), max_length is not None

    def text(self, prompt: Messages, answer: str) -> str:
        """Return the dialogue in the model's chat template, or as plain text where it has none."""
        return model_text(self.base.tokenizer, prompt, answer)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], *, quiet: bool = True) -> Tensor:
        """Return `[N, H]` float32 on the CPU; `cut` counts the texts that lost their beginning.

        Raises:
            DataError: a text longer than the context, where no `max_length` was given.
        """
        model = self.base.model
        rows = [self.ids(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = torch.empty(len(rows), self.width)
        with progress_bar("features", len(rows), unit="text", quiet=quiet) as advance:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                found[batch] = last_states(model, [rows[i] for i in batch], default_device())
                advance(start + len(batch), len(rows))
        return found

    def ids(self, text: str) -> list[int]:
        """Return what is read of a text; with a `max_length` its beginning is cut off, because its end is what is scored.

        Raises:
            DataError: it has no token, or more than the context, where no `max_length` was given.
        """
        ids: list[int] = self.base.tokenizer(text)["input_ids"]
        if not ids or (len(ids) > self.max_length and not self.cuts):
            raise DataError(
                f"{len(ids)} tokens, expected 1 to {self.max_length}: {text!r:.60}\n--max_length {self.max_length} cuts off "
                "the beginning of longer texts"
            )
        if len(ids) <= self.max_length:
            return ids
        self.cut += 1
        first = ids[:1] if ids[0] in self.base.tokenizer.all_special_ids else []
        return first + ids[len(ids) - self.max_length + len(first) :]


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
    known = name is None or name == DEFAULT_ENCODER  # by its hub name wherever it lies
    reference, local = (default_encoder(), False) if name is None or known else resolve_reference(name, "base")
    if not known and is_causal_lm(reference, revision):
        found = CausalFeatures(reference, max_length=max_length, dtype=dtype, revision=revision, **size)
        found.name = str(Path(reference).absolute()) if local else reference
        return found
    if revision is not None or dtype not in ("auto", "float32"):
        raise UsageError(
            f"{name or DEFAULT_ENCODER} is a sentence encoder, read in float32 and as it is: leave out --dtype and --revision"
        )
    encoder = EncoderFeatures(reference, max_length=max_length, **size)
    encoder.name = DEFAULT_ENCODER if known else str(Path(reference).absolute()) if local else reference
    return encoder


def is_causal_lm(name: str, revision: str | None = None) -> bool:
    """Tell a model that generates, or a reward model made of one, from a sentence encoder, by what its config.json names.

    Raises:
        ModelError: it has no config.json that can be read, or is neither.
    """
    try:
        path = local_folder(name, **({} if revision is None else {"revision": revision})) / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"cannot open the base {name}: {reason}; expected a folder with config.json, or a hub name"
        ) from error
    architectures = [str(a) for a in fields.get("architectures") or ()]
    if any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        return True
    if any(a.endswith("ForSequenceClassification") for a in architectures) and _is_decoder(
        str(fields.get("model_type"))
    ):
        return True  # a reward model: its states are read, its own score is not
    if not architectures or any(a.endswith(("Model", "ForMaskedLM")) for a in architectures):
        return False
    raise ModelError(
        f"{name} is a {architectures[0]}: expected a causal LM, a reward model made of one, or a sentence encoder"
    )


def _is_decoder(model_type: str) -> bool:
    """Tell whether a model only generates: transformers' SequenceClassification of it then reads the last token."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


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
    try:
        vectors, cut = _kept(base, unique, cache_dir, quiet)
    except DataError as error:
        raise DataError(f"{_place(base, pairs, texts)}{error}") from error
    if cut:
        print(
            f"warning: {cut} of {len(unique)} texts are longer than what is read of a text and were cut",
            file=sys.stderr,
        )
    index = {text: i for i, text in enumerate(unique)}
    rows = vectors[[index[text] for text in texts]]
    return rows[0::2].clone(), rows[1::2].clone()


def _place(base: Features, pairs: Sequence[Pair], texts: Sequence[str]) -> str:
    """Return "FILE:LINE: " of the first text that a causal LM does not read."""
    for i, text in enumerate(texts):
        try:
            base.ids(text)  # type: ignore[attr-defined]
        except DataError:
            return f"{pairs[i // 2].where}: "
        except AttributeError:
            return ""
    return ""


def _kept(base: Features, texts: list[str], cache_dir: Path | None, quiet: bool) -> tuple[Tensor, int]:
    """Return vectors, from the cache where they lie there, and how many texts were cut."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    before = getattr(base, "cut", 0)
    if cache_dir is None:
        return base.embed(texts, quiet=quiet), getattr(base, "cut", 0) - before
    longest = getattr(base, "max_length", None)
    key = hashlib.sha256(json.dumps([base.kind, base.identity, base.dtype, longest, texts]).encode()).hexdigest()[:32]
    path = cache_dir / f"{key}.safetensors"
    if path.is_file():
        try:
            with safe_open(str(path), framework="pt") as file:
                found = file.get_tensor("features")
                cut = int((file.metadata() or {})["cut"])
            if found.shape == (len(texts), base.width):
                if hasattr(base, "cut"):
                    base.cut += cut
                return found, cut
        except (SafetensorError, KeyError, ValueError):
            pass
        path.unlink()  # cut off while it was written, or damaged: made again
    found = base.embed(texts, quiet=quiet)
    cut = getattr(base, "cut", 0) - before
    cache_dir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({"features": found.contiguous()}, str(temporary), metadata={"cut": str(cut)})
    temporary.replace(path)
    return found, cut

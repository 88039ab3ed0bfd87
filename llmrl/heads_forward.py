"""What turns a transformers causal LM into one with heads: hooks for its hidden states, and a forward that applies the heads.

The hidden states are taken on their way into the output embedding, so exactly those rows for which logits are computed,
whatever `logits_to_keep` says; for heads that read earlier positions, those of all positions as the decoder returns them.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.errors import ModelError
from llmrl.head_cache import sequence_tau
from llmrl.logits_heads import TransformerTemperatureHead, apply_logits_heads, reads_sequence


class LogitsHeadsMixin:
    """Adds `llmrl_heads` to a transformers causal LM; its `forward` is made by `forward_with_heads`."""

    llmrl_heads: nn.ModuleDict
    config: Any

    def attach_heads(self, heads: nn.ModuleDict) -> None:
        """Replace the heads; an empty ModuleDict leaves the bare base."""
        self.llmrl_heads = heads
        self._llmrl_hidden: Tensor | None = None
        self._llmrl_states: Tensor | None = None
        self._llmrl_checked = False
        for handle in getattr(self, "_llmrl_hooks", ()):
            handle.remove()
        self._llmrl_hooks = [self.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)]  # type: ignore[attr-defined]
        if reads_sequence(heads):
            self._llmrl_hooks.append(decoder_of(self).register_forward_hook(self._keep_states))

    def _keep_hidden(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._llmrl_hidden = args[0]

    def _keep_states(self, module: nn.Module, args: Any, output: Any) -> None:
        self._llmrl_states = output[0]  # of every position, where the output embedding may see the last one only

    def _sequence_taus(self, kwargs: dict[str, Any], cache: Any, seen: int | Tensor) -> dict[str, Tensor]:
        """Return tau of the heads that read earlier positions, at the positions whose logits were computed."""
        states, self._llmrl_states = self._llmrl_states, None
        if states is None or self._llmrl_hidden is None:
            return {}
        mask: Any = kwargs.get("attention_mask")
        if torch.is_tensor(mask) and mask.ndim == 4 and getattr(self.config, "sliding_window", None):
            raise ModelError(
                "a transformer head on a base with sliding windows needs a dynamic cache or a 2D attention mask"
            )
        keep = kwargs.get("logits_to_keep", 0)
        rows = slice(-keep, None) if isinstance(keep, int) and keep else slice(None) if isinstance(keep, int) else keep
        if self._llmrl_hidden.shape[1] == states.shape[1]:
            rows = slice(None)
        # once: on a GPU the comparison waits for the device
        if not self._llmrl_checked and not self._llmrl_hidden.equal(states[:, rows]):
            raise ModelError(
                f"{type(self).__name__} changes its hidden states before the output embedding: please report it"
            )
        self._llmrl_checked = True
        return {
            name: sequence_tau(name, head, states, mask, cache, seen)[:, rows]
            for name, head in self.llmrl_heads.items()
            if isinstance(head, TransformerTemperatureHead)
        }


def decoder_of(model: Any) -> Any:
    """Return the part of a transformers causal LM that gives the hidden states which enter the output embedding."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return decoder if decoder is not model else model.base_model


def _length(cache: Any) -> int | Tensor:
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return length.clone() if torch.is_tensor(length) else length


def forward_with_heads(base_forward: Any) -> Any:
    """Return `base_forward` of a transformers causal LM with the heads' effect on logits and loss."""
    names = list(inspect.signature(base_forward).parameters)[1:]

    @functools.wraps(base_forward)  # generate() and Trainer read the base's signature through this
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        labels = kwargs.pop("labels", None)
        as_tuple = kwargs.pop("return_dict", None) is False
        seen = _length(kwargs.get("past_key_values")) if reads_sequence(self.llmrl_heads) else 0
        outputs = base_forward(self, return_dict=True, **kwargs)
        taus = self._sequence_taus(kwargs, outputs.get("past_key_values"), seen)
        hidden, self._llmrl_hidden = self._llmrl_hidden, None
        outputs.logits = apply_logits_heads(self.llmrl_heads, outputs.logits, hidden, taus)
        if labels is not None:
            extra = {key: kwargs[key] for key in ("num_items_in_batch", "shift_labels") if key in kwargs}
            outputs.loss = self.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=self.config.vocab_size, **extra
            )
        return outputs.to_tuple() if as_tuple else outputs

    return forward

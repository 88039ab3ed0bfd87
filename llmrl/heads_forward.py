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
from llmrl.head_cache import cached_tokens, same_sequence, sequence_tau
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
        # of every position, where the output embedding may see the last only
        self._llmrl_states = states_of(module, output)

    def _sequence_taus(self, kwargs: dict[str, Any], cache: Any, seen: int | Tensor) -> dict[str, Tensor]:
        """Return tau of the heads that read earlier positions, at the positions whose logits were computed."""
        states, self._llmrl_states = self._llmrl_states, None
        hidden = self._llmrl_hidden
        if states is None or hidden is None:
            raise ModelError(f"{type(self).__name__} did not call its decoder, whose states a transformer head reads")
        states = states.to(hidden.dtype)  # Mamba's are float32 until they enter the output embedding
        mask = self._mask(kwargs, cache)
        keep = kwargs.get("logits_to_keep", 0)
        rows = slice(-keep, None) if isinstance(keep, int) and keep else slice(None) if isinstance(keep, int) else keep
        if hidden.shape[1] == states.shape[1] and (isinstance(keep, int) or hidden.equal(states)):
            rows = slice(None)  # the base ignores `logits_to_keep`
        if not self._llmrl_checked:  # once: on a GPU the comparison waits for the device
            check_states(self, states[:, rows], hidden)
        self._llmrl_checked = True
        return {
            name: sequence_tau(name, head, states, mask, cache, seen)[:, rows]
            for name, head in self.llmrl_heads.items()
            if isinstance(head, TransformerTemperatureHead)
        }

    def _mask(self, kwargs: dict[str, Any], cache: Any) -> Any:
        """Return the attention mask of the head: the caller's, or that of rows which hold several sequences."""
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor) and mask.ndim == 4 and getattr(self.config, "sliding_window", None):
            raise ModelError(
                "a transformer head on a base with sliding windows needs a dynamic cache or a 2D attention mask"
            )
        if mask is not None:
            return mask
        packed = None if positions is None else same_sequence(positions)
        lengths = kwargs.get("cu_seq_lens_q")
        if packed is None and lengths is not None and len(lengths) > 2:
            raise ModelError(
                "packed rows under a transformer head need position_ids that start again with each sequence"
            )
        if packed is not None and cache is not None:
            raise ModelError("packed rows (position_ids start again within a row) need use_cache=False")
        return packed


def check_states(model: Any, states: Tensor, hidden: Tensor) -> None:
    """Refuse a model that changes the decoder's states before its output embedding: a head would read other ones.

    Raises:
        ModelError: `states` of the decoder are not the `hidden` that enter the output embedding.
    """
    if not (states.shape == hidden.shape and states.equal(hidden)):
        raise ModelError(
            f"{type(model).__name__} changes its hidden states between {type(decoder_of(model)).__name__} and the output "
            "embedding, so a transformer head cannot read them at every position: calibrate with --method ats-mlp"
        )


def check_cache(model: Any, cache: Any, use_cache: bool | None) -> None:
    """Refuse a model that remembers earlier tokens where a head cannot: its next call would see none of them.

    Args:
        model: a causal LM.
        cache: `past_key_values` of its output.
        use_cache: as given to the model; None is what the configuration says, outside of training.

    Raises:
        ModelError: the model caches, and not in `past_key_values`.
    """
    if use_cache is None:
        use_cache = not model.training and bool(getattr(model.config.get_text_config(), "use_cache", False))
    if use_cache and cache is None:
        raise ModelError(
            f"{type(model).__name__} keeps its state outside past_key_values, where a transformer head cannot follow: "
            "generate with use_cache=False, or calibrate with --method ats-mlp"
        )


def states_of(decoder: Any, output: Any) -> Tensor:
    """Return the hidden states `[B, T, H]` in a decoder's output.

    Raises:
        ModelError: it has none.
    """
    states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    if not torch.is_tensor(states):
        raise ModelError(
            f"{type(decoder).__name__} returned a {type(output).__name__} without last_hidden_state: "
            "calibrate with --method ats-mlp, and please report the architecture"
        )
    return states


def decoder_of(model: Any) -> Any:
    """Return the part of a transformers causal LM that gives the hidden states: the largest without the output embedding.

    Raises:
        ModelError: there is no such part.
    """
    from transformers import PreTrainedModel  # not above: it imports the auto classes, which import this module

    output = model.get_output_embeddings()
    roots = [model.get_decoder()] if hasattr(model, "get_decoder") else []  # of a multimodal model, the language model
    for root in (*roots, model):
        for part in root.modules():
            if isinstance(part, PreTrainedModel) and all(module is not output for module in part.modules()):
                return part
    raise ModelError(
        f"{type(model).__name__} has no decoder apart from its output embedding: please report the architecture"
    )


def forward_with_heads(base_forward: Any) -> Any:
    """Return `base_forward` of a transformers causal LM with the heads' effect on logits and loss."""
    names = list(inspect.signature(base_forward).parameters)[1:]

    @functools.wraps(base_forward)  # generate() and Trainer read the base's signature through this
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))
        labels = kwargs.pop("labels", None)
        as_tuple = kwargs.pop("return_dict", None) is False
        sequences = reads_sequence(self.llmrl_heads)
        seen = cached_tokens(kwargs.get("past_key_values")) if sequences else 0
        outputs = base_forward(self, return_dict=True, **kwargs)
        taus = {}
        if sequences:
            cache = outputs.get("past_key_values")
            check_cache(self, cache, kwargs.get("use_cache"))
            taus = self._sequence_taus(kwargs, cache, seen)
        hidden, self._llmrl_hidden = self._llmrl_hidden, None
        if hidden is None and len(self.llmrl_heads):
            raise ModelError(f"{type(self).__name__} computed logits without calling its output embedding")
        outputs.logits = apply_logits_heads(self.llmrl_heads, outputs.logits, hidden, taus)
        if labels is not None:
            extra = {key: kwargs[key] for key in ("num_items_in_batch", "shift_labels") if key in kwargs}
            outputs.loss = self.loss_function(
                logits=outputs.logits, labels=labels, vocab_size=self.config.vocab_size, **extra
            )
        return outputs.to_tuple() if as_tuple else outputs

    return forward

"""The output embedding of a causal LM, spelled out, and its logits a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmrl.errors import ModelError

CHUNK_BYTES = 4 << 20  # of float32 logits at a time: more than a core's cache holds gains nothing on a CPU


@dataclass(frozen=True)
class OutputLayer:
    """The map from hidden states to logits: `cap * tanh(scale * (h W^T + b) / cap)`.

    Covers tied and untied embeddings, an lm_head bias, Gemma's final soft-cap, and the constant scale of Cohere
    (multiplied) and Granite (divided).
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, model: Any) -> OutputLayer:
        """Read it off a transformers causal LM."""
        layer, config = model.get_output_embeddings(), model.config
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight.detach(), getattr(layer, "bias", None), scale, cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `[N, V]` for hidden states `[N, H]`."""
        z = torch.nn.functional.linear(hidden.to(self.weight.device, self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            z = z * self.scale
        if self.soft_cap:
            z = torch.tanh(z / self.soft_cap) * self.soft_cap
        return z

    def only(self, ids: Tensor) -> OutputLayer:
        """Return the layer that gives the logits of the tokens `ids` `[K]` alone, in their order."""
        ids = ids.to(self.weight.device)
        return replace(self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids])

    def chunk(self) -> int:
        """Return how many tokens' logits fit into one chunk."""
        size = CHUNK_BYTES if self.weight.device.type == "cpu" else 64 * CHUNK_BYTES
        return max(1, size // (4 * self.weight.shape[0]))


class LogitsChunk(NamedTuple):
    """Logits of some tokens: which tokens `[n]`, their logits `[n, K]`, the column of each target `[n]`.

    `ids` `[K]` are the tokens of the columns; None is the whole vocabulary. All but `tokens` lie on the layer's device.
    """

    tokens: Tensor
    logits: Tensor
    target: Tensor
    ids: Tensor | None


def logits_chunks(
    layer: OutputLayer, states: Tensor, row: Tensor, target: Tensor, choice: Tensor, choices: Tensor
) -> Iterator[LogitsChunk]:
    """Yield the logits of N tokens, some at a time, each token once.

    Args:
        layer: the base's output layer.
        states: `[M, H]` hidden states.
        row: `[N]` the state that predicts each token.
        target: `[N]` token ids.
        choice: `[N]` which row of `choices` a token is chosen from, -1 for the whole vocabulary.
        choices: `[C, K]` token ids, filled up with -1.
    """
    for number in choice.unique().tolist():
        ids = None if number < 0 else choices[number][choices[number] >= 0].to(layer.weight.device)
        part = layer if ids is None else layer.only(ids)
        for tokens in (choice == number).nonzero()[:, 0].split(part.chunk()):
            y = target[tokens].to(layer.weight.device)
            column = y if ids is None else (ids == y[:, None]).int().argmax(-1)
            yield LogitsChunk(tokens, part.logits(states[row[tokens]]), column, ids)


def decoder_of(model: Any) -> Any:
    """Return the part of a causal LM that gives the hidden states which enter its output embedding."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    return decoder if decoder is not model else model.base_model


def check_output_layer(model: Any, layer: OutputLayer, token_ids: list[int]) -> None:
    """Compare `layer` on the decoder's hidden states with the model's own logits.

    Raises:
        ModelError: they differ, so this architecture does something between decoder and logits that llmrl does not know.
    """
    ids = torch.tensor([token_ids[:64]], device=layer.weight.device)
    with torch.inference_mode():
        own = model(input_ids=ids).logits[0].float()
        ours = layer.logits(decoder_of(model)(input_ids=ids).last_hidden_state[0])
    tolerance = 1e-3 if layer.weight.dtype == torch.float32 else 0.1
    error = (own - ours).abs().max().item() / max(1.0, own.abs().max().item())
    if torch.isfinite(own).all() and not error <= tolerance:
        raise ModelError(
            f"{type(model).__name__} computes its logits in a way llmrl does not know (relative error {error:.1e}): "
            "please report the architecture"
        )

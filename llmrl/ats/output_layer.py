"""The output embedding of a causal LM, spelled out, and its logits a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmrl.errors import ModelError
from llmrl.head_cache import attention_layers
from llmrl.heads_forward import check_cache, check_states, decoder_of, states_of
from llmrl.logit_scale import finish_logits, scale_and_cap

MASKED = -1e30  # models mark what cannot be said by -inf or by the least number of their dtype
CHUNK_BYTES = 4 << 20  # of float32 logits at a time: more than a core's cache holds gains nothing on a CPU


@dataclass(frozen=True)
class OutputLayer:
    """The map from hidden states to logits: `cap * tanh(scale * (h W^T + b) / cap)`.

    Covers tied and untied embeddings, an lm_head bias, the soft-caps of Gemma, RecurrentGemma and xLSTM, and the constant
    scales of Cohere and Falcon-H1 (multiplied) and Granite (divided).
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, model: Any) -> OutputLayer:
        """Read it off a transformers causal LM.

        Raises:
            ModelError: its output embedding is no plain matrix.
        """
        layer, config = model.get_output_embeddings(), model.config.get_text_config(decoder=True)
        if hasattr(layer, "base_layer"):  # PEFT's; its `weight` is the one without the adapter
            raise ModelError("an adapter changes the output embedding: merge it first (merge_and_unload)")
        weight = getattr(layer, "weight", None)
        if not (isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point()):
            raise ModelError(
                f"the output embedding of {type(model).__name__} is a {type(layer).__name__} without a matrix of floating "
                "point numbers: quantise the model without it (llm_int8_skip_modules and the like)"
            )
        scale, cap = scale_and_cap(config)
        return cls(weight.detach(), getattr(layer, "bias", None), scale, cap)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits `[N, V]` for hidden states `[N, H]`."""
        return self.finish(self.project(hidden))

    def project(self, hidden: Tensor) -> Tensor:
        """Return `h W^T + b` in float32, rounded once to the weights' dtype as the model does."""
        hidden = hidden.to(self.weight.device, self.weight.dtype)
        return torch.nn.functional.linear(hidden, self.weight, self.bias).float()

    def finish(self, z: Tensor) -> Tensor:
        """Return the logits of projected states: scaled and capped."""
        return finish_logits(z, self.scale, self.soft_cap)

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


# --- the model's own forward ------------------------------------------------------------------------------------------


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the hidden states `[B, T, H]` that enter the output embedding of a causal LM, whatever lies before it.

    Raises:
        ModelError: the output embedding is not called once on the states of all positions.
    """
    found: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return (args[0][:, :1], *args[1:])  # the logits of all positions would be the largest tensor of all

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    return _only(model, found, input_ids)


def _only(model: Any, found: list[Tensor], ids: Tensor) -> Tensor:
    shapes = [list(states.shape) for states in found]
    if len(found) != 1 or found[0].ndim != 3 or found[0].shape[:2] != ids.shape:
        raise ModelError(
            f"{type(model).__name__} calls its output embedding on {shapes} for ids {list(ids.shape)}, once on states "
            "[batch, length, width] was expected: please report the architecture"
        )
    return found[0]


def check_output_layer(model: Any, layer: OutputLayer, token_ids: list[int]) -> None:
    """Compare `layer` with what the model does: the product with the output embedding, and what follows it.

    Both sides start from the same hidden states. What follows the product is compared in float32, on logits blown up to ten
    times their size: there rounding is small, and a soft-cap or scale that is missing is not.

    Raises:
        ModelError: they differ, so this architecture does something to its logits that llmrl does not know.
    """
    ids = torch.tensor([token_ids[:64]], device=layer.weight.device)
    found, projected, finished = [], [], []

    def blow_up(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found.append(args[0])
        gain = torch.linspace(1, 10, output.shape[1], device=output.device)[:, None]
        projected.append((output.float(), layer.project(args[0])))
        finished.append(layer.finish(output.float() * gain))
        return output.float() * gain

    handle = model.get_output_embeddings().register_forward_hook(blow_up)
    try:
        with torch.inference_mode():
            own = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        handle.remove()
    _only(model, found, ids)
    product = 1e-4 if layer.weight.dtype == torch.float32 else 1e-2
    for wanted, ours, tolerance in ((*projected[0], product), (own, finished[0], 1e-4)):
        if (wanted.isnan() | (wanted == torch.inf)).any():
            return  # damaged weights; the extraction names the row
        size = torch.where(wanted > MASKED, wanted.abs(), 0.0).amax(-1).clamp_min(1e-6)
        error = ((wanted.clamp_min(MASKED) - ours.clamp_min(MASKED)).abs().amax(-1) / size).max().item()
        if not error <= tolerance:
            raise ModelError(
                f"{type(model).__name__} computes its logits in a way llmrl does not know (relative error {error:.1e}): "
                "please report the architecture"
            )


def check_sequence_states(model: Any, token_ids: list[int]) -> None:
    """Check that a head which reads earlier positions can be run in `generate`: it needs every state, and a KV cache.

    Raises:
        ModelError: the model changes its states after its decoder, or has no KV cache that takes a layer more.
    """
    ids = torch.tensor([token_ids[:8]], device=model.get_input_embeddings().weight.device)
    states: list[Tensor] = []
    hidden: list[Tensor] = []
    handles = [
        decoder_of(model).register_forward_hook(lambda module, args, output: states.append(states_of(module, output))),
        model.get_output_embeddings().register_forward_pre_hook(lambda module, args: hidden.append(args[0])),
    ]
    try:
        with torch.inference_mode():
            cache = model(input_ids=ids, use_cache=True).get("past_key_values")
    finally:
        for handle in handles:
            handle.remove()
    check_states(model, states[-1].to(hidden[-1].dtype), hidden[-1])
    check_cache(model, cache, use_cache=True)
    if not attention_layers(cache):
        raise ModelError(
            f"the {type(cache).__name__} of {type(model).__name__} has no attention layers, beside which a transformer head "
            "could keep its state: calibrate with --method ats-mlp"
        )

"""Generation with a static cache: one step captured as a CUDA graph where there is a GPU, the same step eager elsewhere.

A step's route is computed inside it, once a token, on the device, so that a replay follows new tokens' routes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmrl.errors import ModelError, UsageError
from llmrl.lora_switch.layer import SwitchLinear, stamp_of


class DecodeLoop:
    """Greedy or sampled decoding of a batch with buffers of fixed address.

    Args:
        model: a causal LM, with experts or without, in evaluation.
        max_length: tokens of prompt and answer together.
        batch_size: rows.
        graph: capture the step; None does where the model lies on a GPU.

    Raises:
        ModelError: something of a step is decided on the host, so that it cannot be captured.
    """

    def __init__(self, model: Any, max_length: int, batch_size: int = 1, *, graph: bool | None = None) -> None:
        from transformers import StaticCache

        self.model, self.max_length = model, max_length
        device = next(model.parameters()).device
        self.graphed = device.type == "cuda" if graph is None else graph
        runner = type(getattr(model, "_switch_runner", None)).__name__
        if self.graphed and runner == "_Resident":
            raise ModelError("the mode resident reads its route on the host: pass graph=False")
        self._made = lambda: StaticCache(config=model.config, max_cache_len=max_length)
        self.cache, self._dtype = self._made(), model.dtype
        if self.graphed and any(hasattr(layer, "cumulative_length_int") for layer in self.cache.layers):
            raise ModelError("a cache with a sliding window counts tokens on the host: pass graph=False")
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.logits: Tensor | None = None
        self._graph: Any = None
        self._held: list[Any] = []  # the run mode, the fixed route and the packed layers of the graph, kept alive
        self._state: Any = None  # the rest of what it depends on

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """Return `[B, max_new_tokens]` new tokens after prompts `[B, T]` of one length; no token ends a row.

        Raises:
            UsageError: more tokens than the loop was made for, or another batch.
        """
        rows, length = input_ids.shape
        if rows != len(self.token) or length + max_new_tokens > self.max_length:
            raise UsageError(
                f"this loop holds {len(self.token)} rows of {self.max_length} tokens, asked for {rows} of "
                f"{length} + {max_new_tokens}"
            )
        self._drop_stale_graph()
        self._forget_merged()
        try:
            return self._decode(input_ids, max_new_tokens, temperature, seed)
        finally:
            self._forget_merged()

    def _decode(self, input_ids: Tensor, max_new_tokens: int, temperature: float, seed: int) -> Tensor:
        length = input_ids.shape[1]
        generator = torch.Generator(device=input_ids.device).manual_seed(seed)
        self.cache.reset()
        if hasattr(self.cache, "switch_route"):
            del self.cache.switch_route  # a pooled route belongs to its prompt
        positions = torch.arange(length, device=input_ids.device)[None]
        logits = self.model(
            input_ids=input_ids, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).logits
        new = []
        for step in range(max_new_tokens):
            new.append(_next(logits[:, -1].float(), temperature, generator))
            if step + 1 < max_new_tokens:
                self.token.copy_(new[-1])
                self.position.fill_(length + step)
                logits = self._step()
        return torch.cat(new, 1)

    def _forget_merged(self) -> None:
        runner = getattr(self.model, "_switch_runner", None)
        if runner is not None:
            runner.forget()

    def _drop_stale_graph(self) -> None:
        """Forget a graph that holds another run mode, fixed route or switch than now, or weights that changed since."""
        config = getattr(self.model, "switch_config", None)
        held = [getattr(self.model, name, None) for name in ("_switch_runner", "_switch_fixed")]
        held += [module.shared for module in self.model.modules() if isinstance(module, SwitchLinear)]
        state = getattr(self.model, "_switch_off", None), stamp_of(self.model.parameters())
        same = state == self._state and list(map(id, held)) == list(map(id, self._held))
        if self.model.dtype != self._dtype:
            self.cache, self._dtype = self._made(), self.model.dtype
        if not same or (config is not None and config.router_input == "prompt_pooled"):
            # merged and packed copies are made anew by the warm-up that comes before a capture
            self._graph, self._held, self._state = None, held, state

    def _step(self) -> Tensor:
        if not self.graphed:
            return self._forward()
        if self._graph is None:
            self._capture()
        else:
            self._graph.replay()
        assert self.logits is not None
        return self.logits

    def _forward(self) -> Tensor:
        options = {"position_ids": self.position.expand(len(self.token), 1), "past_key_values": self.cache}
        return self.model(input_ids=self.token, use_cache=True, **options).logits  # type: ignore[no-any-return]

    def _capture(self) -> None:
        """Record the step; warm-up and recording leave the cache's counters where they were, for the replay to move."""
        counters = [(layer, layer.cumulative_length.clone()) for layer in self.cache.layers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
                rewind(counters)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.logits = self._forward()
        rewind(counters)  # recording runs nothing on the device, but what the host counted
        self._graph.replay()


def rewind(counters: list[tuple[Any, Tensor]]) -> None:
    """Put counters of cache layers back in place, at the address that a graph has recorded."""
    for layer, before in counters:
        layer.cumulative_length.copy_(before)


def _next(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)

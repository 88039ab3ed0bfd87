"""vLLM model classes with llmrl's heads, made on demand from vLLM's own class of the base architecture.

`LlmrlXForCausalLM` changes logits in `compute_logits`, so sampling, logprobs and prompt logprobs all see the heads' effect,
and the sampling temperature of a request still applies on top. `LlmrlXForSequenceClassification` gives a reward head's K
numbers through `/classify`. Heads are replicated under tensor parallelism; they exist on every pipeline rank and are used
on the last. The outer class is not compiled by vLLM, so nothing here needs compile support.

A head that reads earlier positions has an attention layer of its own in vLLM's paged KV cache. Its tau is known where all
positions are, in `forward`, and needed where only the sampled ones are left, in `compute_logits`: it travels as three
further columns of the hidden states, whose sum in float32 loses nothing of it in 16 bits.

Run on: CPU, V1 model runner. Not run: GPU, the V2 runner, tensor and pipeline parallelism; `compute_logits_local`, which
V2's sharded sampling calls, is overridden for them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from llmrl.errors import ModelError
from llmrl.fingerprints import check_weights
from llmrl.heads import PREFIX as HEAD_PREFIX
from llmrl.heads import HeadsConfig, HeadSpec, asked_steering, build_heads
from llmrl.logits_heads import TransformerTemperatureHead, VectorHead, apply_logits_heads
from llmrl.reward_heads import RewardHead
from llmrl.serving.plugin import CAUSAL, POOLING, PREFIX, pooling_name
from llmrl.value_heads import ValueHead


class _HeadsMixin:
    """Builds the heads a folder describes and loads them beside the base's weights, wherever those lie."""

    def _build_heads(self, vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config
        self.llmrl_config = HeadsConfig.from_json(config.hf_config.llmrl)
        self.llmrl_heads = build_heads(self.llmrl_config)
        for head in self.llmrl_heads.values():
            if isinstance(head, ValueHead):
                head.beta, head.support = steering(head.spec, config.hf_config)
        folder = Path(config.model)
        base = folder if self.llmrl_config.merged else Path(self.llmrl_config.base.model)
        if base.is_dir():  # a hub name is pinned to a commit instead
            check_weights(base, self.llmrl_config.base, folder)
        elif base.is_absolute():
            raise ModelError(f"the base model of {folder} is not at {base}: put it there, or calibrate with --merge")
        if not self.llmrl_config.merged:
            # the folder itself holds only the heads; vLLM reads these sources after it
            self.secondary_weights = [
                DefaultModelLoader.Source(
                    model_or_path=self.llmrl_config.base.model,
                    revision=self.llmrl_config.base.revision,
                    fall_back_to_pt=False,
                    allow_patterns_overrides=["*.safetensors"],
                )
            ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load head tensors here and the rest in the base class."""
        own: dict[str, Tensor] = {}

        def rest() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.startswith(HEAD_PREFIX):
                    own[name] = tensor.clone()  # the iterator may reuse its buffer
                elif not self._skip(name):
                    yield name, tensor

        loaded = set(super().load_weights(rest()) or ())  # type: ignore[misc]
        # looked up at each call and loaded through weight_loader: during a reload parameters are stand-ins
        parameters = dict(self.named_parameters())  # type: ignore[attr-defined]
        for name, tensor in own.items():
            if name not in parameters:
                raise ModelError(f"head tensor {name} is not described in config.json: save the folder again")
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            loaded.add(name)
        return loaded

    def _skip(self, name: str) -> bool:
        return False


def steering(spec: HeadSpec, hf_config: Any) -> tuple[float, float]:
    """Return beta and support as they were asked for when the model was loaded.

    `--hf-overrides '{"llmrl_beta": 4}'` goes first, then what `llmrl.heads.asked_steering` looks at; likewise `llmrl_support`.

    Raises:
        ModelError: one is out of range.
    """
    return asked_steering(spec, {name: getattr(hf_config, f"llmrl_{name}", None) for name in ("beta", "support")})


_TAU_COLUMNS = 3


def pack_tau(tau: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `[..., 1]` float32 as `[..., 3]` of `dtype` whose sum is tau to 24 bits."""
    parts, rest = [], tau.float()
    for _ in range(_TAU_COLUMNS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
    return torch.cat(parts, -1)


def unpack_tau(columns: Tensor) -> Tensor:
    """Return `[..., 1]` float32 from `pack_tau`'s `[..., 3]`."""
    return columns.float().sum(-1, keepdim=True)


class _SequenceHeads:
    """Attention in vLLM's KV cache for the heads that read earlier positions, and the way of their tau to the logits."""

    def __init__(self, heads: nn.ModuleDict, vllm_config: VllmConfig, prefix: str) -> None:
        self.attention = nn.ModuleDict()
        self.heads = {name: head for name, head in heads.items() if isinstance(head, TransformerTemperatureHead)}
        if not self.heads:
            return
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise ValueError(
                "a transformer temperature head is not sharded: serve with --tensor-parallel-size 1 (several servers with "
                "--workers N), or calibrate with --method ats-mlp or ats-linear"
            )
        cache_config = copy.copy(vllm_config.cache_config)
        cache_config.sliding_window = None  # the head sees everything, as in training, even where the base does not
        first = vllm_config.model_config.hf_text_config.num_hidden_layers
        self.attention = nn.ModuleDict(
            {
                name: Attention(
                    head.spec.num_heads,
                    head.spec.head_dim,
                    head.spec.head_dim**-0.5,
                    num_kv_heads=head.spec.num_kv_heads,
                    cache_config=cache_config,
                    # vLLM orders its caches by the one number in this name
                    prefix=f"{prefix}.llmrl_heads.layers.{first + i}.attention".lstrip("."),
                )
                for i, (name, head) in enumerate(self.heads.items())
            }
        )

    def add_tau(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Return hidden states `[T, H]` with the columns of every head behind them."""
        columns = [hidden]
        for name, head in self.heads.items():
            layer = self.attention[name]

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: Any = layer) -> Tensor:
                return layer(q.flatten(-2), k.flatten(-2), v.flatten(-2)).unflatten(-1, q.shape[-2:])

            columns.append(pack_tau(head(hidden, positions, attend), hidden.dtype))
        return torch.cat(columns, -1)

    def split(self, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the hidden states and tau by head."""
        width = hidden.shape[-1] - _TAU_COLUMNS * len(self.heads)
        parts = hidden[..., width:].split(_TAU_COLUMNS, -1) if self.heads else ()
        taus = {name: unpack_tau(part) for name, part in zip(self.heads, parts, strict=True)}
        return hidden[..., :width], taus


def _causal_class(base_architecture: str) -> type:
    base = ModelRegistry.models[base_architecture].load_model_cls()

    class Model(_HeadsMixin, base):  # type: ignore[valid-type, misc]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
            if vllm_config.speculative_config is not None:
                raise ValueError(
                    "llmrl heads do not work with speculative decoding: the drafter would propose from logits without "
                    "them. Remove --speculative-config."
                )
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
            self._build_heads(vllm_config)
            self._sequence = _SequenceHeads(self.llmrl_heads, vllm_config, prefix)
            self.llmrl_attention = self._sequence.attention  # where vLLM looks for attention layers; no parameters

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            if not self._sequence.heads or not isinstance(hidden, Tensor):  # of an earlier pipeline rank
                return hidden
            return self._sequence.add_tau(hidden, positions)

        def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            hidden, taus = self._sequence.split(hidden_states)
            logits = super().compute_logits(hidden, *args, **kwargs)
            if logits is None:  # tensor parallelism gathers them on one rank
                return None
            return apply_logits_heads(self.llmrl_heads, logits, hidden, taus)

    if hasattr(base, "compute_logits_local"):

        def compute_logits_local(self: Any, hidden_states: Tensor) -> Tensor:
            hidden, taus = self._sequence.split(hidden_states)
            logits = base.compute_logits_local(self, hidden)
            whole = (VectorHead, ValueHead)
            if any(isinstance(h, whole) and h.spec.outputs != logits.shape[-1] for h in self.llmrl_heads.values()):
                raise ValueError(
                    "vector scaling and values need the whole vocabulary on one rank: serve with --tensor-parallel-size 1"
                )
            return apply_logits_heads(self.llmrl_heads, logits, hidden, taus)

        Model.compute_logits_local = compute_logits_local  # type: ignore[attr-defined]
    return Model


def _pooling_class(base_architecture: str) -> type:
    from vllm.model_executor.layers.pooler import DispatchPooler
    from vllm.model_executor.models.adapters import _create_pooling_model_cls

    base = ModelRegistry.models[base_architecture].load_model_cls()

    class Model(_HeadsMixin, _create_pooling_model_cls(base)):  # type: ignore[misc]
        def _init_pooler(self, vllm_config: VllmConfig, prefix: str = "") -> Any:
            # runs inside the base's __init__, so the heads are built here
            self._build_heads(vllm_config)
            rewards = [head for head in self.llmrl_heads.values() if isinstance(head, RewardHead)]
            if len(rewards) != 1:
                raise ModelError(f"a served reward folder has one reward head, this one has {len(rewards)}")

            def scores(pooled: Tensor) -> Tensor:
                return rewards[0](pooled)

            return DispatchPooler.for_seq_cls(vllm_config.model_config.pooler_config, classifier=scores)

        def _skip(self, name: str) -> bool:
            return name.startswith("lm_head")

    return Model


def __getattr__(name: str) -> type:
    """Make and keep the class that vLLM's registry asks for by name."""
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    wanted = name.removeprefix(PREFIX)
    if wanted.endswith(POOLING):
        names = [base for base in ModelRegistry.get_supported_archs() if pooling_name(base) == wanted]
        base = next((b for b in names if b.endswith((CAUSAL, "LMHeadModel")) and not b.startswith(PREFIX)), None)
        if base is None:
            raise AttributeError(name)
        made = _pooling_class(base)
    else:
        made = _causal_class(wanted)
    made.__name__ = made.__qualname__ = name
    made.__module__ = __name__
    globals()[name] = made
    return made

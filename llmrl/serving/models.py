"""vLLM model classes with llmrl's heads, made on demand from vLLM's own class of the base architecture.

`LlmrlXForCausalLM` changes logits in `compute_logits`, so sampling, logprobs and prompt logprobs all see the heads' effect,
and the sampling temperature of a request still applies on top. `LlmrlXForSequenceClassification` gives a reward head's K
numbers through `/classify`. Heads are replicated under tensor parallelism; they exist on every pipeline rank and are used
on the last. The outer class is not compiled by vLLM, so nothing here needs compile support.

Run on: CPU, V1 model runner. Not run: GPU, the V2 runner, tensor and pipeline parallelism; `compute_logits_local`, which
V2's sharded sampling calls, is overridden for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from llmrl.errors import ModelError
from llmrl.heads import PREFIX as HEAD_PREFIX
from llmrl.heads import HeadsConfig, RewardHead, apply_logits_heads, build_heads, check_weights
from llmrl.serving.plugin import CAUSAL, POOLING, PREFIX, pooling_name


class _HeadsMixin:
    """Builds the heads a folder describes and loads them beside the base's weights, wherever those lie."""

    def _build_heads(self, vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config
        self.llmrl_config = HeadsConfig.from_json(config.hf_config.llmrl)
        self.llmrl_heads = build_heads(self.llmrl_config)
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

        def compute_logits(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            logits = super().compute_logits(hidden_states, *args, **kwargs)
            if logits is None:  # tensor parallelism gathers them on one rank
                return None
            return apply_logits_heads(self.llmrl_heads, logits, hidden_states)

    if hasattr(base, "compute_logits_local"):

        def compute_logits_local(self: Any, hidden_states: Tensor) -> Tensor:
            logits = base.compute_logits_local(self, hidden_states)
            return apply_logits_heads(self.llmrl_heads, logits, hidden_states)

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

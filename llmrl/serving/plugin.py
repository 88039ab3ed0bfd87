"""The entry point vLLM calls in every one of its processes (group `vllm.general_plugins`).

For each causal LM that vLLM knows, `XForCausalLM`, three more are registered by name: `LlmrlXForCausalLM` (heads on logits),
`LlmrlXForSequenceClassification` (heads on pooled states) and `LlmrlSwitchXForCausalLM` (experts routed per token).
Nothing is imported until one of them is asked for. Every process also learns the weight transfer of the rollout engine, and
the CPU build what it takes to mend it.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmrl.rollout.weight_files import VLLM_BACKEND
from llmrl.vllm_compat import patch_cpu_build

MODULE = "llmrl.serving.models"
SWITCH_MODULE = "llmrl.serving.switch_models"
PREFIX, SWITCH_PREFIX = "Llmrl", "LlmrlSwitch"
CAUSAL, POOLING = "ForCausalLM", "ForSequenceClassification"
MARKER_VARIABLE = "LLMRL_PLUGIN_MARKER"  # a file that `llmrl serve` looks for, to tell whether this function ran


def register() -> None:
    """Register llmrl's model classes with vLLM; safe to call several times."""
    from vllm import ModelRegistry

    import llmrl  # noqa: F401 - teaches AutoConfig the model type "llmrl"

    known = set(ModelRegistry.get_supported_archs())
    for base in known:
        if base.startswith(PREFIX) or not is_causal_lm(base):
            continue
        switch = SWITCH_PREFIX + base
        for name, module in ((PREFIX + base, MODULE), (PREFIX + pooling_name(base), MODULE), (switch, SWITCH_MODULE)):
            if name not in known:
                ModelRegistry.register_model(name, f"{module}:{name}")
    _register_weight_transfer()
    patch_cpu_build()
    marker = os.environ.get(MARKER_VARIABLE)
    if marker:
        Path(marker).touch()


def _register_weight_transfer() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if VLLM_BACKEND not in WeightTransferEngineFactory._registry:
        module, name = "llmrl.rollout.vllm_weights", "FileWeightTransferEngine"
        WeightTransferEngineFactory.register_engine(VLLM_BACKEND, module, name)


def is_causal_lm(architecture: str) -> bool:
    """Tell whether a vLLM architecture name is a causal language model."""
    return architecture.endswith((CAUSAL, "LMHeadModel"))


def pooling_name(base: str) -> str:
    """Return the name of the pooling class of a causal LM; vLLM knows by its ending that it does not generate."""
    return base.removesuffix(CAUSAL).removesuffix("LMHeadModel") + POOLING

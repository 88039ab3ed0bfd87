"""Opening an engine by name, and what `auto` takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmrl.errors import UsageError, did_you_mean
from llmrl.rollout.engine import BaseEngine
from llmrl.rollout.model_facts import ModelFacts, read_facts
from llmrl.rollout.options import BACKENDS
from llmrl.vllm_compat import check_versions, has_nvidia_driver, vllm_architectures, vllm_build, why_no_vllm


def choose_backend(facts: ModelFacts, urls: Sequence[str] = ()) -> tuple[str, str]:
    """Return what `auto` takes for a model, and why."""
    if urls:
        return "server", "URLs were given"
    build = vllm_build()
    if build is None:
        return "transformers", f"vLLM: {why_no_vllm()}"
    wrong = check_versions(("vllm",), strict=False)
    if wrong:
        return "transformers", wrong[0]
    if build == "cuda" and not has_nvidia_driver():
        return "transformers", "this vLLM needs a GPU and there is none"
    # a folder with heads is known by llmrl's plugin, as the class of its base
    if facts.architecture.removeprefix("Llmrl") not in vllm_architectures():
        return "transformers", f"vLLM does not know {facts.architecture}"
    return "vllm", "it is installed and knows the model"


def open_engine(
    model: str,
    *,
    rollout_backend: str = "auto",
    server_url: Sequence[str] = (),
    dtype: str = "auto",
    max_model_len: int | None = None,
    adapter: Path | str | None = None,
    batch_size: int = 32,
    **options: Any,
) -> BaseEngine:
    """Open an engine on a model; close it, or use it as a context manager.

    Args:
        model: A folder or a hub name.
        rollout_backend: "auto", "transformers", "vllm" or "server". (`ScriptedEngine` is made directly.)
        server_url: Of running vLLM servers, for `server`.
        dtype: "auto" (float32 on a CPU, else as stored), "float32", "bfloat16" or "float16"; a server has its own.
        max_model_len: A shorter context than the model's own, or the server's.
        adapter: Folder of a PEFT LoRA adapter to sample with.
        batch_size: Of the transformers backend.
        options: Further arguments of the backend's class.

    Raises:
        UsageError: An unknown backend, a file that is not there.
        ModelError: The model or the adapter cannot be used.
        VersionError: vLLM was asked for and is not usable here.
        EngineError: The engine does not start, or no server answers.
    """
    if rollout_backend not in BACKENDS:
        raise UsageError(f"rollout_backend '{rollout_backend}': not a choice{did_you_mean(rollout_backend, BACKENDS)}")
    name = rollout_backend
    if name == "auto":
        name, _ = choose_backend(read_facts(model), server_url)
    if name == "server":
        from llmrl.rollout.server import ServerEngine

        if dtype != "auto":
            raise UsageError(f"dtype {dtype} with the server backend: a server has its own dtype; leave dtype out")
        return ServerEngine(model, list(server_url), adapter=adapter, max_model_len=max_model_len, **options)
    if name == "vllm":
        from llmrl.rollout.vllm_engine import VllmEngine

        return VllmEngine(model, dtype=dtype, max_model_len=max_model_len, adapter=adapter, **options)
    from llmrl.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        model, dtype=dtype, max_model_len=max_model_len, adapter=adapter, batch_size=batch_size, **options
    )

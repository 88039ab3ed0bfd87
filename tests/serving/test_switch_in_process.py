"""Routed experts in vLLM say what they say in transformers: in any batch, in chunks, out of the prefix cache, on two ranks."""

import json
import subprocess
import sys

import pytest
import torch
from serving_folders import ENVIRONMENT, NEW_TOKENS, ROOT, assert_agrees, largest_difference, paging_prompts
from switch_folders import SWITCH_BFLOAT16, SWITCH_PAGING, SWITCHED, expected_gates, expected_switch
from test_vllm_in_process import answer_of, assert_continuations_agree, some

pytestmark = pytest.mark.vllm

TWO_RANKS = """
import json, sys
from in_process import SMALL, generate
from vllm import LLM
if __name__ == "__main__":  # the ranks are processes that import this file
    task = json.loads(sys.argv[1])
    llm = LLM(task["folder"], tensor_parallel_size=2, **SMALL)
    open(task["answers"], "w").write(json.dumps(generate(llm, task["prompts"], task["new_tokens"])))
"""


@pytest.mark.parametrize("name", SWITCHED)
def test_switch_model_agrees_with_transformers(name, in_process, switch_folders, prompts):
    found, wanted = answer_of(in_process, name)["answers"], expected_switch(switch_folders[name], prompts)
    assert [answer["ids"] for answer in found] == wanted["greedy"]
    logprobs = [answer["prompt_logprobs"] + answer["logprobs"] for answer in found]
    assert largest_difference(logprobs, wanted["logprobs"]) < 1e-3
    assert largest_difference(logprobs, wanted["base_logprobs"]) > 0.3
    # the experts are in the decoded tokens too; where a random Gemma repeats one token they change less
    base_new = [row[-NEW_TOKENS:] for row in wanted["base_logprobs"]]
    assert largest_difference([answer["logprobs"] for answer in found], base_new) > 0.1


@pytest.mark.parametrize("name", SWITCH_BFLOAT16)
def test_routes_by_embedding_are_the_same_in_16_bits(name, in_process, switch_folders, prompts):
    """Where what is computed differs in every layer, the same experts are asked with the same weights."""
    gates, expected = answer_of(in_process, f"routes-{name}"), expected_gates(switch_folders[name], prompts)
    for found, wanted in zip(gates, expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=1e-5)
        assert len(set(map(tuple, (wanted > 0).tolist()))) > 1


@pytest.fixture(scope="session")
def paging_wanted(switch_folders):
    return {name: expected_switch(switch_folders[name], paging_prompts()) for name in SWITCH_PAGING}


@pytest.mark.parametrize("name", SWITCH_PAGING)
def test_routes_survive_chunks_prefixes_and_preemption(name, in_process, paging_wanted):
    runs, wanted = answer_of(in_process, f"paging-{name}"), paging_wanted[name]
    assert len([step for step in runs["chunked"]["scheduled"] if step[0] > 1]) > 1
    assert_agrees(runs["chunked"]["answers"], some(wanted, 0))
    assert runs["again"]["answers"][0]["cached"] > 0
    for run, index in (("first", 0), ("again", 0), ("branch", 1)):
        assert_continuations_agree(runs[run]["answers"], some(wanted, index))
    assert runs["crowded"]["preempted"] > 0
    assert_agrees(runs["crowded"]["answers"], wanted)


@pytest.mark.slow
def test_two_ranks_agree_with_transformers(switch_folders, prompts, tmp_path):
    """Every kind of layer is split: qkv and gate_up by output (k and v are replicated), o and down by input."""
    folder, script, answers = switch_folders["switch-llama"], tmp_path / "two_ranks.py", tmp_path / "answers.json"
    script.write_text(TWO_RANKS)
    task = {"folder": str(folder), "prompts": prompts, "new_tokens": NEW_TOKENS, "answers": str(answers)}
    path = f"{ROOT / 'tests' / 'serving'}:{ROOT}:{ROOT / 'kernels'}"
    environment = ENVIRONMENT | {"PYTHONPATH": path, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(task)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert answers.exists(), done.stdout[-2000:] + done.stderr[-4000:]
    assert_agrees(json.loads(answers.read_text()), expected_switch(folder, prompts))

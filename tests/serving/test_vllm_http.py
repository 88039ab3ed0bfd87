"""Over HTTP: `llmrl serve DIR` and the plain `vllm serve DIR`, started, asked, and stopped."""

import signal

import pytest
from http_server import listening_addresses
from serving_folders import NEW_TOKENS, STORIES, assert_agrees, expected

pytestmark = pytest.mark.vllm

LOOPBACK = ["0100007F"]


def test_llmrl_serve_answers_as_transformers_and_stops_on_ctrl_c(servers, served, prompts):
    server = servers["llmrl"]
    server.wait_until_healthy()
    assert listening_addresses(server.port) == LOOPBACK
    # without --dtype: a float32 folder stays float32; rounded to 16 bits it would be off by more than the tolerance
    found = server.complete(str(served), prompts, NEW_TOKENS)
    assert_agrees(found, expected(served, STORIES, prompts))
    code, left = server.stop(signal.SIGINT, group=True)  # a terminal sends it to every process of the group
    assert left == []
    assert code in (0, 128 + signal.SIGINT), server.text()
    assert listening_addresses(server.port) == []


def test_vllm_serve_answers_as_transformers(servers, served, prompts):
    server = servers["vllm"]
    server.wait_until_healthy()
    found = server.complete(str(served), prompts, NEW_TOKENS)
    assert_agrees(found, expected(served, STORIES, prompts))
    # echo, the completions API's own form of prompt logprobs
    body = {"model": str(served), "prompt": prompts[1], "max_tokens": 1, "temperature": 0, "logprobs": 0, "echo": True}
    echoed = server.post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    assert echoed[0] is None
    assert echoed[1 : len(prompts[1])] == pytest.approx(found[1]["prompt_logprobs"], abs=1e-4)

"""Over HTTP: `llmrl serve DIR` and the plain `vllm serve DIR`, started, asked, and stopped."""

import signal
import sys

import pytest
from conftest import ENVIRONMENT
from http_server import Server, listening_addresses
from serving_folders import NEW_TOKENS, STORIES, assert_agrees, expected

pytestmark = pytest.mark.vllm

LLMRL_SERVE = [sys.executable, "-m", "llmrl.cli", "serve"]
VLLM_SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]  # what the script `vllm` runs
LOOPBACK = ["0100007F"]


def test_llmrl_serve_answers_on_loopback_and_stops_on_sigterm(served, prompts, tmp_path):
    with Server([*LLMRL_SERVE, str(served)], tmp_path / "log", ENVIRONMENT) as server:
        server.wait_until_healthy()
        assert listening_addresses(server.port) == LOOPBACK
        # without --dtype: a float32 folder stays float32, 16 bits would be off by more than the tolerance
        found = server.complete(str(served), prompts, NEW_TOKENS)
        assert_agrees(found, expected(served, STORIES, prompts))
        code, left = server.stop(signal.SIGTERM)
        assert left == []
        assert code in (0, 128 + signal.SIGTERM), server.text()
        assert listening_addresses(server.port) == []


def test_llmrl_serve_stops_on_ctrl_c(other_head, tmp_path):
    with Server([*LLMRL_SERVE, str(other_head)], tmp_path / "log", ENVIRONMENT) as server:
        server.wait_until_healthy()
        code, left = server.stop(signal.SIGINT, group=True)
        assert left == []
        assert code in (0, 128 + signal.SIGINT), server.text()


def test_vllm_serve_answers_as_transformers(served, prompts, tmp_path):
    options = ["--dtype=float32", "--host=127.0.0.1"]
    with Server([*VLLM_SERVE, str(served), *options], tmp_path / "log", ENVIRONMENT) as server:
        server.wait_until_healthy()
        found = server.complete(str(served), prompts, NEW_TOKENS)
        assert_agrees(found, expected(served, STORIES, prompts))
        # echo: the completions API's own form of prompt logprobs
        body = {"model": str(served), "prompt": prompts[1], "max_tokens": 1, "temperature": 0, "logprobs": 0, "echo": True}
        echoed = server.post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
        assert echoed[0] is None
        assert echoed[1 : len(prompts[1])] == pytest.approx(found[1]["prompt_logprobs"], abs=1e-4)

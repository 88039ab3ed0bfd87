"""What the tests of the server backend share: requests, and what the fake servers answer to them."""

import time

import torch
from fake_vllm import LENGTH, next_token

from llmrl.types import SamplingConfig

WEIGHTS = {"one": torch.arange(6.0).reshape(2, 3), "two": torch.ones(4)}
GREEDY = SamplingConfig(temperature=0, max_tokens=LENGTH, seed=7)


def on_completion(fault):
    return lambda path, body: fault if path == "/v1/completions" else None


def expected(prompt, seed, weights="start", count=LENGTH):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, seed, weights))
    return tuple(ids[len(prompt) :])


def prompts(count):
    return [[1, 300 + i % 100, 7, i % 50 + 3] for i in range(count)]


def ask(one, count=40, **sampling):
    """Return the samples of many prompts at once, each with a seed of its own, checked against what is right."""
    configs = [
        SamplingConfig(**({"temperature": 1.0, "max_tokens": LENGTH, "seed": i} | sampling)) for i in range(count)
    ]
    rows = one.generate(prompts(count), configs)
    return [row[0] for row in rows]


def right(count=40, weights="start"):
    return [expected(prompt, i, weights) for i, prompt in enumerate(prompts(count))]


def wait_for(condition, seconds=8):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)

"""`llmrl hindsight` for its tests: run it, and read what it left."""

import json

from llmrl.cli import main
from llmrl.rollout.shards import read_shards
from llmrl.types import Episode

TRAIN = ["--max_steps", "12", "--batch_size", "8", "--quiet"]


def run(*words):
    return main(["hindsight", *map(str, words)])


def make_world(folder):
    """Write logs of the charity talk, a small model, and two policies."""
    options = ["--count", "120", "--model_dir", folder / "small", "--width", "32", "--quiet"]
    assert run("logs", "--env", "charity", "--output", folder / "logs.jsonl", *options) == 0
    data = ["--data", folder / "logs.jsonl", "--model", folder / "small"]
    assert run("train", *data, "--output_dir", folder / "ilql", *TRAIN) == 0
    assert run("train", *data, "--output_dir", folder / "bc", "--method", "bc", *TRAIN) == 0
    return folder


def episodes(folder):
    return [Episode.from_json(one) for one in read_shards(folder / "episodes").values()]


def report(folder):
    return json.loads((folder / "report.json").read_text())

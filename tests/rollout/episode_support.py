"""An environment and readers that the tests of episodes share."""

import json

from llmrl.rollout.environment import Step
from llmrl.rollout.episodes import export_episodes
from llmrl.rollout.shards import read_shards
from llmrl.types import Episode, Message


class Base:
    """Asks twice and ends."""

    tools = ()
    turns = 2

    def __init__(self, row, seed):
        self.row, self.seed, self.count = row, seed, 0

    def observe(self):
        return [Message("user", "0")]

    def step(self, answer):
        self.count += 1
        return Step([Message("user", str(self.count))], rewards={"r": self.count}, done=self.count == self.turns)


def rows(number):
    return [{"id": f"r{i}"} for i in range(number)]


def episodes(output):
    return {key: Episode.from_json(record) for key, record in read_shards(output).items()}


def exported(output):
    export_episodes(output, output / "data.jsonl")
    return (output / "data.jsonl").read_bytes()


def lines_in(output):
    return sum(path.read_bytes().count(b"\n") for path in (output / "shards").glob("*.jsonl"))


def completion_order(output):
    lines = [line for path in sorted((output / "shards").iterdir()) for line in path.read_text().splitlines()]
    return [json.loads(line)["row_id"] for line in lines]


def answers(episode):
    return [turn for turn in episode.turns if turn.is_sampled]

"""One process of a run of episodes with a scripted engine, to be killed: episodes_run.py OUTPUT RANK WORLD.

Also the toy world that the tests of episodes share: a tokenizer of bytes, a script that depends on the request's seed
and context, and a game with rewards, metadata, several turns and, for some rows, an error.
"""

import random
import sys
import time
import zlib
from types import MappingProxyType

from llmrl.rollout.environment import Step
from llmrl.rollout.episodes import run_episodes
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.types import Message, SamplingConfig

END = "<|end|>"


class ByteTokenizer:
    """Bytes and an end token; each message is rendered as `role:content<|end|>`."""

    eos_token_id = 256
    chat_template = "tools"
    added_tokens_decoder = MappingProxyType({})
    all_special_ids = (256,)
    all_special_tokens = (END,)

    def __len__(self):
        return 257

    def encode(self, text, add_special_tokens=False):
        first, *rest = text.split(END)
        return [*first.encode(), *(i for piece in rest for i in (256, *piece.encode()))]

    def decode(self, ids, skip_special_tokens=False):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def get_chat_template(self, chosen=None, tools=None):
        return chosen or self.chat_template

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, tools, chat_template):
        shown = "".join(f"{m['role']}:{m['content']}{END}" for m in messages)
        return f"{tools or ''}{shown}{'assistant:' if add_generation_prompt else ''}"


def say(request):
    """A function of seed and context alone, so that a wrong seed or context shows in the data."""
    return f"{zlib.crc32(repr((request.sampling.seed, request.token_ids)).encode()):08x}"


class Game:
    """Goes on for one to four turns, how many and what is said being the seed's; row r7 fails in its second turn."""

    tools = ()
    pause = 0.0

    def __init__(self, row, seed):
        self.row, self.random = row, random.Random(seed)
        self.left = self.random.randint(1, 4)

    def observe(self):
        return [Message("system", "play"), Message("user", self.row["question"])]

    def step(self, answer):
        time.sleep(self.pause * random.random())
        self.left -= 1
        if self.row.get("id") == "r7" and self.left < 3:
            raise ValueError("no such move")
        rewards = {"score": zlib.crc32(answer.content.encode()) % 10 / 10}
        said = [Message("user", f"next {self.random.random():.3f}")]
        return Step(said, rewards=rewards, done=self.left == 0, metadata={"left": self.left})


ROWS = [{"id": f"r{i}", "question": f"question {i} é"} for i in range(12)]
SAMPLING = SamplingConfig(max_tokens=16)


def engine(script=say, **options):
    return ScriptedEngine(ByteTokenizer(), script, **options)


def play(output, rows=ROWS, environment=Game, sampling=SAMPLING, *, script=say, **options):
    """`run_episodes` on the toy world."""
    with engine(script) as scripted:
        return run_episodes(scripted, rows, environment, sampling, output=output, **{"progress": False, **options})


def main():
    output, rank, world = sys.argv[1], *map(int, sys.argv[2:4])
    Game.pause = 0.15  # long enough for a kill to come in between
    summary = play(output, samples=3, seed=11, concurrency=4, rank=rank, world=world)
    print(summary.sentence())


if __name__ == "__main__":
    main()

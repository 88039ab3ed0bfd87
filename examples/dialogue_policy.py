"""A dialogue of your own, from mediocre logs to a better agent. The environment is forty lines.

    python examples/dialogue_policy.py --output_dir runs/cafe

A guest wants tea or coffee and does not say so. The logged waiter mostly guesses; asking first costs a little and is always
worth it. The language model starts from nothing and learns from the logs alone, by cloning and by ILQL.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.commands import quiet_libraries
from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, run_command
from llmrl.hindsight.envs.common import play
from llmrl.hindsight.options import TrainConfig
from llmrl.hindsight.policy import open_policy
from llmrl.hindsight.run import train
from llmrl.hindsight.small_model import make_small_model
from llmrl.jsonl import write_objects
from llmrl.rollout.environment import Step
from llmrl.rollout.episodes import run_episodes
from llmrl.rollout.shards import read_shards
from llmrl.types import Message, SamplingConfig

ASK, SERVE = "What would you like?", {"tea": "Here is your tea.", "coffee": "Here is your coffee."}


# --- the environment -------------------------------------------------------------------------------------------------
class Cafe:
    """One guest. Reward 1 for the right drink, -0.1 for each question and for anything that is neither."""

    tools: Sequence[dict[str, Any]] = ()

    def __init__(self, row: Mapping[str, Any], seed: int) -> None:
        self.wants = random.Random(seed).choice(
            sorted(SERVE)
        )  # the seed of this episode: the same guest for every policy
        self.turns = 0

    def observe(self) -> list[Message]:
        return [Message("user", "Good morning.")]

    def step(self, answer: Message) -> Step:
        self.turns += 1
        served = next((drink for drink, text in SERVE.items() if answer.content == text), None)
        if served is not None:
            right = served == self.wants
            return Step([Message("user", "Thank you!" if right else "Oh.")], {"reward": float(right)}, done=True)
        reply = f"I would like {self.wants}." if answer.content == ASK else "Pardon?"
        return Step([Message("user", reply)], {"reward": -0.1}, truncated=self.turns >= 4)


def waiter(rng: random.Random) -> Any:
    """Return the logged agent: it asks one time in four, and often forgets what it was told."""

    def says(history: Sequence[Message]) -> str:
        told = next((drink for drink in SERVE if drink in history[-1].content), None)
        if told and rng.random() < 0.6:
            return SERVE[told]
        return ASK if rng.random() < 0.25 else SERVE[rng.choice(sorted(SERVE))]

    return says


# --- logs, training, play --------------------------------------------------------------------------------------------
@dataclass
class CafeConfig:
    """Options of the example."""

    output_dir: str = option("runs/cafe", help="where logs, the model and both policies go")
    count: int = option(2000, help="logged dialogues")
    seed: int = option(0, help="of everything")


def mean_return(policy: Path, folder: Path, episodes: int = 200) -> float:
    rows = [{"id": f"guest-{i}"} for i in range(episodes)]
    with open_policy(str(policy), rollout_backend="transformers") as engine:
        run_episodes(engine, rows, Cafe, SamplingConfig(max_tokens=12), output=folder, max_turns=4, progress=False)
    turns = [turn for episode in read_shards(folder).values() for turn in episode["turns"]]
    return sum(sum(turn["rewards"].values()) for turn in turns) / episodes


def main(argv: list[str]) -> int:
    config = parse_config(
        CafeConfig, argv, prog="examples/dialogue_policy.py", description=str(__doc__).splitlines()[0]
    )
    quiet_libraries(quiet=True)
    folder = Path(config.output_dir)
    says = waiter(random.Random(config.seed))
    logs = [play(Cafe({}, config.seed + i), says, id=f"log-{i}", task="cafe") for i in range(config.count)]
    write_objects(folder / "logs.jsonl", [dialogue.to_json() for dialogue in logs])
    make_small_model(logs, folder / "model", context=128, seed=config.seed)
    print(f"logs: mean return {sum(dialogue.total for dialogue in logs) / len(logs):.3f}; the best is 0.9", flush=True)
    for method in ("bc", "ilql"):
        options = {"data": [str(folder / "logs.jsonl")], "model": str(folder / "model"), "seed": config.seed}
        target = folder / method
        train(TrainConfig(**options, output_dir=str(target), method=method, max_steps=600, quiet=True, overwrite=True))
        played = folder / f"{method}-episodes"
        print(f"{method}: mean return {mean_return(target, played):.3f}; episodes in {played}", flush=True)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

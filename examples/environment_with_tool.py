"""A custom environment with a tool: the model may use a calculator before it answers. The environment is forty lines.

    python examples/environment_with_tool.py --output_dir runs/calculator

The small language model of this repository was shown such talks, so it plays this one as it stands.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config import option, parse_config
from llmrl.errors import run_command
from llmrl.rollout.environment import Step, parse_tool_calls
from llmrl.types import Message, SamplingConfig


# --- the environment -------------------------------------------------------------------------------------------------
class Calculator:
    """One sum to work out. Rewards: `correct` at the end, `mistake` for each call that cannot be carried out."""

    tools: Sequence[dict[str, Any]] = ()  # JSON schemas for the chat template; this model's template takes none

    def __init__(self, row: Mapping[str, Any], seed: int) -> None:
        numbers = random.Random(seed)  # the seed of this episode: the same sum in every run and process
        self.a, self.b = numbers.randint(10, 999), numbers.randint(10, 999)

    def observe(self) -> list[Message]:
        """Open the talk."""
        return [
            Message("system", "You may call the tool calculator."),
            Message("user", f"Calculate {self.a} + {self.b}."),
        ]

    def step(self, answer: Message) -> Step:
        """Carry out a call, or judge the answer."""
        calls, mistake = parse_tool_calls(answer.content)
        if mistake:
            return Step([Message("tool", mistake)], rewards={"mistake": -1.0})
        if not calls:
            return Step(rewards={"correct": float(answer.content.strip() == str(self.a + self.b))}, done=True)
        terms = str(calls[0].arguments.get("expression", "")).split("+")
        if len(terms) != 2 or not all(term.strip().isdigit() for term in terms):
            return Step([Message("tool", "expected NUMBER + NUMBER")], rewards={"mistake": -1.0})
        return Step([Message("tool", str(sum(int(term) for term in terms)), name="calculator")])


# --- playing it ------------------------------------------------------------------------------------------------------
@dataclass
class Options:
    """Options of the example."""

    model: str = option("examples/tiny_lm", help="a folder, or a hub name, with a chat template")
    output_dir: str = option("runs/calculator", help="where shards and episodes.jsonl go; the same command goes on")
    rollout_backend: str = option("auto", choices=("auto", "transformers", "vllm"), help="what samples the answers")
    episodes: int = option(64, help="how many to play")
    temperature: float = option(0.7, help="0 is greedy")
    seed: int = option(0, help="of environments and sampling")


def main(argv: list[str]) -> int:
    """Play, then export; return the exit code."""
    options = parse_config(Options, argv, prog="environment_with_tool.py", description="sums with a calculator")
    from llmrl.rollout.backends import open_engine
    from llmrl.rollout.episodes import export_episodes, run_episodes

    rows = [{"id": f"sum-{i:03d}"} for i in range(options.episodes)]
    sampling = SamplingConfig(temperature=options.temperature, max_tokens=64)
    with open_engine(options.model, rollout_backend=options.rollout_backend) as engine:
        summary = run_episodes(
            engine, rows, Calculator, sampling, output=options.output_dir, seed=options.seed, max_turns=6, source="sums"
        )
    print(summary.table())
    path = Path(options.output_dir) / "episodes.jsonl"
    print(f"{export_episodes(options.output_dir, path)} episodes in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

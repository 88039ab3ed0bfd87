"""What LeReT costs beside generation: `python evals/leret_speed.py --policy recipes/leret/policy --output_dir evals/results`.

    rules      1,000 questions, two hops, nine queries each, no model: retrieval, scoring, pairs, files
    explore    the policy asked by vLLM in process: the share of the time that is not generation
    pairs      a step's forward and backward over pairs of a state: one pass over the shared prompt against one for each
               completion, in alternation

Writes leret-speed.json with hardware and versions.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config import load_config_file, option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command


@dataclass
class SpeedConfig:
    """Options of the measurement."""

    policy: str = option("recipes/leret/policy", help="a folder with weights and search_prompt.json")
    recipe: str = option("recipes/leret/hotpotqa-small.yaml", help="questions and passages")
    rollout_backend: str = option("vllm", choices=("vllm", "transformers"), help="of the exploration")
    rounds: int = option(7, help="alternations of the pair forward")
    output_dir: str | None = option(None, help="where leret-speed.json goes")


def main(argv: list[str]) -> int:
    """Measure and write."""
    config = parse_config(SpeedConfig, argv, prog="evals/leret_speed.py", description=str(__doc__).splitlines()[0])
    if config.output_dir is None:
        raise UsageError("missing --output_dir")
    from llmrl.commands import quiet_libraries
    from llmrl.files import write_json
    from llmrl.leret.preference_data import read_pairs
    from llmrl.training.run import environment

    quiet_libraries(True)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"rules": _explore(config, Path(folder) / "rules", policy="rules", model=None)}
        found["explore"] = _explore(
            config, Path(folder) / "policy", model=config.policy, rollout_backend=config.rollout_backend
        )
        pairs = read_pairs(Path(folder) / "policy" / "round-0" / "pairs.jsonl")
        found["pairs"] = _pair_forward(config, pairs)
    for name, row in found.items():
        print(f"{name}: {json.dumps(row)}")
    write_json(Path(config.output_dir) / "leret-speed.json", {**found, "environment": environment()})
    return EXIT_DONE


def _explore(config: SpeedConfig, folder: Path, **changes: Any) -> dict[str, Any]:
    """Explore the recipe's training questions; return the seconds of each part and the share that is not generation."""
    from llmrl.leret import run
    from llmrl.leret.options import LeretConfig

    values = load_config_file(config.recipe, LeretConfig)
    files = {key: values[key] for key in ("questions", "passages")}
    taken = {
        **files,
        "few_shot_prompts": 0,
        "samples": 1,
        "temperature": [0.0],
        "output_dir": str(folder),
        "quiet": True,
    }
    taken["question_first"] = changes.get("policy") != "rules"
    report = run.explore(LeretConfig(**{**taken, **changes}))
    seconds = json.loads((folder / "round-0" / "timings.json").read_text(encoding="utf-8"))
    working = seconds["all"] - seconds["start"]
    share = (working - seconds["generation"]) / working
    counts = {key: report[key] for key in ("questions", "groups", "searches", "pairs")}
    return {**counts, **{key: round(value, 3) for key, value in seconds.items()}, "all_but_generation": round(share, 4)}


def _pair_forward(config: SpeedConfig, pairs: list[Any]) -> dict[str, Any]:
    """Return the median seconds of a step's pairs both ways, and how many times as fast sharing is."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmrl.leret import pair_forward
    from llmrl.leret.collate import PairCollator

    model = AutoModelForCausalLM.from_pretrained(config.policy, dtype=torch.float32).train()
    batch = PairCollator()([{"row": row} for row in random.Random(0).sample(pairs, 16)])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    shares = pair_forward.shares_prompt
    try:
        for turn in range(2 * config.rounds + 2):  # the first of each is not counted
            shared = turn % 2 == 0
            pair_forward.shares_prompt = lambda _, shared=shared: shared  # type: ignore[misc]
            begun = time.perf_counter()
            chosen, rejected = pair_forward.completion_logps(model, batch)
            (chosen.total - rejected.total).sum().backward()
            if turn > 1:
                seconds[shared].append(time.perf_counter() - begun)
    finally:
        pair_forward.shares_prompt = shares
    one, two = (statistics.median(seconds[shared]) for shared in (True, False))
    ratios = [b / a for a, b in zip(seconds[True], seconds[False], strict=True)]
    prompts = statistics.mean(len(row.prompt_ids) for row in pairs)
    queries = statistics.mean(len(ids) for row in pairs for ids in (row.chosen_ids, row.rejected_ids))
    return {
        "pairs": 16, "mean_prompt_tokens": round(prompts), "mean_query_tokens": round(queries), "seconds_shared": one,
        "seconds_twice": two, "ratio": two / one, "ratio_low": min(ratios), "ratio_high": max(ratios),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

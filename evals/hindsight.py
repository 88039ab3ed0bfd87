"""The real runs of offline RL for dialogues: `python evals/hindsight.py --output_dir evals/results`.

    charity     the charity talk in short words: a language model without any knowledge learns it from 1,000 raw logs
    charity-long   the same in utterances of 8 to 14 words, four templates an act
    charity-lora   the same in short words, the small pretrained language model of this repository under LoRA
    maze        the double-T maze in text: free generation, sampled and greedy, over a grid of beta
    questions   twenty questions

Each method and seed is trained once and kept in `--work_dir`; a run that is cut off goes on. Beta is chosen on episodes of
another luck (seed SELECTION) than those that are reported. One policy a seed: a seed is of the logs, the weights and the order.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command

SELECTION = 1000
STEERED = ("ilql", "mc")


@dataclass(frozen=True)
class Part:
    """One environment with one kind of model.

    Attributes:
        env, variant: of `llmrl hindsight eval`.
        methods: in the order of the table.
        options: of `llmrl hindsight train`.
        betas: of the grid.
        episodes: reported, for each policy.
        model: None is a model without any knowledge.
    """

    env: str
    variant: str | None
    methods: tuple[str, ...]
    options: dict[str, Any]
    betas: tuple[float, ...]
    episodes: int
    model: str | None = None


_ALL = ("bc", "filtered-bc", "awr", "dpo", "mc", "ilql")
_SCRATCH = {"lr": 2e-3, "heads_lr": 2e-3, "batch_size": 16}
PARTS = {
    "charity": Part("charity", "short", _ALL, {**_SCRATCH, "max_steps": 800}, (2, 4, 8, 16), 300),
    "charity-long": Part("charity", "long", _ALL, {**_SCRATCH, "max_steps": 1200}, (2, 4, 8, 16), 300),
    "charity-lora": Part(
        "charity", "short", ("bc", "filtered-bc", "mc", "ilql"),
        {"tuning": "lora", "lora_r": 16, "lr": 2e-3, "heads_lr": 2e-3, "batch_size": 16, "max_steps": 500},
        (2, 4, 8, 16), 300, "examples/tiny_lm",
    ),
    "maze": Part(
        "maze", None, ("bc", "filtered-bc", "mc", "ilql"),
        {"lr": 1e-3, "heads_lr": 1e-3, "batch_size": 8, "max_steps": 600, "discount": 0.99}, (1, 2, 4, 8), 100,
    ),
    "questions": Part(
        "twenty-questions", None, ("bc", "filtered-bc", "mc", "ilql"),
        {**_SCRATCH, "max_steps": 800}, (1, 2, 4, 8), 200,
    ),
}  # fmt: skip


@dataclass
class RunConfig:
    """Options of the runs."""

    output_dir: str | None = option(None, help="where hindsight-PART.json goes")
    only: list[str] = option([], help=f"parts: {', '.join(PARTS)} (default: all)")
    methods: list[str] = option([], help="methods (default: all of the part)")
    seeds: int = option(3, help="policies of each method")
    logs: int = option(1000, help="logged dialogues of each seed")
    max_steps: int | None = option(None, help="of the training, in place of the part's own")
    work_dir: str = option("runs/hindsight", help="where logs, models and policies are kept")
    quiet: bool = option(False, help="print errors only")


def main(argv: list[str]) -> int:
    """Run the parts and write a JSON file each."""
    config = parse_config(RunConfig, argv, prog="evals/hindsight.py", description=str(__doc__).splitlines()[0])
    if config.output_dir is None:
        raise UsageError("missing --output_dir")
    wrong = [name for name in config.only if name not in PARTS]
    if wrong:
        raise UsageError(f"--only {wrong[0]}: expected some of {', '.join(PARTS)}")
    from llmrl.commands import quiet_libraries

    quiet_libraries(quiet=True)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name in config.only or PARTS:
        run_part(config, name, PARTS[name], output / f"hindsight-{name}.json")
    return EXIT_DONE


def run_part(config: RunConfig, name: str, part: Part, path: Path) -> None:
    """Train and play every method and seed; the file is written again after each."""
    from llmrl.files import write_json
    from llmrl.hindsight.evaluation import ENVIRONMENTS
    from llmrl.training.run import environment

    found: dict[str, Any] = {
        "environment": environment(),
        "command": f"python evals/hindsight.py --only {name} --seeds {config.seeds} --output_dir DIR",
        "env": part.env,
        "variant": part.variant,
        "options": part.options | ({"max_steps": config.max_steps} if config.max_steps else {}),
        "model": part.model or "a Llama of 2 layers and width 64, random weights, whole words as tokens",
        "optimum": float(ENVIRONMENTS[part.env].module.optimum()),
        "logs": {},
        "methods": {},
    }
    for seed in range(config.seeds):
        folder = Path(config.work_dir) / name / str(seed)
        logs, model = make_logs(config, part, folder, seed)
        found["logs"][str(seed)] = logs
        for method in config.methods or part.methods:
            one = one_policy(config, part, folder, method, seed, model, found["options"])
            found["methods"].setdefault(method, {})[str(seed)] = one
            write_json(path, found | {"summary": summary(found["methods"])})
            if not config.quiet:
                value = one["return"]
                print(
                    f"{name} seed {seed} {method}: {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]",
                    flush=True,
                )


def make_logs(config: RunConfig, part: Part, folder: Path, seed: int) -> tuple[dict[str, float], str]:
    """Write logs and the model to start from, once; return the mean return of the logs, and the model."""
    from llmrl.hindsight.evaluation import write_logs
    from llmrl.hindsight.options import LogsConfig

    path, small = folder / "logs.jsonl.gz", folder / "model"
    if not path.is_file():
        variant = part.variant if part.env == "charity" else None
        write_logs(
            LogsConfig(
                env=part.env, output=str(path), count=config.logs, variant=variant, seed=seed, overwrite=True, quiet=True,
                model_dir=None if part.model else str(small),
            )
        )  # fmt: skip
    from llmrl.hindsight.dialogues import read_dialogues

    totals = [dialogue.total for dialogue in read_dialogues([path]).dialogues]
    return {"mean": float(np.mean(totals)), "most": float(np.max(totals))}, part.model or str(small)


def one_policy(
    config: RunConfig, part: Part, folder: Path, method: str, seed: int, model: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Train a policy unless it is there, choose beta, and play it; what was found is kept beside it."""
    from llmrl.hindsight.options import TrainConfig
    from llmrl.hindsight.run import train

    target, kept = folder / method, folder / f"{method}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    if not target.is_dir():
        start = str(folder / "bc") if method == "dpo" else model  # preferences begin where cloning ended
        train(
            TrainConfig(
                data=[str(folder / "logs.jsonl.gz")], model=start, output_dir=str(target), method=method, seed=seed, quiet=True,
                overwrite=True, save_steps=10**6, **options,
            )
        )  # fmt: skip
    trained = json.loads((target / "report.json").read_text(encoding="utf-8"))
    begun = time.monotonic()
    found: dict[str, Any] = {"train_seconds": trained["seconds"], "last": trained["last"]}
    beta = None
    if method in STEERED:
        grid = {b: play(part, target, b, SELECTION, part.episodes // 2) for b in part.betas}
        found["grid"] = {f"{b:g}": {key: of[key] for key in ("return", "invalid_share")} for b, of in grid.items()}
        beta = max(grid, key=lambda b: grid[b]["return"]["value"])
    sampled = play(part, target, beta, seed, part.episodes)
    greedy = play(part, target, beta, seed, part.episodes // 2, greedy=True)
    keys = ("return", "invalid_share", "off_template_share", "truncated_share")
    found |= {"beta": beta, **{key: sampled[key] for key in keys}, "greedy": {key: greedy[key] for key in keys}}
    found["play_seconds"] = time.monotonic() - begun
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def play(
    part: Part, policy: Path, beta: float | None, seed: int, episodes: int, *, greedy: bool = False
) -> dict[str, Any]:
    """Return the report of `llmrl hindsight eval`."""
    from llmrl.hindsight.evaluation import evaluate
    from llmrl.hindsight.options import EvalConfig

    return evaluate(
        EvalConfig(
            policy=str(policy), env=part.env, output_dir=f"{policy}.eval", episodes=episodes, beta=beta, greedy=greedy,
            variant=part.variant, seed=seed, overwrite=True, quiet=True,
        )
    )  # fmt: skip


def summary(methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the mean return over seeds, its spread, and each seed's."""
    found = {}
    for method, seeds in methods.items():
        values = [one["return"]["value"] for one in seeds.values()]
        greedy = [one["greedy"]["return"]["value"] for one in seeds.values()]
        found[method] = {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "seeds": values,
            "greedy": float(np.mean(greedy)),
        }
    return found


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

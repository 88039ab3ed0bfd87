"""How the learning rates of recipes/leret/hotpotqa-small.yaml were chosen: on training questions that no stage learned from.

    python evals/leret_rates.py --policy runs/policy-0 --output_dir evals/results

One exploration of all training questions; pairs and targets of the share that the policy's pretraining kept out (15%) are
left out of training too, and score what was trained on the others. Supervised rates first, then rates of IPO from the best of
them. Test questions are not read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.config import load_config_file, option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command

HELD_OUT = 0.15  # as recipes/leret_policy.py


@dataclass
class RatesConfig:
    """Options of the choice."""

    policy: str | None = option(None, help="a folder that recipes/leret_policy.py wrote")
    recipe: str = option("recipes/leret/hotpotqa-small.yaml", help="options of the runs")
    sft_lr: list[float] = option([1e-4, 3e-4], help="rates of supervised training")
    lr: list[float] = option([2e-5, 5e-5, 1e-4], help="rates of IPO")
    explore_backend: str = option(
        "vllm", choices=("vllm", "transformers"), help="of exploration; all else is asked by the recipe's"
    )
    work_dir: str = option("runs/leret-rates", help="where the runs are kept")
    output_dir: str | None = option(None, help="where leret-rates.json goes")
    quiet: bool = option(False, help="print errors only")


def main(argv: list[str]) -> int:
    """Explore, train with every rate, and say what the held-out questions make of it."""
    config = parse_config(RatesConfig, argv, prog="evals/leret_rates.py", description=str(__doc__).splitlines()[0])
    if config.policy is None or config.output_dir is None:
        raise UsageError("missing --policy (a pretrained folder) or --output_dir")
    from llmrl.commands import quiet_libraries
    from llmrl.files import write_json
    from llmrl.leret.opening import open_data
    from llmrl.leret.options import LeretConfig
    from llmrl.leret.partitions import share_of
    from llmrl.leret.rounds import explore_round, first_learner

    quiet_libraries(config.quiet)
    say: Callable[[str], None] = (lambda _: None) if config.quiet else print
    work = Path(config.work_dir)
    values = load_config_file(config.recipe, LeretConfig) | {"model": config.policy, "output_dir": str(work)}
    options = LeretConfig(**{**values, "test_questions": [], "quiet": config.quiet})
    opened = open_data(options, say)
    asked = replace(opened, config=replace(options, rollout_backend=config.explore_backend))
    explore_round(asked, 0, first_learner(opened), work / "round-0", say)
    held = [question for question in opened.questions.questions if share_of(question.text) < HELD_OUT]
    score = _Scorer(opened, held, work, say)
    rows, pairs = _rows(work / "round-0", {question.id for question in held})
    facts = {"questions": len(opened.questions.questions), "held_out": len(held), "sft": len(rows), "pairs": len(pairs)}
    scores = {"base": score("base", config.policy)}
    for rate in config.sft_lr:
        name = f"sft-{rate:g}"
        scores[name] = score(name, _sft(options, config.policy, rows, work / name, rate))
    best = max((name for name in scores if name.startswith("sft-")), key=lambda name: scores[name]["recall"])
    for rate in config.lr:
        name = f"{best} ipo-{rate:g}"
        scores[name] = score(name, _ipo(options, work / best / "final", pairs, work / name.replace(" ", "-"), rate))
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(config.output_dir) / "leret-rates.json", {**facts, "scores": scores})
    return EXIT_DONE


@dataclass
class _Scorer:
    """Plays a model on the held-out questions, any passages at hop 2."""

    opened: Any
    questions: Any
    work: Path
    say: Callable[[str], None]

    def __call__(self, name: str, model: str) -> dict[str, float]:
        from llmrl.leret.opening import open_asker
        from llmrl.leret.play import play

        with open_asker(self.opened, model) as asker:
            explorer = self.opened.explorer(asker, 0)
            system = play(
                name, explorer, self.questions, self.opened.bare, self.work / "answers" / name.replace(" ", "-")
            )
        found = system.means()
        self.say(f"{name}: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))
        return found


def _rows(folder: Path, held: set[str]) -> tuple[list[Any], list[Any]]:
    """Return the rows of both stages that are of other questions."""
    from llmrl.leret.export import PAIRS_FILE, SFT_FILE
    from llmrl.leret.jsonl import read_objects
    from llmrl.leret.preference_data import pair_row, sft_row

    found = []
    for file, read in ((SFT_FILE, sft_row), (PAIRS_FILE, pair_row)):
        found.append([read(row, where) for where, row in read_objects(folder / file) if row["question_id"] not in held])
    return found[0], found[1]


def _sft(options: Any, policy: str, rows: list[Any], folder: Path, rate: float) -> str:
    from llmrl.leret.rounds import stage_settings
    from llmrl.leret.sft import train_sft

    if not (folder / "final").is_dir():
        train_sft(
            policy, rows, folder, settings=replace(stage_settings(options, "sft", len(rows), 0), learning_rate=rate)
        )
    return str(folder / "final")


def _ipo(options: Any, start: Path, pairs: list[Any], folder: Path, rate: float) -> str:
    from llmrl.leret.preference import Objective, train_preference
    from llmrl.leret.rounds import stage_settings

    if not (folder / "final").is_dir():
        settings = replace(stage_settings(options, "preference", len(pairs), 0), learning_rate=rate)
        objective = Objective(str(options.loss), float(options.beta), str(options.ipo_reduction))
        train_preference(str(start), pairs, folder, settings=settings, objective=objective)
    return str(folder / "final")


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""`llmrl hyre train --tuning ...` in processes of its own, which tests start, kill with SIGKILL and resume.

    run(folder, kill=..., ranks=..., **options of TrainConfig)      exit code; what it printed is in folder/log.txt

It writes folder/ensemble; a run that is killed leaves folder/ensemble.training. `kill` is "after_save:N". `ranks` 2 starts two
processes with gloo (training/sft_run.py). batches-R.jsonl holds the rows that process R saw, by step.
"""

import functools
import gzip
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from forked_runs import REPO, call, forwards, training_script

MODEL = REPO / "examples" / "stories260k"
ROWS = [
    [5, 9, 2, 30, 7],
    [5, 9],
    [8, 8, 8, 3],
    [11],
    [40, 41, 42],
    [5, 60, 61, 62, 63, 64],
]  # ids of texts
RULES = {"commas": lambda text: text.count(","), "length": len}


def write_pairs(path, count, rules=RULES, margin=False):
    """Write pairs of lines of a book, of 10 to 60 letters; each of the groups prefers by a rule of its own."""
    with gzip.open(REPO / "examples" / "text" / "wizard_of_oz.txt.gz", "rt", encoding="utf-8") as book:
        lines = [line.strip() for line in book if len(line.strip()) > 60]
    draw, rows = random.Random(0), []
    while len(rows) < count:
        a, b = (line[: draw.randint(10, 60)] for line in draw.sample(lines, 2))
        group = draw.choice(sorted(rules))
        better = rules[group](a) - rules[group](b)
        if better:
            row = {"chosen": a if better > 0 else b, "rejected": b if better > 0 else a, "group": group}
            rows.append({**row, **({"margin": len(rows) % 3 / 4} if margin else {})})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


run = functools.partial(call, __file__)


def sides(folder, processes):
    """Return for each step (rows of the chosen, rows of the rejected), in the order in which one process would see them."""
    steps = []
    for step in forwards(folder, processes):
        halves = [(rows[: len(rows) // 2], rows[len(rows) // 2 :]) for rows in step]
        steps.append(tuple([row for half in side for row in half] for side in zip(*halves, strict=True)))
    return steps


def main():
    sft_run = training_script()
    from llmrl.hyre import tune, tune_settings
    from llmrl.hyre.options import TrainConfig
    from llmrl.hyre.train import train

    def stage(options):
        options = {"kill": None, "micro_batch_size": None, "quiet": True, **options}
        watch = {"sharded": False, "fail": None, "slow": None, "kill": options.pop("kill")}
        tune.EnsembleTrainer = sft_run.watched(tune.EnsembleTrainer, watch)
        more, made = (
            {"micro_batch_size": options.pop("micro_batch_size"), "logging_steps": 3},
            tune_settings.settings_of,
        )
        tune_settings.settings_of = lambda config: replace(made(config), **more)
        folder = Path(options.pop("output_dir"))
        train(TrainConfig(**{"base": str(MODEL), "output_dir": str(folder / "ensemble"), **options}))

    sft_run.run = stage
    return sft_run.main()


if __name__ == "__main__":
    sys.exit(main())

"""Both training stages in processes of their own, which tests start, kill with SIGKILL and resume: see training/sft_run.py.

    run(output_dir, stage="sft" | "preference", rows=FILE, ...)    exit code; what it printed is in output_dir/log.txt

`kill` is "after_save:N". `ranks` 2 starts two processes with gloo. batches-R.jsonl holds the ids that process R saw, by step.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "examples" / "stories260k"
DEFAULTS = {
    "stage": "preference", "rows": None, "model": str(MODEL), "resume": None, "kill": None, "settings": {}, "objective": {},
    "reference": "sft",
}  # fmt: skip


@functools.cache
def server():
    """Start the process that forks the runs: importing takes longer than a run."""
    quiet = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    variables = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    command = [sys.executable, __file__]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**variables, **quiet}
    )


def run(output_dir, **options):
    """Run one stage; return its exit code."""
    process = server()
    process.stdin.write(json.dumps({"output_dir": str(output_dir), **options}) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def forwards(folder, processes):
    """Return for each step the rows of its forwards, in the order in which a single process would see them."""
    ranks = []
    for rank in range(processes):
        records = [json.loads(line) for line in (folder / f"batches-{rank}.jsonl").read_text().splitlines()]
        groups = groupby(records, key=lambda record: record["step"])
        ranks.append([[record["rows"] for record in group] for _, group in groups])
    return [[rows for same in zip(*parts, strict=True) for rows in same] for parts in zip(*ranks, strict=True)]


def nll(model, prompt, completion):
    """Return the summed NLL of a completion, token by token from one unpadded row."""
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return -sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


def main():
    sys.path[:0] = [str(REPO), str(REPO / "tests" / "training")]
    import sft_run

    from llmrl.leret import preference, sft
    from llmrl.leret.train_settings import TrainSettings

    def stage(options):
        options = {**DEFAULTS, **options}
        base = preference.PreferenceTrainer if options["stage"] == "preference" else sft._trainer_class()
        watched = sft_run.watched(base, {"sharded": False, "kill": None, "fail": None, "slow": None, **options})
        settings = replace(TrainSettings(quiet=True), **options["settings"])
        common = {"settings": settings, "resume": options["resume"]}
        if options["stage"] == "sft":
            sft._trainer_class = lambda: watched
            sft.train_sft(options["model"], options["rows"], options["output_dir"], **common)
            return
        preference.PreferenceTrainer = watched
        preference.train_preference(
            options["model"], options["rows"], options["output_dir"], reference=options["reference"],
            objective=preference.Objective(**options["objective"]), **common,
        )  # fmt: skip

    sft_run.run = stage
    return sft_run.main()


if __name__ == "__main__":
    sys.exit(main())

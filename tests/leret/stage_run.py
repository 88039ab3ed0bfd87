"""Both training stages in processes of their own, which tests start, kill with SIGKILL and resume: see training/sft_run.py.

    run(output_dir, stage="sft" | "preference", rows=FILE, ...)    exit code; what it printed is in output_dir/log.txt

`kill` is "after_save:N". `ranks` 2 starts two processes with gloo. batches-R.jsonl holds the ids that process R saw, by step.
"""

import functools
import sys
from dataclasses import replace

import torch
from forked_runs import REPO, call, training_script

MODEL = REPO / "examples" / "stories260k"
DEFAULTS = {
    "stage": "preference", "rows": None, "model": str(MODEL), "resume": None, "kill": None, "settings": {}, "objective": {},
    "reference": "sft",
}  # fmt: skip


run = functools.partial(call, __file__)


def nll(model, prompt, completion):
    """Return the summed NLL of a completion, token by token from one unpadded row."""
    with torch.no_grad():
        logps = model(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    return -sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(completion))


def main():
    sft_run = training_script()
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

"""`llmrl leret explore|train|eval` and recipes/leret.py: one code path."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from llmrl.config import to_flat
from llmrl.errors import UsageError
from llmrl.leret.evaluation import BASE, POLICY, evaluate, systems_of
from llmrl.leret.headroom import headroom_table, refuse_reason
from llmrl.leret.model_identity import model_and_adapter
from llmrl.leret.opening import Opened, Say, open_data
from llmrl.leret.options import LeretConfig
from llmrl.leret.prompts import PromptStyle
from llmrl.leret.questions import QuestionSet
from llmrl.leret.records import Candidate, group_candidates, read_records
from llmrl.leret.rounds import STYLES_FILE, explore_round, first_learner, published_round, run_rounds
from llmrl.leret.run_folder import (
    RUN_FILE,
    claim_part,
    claimed_folder,
    identity,
    questions_fingerprint,
    systems_identity,
)
from llmrl.training.distributed import check_processes, is_main_process, join_processes
from llmrl.training.run import write_run_files
from llmrl.training.tracking import check_tracker
from llmrl.vllm_compat import check_versions

EVAL_FILE, TEST = "leret_eval.json", "test"
# where an action counts the prompts that got no answer
_COUNTS = {
    "explore": ("round-0/headroom.json",),
    "train": ("round-*/headroom.json", "dev-start.json", "round-*/dev.json", f"{TEST}/report.json"),
    "eval": ("report.json",),
}
_PATIENCE = timedelta(days=30)  # of one process for the answers of another


def explore(config: LeretConfig) -> dict[str, Any]:
    """Explore the first round; return its headroom report, which is also written beside the rows for training."""
    opened, say = _begin(config)
    with claimed_folder(str(config.output_dir), identity(opened), overwrite=config.overwrite, file=RUN_FILE) as folder:
        _describe(config, folder)
        report = explore_round(opened, 0, first_learner(opened), folder / "round-0", say)
        reason = refuse_reason(report)
        say(headroom_table(report))
        say(f"nothing to learn: {reason}" if reason else f"rows for training: {folder / 'round-0'}")
        return report


def train(config: LeretConfig) -> dict[str, Any] | None:
    """Explore and train in rounds; return the report on --test_questions, None without them."""
    if config.policy == "rules":
        raise UsageError(
            "--policy rules has no model to train; llmrl leret explore writes pairs as text, which trl's trainers read"
        )
    if not (config.sft_epochs or config.epochs):
        raise UsageError("nothing to train: --sft_epochs and --epochs are both 0")
    opened, say = _begin(config)
    if config.tuning == "full" and first_learner(opened).adapter is not None:
        raise UsageError(f"--tuning full trains a whole model, --model {config.model} is an adapter: use --tuning lora")
    with claimed_folder(str(config.output_dir), identity(opened), overwrite=config.overwrite, file=RUN_FILE) as folder:
        _describe(config, folder)
        final = run_rounds(opened, folder, say)
        _plots(folder)
        say(f"policy: {final}")
        return None if opened.test is None else _test(opened, opened.test, Path(final), folder, say)


def _test(opened: Opened, questions: QuestionSet, policy: Path, folder: Path, say: Say) -> dict[str, Any]:
    """Report on the policy, the model before training and the supervised stage of the policy's round."""
    start = first_learner(opened)
    base = str(start.model)
    models = [(POLICY, *model_and_adapter(str(policy), base)), (BASE, base, start.adapter)]
    sft = folder / f"round-{published_round(policy)}" / "sft" / "final"
    if sft.is_dir() and opened.config.epochs:
        models.append(("sft", *model_and_adapter(str(sft), base)))
    # a run that goes on may have another policy by now, or be asked about other questions
    claim_part(folder / TEST, {"models": systems_identity(models), "questions": questions_fingerprint(questions)})
    return evaluate(opened, questions, models, folder / TEST, say, further={BASE: _few_shot(folder)})


def failed_prompts(action: str, output_dir: Path | str) -> int:
    """Return how many prompts got no answer, as the files that an action left say.

    Args:
        action: explore, train or eval.
        output_dir: of the run.
    """
    failed = 0
    for pattern in _COUNTS[action]:
        for file in sorted(Path(output_dir).expanduser().glob(pattern)):
            said = json.loads(file.read_text(encoding="utf-8")).get("failed_prompts", 0)
            failed += said if isinstance(said, int) else sum(of["failed"] for of in said.values())
    return failed


def _few_shot(folder: Path) -> list[PromptStyle]:
    """Return the best few-shot style of the first round, for a row of the model as it was before training."""
    file = folder / "round-0" / "few-shot" / STYLES_FILE
    made = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [replace(PromptStyle.from_json(made[0]), name="few-shot")] if made else []


def evaluate_policy(config: LeretConfig) -> dict[str, Any]:
    """Evaluate on --questions; return the report, which is also written to `output_dir/report.json`."""
    opened, say = _begin(config)
    models = systems_of(opened)
    what = {**identity(opened), "models": systems_identity(models), "eval": True}
    with claimed_folder(str(config.output_dir), what, overwrite=config.overwrite, file=EVAL_FILE) as folder:
        _describe(config, folder)
        return evaluate(opened, opened.questions, models, folder, say)


def _begin(config: LeretConfig) -> tuple[Opened, Say]:
    check_versions(("torch", "transformers", "safetensors"))
    check_tracker(config.report_to)
    join_processes(patience=_PATIENCE)
    check_processes(announce=not config.quiet)

    def say(text: str) -> None:
        if not config.quiet and is_main_process():
            print(text, flush=True)

    return open_data(config, say), say


def _describe(config: LeretConfig, folder: Path) -> None:
    if is_main_process():
        write_run_files(folder, to_flat(config), command=sys.argv)


def _plots(folder: Path) -> None:
    """Draw what the rounds came to: recall against queries, training curves, dev by round."""
    if not is_main_process():
        return
    from llmrl.leret.plots import recall_against_queries, rounds_on_dev, training_curves
    from llmrl.training.metrics import read_metrics

    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    rounds = sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-")))
    for number, path in enumerate(rounds):
        candidates = [c for file in sorted(path.glob("hop-*/candidates.jsonl")) for c in read_records(file, Candidate)]
        if candidates:
            recall_against_queries(plots / f"queries-{number}.png", group_candidates(candidates), f"round {number}")
        stages = {name: path / name / "metrics.jsonl" for name in ("sft", "preference")}
        found = {name: read_metrics(file) for name, file in stages.items() if file.is_file()}
        if found:
            training_curves(plots / f"training-{number}.png", found, f"round {number}")
    dev = [folder / "dev-start.json", *(path / "dev.json" for path in rounds)]
    means = [json.loads(file.read_text(encoding="utf-8")) for file in dev if file.is_file()]
    if len(means) > 1:
        rounds_on_dev(plots / "rounds.png", means)

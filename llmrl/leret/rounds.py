"""Rounds of LeReT: explore, see whether there is something to learn, train, look at dev; again with the new model.

    round-R/hop-H/candidates.jsonl    what was tried (explore.py)
    round-R/headroom.{json,md}        is there something to learn
    round-R/{sft,pairs,grpo}.jsonl    what training reads
    round-R/sft/, round-R/preference/ the two stages, each with final/
    round-R/dev.json                  the new model on dev questions
    policy/                           the best round's model or adapter, with its prompt

Each of them is written whole and not made again, so a run that was killed goes on where it was: at its round, hop,
answer or training step.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.config import to_flat
from llmrl.errors import DataError, UsageError
from llmrl.files import publish_folder, staging_folder, write_json, write_text
from llmrl.leret.ask import AskTally
from llmrl.leret.bootstrap import bootstrap_styles
from llmrl.leret.evaluate import report_json
from llmrl.leret.explore import Explorer
from llmrl.leret.export import PAIRS_FILE, SFT_FILE, write_rows
from llmrl.leret.headroom import headroom, headroom_table, refuse_reason
from llmrl.leret.model_identity import model_and_adapter
from llmrl.leret.opening import Opened, Say, open_asker, warn
from llmrl.leret.options import LeretConfig
from llmrl.leret.pairs import PairRule
from llmrl.leret.partitions import partition_rounds, shuffled, slice_questions
from llmrl.leret.play import check_row, play
from llmrl.leret.preference_data import read_pairs, read_sft_rows
from llmrl.leret.prompts import ECHO_HEADERS, PromptStyle, load_setup
from llmrl.leret.questions import Question
from llmrl.leret.report import warnings
from llmrl.leret.retriever import NothingFoundError
from llmrl.leret.train_settings import TrainSettings
from llmrl.rollout.seeds import derive_seed
from llmrl.training.distributed import barrier, is_main_process, world_size

POLICY, STYLES_FILE, ROUND = "policy", "styles.json", "round"
_SEED_RANGE = 2**31  # of what torch and numpy take


@dataclass(frozen=True)
class Learner:
    """The model as it stands: a model, or an adapter on one."""

    model: str | None
    adapter: str | None


def first_learner(opened: Opened) -> Learner:
    """Return what the first round starts from: the model of the options, an adapter on its base, or nothing (rules)."""
    config = opened.config
    if config.model is None or config.adapter is not None:
        return Learner(config.model, config.adapter)
    return Learner(*model_and_adapter(config.model, None))


def explore_round(opened: Opened, number: int, learner: Learner, folder: Path, say: Say) -> dict[str, Any]:
    """Explore one round and write what training reads; return the headroom report."""
    report_file = folder / "headroom.json"
    if report_file.is_file():
        say(f"round {number}: exploration is there, kept")
        return dict(json.loads(report_file.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    config = opened.config
    seed = derive_seed(config.seed, "round", number)
    questions, few_shot = _questions_of(opened, number)
    begun = time.perf_counter()
    with open_asker(opened, learner.model, learner.adapter) as asker:
        opening = time.perf_counter() - begun
        explorer = opened.explorer(asker, seed)
        styles = _all_styles(opened, explorer, few_shot, folder, seed, say)
        say(f"round {number}: {len(questions)} questions, styles {', '.join(style.name for style in styles)}")
        groups = explorer.explore(questions, styles, folder)
        explorer.searcher.watch.finish()
        tokenizer = getattr(getattr(asker, "engine", None), "tokenizer", None)
        rule = PairRule(
            policy=str(config.pairs),
            margin=float(config.margin or 0),
            max_pairs=int(config.max_pairs or 0),
            near_duplicate=float(config.near_duplicate or 1),
            echo_headers=ECHO_HEADERS,
            stop_query="" if config.keep_solved else None,
            seed=seed,
        )
        building = time.perf_counter()
        report = headroom(groups, rule)
        if is_main_process():
            render, options = _render(opened, explorer, questions), opened.setup.format.template_options
            counts = write_rows(folder, groups, rule, render, tokenizer, options)
            tally = asker.tally
            answered = {"prompts": tally.prompts, "failed_prompts": tally.failed, "first_failure": tally.failure}
            report = {**report, "rows": counts, **answered, **opened.facts()}
            seconds = {
                "start": opening,
                "generation": asker.tally.seconds,
                "retrieval": explorer.searcher.seconds,
                "scoring": explorer.clock.seconds,
                "pairs": time.perf_counter() - building,
                "all": time.perf_counter() - begun,
            }
            write_json(
                folder / "timings.json", {**seconds, "tokens": asker.tally.tokens, "answers": asker.tally.answers}
            )
            write_text(folder / "headroom.md", headroom_table(report) + "\n")
            write_json(report_file, report)
            say(summary_line(seconds, asker.tally, explorer.searcher.searches))
            if tally.failed:
                warn(f"round {number}: {tally.failures()}; nothing was explored there")
    barrier()
    return report


def summary_line(seconds: dict[str, float], tally: AskTally, searches: int) -> str:
    """Return what exploring cost, and the share of it that is not generation: reading and writing files included."""
    working = seconds["all"] - seconds["start"]
    files = max(0.0, working - sum(seconds[name] for name in ("generation", "retrieval", "scoring", "pairs")))
    ours = max(0.0, working - seconds["generation"])
    failed = f", {tally.failed} failed ({tally.failure:.120})" if tally.failed else ""
    return (
        f"explored in {working:.1f} s: {tally.answers} answers ({tally.tokens:,} tokens){failed} in "
        f"{seconds['generation']:.1f} s, {searches} searches in {seconds['retrieval']:.1f} s, scoring "
        f"{seconds['scoring']:.1f} s, pairs {seconds['pairs']:.1f} s, files {files:.1f} s: "
        f"all but the answers is {ours / max(working, 1e-9):.1%}"
    )


def train_round(opened: Opened, number: int, learner: Learner, folder: Path, say: Say) -> Learner:
    """Train both stages on a round's rows; return the model as it is afterwards."""
    from llmrl.leret.preference import Objective, train_preference
    from llmrl.leret.sft import train_sft

    config = opened.config
    base = str(learner.model if learner.adapter else config.model)
    facts = {"base": base, **opened.facts(), ROUND: str(number)}
    now = learner
    if config.sft_epochs:
        rows = read_sft_rows(folder / SFT_FILE)
        settings = stage_settings(config, "sft", len(rows), number)
        result = _stage(folder / "sft", lambda resume: train_sft(
            now.adapter or now.model, rows, folder / "sft", settings=settings, facts=facts, resume=resume,
            base=now.model if now.adapter else None,
        ), say)  # fmt: skip
        now = _learned(opened, now, result, config.tuning)
    if config.epochs:
        pairs = read_pairs(folder / PAIRS_FILE)
        settings = stage_settings(config, "preference", len(pairs), number)
        before, objective = now, Objective(str(config.loss), float(config.beta or 0), str(config.ipo_reduction))
        result = _stage(folder / "preference", lambda resume: train_preference(
            before.adapter or before.model, pairs, folder / "preference", settings=settings, objective=objective,
            reference=config.reference, facts=facts, resume=resume, base=before.model if before.adapter else None,
        ), say)  # fmt: skip
        now = _learned(opened, now, result, config.tuning)
    if now is learner:
        raise UsageError("nothing to train: sft_epochs and epochs are both 0")
    return now


def run_rounds(opened: Opened, output_dir: Path, say: Say) -> Path:
    """Explore and train until the rounds are over or dev no longer rises; return the folder of the best policy.

    Raises:
        DataError: there is nothing to learn; the headroom report says why. `force` trains all the same.
        NothingFoundError: most searches of the first round come back empty; a later round ends the rounds.
    """
    config = opened.config
    learner = first_learner(opened)
    start = top = _dev_recall(opened, learner, output_dir / "dev-start.json", "before training", say)
    best: tuple[Learner, float | None, int] | None = None
    waited = 0
    for number in range(config.rounds):
        folder = output_dir / f"round-{number}"
        try:
            report = explore_round(opened, number, learner, folder, say)
        except NothingFoundError as error:
            if best is None:
                raise
            warn(f"round {number}: {error}\nstopped: the policy is that of the rounds before")
            break
        say(headroom_table(report))
        reason = refuse_reason(report)
        if reason and not config.force:
            if best is not None:
                say(f"round {number}: {reason}\nstopped: the policy is that of the rounds before")
                break
            raise DataError(f"round {number}: {reason}\nsee {folder / 'headroom.md'}; --force trains all the same")
        learner = train_round(opened, number, learner, folder, say)
        found = _dev_recall(opened, learner, folder / "dev.json", f"round {number}", say)
        if found is None or best is None or best[1] is None or found > best[1]:
            best = (learner, found, number)
        if found is None or top is None:
            continue
        waited = 0 if found > top else waited + 1
        top = max(top, found)
        if waited >= config.patience and number + 1 < config.rounds:
            say(f"dev recall has not risen for {waited} round(s): stopped after round {number}")
            break
    assert best is not None
    if start is not None and best[1] is not None and best[1] <= start:
        say(f"the best round is no better on dev than the model before training ({best[1]:.3f}, {start:.3f})")
    return _publish(opened, *best, output_dir)


def _questions_of(opened: Opened, number: int) -> tuple[list[Question], list[Question]]:
    """Return the questions of a round and those set aside for few-shot styles; the slices are the same in all rounds."""
    config, by_id = opened.config, {question.id: question for question in opened.questions.questions}
    wanted = config.few_shot_questions if config.few_shot_prompts and config.policy == "model" else 0
    aside = min(wanted, len(by_id) // 2)  # of few questions, those that are explored matter more
    slices = slice_questions(sorted(by_id), few_shot=aside, seed=config.seed)
    ids = partition_rounds(slices.train, config.rounds, str(config.partition), config.seed)[number]
    return [by_id[name] for name in ids], [by_id[name] for name in shuffled(slices.few_shot, config.seed, "few-shot")]


def _all_styles(
    opened: Opened, explorer: Explorer, few_shot: Sequence[Question], folder: Path, seed: int, say: Say
) -> list[PromptStyle]:
    config = opened.config
    if config.policy == "rules":
        return list(opened.styles)
    styles = [opened.bare, *opened.styles]
    if config.few_shot_prompts:
        settings = replace(explorer.settings, samples=1, temperatures=(0.0,), returns="greedy")
        maker = replace(explorer, settings=settings)  # one asker, searcher and clock, so that the summary counts it
        made, how = bootstrap_styles(
            maker, opened.setup.format, few_shot, folder / "few-shot",
            styles=config.few_shot_prompts, demos=config.few_shot_demos, seed=seed,
        )  # fmt: skip
        say(how)
        if is_main_process():
            write_json(folder / "few-shot" / STYLES_FILE, [style.to_json() for style in made])
        styles += made
    return styles


def _render(opened: Opened, explorer: Explorer, questions: Sequence[Question]) -> Any:
    texts = {question.id: question.text for question in questions}

    def render(state: Any) -> Any:
        passages = [explorer.passage(name) for name in explorer.context(state)]
        return opened.setup.format.messages(opened.bare, texts[state.question_id], passages)

    return render


def stage_settings(config: LeretConfig, stage: str, rows: int, number: int) -> TrainSettings:
    """Return how "sft" or "preference" of a round is trained on so many rows.

    A batch is no larger than the rows, and a multiple of the number of processes, which share it.

    Raises:
        UsageError: fewer rows than processes.
    """
    said: dict[str, Any] = to_flat(config)
    prefix = "sft_" if stage == "sft" else ""
    same = (
        "micro_batch_size", "optimizer", "warmup_steps", "max_grad_norm", "tuning", "lora_r", "lora_alpha",
        "gradient_checkpointing", "save_steps", "report_to", "quiet",
    )  # fmt: skip
    processes, wanted = world_size(), said["sft_batch_size" if prefix else "train_batch_size"]
    size = min(wanted, rows) // processes * processes
    if rows and not size:
        raise UsageError(f"{stage}: batches of {min(wanted, rows)} rows for {processes} processes: start fewer of them")
    return TrainSettings(
        learning_rate=said[f"{prefix}lr"],
        batch_size=size,
        epochs=said[f"{prefix}epochs"],
        seed=derive_seed(config.seed, "round", number, stage) % _SEED_RANGE,
        long_rows="drop",  # one prompt above the context must not end a run; the number left out is said
        **{name: said[name] for name in same},
    )


def _stage(folder: Path, train: Any, say: Say) -> Path:
    """Train one stage, or go on with it; a stage that is whole is kept."""
    from llmrl.leret.policy_files import FINAL

    if (folder / FINAL).is_dir():
        say(f"{folder.parent.name}: {folder.name} is there, kept")
        return folder / FINAL
    from llmrl.training.resume import latest_checkpoint

    return Path(train("latest" if latest_checkpoint(folder) else None).folder)


def _learned(opened: Opened, before: Learner, final: Path, tuning: str | None) -> Learner:
    if is_main_process():
        replace(opened.setup, notes=opened.facts()).save(final)
    barrier()
    return Learner(before.model, str(final)) if tuning == "lora" else Learner(str(final), None)


def _dev_recall(opened: Opened, learner: Learner, file: Path, what: str, say: Say) -> float | None:
    if opened.dev is None:
        return None
    if not file.is_file():
        with open_asker(opened, learner.model, learner.adapter) as asker:
            explorer = opened.explorer(asker, derive_seed(opened.config.seed, "dev"))
            system = play(what, explorer, opened.dev.questions, opened.bare, file.with_suffix(""))
            check_row(system, explorer.searcher, opened.dev.questions)
        facts = {**opened.facts(), "failed_prompts": {what: asker.tally.to_json()}}
        report = report_json([system], [], facts=facts)
        for line in warnings(report):
            warn(f"dev, {line}")
        if is_main_process():
            found = report["systems"][what]
            write_json(file, {**found, "failed_prompts": asker.tally.failed, **opened.facts()})
        barrier()
    scores = json.loads(file.read_text(encoding="utf-8"))
    recall, ap, both = (scores[metric]["value"] for metric in ("recall", "ap", "both"))
    say(f"dev, {what}: recall {recall:.3f}, AP {ap:.3f}, all found {both:.3f}")
    return float(recall)


def published_round(policy: Path) -> int:
    """Return the number of the round that a published policy comes from, 0 where its search prompt does not say."""
    setup = load_setup(policy)
    return int(setup.notes.get(ROUND, 0)) if setup is not None else 0


def _publish(opened: Opened, best: Learner, recall: float | None, number: int, output_dir: Path) -> Path:
    """Copy the best round's result to policy/, whole, with the prompt it was trained with."""
    final = output_dir / POLICY
    if is_main_process():
        notes = {**opened.facts(), ROUND: str(number)}
        if recall is not None:
            notes["dev_recall"] = f"{recall:.4f}"
        with staging_folder(final) as staging:
            shutil.copytree(str(best.adapter or best.model), staging, dirs_exist_ok=True)
            replace(opened.setup, notes=notes).save(staging)
            publish_folder(staging, final)
    barrier()
    return final

"""`llmrl hindsight regenerate`: logged dialogues in; new ones, what was refused, and a report out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.config import to_flat
from llmrl.errors import DataError, Interrupted, OutputError, UsageError
from llmrl.files import write_json
from llmrl.hindsight.datasets import read_files
from llmrl.hindsight.dialogues import Dialogue, read_dialogues
from llmrl.hindsight.regeneration.answers import Answers
from llmrl.hindsight.regeneration.budget import Meter
from llmrl.hindsight.regeneration.estimate import estimate, table_of
from llmrl.hindsight.regeneration.forward import Continuation
from llmrl.hindsight.regeneration.opening import Opener, open_parts, read_user
from llmrl.hindsight.regeneration.options import RegenerateConfig
from llmrl.hindsight.regeneration.realism import compare
from llmrl.hindsight.regeneration.rounds import Parts, Round, Settings, regenerate
from llmrl.intervals import draw_means, interval
from llmrl.jsonl import write_objects
from llmrl.rollout.seeds import derive_seed
from llmrl.training.run import environment
from llmrl.training.tracking import progress_bar

_DRAWS = 2000
_FEWEST_HELD_OUT = 10
_CALIBRATION_SHARE = 0.4  # of a budget: half of it for the judge, and what is left of it for the forward model


def run(config: RegenerateConfig) -> dict[str, Any]:
    """Regenerate as the options say, write what came of it, and return the report.

    Raises:
        UsageError: options that do not fit.
        DataError: no dialogue that can be read, or none that could be made.
        OutputError: `--output` is there.
        EngineError: an endpoint is gone; answers up to then are kept.
    """
    files = Files(config.output)
    for path in [*config.data, *([config.match] if config.match else [])]:
        if Path(path).expanduser().resolve() == files.output.resolve():
            raise UsageError(f"--output {config.output} is read too, and would be replaced: name another file")
    if files.output.exists() and not config.overwrite and not config.dry_run:
        raise OutputError(
            f"--output {files.output} is there; --overwrite replaces it, and uses the answers kept beside it"
        )
    read = read_files(config.data, config.data_format)
    dialogues = _some(read.dialogues, config)
    if config.dry_run:
        found = estimate(config, dialogues)
        print(f"{read.summary()}\n{table_of(found)}", flush=True)
        return found
    settings = _settings(config)
    meter = Meter(config.budget_tokens, config.budget_requests)
    with ExitStack() as stack:
        answers = stack.enter_context(Answers(files.answers))
        bars = stack.enter_context(_Bars(config.quiet))
        try:
            opener = Opener(config, stack, answers, meter)
            with meter.at_most(_CALIBRATION_SHARE / 2):
                parts = open_parts(config, dialogues, opener, lambda done, total: bars.show("judge", done, total))
            with meter.at_most(_CALIBRATION_SHARE):
                realism = _realism(config, dialogues, parts, bars, meter.stop)
            rounds = regenerate(
                dialogues, parts, settings, lambda r, done, total: bars.show(f"round {r}", done, total), meter.stop
            )
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted: {len(answers)} answers are kept; the same command goes on with them"
            ) from None
    made = [dialogue for one in rounds for dialogue in one.made]
    report = {
        **_report(config, dialogues, rounds, parts, meter),
        "kept_aside": dict(Counter(reason for _, reason, _, _ in read.refused)),
        "realism": realism,
        "environment": environment(),
    }
    files.output.parent.mkdir(parents=True, exist_ok=True)
    read.write_aside(files.aside)
    write_objects(files.refused, _refused(rounds))
    write_json(files.report, report)
    if not config.quiet:
        print(summary_of(report), flush=True)
    if not made and not report["unfinished"]:
        raise DataError(f"not one dialogue could be made; {files.refused} says why, line by line")
    if made:
        written = [*dialogues, *made] if config.with_logs else made
        write_objects(files.output, [dialogue.to_json() for dialogue in written])  # last: it says that all is there
        if not config.quiet:
            print(files.output, flush=True)
    return report


class Files:
    """Where things go, beside the output."""

    def __init__(self, output: str) -> None:
        self.output = Path(output).expanduser()
        stem = self.output.name.removesuffix(".gz").removesuffix(".jsonl")
        self.report = self.output.with_name(f"{stem}.report.json")
        self.refused = self.output.with_name(f"{stem}.refused.jsonl")
        self.aside = self.output.with_name(f"{stem}.kept_aside.jsonl")
        self.answers = self.output.with_name(f"{stem}.answers")


class _Bars:
    """One bar after the other."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._stack, self._title = quiet, ExitStack(), ""
        self._advance: Callable[[int, int], None] = lambda done, total: None
        self._lock = threading.Lock()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def show(self, title: str, done: int, total: int) -> None:
        with self._lock:
            if title != self._title:
                self._stack.close()
                self._title = title
                self._advance = self._stack.enter_context(
                    progress_bar(title, total, unit="dialogue", quiet=self._quiet)
                )
            self._advance(done, total)


def _some(dialogues: list[Dialogue], config: RegenerateConfig) -> list[Dialogue]:
    if config.limit is None or config.limit >= len(dialogues):
        return dialogues
    chosen = set(
        sorted((d.id for d in dialogues), key=lambda name: derive_seed(config.seed, "limit", name))[: config.limit]
    )
    return [dialogue for dialogue in dialogues if dialogue.id in chosen]


def _settings(config: RegenerateConfig) -> Settings:
    counts = None
    if config.match is not None:
        found = Counter(
            d.provenance.get("regenerated", {}).get("round") for d in read_dialogues([config.match]).dialogues
        )
        found.pop(None, None)
        counts = tuple(found[number] for number in sorted(found))
        if not counts:
            raise DataError(
                f"--match {config.match}: expected the output of another regenerate, whose rounds can be counted"
            )
        if len(counts) != config.rounds:
            raise UsageError(
                f"--match {config.match} has {len(counts)} rounds, --rounds is {config.rounds}: give the same"
            )
    return Settings(
        rounds=config.rounds,
        edits=config.edits_per_dialogue,
        candidates=config.candidates,
        retries=config.retries,
        concurrency=config.concurrency,
        seed=config.seed,
        tag=_tag(config),
        counts=counts,
    )


def _tag(config: RegenerateConfig) -> str:
    """Return what tells the ids of this run from those of another one on the same logs."""
    return f"{derive_seed(config.seed, config.control, config.controller, config.forward) % 16**4:04x}"


def _realism(
    config: RegenerateConfig, dialogues: Sequence[Dialogue], parts: Parts, bars: _Bars, stop: Callable[[], None]
) -> dict[str, Any]:
    """Compare the forward model with logs that it was not trained on, where it says which these are."""
    trained = read_user(config.forward) if config.forward != "scripted" else None
    unseen = None if trained is None else set(trained["held_out"])
    held_out = [d for d in dialogues if unseen is None or d.id in unseen]
    enough = len(held_out) >= min(_FEWEST_HELD_OUT, len(dialogues))
    found = compare(
        held_out if enough else dialogues,
        parts.forward,
        parts.reward,
        count=config.calibration,
        seed=config.seed,
        concurrency=config.concurrency,
        progress=lambda done, total: bars.show("calibration", done, total),
        stop=stop,
    )
    return {**found, "held_out": enough if trained is not None else None}


def _report(
    config: RegenerateConfig, dialogues: Sequence[Dialogue], rounds: Sequence[Round], parts: Parts, meter: Meter
) -> dict[str, Any]:
    pool, told, judged = list(dialogues), [], _judged(config, dialogues, parts)
    for one in rounds:
        told.append(_round(one, pool, judged))
        pool = one.made
    outcomes = [outcome for one in rounds for _, outcome in one.jobs]
    unfinished = Counter(
        "budget" if outcome.unfinished == "budget" else "no answer" for outcome in outcomes if outcome.unfinished
    )
    short = sum((one.wanted or 0) - len(one.made) for one in rounds if one.wanted is not None)
    unfinished += Counter({"fewer than --match": short} if short else {})
    return {
        "controller": parts.controller.name,
        "forward": parts.forward.name,
        "agent": parts.forward.agent_name,
        "reward": {"name": parts.reward.name, "sd": parts.reward.sd, "agreement": parts.reward.agreement},
        "logs": {"dialogues": len(dialogues), "return": float(np.mean([d.total for d in dialogues]))},
        "rounds": told,
        "made": sum(len(one.made) for one in rounds),
        "refused": dict(sum((one.reasons() for one in rounds), Counter())),
        "unfinished": dict(unfinished),
        "first_unfinished": next((o.unfinished for o in outcomes if o.unfinished not in (None, "budget")), None),
        "attempts": dict(sorted(Counter(str(outcome.attempts) for outcome in outcomes).items())),
        "cost": meter.to_json(),
        "options": to_flat(config),
    }


def _judged(config: RegenerateConfig, dialogues: Sequence[Dialogue], parts: Parts) -> dict[str, float]:
    """Return what the reward model says of the logs, by id: what was really earned is on another scale than its errors.

    A judge would have to be asked for each; its gains in the first round are left out.
    """
    if config.reward.startswith("judge"):
        return {}
    exact = config.forward == "scripted" and config.reward == "rule"
    whole = [Continuation(d.messages, d.rewards if exact else None, True, False, ()) for d in dialogues]
    return {d.id: sum(parts.reward.rewards(one, d.task, 0)) for d, one in zip(dialogues, whole, strict=True)}


def _round(one: Round, pool: Sequence[Dialogue], judged: Mapping[str, float]) -> dict[str, Any]:
    origins = [(d.total, d.provenance["regenerated"]) for d in one.made]
    before = [judged.get(o["parent"], o["parent_return"] if "~" in o["parent"] else None) for _, o in origins]
    gains = np.array([total - old for (total, _), old in zip(origins, before, strict=True) if old is not None])
    gain = (
        interval(float(gains.mean()), draw_means(gains[:, None], _DRAWS, 0)[:, 0], None, basic=False)
        if len(gains)
        else None
    )
    return {
        "round": one.number,
        "dialogues": len(one.jobs),
        "made": len(one.made),
        "wanted": one.wanted,
        "no_fault": sum(outcome.no_fault for _, outcome in one.jobs),
        "refused": dict(one.reasons().most_common()),
        "pool_return": float(np.mean([d.total for d in pool])),
        "return": float(np.mean([d.total for d in one.made])) if one.made else None,
        "best": max((d.total for d in one.made), default=None),
        "gain": gain,
    }


def _refused(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    rows = []
    for one in rounds:
        for dialogue, outcome in one.jobs:
            for attempt, refused in outcome.refused:
                edit = refused.edit
                rows.append(
                    {
                        "dialogue": dialogue.id,
                        "round": one.number,
                        "attempt": attempt,
                        "reason": refused.reason,
                        "detail": _plain(refused.detail),
                        "turn": None if edit is None else edit.turn,
                        "utterance": None if edit is None else _plain(edit.utterance),
                        "diagnosis": None if edit is None else _plain(edit.diagnosis),
                        "answer": None if refused.answer is None else _plain(refused.answer),
                    }
                )
            if outcome.unfinished:
                row = {
                    "dialogue": dialogue.id,
                    "round": one.number,
                    "reason": "unfinished",
                    "detail": outcome.unfinished,
                }
                rows.append(row)
    return rows


def _plain(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def summary_of(report: dict[str, Any]) -> str:
    """Return what a person reads of a report."""
    lines = [f"{report['logs']['dialogues']} dialogues, mean return {report['logs']['return']:.3f}"]
    for one in report["rounds"]:
        refused = sum(one["refused"].values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in one["refused"].items())
        gain = "" if one["gain"] is None else f" ({one['gain']['value']:+.3f} on what they were before)"
        found = "" if one["return"] is None else f", mean return {one['return']:.3f}{gain}"
        lines.append(
            f"round {one['round']}: {one['dialogues']} dialogues -> {one['made']} new{found}; {one['no_fault']} without fault, "
            f"{refused} refused" + (f" ({reasons})" if reasons else "")
        )
    real, cost, judged = report["realism"], report["cost"], report["reward"]["agreement"]
    if "earned" in real:
        earned, agreed = real["earned"], real["agreement"]
        lines.append(
            f"forward model after {real['prefixes']} real prefixes: earns {earned['simulated']:.3f} where {earned['real']:.3f} "
            f"was earned ({earned['difference']['value']:+.3f} [{earned['difference']['low']:+.3f}, "
            f"{earned['difference']['high']:+.3f}]), agrees in {agreed['simulated']:.0%} (people {agreed['real']:.0%})"
            + ("; it was trained on these" if real["held_out"] is False else "")
        )
    if judged is not None:
        rank = judged["spearman"]
        told = (
            "says the same of all"
            if rank is None
            else f"rank correlation {rank['value']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}]"
        )
        lines.append(f"reward on {judged['dialogues']} logs: {told}, error {report['reward']['sd']:.3g}")
    if cost["requests"] or cost["answers_known"]:
        idle = "" if cost["idle_share"] is None else f", {cost['idle_share']:.1%} of the time without any under way"
        lines.append(
            f"{cost['requests']} requests, {cost['tokens']} tokens, {cost['answers_known']} answers known{idle}"
        )
    if report["unfinished"]:
        left = ", ".join(f"{count} {reason}" for reason, count in report["unfinished"].items())
        lines.append(
            f"unfinished: {left}; the same command with --overwrite goes on with them, what is answered is kept"
        )
    lines += [f"ALARM: {alarm}" for alarm in real["alarms"]]
    return "\n".join(lines)

"""The tables and pictures of evals/leret.py: seeds pooled, the claims first, every row of every report behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl.files import write_json, write_text
from llmrl.leret.evaluate import METRICS, Outcome, System, report_seeds
from llmrl.leret.play import ORACLE, QUESTION, QUESTION_TOP
from llmrl.leret.report import TITLES, markdown_cell, report_markdown, verdict
from llmrl.leret.transfer import transfer_markdown, transfer_table
from llmrl.tables import aligned_table

POLICY = "policy"
# (letter, the policy minus which row, metrics, what hop 2 returns)
CLAIMS = (
    ("a", "sft", ("recall", "ap"), "any"),
    ("a", "sft-longer", ("recall", "ap"), "any"),
    ("b", QUESTION, ("recall",), "any"),
    ("c", QUESTION, ("ap",), "any"),
    ("d", QUESTION_TOP, ("recall", "ap"), "unseen"),
    ("-", "base", ("recall", "ap"), "any"),
    ("-", "base[told]", ("recall", "ap"), "any"),
)
_MARKS = {"above": ">", "below": "<", "open": ""}
WORDS = {"above": "shown", "below": "the other way", "open": "not shown"}


def write_tables(config: Any, names: Sequence[str], parts: Mapping[str, set[str]]) -> None:
    """Pool the seeds of an evaluation; write leret.json, leret.md and the pictures.

    Args:
        config: of evals/leret.py.
        names: of the reports, "SET-HOP2".
        parts: ids of the questions of each of the sets that "test" puts together.
    """
    output, work = Path(str(config.output_dir)), Path(config.work_dir)
    output.mkdir(parents=True, exist_ok=True)
    folders = {str(seed): work / f"seed-{seed}" for seed in range(len(config.policies))}
    reports = {name: pooled({seed: folder / name for seed, folder in folders.items()}, config.draws) for name in names}
    claims = [claim for name in names for claim in claims_of(name, reports[name])]
    for hop_2 in ("any", "unseen"):  # of each set alone, which together may hide what one of them says
        for part, ids in parts.items() if len(parts) > 1 else ():
            tested = {seed: folder / f"test-{hop_2}" for seed, folder in folders.items()}
            claims += claims_of(f"{part}-{hop_2}", pooled(tested, config.draws, ids))
    facts: dict[str, Any] = {"claims": claims, "runs": _stages(folders), "few_shot": _few_shot(folders["0"])}
    if config.extras:
        facts["dpo"] = json.loads((work / "seed-0" / "dpo-any" / "report.json").read_text(encoding="utf-8"))
        facts["transfer"] = _transfer(work)
    write_json(output / "leret.json", {**facts, "reports": reports, "environment": _environment()})
    write_text(output / "leret.md", _markdown(facts, reports))
    _pictures(output, reports)


def pooled(folders: Mapping[str, Path], draws: int, only: set[str] | None = None) -> dict[str, Any]:
    """Return the report over several seeds, each of which wrote report.json and outcomes.jsonl in its folder.

    Args:
        folders: by seed.
        draws: behind the intervals.
        only: ids of the questions that count; None for all.
    """
    runs: dict[str, list[System]] = {}
    facts: dict[str, Any] = {}
    for seed, folder in folders.items():
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        found: dict[str, list[Outcome]] = {}
        for line in (folder / "outcomes.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if only is not None and row["question_id"] not in only:
                continue
            found.setdefault(row.pop("system"), []).append(Outcome.from_json(row))
        runs[seed] = [System(name, tuple(outcomes)) for name, outcomes in found.items()]
    # few-shot examples are made of seed 0 alone
    shared = set.intersection(*({system.name for system in systems} for systems in runs.values()))
    runs = {seed: [system for system in systems if system.name in shared] for seed, systems in runs.items()}
    names = [system.name for system in next(iter(runs.values()))]
    pairs = [(POLICY, name) for name in names if name != POLICY]
    kept = {key: facts[key] for key in ("corpus", "retriever", "retriever_fingerprint", "search")}
    return report_seeds(runs, pairs, draws=draws, facts=kept)


def claims_of(name: str, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the claims that a report decides: {"claim", "set", "hop_2", "difference", "metric", "value", ..., "verdict"}."""
    questions, _, hop_2 = name.rpartition("-")
    found = []
    for letter, other, metrics, at in CLAIMS:
        difference = report["paired"].get(f"{POLICY} - {other}")
        if at == hop_2 and difference is not None:
            found += [
                {
                    "claim": letter, "set": questions, "hop_2": hop_2, "difference": f"{POLICY} - {other}",
                    "metric": metric, **difference[metric], "verdict": WORDS[verdict(difference[metric])],
                }
                for metric in metrics
            ]  # fmt: skip
    return found


def _stages(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return of each seed what exploration found and how long both stages trained."""
    found: dict[str, Any] = {}
    for seed, folder in folders.items():
        first = folder / "leret" / "round-0"
        report = json.loads((first / "headroom.json").read_text(encoding="utf-8"))
        kept = (
            "questions",
            "groups",
            "searches",
            "empty_retrievals",
            "pairs",
            "questions_with_pair",
            "headroom",
            "rows",
        )
        found[seed] = {key: report[key] for key in kept if key in report}
        found[seed]["timings"] = json.loads((first / "timings.json").read_text(encoding="utf-8"))
        for stage in ("sft", "preference"):
            rows = [json.loads(line) for line in (first / stage / "metrics.jsonl").read_text().splitlines()]
            found[seed][stage] = {"steps": rows[-1].get("step"), "last": rows[-1]}
    return found


def _few_shot(folder: Path) -> dict[str, Any] | None:
    """Return the row of seed 0 that was shown examples, and what the policy of that seed is above it."""
    report = json.loads((folder / "test-any" / "report.json").read_text(encoding="utf-8"))
    name = "base[few-shot]"
    if name not in report["systems"]:
        return None
    return {"system": report["systems"][name], "policy - few-shot": report["paired"][f"{POLICY} - {name}"]}


def _transfer(work: Path) -> dict[str, Any]:
    """Return training by test retriever, of seed 0."""
    folders = {
        ("bm25", "bm25"): work / "seed-0" / "test-any",
        ("bm25", "dense"): work / "seed-0" / "bm25-dense",
        ("dense", "dense"): work / "seed-0" / "dense-dense",
        ("dense", "bm25"): work / "seed-0" / "dense-bm25",
    }
    reports = {key: json.loads((folder / "report.json").read_text(encoding="utf-8")) for key, folder in folders.items()}
    return {metric: transfer_table(reports, metric=metric) for metric in ("recall", "ap")}


def _environment() -> dict[str, Any]:
    from llmrl.training.run import environment

    return environment()


def _markdown(facts: Mapping[str, Any], reports: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            *(c["claim"], c["set"], c["hop_2"], c["difference"], TITLES[c["metric"]]),
            *(markdown_cell(c, sign=True), _runs(c), c["verdict"]),
        ]
        for c in facts["claims"]
    ]
    head = ["", "questions", "hop 2", "difference", "metric", "mean over seeds [95%]", "each seed", ""]
    parts = ["# LeReT with a small policy", aligned_table(head, rows)]
    for name, report in reports.items():
        questions, _, hop_2 = name.rpartition("-")
        parts += [f"## {questions}, hop 2 returns {hop_2} passages", _ceiling(report), report_markdown(report).rstrip()]
        parts += _by_type(report)
    if facts["few_shot"] is not None:
        found, above = facts["few_shot"]["system"], facts["few_shot"]["policy - few-shot"]
        rows = [
            [TITLES[metric], markdown_cell(found[metric]), markdown_cell(above[metric], sign=True)]
            for metric in METRICS
        ]
        parts += ["## The pretrained policy with worked examples of its own, seed 0, any passages at hop 2"]
        parts += [aligned_table(["", "base[few-shot]", "policy - base[few-shot]"], rows)]
    if "transfer" in facts:
        parts += ["## DPO on the same pairs, seed 0", report_markdown(facts["dpo"]).rstrip()]
        parts += ["## Training by test retriever, seed 0"]
        parts += [transfer_markdown(table) for table in facts["transfer"].values()]
    return "\n\n".join(parts) + "\n"


def _by_type(report: Mapping[str, Any]) -> list[str]:
    """Return the policy's differences to its controls by question type; [] where questions have none."""
    others = [
        name for name in dict.fromkeys(other for _, other, _, _ in CLAIMS) if f"{POLICY} - {name}" in report["paired"]
    ]
    found = {name: report["paired_by_type"][f"{POLICY} - {name}"] for name in others}
    if not any(found.values()):
        return []
    rows = [
        [
            f"{POLICY} - {name}",
            kind,
            *(f"{markdown_cell(of[m], sign=True)} {_MARKS[verdict(of[m])]}".strip() for m in METRICS[:2]),
        ]
        for name, kinds in found.items()
        for kind, of in kinds.items()
    ]
    return [aligned_table(["difference by type", "questions", "RE", "AP"], rows)]


def _runs(claim: Mapping[str, Any]) -> str:
    return ", ".join(f"{value:+.3f}" for value in claim.get("runs", {}).values()) or "-"


def _ceiling(report: Mapping[str, Any]) -> str:
    """Return the best rule and the oracle, which no claim hides."""
    systems = report["systems"]
    rules = [name for name in systems if name.startswith("rule:")]
    lines = []
    for metric in METRICS[:2]:
        best = max(rules, key=lambda name: systems[name][metric]["value"])
        shown = {name: systems[name][metric]["value"] for name in (POLICY, best, ORACLE)}
        lines.append(f"{TITLES[metric]}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    return "\n\n".join(lines)


def _pictures(output: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    from llmrl.leret.plots import systems_dots

    for name, report in reports.items():
        questions, _, hop_2 = name.rpartition("-")
        if questions == "test":
            title = f"{report['questions']} questions, two hops, k = 3, BM25; hop 2 returns {hop_2} passages"
            systems_dots(output / f"leret-{hop_2}.png", report, title)

"""The real run of LeReT: small policies from several pretraining seeds, trained and tested against every control.

    for s in 0 1 2; do
        python recipes/leret_policy.py --config recipes/leret/policy.yaml --seed $s --output_dir runs/policy-$s
    done
    python evals/leret.py --policies runs/policy-0 runs/policy-1 runs/policy-2 --output_dir evals/results

Of each seed, on the same explored pairs:

    base        the pretrained policy asked plainly, before LeReT
    sft         its supervised stage alone: what LeReT adds is measured against this
    sft-longer  supervised training for as many steps as both stages
    leret       both stages
    dpo         the same pairs with DPO in place of IPO

beside the question itself (on both hops, and its top 6 in one search), the rules, and the oracle among the rules. Test
questions are touched by nothing but the last step. Each seed's stages and reports stay in `--work_dir`, so that a killed
run goes on with the same command.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.config import load_config_file, option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command

SETTINGS = {"normal": False, "unseen": True}  # whether hop 2 returns unseen passages only
CLAIMS = (
    ("a", "leret", "sft", ("recall", "ap"), "normal"),
    ("a", "leret", "sft-longer", ("recall", "ap"), "normal"),
    ("b", "leret", "question", ("recall",), "normal"),
    ("c", "leret", "question", ("ap",), "normal"),
    ("d", "leret", "question-top", ("recall",), "unseen"),
    ("", "leret", "base", ("recall", "ap"), "normal"),
    ("", "leret", "dpo", ("recall", "ap"), "normal"),
)


@dataclass
class EvalConfig:
    """Options of the evaluation."""

    policies: list[str] = option([], help="pretrained policies, one a seed: folders that recipes/leret_policy.py wrote")
    recipe: str = option("recipes/leret/hotpotqa-small.yaml", help="options of the runs")
    transfer: list[str] = option([], help="further test sets as NAME=QUESTIONS:PASSAGES, on which nothing was trained")
    encoder: str | None = option(None, help="a sentence encoder: also test with a dense retriever")
    work_dir: str = option("runs/leret-eval", help="where each seed's stages and reports are kept")
    output_dir: str | None = option(None, help="where the tables go")
    draws: int = option(10_000, help="draws behind the 95% intervals")
    quiet: bool = option(False, help="print errors only")


def main(argv: list[str]) -> int:
    """Run every seed, then pool them."""
    config = parse_config(EvalConfig, argv, prog="evals/leret.py", description=str(__doc__).splitlines()[0])
    if not config.policies or config.output_dir is None:
        raise UsageError("missing --policies (pretrained folders, one a seed) or --output_dir")
    from llmrl.commands import quiet_libraries

    quiet_libraries(config.quiet)
    tests = {"test": None, **dict(_transfer_set(text) for text in config.transfer)}
    for seed, policy in enumerate(config.policies):
        stages = _train(config, seed, policy)
        for name, files in tests.items():
            for setting, unseen in SETTINGS.items():
                _test(config, seed, policy, stages, f"{name}-{setting}", files, unseen_only=unseen)
        if config.encoder:
            _test(config, seed, policy, stages, "dense-normal", None, retriever="dense", encoder=config.encoder)
    _pool(
        config,
        [f"{name}-{setting}" for name in tests for setting in SETTINGS] + (["dense-normal"] if config.encoder else []),
    )
    return EXIT_DONE


def _options(config: EvalConfig, seed: int, policy: str, folder: Path, **changes: Any) -> Any:
    from llmrl.leret.options import LeretConfig

    values = load_config_file(config.recipe, LeretConfig)
    values |= {"model": policy, "seed": seed, "output_dir": str(folder), "test_questions": [], "quiet": config.quiet}
    return LeretConfig(**{**values, **changes})


def _train(config: EvalConfig, seed: int, policy: str) -> dict[str, str]:
    """Run LeReT and its controls; return the folder of each stage."""
    from llmrl.leret import run
    from llmrl.leret.export import PAIRS_FILE, SFT_FILE
    from llmrl.leret.preference import Objective, train_preference
    from llmrl.leret.preference_data import read_pairs, read_sft_rows
    from llmrl.leret.prompts import load_setup
    from llmrl.leret.rounds import stage_settings
    from llmrl.leret.sft import train_sft
    from llmrl.leret.train_settings import steps_of

    folder = Path(config.work_dir) / f"seed-{seed}"
    options = _options(config, seed, policy, folder / "leret")
    run.train(options)
    first = folder / "leret" / "round-0"
    rows, pairs = read_sft_rows(first / SFT_FILE), read_pairs(first / PAIRS_FILE)
    sft, preference = stage_settings(options, "sft", len(rows), 0), stage_settings(options, "preference", len(pairs), 0)
    stages = {"base": policy, "sft": str(first / "sft" / "final"), "leret": str(folder / "leret" / "policy")}
    longer = replace(sft, max_steps=steps_of(sft, len(rows)) + steps_of(preference, len(pairs)))
    stages["sft-longer"] = _once(folder / "sft-longer", lambda where: train_sft(policy, rows, where, settings=longer))
    dpo = Objective("dpo", beta=0.1)
    stages["dpo"] = _once(
        folder / "dpo",
        lambda where: train_preference(stages["sft"], pairs, where, settings=preference, objective=dpo),
    )
    setup = load_setup(stages["leret"])
    assert setup is not None
    for stage in stages.values():
        if load_setup(stage) is None:
            setup.save(stage)
    return stages


def _once(folder: Path, train: Any) -> str:
    if not (folder / "final").is_dir():
        train(folder)
    return str(folder / "final")


def _test(
    config: EvalConfig,
    seed: int,
    policy: str,
    stages: dict[str, str],
    name: str,
    files: tuple[str, str] | None,
    **changes: Any,
) -> None:
    """Write one report of one seed."""
    from llmrl.leret import run
    from llmrl.leret.options import LeretConfig

    folder = Path(config.work_dir) / f"seed-{seed}" / name
    if (folder / "report.json").is_file():
        return
    given = load_config_file(config.recipe, LeretConfig)
    questions = {"questions": given["test_questions"], "dev_questions": []}
    if files is not None:
        questions |= {"questions": [files[0]], "passages": [files[1]]}
    rules = {} if "retriever" in changes else {"rules": ["all"]}
    systems = [f"{stage}={path}" for stage, path in stages.items() if stage != "leret"]
    options = _options(config, seed, stages["leret"], folder, systems=systems, **questions, **rules, **changes)
    options.bootstrap_draws = config.draws
    run.evaluate_policy(options)


def _transfer_set(text: str) -> tuple[str, tuple[str, str]]:
    name, equals, files = text.partition("=")
    questions, colon, passages = files.rpartition(":")
    if not (equals and colon and name and questions and passages):
        raise UsageError(f"--transfer {text}: expected NAME=QUESTIONS:PASSAGES")
    return name, (questions, passages)


def _pool(config: EvalConfig, names: list[str]) -> None:
    """Pool the seeds and write the tables."""
    from llmrl.files import write_json, write_text
    from llmrl.leret.evaluate import Outcome, System, report_seeds
    from llmrl.leret.plots import systems_dots
    from llmrl.leret.report import report_markdown
    from llmrl.training.run import environment

    output = Path(str(config.output_dir))
    reports: dict[str, Any] = {}
    for name in names:
        runs: dict[str, list[Any]] = {}
        facts: dict[str, Any] = {}
        for seed in range(len(config.policies)):
            folder = Path(config.work_dir) / f"seed-{seed}" / name
            facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            found: dict[str, list[Any]] = {}
            for line in (folder / "outcomes.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                system = row.pop("system")
                found.setdefault("leret" if system == "policy" else system, []).append(Outcome.from_json(row))
            runs[str(seed)] = [System(system, tuple(outcomes)) for system, outcomes in found.items()]
        pairs = [("leret", system.name) for system in runs["0"] if system.name != "leret"]
        kept = {key: facts[key] for key in ("corpus", "retriever", "retriever_fingerprint", "search")}
        reports[name] = report_seeds(runs, pairs, draws=config.draws, facts=kept)
    headroom = [
        json.loads(
            (Path(config.work_dir) / f"seed-{seed}" / "leret" / "round-0" / "headroom.json").read_text(encoding="utf-8")
        )
        for seed in range(len(config.policies))
    ]
    claims = []
    for claim, a, b, metrics, setting in CLAIMS:
        found = reports[f"test-{setting}"]["paired"][f"{a} - {b}"]
        for metric in metrics:
            facts = {"claim": claim, "setting": setting, "difference": f"{a} - {b}", "metric": metric}
            claims.append({**facts, "value": found[metric]})
    write_json(
        output / "leret.json",
        {"claims": claims, "reports": reports, "headroom": headroom, "environment": environment()},
    )
    write_text(output / "leret.md", _markdown(claims, reports, report_markdown))
    systems_dots(output / "leret.png", reports["test-normal"], "two hops, k = 3, BM25")
    systems_dots(output / "leret-unseen.png", reports["test-unseen"], "hop 2 returns unseen passages only")


def _markdown(claims: list[dict[str, Any]], reports: dict[str, Any], report_markdown: Any) -> str:
    from llmrl.leret.report import markdown_cell, markdown_rows, verdict

    rows = []
    for claim in claims:
        metric = next(key for key in claim if key not in ("claim", "setting", "difference"))
        cell = markdown_cell(claim[metric], sign=True)
        rows.append(
            [claim["claim"] or "-", claim["difference"], metric, claim["setting"], cell, verdict(claim[metric])]
        )
    parts = [
        "# LeReT with a small policy\n",
        markdown_rows(["", "difference", "metric", "hop 2", "value [95%]", "against 0"], rows),
    ]
    for name, report in reports.items():
        parts += [f"\n## {name}\n", report_markdown(report)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

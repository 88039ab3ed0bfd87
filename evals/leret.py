"""The real run of LeReT: small policies, each from a pretraining of its own, trained and tested against every control.

    python evals/leret.py --policies runs/policy-0 runs/policy-1 runs/policy-2 --output_dir evals/results

The policies come from recipes/leret_policy.py, one a seed. The settings of the recipe are first guesses: one run was looked at,
on training questions, and nothing was changed. The rules, and that hop 1 asks the question, come from earlier work that had
looked at these test questions. Of each seed, on the same explored pairs:

    policy      both stages: LeReT
    sft         its supervised stage alone
    sft-longer  supervised training for as many steps as both stages
    base        the pretrained policy asked plainly; [told] told a rule by name; [few-shot], of seed 0, with examples of its own

beside the question on both hops, its top k x hops in one search, every rule, and the oracle among the rules. Test questions
are read by the last step alone, which prints every row. Stages and reports stay in `--work_dir`: a
killed run goes on with the same command, and `--only 1` does one seed, so that several can run side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmrl.config import load_config_file, option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command

SHOWN = ("policy", "sft", "base")  # where no claim needs the other controls
POLICY, TOLD = "policy", "rest+names-1"  # the rule with the best recall on training questions
HOP_2 = {"any": False, "unseen": True}  # what hop 2 returns: any passages, or only such as were not found before


@dataclass
class EvalConfig:
    """Options of the evaluation."""

    policies: list[str] = option([], help="pretrained policies, one a seed: folders that recipes/leret_policy.py wrote")
    recipe: str = option("recipes/leret/hotpotqa-small.yaml", help="options of the runs")
    further: list[str] = option([], help="further test sets as NAME=QUESTIONS:PASSAGES, on which nothing was trained")
    extras: bool = option(
        False, help="of seed 0: DPO on the same pairs; training and test with BM25 and dense retrieval"
    )
    explore_backend: str = option(
        "vllm", choices=("vllm", "transformers"), help="of exploration; all else is asked by the recipe's"
    )
    work_dir: str = option("runs/leret-eval", help="where each seed's stages and reports are kept")
    output_dir: str | None = option(None, help="where the tables go")
    only: list[int] = option([], help="seeds to run now; the tables are made when all are there")
    draws: int = option(10_000, help="draws behind the 95% intervals")
    quiet: bool = option(False, help="print errors only")


@dataclass(frozen=True)
class Run:
    """One seed: its pretrained policy and the folder of what comes of it."""

    config: EvalConfig
    seed: int
    base: str

    @property
    def folder(self) -> Path:
        """Of the seed."""
        return Path(self.config.work_dir) / f"seed-{self.seed}"

    def options(self, folder: Path, **changes: Any) -> Any:
        """Return the recipe's options with some of them changed."""
        from llmrl.leret.options import LeretConfig

        values = load_config_file(self.config.recipe, LeretConfig)
        values |= {"model": self.base, "seed": self.seed, "output_dir": str(folder), "test_questions": []}
        values |= {"quiet": self.config.quiet, "bootstrap_draws": self.config.draws, "cache_dir": str(self.cache)}
        return LeretConfig(**{**values, **changes})

    @property
    def cache(self) -> Path:
        """Of searches and embeddings, for all seeds."""
        return Path(self.config.work_dir) / "cache"


def main(argv: list[str]) -> int:
    """Run the seeds, then pool them."""
    config = parse_config(EvalConfig, argv, prog="evals/leret.py", description=str(__doc__).splitlines()[0])
    if not config.policies or config.output_dir is None:
        raise UsageError("missing --policies (pretrained folders, one a seed) or --output_dir")
    seeds = config.only or list(range(len(config.policies)))
    if not set(seeds) <= set(range(len(config.policies))):
        raise UsageError(
            f"--only {seeds}: expected seeds from 0 to {len(config.policies) - 1}, one for each of --policies"
        )
    from llmrl.commands import quiet_libraries

    quiet_libraries(config.quiet)
    further = dict(_further(text) for text in config.further)
    for seed in seeds:
        run = Run(config, seed, config.policies[seed])
        stages = train_stages(run)
        test_everywhere(run, stages, further)
        if config.extras and seed == 0:
            compare_dpo(run, stages)
            transfer(run, stages)
        (run.folder / "done").touch()
    missing = [n for n in range(len(config.policies)) if not (Run(config, n, "").folder / "done").is_file()]
    if missing:
        print(f"no tables yet: still to be run with --only {' '.join(map(str, missing))}")
        return EXIT_DONE
    from leret_report import write_tables

    parts = test_sets(Run(config, 0, config.policies[0]))
    write_tables(config, [f"{name}-{hop_2}" for name in ("test", *further) for hop_2 in HOP_2], parts)
    return EXIT_DONE


def train_stages(run: Run, **changes: Any) -> dict[str, str]:
    """Run LeReT and its controls; return the folder of each stage, the policy first."""
    from llmrl.leret import run as leret
    from llmrl.leret.export import PAIRS_FILE, SFT_FILE
    from llmrl.leret.preference_data import read_pairs, read_sft_rows
    from llmrl.leret.prompts import load_setup
    from llmrl.leret.rounds import stage_settings
    from llmrl.leret.sft import train_sft
    from llmrl.leret.train_settings import steps_of

    options = run.options(run.folder / "leret", **changes)
    leret.explore(replace(options, rollout_backend=run.config.explore_backend))
    leret.train(options)
    first = run.folder / "leret" / "round-0"
    rows, pairs = read_sft_rows(first / SFT_FILE), read_pairs(first / PAIRS_FILE)
    sft, preference = stage_settings(options, "sft", len(rows), 0), stage_settings(options, "preference", len(pairs), 0)
    stages = {POLICY: str(run.folder / "leret" / "policy"), "sft": str(first / "sft" / "final")}
    longer = replace(sft, max_steps=steps_of(sft, len(rows)) + steps_of(preference, len(pairs)))
    stages["sft-longer"] = _once(
        run.folder / "sft-longer", lambda to, resume: train_sft(run.base, rows, to, settings=longer, resume=resume)
    )
    setup = load_setup(stages[POLICY])
    assert setup is not None
    setup.save(stages["sft-longer"])
    return {**stages, "base": run.base}


def _once(folder: Path, train: Callable[[Path, str | None], Any]) -> str:
    from llmrl.training.resume import latest_checkpoint

    if not (folder / "final").is_dir():
        train(folder, "latest" if latest_checkpoint(folder) else None)
    return str(folder / "final")


def test_everywhere(run: Run, stages: dict[str, str], further: dict[str, dict[str, str]]) -> None:
    """Write the reports of one seed: every stage where hop 2 may return any passages, else the rows that are shown."""
    few = {name: stages[name] for name in SHOWN}
    for hop_2, unseen in HOP_2.items():
        shown = few if unseen else stages
        report(run, shown, f"test-{hop_2}", controls=not unseen, unseen_only=unseen, rules=["all"])
        for name, files in further.items():
            report(run, shown, f"{name}-{hop_2}", unseen_only=unseen, rules=["all"], **files)


def report(run: Run, stages: dict[str, str], name: str, *, controls: bool = False, **changes: Any) -> dict[str, Any]:
    """Write one report of one seed; return it. `controls`: the pretrained policy is also shown examples, and told a rule."""
    from llmrl.leret.evaluation import evaluate
    from llmrl.leret.opening import open_data

    folder = run.folder / name
    if (folder / "report.json").is_file():
        return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    say = (lambda _: None) if run.config.quiet else print
    given = run.options(folder)  # of the recipe
    changes = {"questions": _test_questions(run), **changes}
    changes |= {
        key: [value] for key, value in changes.items() if key in ("questions", "passages") and isinstance(value, str)
    }
    opened = open_data(run.options(folder, model=stages[POLICY], **changes), say)
    further = few_shot_styles(run, given) if controls and run.seed == 0 else []
    if controls:
        further += [replace(style, name="told") for style in opened.setup.format.styles if style.name == TOLD]
    return evaluate(
        opened, opened.questions, [(name, path, None) for name, path in stages.items()], folder, say,
        further={"base": further},
    )  # fmt: skip


def _test_questions(run: Run) -> list[str]:
    from llmrl.leret.options import LeretConfig

    return list(load_config_file(run.config.recipe, LeretConfig)["test_questions"])


def test_sets(run: Run) -> dict[str, set[str]]:
    """Return the ids of the questions of each test file, by the name of its folder."""
    from llmrl.jsonl import id_field, read_objects

    return {
        Path(file).parent.name: {id_field(row, where) for where, row in read_objects(file)}
        for file in _test_questions(run)
    }


def few_shot_styles(run: Run, options: Any) -> list[Any]:
    """Return the best few-shot style of the pretrained policy, made of its own queries on training questions."""
    from llmrl.leret.bootstrap import bootstrap_styles
    from llmrl.leret.opening import open_asker, open_data
    from llmrl.leret.partitions import shuffled
    from llmrl.leret.prompts import PromptStyle

    file = run.folder / "few-shot.json"
    if not file.is_file():
        opened = open_data(options, lambda _: None)
        by_id = {question.id: question for question in opened.questions.questions}
        aside = [by_id[name] for name in shuffled(sorted(by_id), run.seed, "few-shot")[: options.few_shot_questions]]
        with open_asker(opened, run.base) as asker:
            explorer = opened.explorer(asker, run.seed)
            explorer.settings = replace(explorer.settings, samples=1, temperatures=(0.0,), returns="greedy")
            made, how = bootstrap_styles(
                explorer, opened.setup.format, aside, run.folder / "few-shot", styles=1, demos=2, seed=run.seed
            )  # a context of 1,024 tokens holds two
        if not run.config.quiet:
            print(how)
        file.write_text(json.dumps([replace(style, name="few-shot").to_json() for style in made]), encoding="utf-8")
    return [PromptStyle.from_json(row) for row in json.loads(file.read_text(encoding="utf-8"))]


def compare_dpo(run: Run, stages: dict[str, str]) -> None:
    """Train with DPO on the pairs of LeReT, from the same supervised stage, and test both."""
    from llmrl.leret.export import PAIRS_FILE
    from llmrl.leret.preference import Objective, train_preference
    from llmrl.leret.preference_data import read_pairs
    from llmrl.leret.prompts import load_setup
    from llmrl.leret.rounds import stage_settings

    pairs = read_pairs(run.folder / "leret" / "round-0" / PAIRS_FILE)
    settings = stage_settings(run.options(run.folder / "leret"), "preference", len(pairs), 0)
    dpo = _once(
        run.folder / "dpo",
        lambda to, resume: train_preference(
            stages["sft"], pairs, to, settings=settings, objective=Objective("dpo", beta=0.1), resume=resume
        ),
    )
    setup = load_setup(stages[POLICY])
    assert setup is not None
    setup.save(dpo)
    report(run, {POLICY: stages[POLICY], "dpo": dpo, "sft": stages["sft"]}, "dpo-any")


def transfer(run: Run, stages: dict[str, str]) -> None:
    """Test what was trained with BM25 on a dense retriever too; train with that as well, and test on both."""
    dense = {"retriever": "dense"}
    report(run, {name: stages[name] for name in SHOWN}, "bm25-dense", **dense)
    other = replace(run, config=replace(run.config, work_dir=str(Path(run.config.work_dir) / "dense")))
    back = train_policy(other, **dense)
    report(run, back, "dense-dense", **dense)
    report(run, back, "dense-bm25")


def train_policy(run: Run, **changes: Any) -> dict[str, str]:
    """Run LeReT without controls; return its stages."""
    from llmrl.leret import run as leret

    options = run.options(run.folder / "leret", **changes)
    leret.explore(replace(options, rollout_backend=run.config.explore_backend))
    leret.train(options)
    return {
        POLICY: str(run.folder / "leret" / "policy"),
        "sft": str(run.folder / "leret" / "round-0" / "sft" / "final"),
    }


def _further(text: str) -> tuple[str, dict[str, str]]:
    name, equals, files = text.partition("=")
    questions, colon, passages = files.rpartition(":")
    if not (equals and colon and name and questions and passages):
        raise UsageError(f"--further {text}: expected NAME=QUESTIONS:PASSAGES")
    return name, {"questions": questions, "passages": passages}


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""`llmrl leret eval`: a policy beside the question, rules and other models, on the same questions and passages.

report.json     the numbers, with 95% intervals and paired differences
report.md       the same as a table and sentences
outcomes.jsonl  what each system found for each question
plots/          recall and AP of every system
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmrl.errors import UsageError, did_you_mean
from llmrl.files import write_json, write_text
from llmrl.leret.ask import AskTally
from llmrl.leret.evaluate import System, report_json
from llmrl.leret.model_identity import model_and_adapter
from llmrl.leret.opening import Opened, Say, open_asker, warn
from llmrl.leret.play import QUESTION, QUESTION_TOP, baselines, play, rule_systems
from llmrl.leret.prompts import PromptStyle, load_setup
from llmrl.leret.questions import QuestionSet
from llmrl.leret.report import report_markdown, warnings
from llmrl.leret.rules import RULES
from llmrl.rollout.seeds import derive_seed
from llmrl.training.distributed import barrier, is_main_process

BASE, POLICY = "base", "policy"


def evaluate(
    opened: Opened,
    questions: QuestionSet,
    models: Sequence[tuple[str, str | None, str | None]],
    folder: Path,
    say: Say,
    further: Mapping[str, Sequence[PromptStyle]] | None = None,
) -> dict[str, Any]:
    """Play every system on `questions` and write the report; return it.

    The question itself is searched for first: where that finds nothing the retriever is at fault, and nothing is asked. A
    row of a model or a rule that finds nothing is reported as such, in the report and on stderr.

    Args:
        opened: corpus, retriever, prompt.
        questions: what is asked.
        models: (name, model, adapter) of the systems that a model plays; the first is compared with all others.
        folder: of the report; answers that lie there are kept.
        say: prints.
        further: by the name of a model, styles that it is also asked in, beside the bare one and those of --prompts.

    Raises:
        RetrieverError: the retriever failed, or finds nothing for most of the questions as they stand.
    """
    config = opened.config
    folder.mkdir(parents=True, exist_ok=True)
    seed = derive_seed(config.seed, "eval")
    settings = replace(opened.settings(seed), question_first=False)
    systems = baselines(
        opened.retriever,
        opened.corpus,
        questions.questions,
        settings,
        k=opened.setup.k,
        unseen_only=opened.setup.unseen_only,
    )
    chosen = _rules(config.rules)
    if chosen:
        systems += rule_systems(chosen, opened.searcher(), opened.corpus, questions.questions, settings)
    played: list[System] = []
    tallies: dict[str, AskTally] = {}
    for one in models:
        styles = (further or {}).get(one[0], ())
        found, counted = _play_model(opened, questions, *one, styles, seed, folder, say)
        played += found
        tallies |= counted
    systems += played
    names = [system.name for system in systems]
    if played:
        pairs = [(played[0].name, other) for other in names if other != played[0].name]
    else:
        pairs = [(name, QUESTION) for name in names if name != QUESTION]
    report = report_json(
        systems,
        pairs,
        draws=config.bootstrap_draws,
        seed=config.seed,
        excluded=questions.excluded,
        facts={
            **opened.facts(),
            "search": _search(opened),
            "models": {name: _shown(m, a) for name, m, a in models},
            "failed_prompts": {name: tally.to_json() for name, tally in tallies.items()},
        },
    )
    for line in warnings(report):
        warn(line)
    if is_main_process():
        _write(folder, report, systems)
        say(report_markdown(report))
    barrier()
    return report


def systems_of(opened: Opened) -> list[tuple[str, str | None, str | None]]:
    """Return what `eval` was asked to play: the policy, its base where it is an adapter, and --systems."""
    config = opened.config
    rows: list[tuple[str, str | None, str | None]] = []
    model = None
    if config.policy == "model":
        model, adapter = (
            model_and_adapter(str(config.model), None) if config.adapter is None else (config.model, config.adapter)
        )
        rows.append((POLICY, model, adapter))
        if adapter is not None:
            rows.append((BASE, model, None))
    for text in config.systems:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--systems {text}: expected NAME=FOLDER")
        if name in (QUESTION, QUESTION_TOP, *(row[0] for row in rows)):
            raise UsageError(f"--systems {text}: the name '{name}' is taken")
        if "/" in name or name.startswith("."):
            raise UsageError(f"--systems {text}: the name of a row is a word, without / or a dot in front")
        rows.append((name, *model_and_adapter(path, model)))
    return rows


def _play_model(
    opened: Opened,
    questions: QuestionSet,
    name: str,
    model: str | None,
    adapter: str | None,
    further: Sequence[PromptStyle],
    seed: int,
    folder: Path,
    say: Say,
) -> tuple[list[System], dict[str, AskTally]]:
    """Play one model in the bare style, in those of --prompts, and in further ones; return the rows and their counts."""
    own = load_setup(adapter, model)
    used = opened
    if own is not None:
        config, form = opened.config, own.format
        thinking = {} if config.enable_thinking is None else {"enable_thinking": config.enable_thinking}
        own_format = replace(
            form,
            max_tokens=config.max_tokens or form.max_tokens,
            template_options={**form.template_options, **thinking},
        )
        used = replace(opened, setup=replace(opened.setup, format=own_format))
    styles = [used.bare, *(used.styles if opened.config.prompts else ()), *further]
    systems, tallies = [], {}
    with open_asker(used, model, adapter) as asker:
        explorer = used.explorer(asker, seed)
        for style in styles:
            label = name if style is styles[0] else f"{name}[{style.name}]"
            asker.tally = tallies[label] = AskTally()
            systems.append(play(label, explorer, questions.questions, style, folder / "answers" / label))
            means = systems[-1].means()
            say(f"{label}: recall {means['recall']:.3f}, AP {means['ap']:.3f}")
    return systems, tallies


def _rules(names: Sequence[str]) -> dict[str, Any]:
    if list(names) == ["all"]:
        return dict(RULES)
    unknown = next((name for name in names if name not in RULES), None)
    if unknown is not None:
        raise UsageError(f"--rules {unknown}: no such rule{did_you_mean(unknown, RULES)}")
    return {name: RULES[name] for name in names}


def _search(opened: Opened) -> dict[str, Any]:
    setup = opened.setup
    return {
        "hops": setup.hops, "k": setup.k, "merge": setup.merge, "unseen_only": setup.unseen_only,
        "question_first": setup.question_first,
    }  # fmt: skip


def _shown(model: str | None, adapter: str | None) -> str:
    parts = [Path(part).name for part in (model, adapter) if part]
    return " + ".join(parts) or "rules"


def _write(folder: Path, report: dict[str, Any], systems: Sequence[System]) -> None:
    from llmrl.leret.plots import systems_dots

    write_json(folder / "report.json", report)
    write_text(folder / "report.md", report_markdown(report) + "\n")
    lines = [
        json.dumps({"system": system.name, **outcome.to_json()}, ensure_ascii=False)
        for system in systems
        for outcome in system.outcomes
    ]
    write_text(folder / "outcomes.jsonl", "".join(line + "\n" for line in lines))
    (folder / "plots").mkdir(exist_ok=True)
    systems_dots(folder / "plots" / "systems.png", report)

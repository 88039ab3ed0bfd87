"""Few-shot styles made of the model's own successful queries, with no teacher and no labels but the gold documents.

Questions set aside for this are asked in the bare style. Queries that found something become worked examples; random
handfuls of them are candidate styles, and those that search best on another part of the questions are kept (the paper
does this with DSPy's random search; arXiv 2410.23214, section 4).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from llmrl.leret.explore import Explorer
from llmrl.leret.play import play
from llmrl.leret.prompts import BARE, Demo, PromptFormat, PromptStyle
from llmrl.leret.questions import Question
from llmrl.leret.records import Group
from llmrl.leret.rewards import recall
from llmrl.rollout.seeds import derive_seed

TRIED_PER_KEPT = 4


def bootstrap_styles(
    explorer: Explorer,
    prompt_format: PromptFormat,
    questions: Sequence[Question],
    folder: Path | str,
    *,
    styles: int,
    demos: int,
    seed: int,
) -> tuple[tuple[PromptStyle, ...], str]:
    """Return few-shot styles, best first, and one line on how they came about.

    Args:
        explorer: asks the model.
        prompt_format: gives the bare style.
        questions: set aside; the first half is asked for examples, the second half judges the styles.
        folder: what was asked before is kept there.
        styles: how many to keep; four times as many are tried.
        demos: worked examples in each.
        seed: of the draws.
    """
    folder = Path(folder)
    making, judging = questions[: len(questions) // 2], questions[len(questions) // 2 :]
    groups = explorer.explore(making, [prompt_format.bare], folder / "make")
    pool = successes(groups, making, explorer)
    if len(pool) < demos:
        return (
            (),
            f"few-shot: {len(pool)} of {len(making)} questions gave a query that found something, {demos} are needed",
        )
    rng = random.Random(derive_seed(seed, "few-shot"))
    judged = []
    for number in range(TRIED_PER_KEPT * styles):
        style = PromptStyle(f"few-shot-{number}", prompt_format.instruction, tuple(rng.sample(pool, demos)))
        system = play(style.name, explorer, judging, style, folder / "judge" / style.name)
        judged.append((system.means()["ap"], -number, style))
    judged.sort(key=lambda one: one[:2], reverse=True)
    kept = tuple(style for _, _, style in judged[:styles])
    best, worst = judged[0][0], judged[-1][0]
    return kept, (
        f"few-shot: {len(pool)} examples from {len(making)} questions, {len(judged)} styles tried on {len(judging)} others, "
        f"AP {worst:.3f} to {best:.3f}, kept {', '.join(style.name for style in kept)}"
    )


def successes(groups: Sequence[Group], questions: Sequence[Question], explorer: Explorer) -> list[Demo]:
    """Return a worked example for each question: of its last hop that found a missing gold document, the best query that did.

    A question that was searched for as it stands (`question_first`) is nobody's example.
    """
    texts = {question.id: question.text for question in questions}
    gold = {question.id: question.gold for question in questions}
    best: dict[str, Demo] = {}
    for group in sorted(groups, key=lambda group: (group.question_id, group.hop)):
        context = explorer.context(group.state)
        before = recall(context, gold[group.question_id])
        tried = [c for c in group.candidates if c.prompt_name == BARE and c.query.strip() and c.recall > before]
        if tried:
            winner = max(tried, key=lambda c: (c.reward, -len(c.query), c.query))
            passages = tuple((explorer.passage(i).title, explorer.passage(i).text) for i in context)
            best[group.question_id] = Demo(texts[group.question_id], passages, winner.query, group.hop)
    return [best[name] for name in sorted(best)]

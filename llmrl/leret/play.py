"""Whole searches for evaluation: a model, a rule or the question itself, hop after hop over the same corpus."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmrl.leret.ask import RuleAsker
from llmrl.leret.context import SearchState
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.evaluate import Outcome, System, score_state
from llmrl.leret.explore import Explorer, ExploreSettings
from llmrl.leret.prompts import PromptStyle
from llmrl.leret.questions import Question
from llmrl.leret.retriever import Retriever
from llmrl.leret.search import Searcher

QUESTION, QUESTION_TOP, ORACLE = "question", "question-top", "oracle-rule"


def play(
    name: str, explorer: Explorer, questions: Sequence[Question], style: PromptStyle, folder: Path | str
) -> System:
    """Search for every question in one style, greedily; return the system's row, which may have found nothing."""
    by_id = {question.id: question for question in questions}
    with explorer.searcher.unwatched():
        ends = explorer.follow([SearchState(question.id) for question in questions], by_id, style, folder)
    return _system(name, [found[0] for found in ends], by_id, explorer.settings.merge)


def baselines(
    retriever: Retriever,
    corpus: Corpus,
    questions: Sequence[Question],
    settings: ExploreSettings,
    *,
    k: int,
    unseen_only: bool,
) -> list[System]:
    """Return `question`, which asks the question on every hop, and `question-top`, its top k x hops in one search.

    Raises:
        NothingFoundError: most questions find nothing, so that no row of a report would mean anything.
    """
    every_hop = Searcher(retriever, k, unseen_only=unseen_only)
    at_once = Searcher(retriever, k * settings.hops)
    rows = [(QUESTION, every_hop, settings), (QUESTION_TOP, at_once, replace(settings, hops=1))]
    systems = [
        play(name, Explorer(_rule(_the_question), searcher, corpus, used), questions, PromptStyle("rule", ""), Path())
        for name, searcher, used in rows
    ]
    check_row(systems[0], every_hop, questions)
    return systems


def check_row(system: System, searcher: Searcher, questions: Sequence[Question]) -> None:
    """Find out whose fault it is where a row found next to nothing: that of its queries, which it tells, or the retriever's.

    Raises:
        NothingFoundError: the questions as they stand find nothing either.
    """
    if system.mostly_empty:
        searcher.search([(SearchState(question.id), question.text) for question in questions])
        searcher.watch.finish()


def rule_systems(
    rules: Mapping[str, Callable[[str, Sequence[Passage]], str]],
    searcher: Searcher,
    corpus: Corpus,
    questions: Sequence[Question],
    settings: ExploreSettings,
) -> list[System]:
    """Return a row for each rule: the question at hop 1, the rule afterwards. The last row is the oracle.

    The oracle takes for each question the rule with the best recall, then AP: no policy knows it, it is a ceiling for
    choosing among these rules.
    """
    systems = []
    for name, rule in rules.items():
        asker = _rule(lambda question, passages, rule=rule: rule(question, passages) if passages else question)  # type: ignore[misc]
        explorer = Explorer(asker, searcher, corpus, settings)
        systems.append(play(f"rule:{name}", explorer, questions, PromptStyle("rule", ""), Path()))
    best = [max(same, key=_rank) for same in zip(*(system.outcomes for system in systems), strict=True)]
    return [*systems, System(ORACLE, tuple(best))]


def _rank(outcome: Outcome) -> tuple[float, float]:
    last = outcome.after(len(outcome.hops))
    return last.recall, last.ap


def _rule(rule: Callable[[str, Sequence[Passage]], str]) -> RuleAsker:
    return RuleAsker({"rule": rule})


def _the_question(question: str, passages: Sequence[Passage]) -> str:
    return question


def _system(name: str, states: Sequence[SearchState], questions: Mapping[str, Question], merge: str) -> System:
    return System(name, tuple(score_state(questions[state.question_id], state, merge) for state in states))

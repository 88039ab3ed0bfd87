"""What a policy trained with one retriever finds with another: a table of reports, training by test retriever.

Query styles that were learned on one retriever often do not carry over to the next, so a policy is told by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.errors import DataError, did_you_mean
from llmrl.leret.report import TITLES, markdown_cell
from llmrl.tables import aligned_table

Reports = Mapping[tuple[str, str], Mapping[str, Any]]
_SAME = ("corpus", "questions", "search")


def transfer_table(
    reports: Reports, *, system: str = "policy", baseline: str = "question", metric: str = "recall"
) -> dict[str, Any]:
    """Collect one metric of the reports of several trained policies, each tested with several retrievers.

    Args:
        reports: by (training retriever, test retriever) what `report_json` returned.
        system: the row of each report that is compared.
        baseline: a row that needs no training: what asking the question itself finds.
        metric: of `evaluate.METRICS`.

    Returns:
        "metric", "train" and "test" (names in order of appearance), "scores": by training and test retriever
        {"value", "low", "high"}, "differences" over the baseline where the reports compare them, and "baseline" by test
        retriever. A combination that was not run is absent.

    Raises:
        DataError: a report lacks the system, or reports in the same column differ in their baseline, corpus, number of
            questions, hops or k.
    """
    if not reports:
        raise DataError("expected at least one report to compare, got none")
    table: dict[str, Any] = {
        "system": system,
        "against": baseline,
        "metric": metric,
        "train": list(dict.fromkeys(train for train, _ in reports)),
        "test": list(dict.fromkeys(test for _, test in reports)),
        "scores": {},
        "differences": {},
        "baseline": {},
    }
    first: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for (train, test), report in reports.items():
        where = f"trained with {train}, tested with {test}"
        for name in (system, baseline):
            if name not in report["systems"]:
                raise DataError(f"{where}: no system '{name}' in the report{did_you_mean(name, report['systems'])}")
        _check_column(*first.setdefault(test, (where, report)), where, report, baseline, metric)
        table["scores"].setdefault(train, {})[test] = report["systems"][system][metric]
        table["baseline"][test] = report["systems"][baseline][metric]
        difference = report["paired"].get(f"{system} - {baseline}")
        if difference is not None:
            table["differences"].setdefault(train, {})[test] = difference[metric]
    return table


def transfer_markdown(table: Mapping[str, Any]) -> str:
    """Return the table with one row a training retriever, and how far each is above the untrained baseline."""
    tests = table["test"]
    rows = [[f"{table['against']} (untrained)", *(markdown_cell(table["baseline"][test]) for test in tests)]]
    rows += [
        [f"trained with {train}", *(_found(table["scores"][train], test) for test in tests)] for train in table["train"]
    ]
    rows += [
        [f"{train} - {table['against']}", *(_found(found, test, sign=True) for test in tests)]
        for train, found in table["differences"].items()
    ]
    return aligned_table([TITLES[table["metric"]], *(f"tested with {test}" for test in tests)], rows)


def _found(scores: Mapping[str, Any], test: str, *, sign: bool = False) -> str:
    return markdown_cell(scores[test], sign=sign) if test in scores else "-"


def _check_column(
    here: str, a: Mapping[str, Any], there: str, b: Mapping[str, Any], baseline: str, metric: str
) -> None:
    """Refuse two reports of one column that were not made on the same ground."""
    differing = [key for key in _SAME if a.get(key) != b.get(key)]
    values: Sequence[float] = [report["systems"][baseline][metric]["value"] for report in (a, b)]
    if values[0] != values[1]:
        differing.append(f"{metric} of '{baseline}'")
    if differing:
        raise DataError(
            f"two reports of one column cannot be compared: {differing[0]} of '{here}' and of '{there}' differ; test "
            "each policy on the same questions, corpus and settings"
        )

"""The report for people: tables in markdown, which read as well in a terminal, and plain sentences on what is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmrl.leret.evaluate import METRICS
from llmrl.tables import aligned_table

TITLES = {"recall": "RE", "ap": "AP", "mrr": "MRR", "both": "both"}
_SAID = {"both": "both found"}  # "AP and both" would read as another thing
_LEGEND = "RE: share of gold documents found; both: questions with all of them; * marks the best of a column"


def report_markdown(report: Mapping[str, Any]) -> str:
    """Return the whole report: what was asked, the systems, their hops and types, and what the differences show.

    Args:
        report: of `report_json` or `report_seeds`.
    """
    parts = [_what_was_asked(report), *warnings(report), scores_table(report["systems"]), hops_table(report["systems"])]
    if report["paired"]:
        parts += [paired_table(report["paired"]), "\n".join(f"- {line}" for line in sentences(report))]
    return "\n\n".join(parts) + "\n"


def warnings(report: Mapping[str, Any]) -> list[str]:
    """Say which rows do not mean what they seem to: prompts without an answer, and rows that mostly found nothing."""
    lines = [
        f"{name}: {of['failed']} of {of['prompts']} prompts got no answer ({of['first']:.120}); their searches ended there"
        for name, of in report.get("failed_prompts", {}).items()
        if of["failed"]
    ]
    for name, found in report["systems"].items():
        if found.get("mostly_empty"):
            never = f", no query for {found['never_searched']} questions" if found["never_searched"] else ""
            searches = f"{_share(found['empty'])} of {found['searches']} searches found nothing{never}"
            lines.append(f"{name}: {searches}: this row says what it misses, and not how well it searches")
    return lines


def scores_table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one row a system: RE, AP, MRR and both with 95% intervals, queries a question, and searches without a hit."""
    rows = []
    for name, found in systems.items():
        scores = [markdown_cell(found[metric], _is_best(systems, name, metric)) for metric in METRICS]
        rows.append([name, *scores, f"{found['hops_used']['value']:.1f}", _share(found["empty"])])
    return aligned_table(["system", *(TITLES[metric] for metric in METRICS), "queries", "no hit"], rows)


def hops_table(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """Return RE / AP after each hop, and of each type of question; a system without that hop has a dash."""
    hops = max((len(found["by_hop"]) for found in systems.values()), default=0)
    types = {t: of["questions"] for found in systems.values() for t, of in found["by_type"].items()}
    rows = []
    for name, found in systems.items():
        cells = [_both(found["by_hop"][hop]) if hop < len(found["by_hop"]) else "-" for hop in range(hops)]
        rows.append([name, *cells, *(_both(found["by_type"][t]) for t in types)])
    head = [*(f"hop {hop + 1}" for hop in range(hops)), *(f"{t} ({count})" for t, count in types.items())]
    return aligned_table(["RE / AP", *head], rows)


def paired_table(paired: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return one row a difference, with its 95% interval; > or < marks one that does not hold 0."""
    mark = {"above": " >", "below": " <", "open": ""}
    rows = [
        [name, *(f"{markdown_cell(scores[metric], sign=True)}{mark[verdict(scores[metric])]}" for metric in METRICS)]
        for name, scores in paired.items()
    ]
    return aligned_table(["difference", *(TITLES[metric] for metric in METRICS)], rows)


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Say of each pair in which metrics the interval of the difference is above zero, below, or holds it."""
    words = {"above": "above zero in", "below": "below zero in", "open": "not told from zero in"}
    lines = []
    for name, scores in report["paired"].items():
        found = {key: [_SAID.get(m, TITLES[m]) for m in METRICS if verdict(scores[m]) == key] for key in words}
        lines.append(f"{name}: {'; '.join(f'{words[key]} {_list(said)}' for key, said in found.items() if said)}")
    return lines


def verdict(difference: Mapping[str, Any]) -> str:
    """Return "above" or "below" for an interval on one side of 0, "open" for one that holds it or that is not there."""
    low, high = difference["low"], difference["high"]
    if low is None or high is None or low <= 0 <= high:
        return "open"
    return "above" if low > 0 else "below"


def _what_was_asked(report: Mapping[str, Any]) -> str:
    reasons = "; ".join(f"{count} {reason}" for reason, count in report["excluded"]["reasons"].items())
    left_out = f" ({report['excluded']['questions']} left out: {reasons})" if report["excluded"]["questions"] else ""
    seeds, draws = report["bootstrap"]["training_seeds"], report["bootstrap"]["draws"]
    runs = f"; means over training seeds {', '.join(seeds)}, ± is the standard deviation over them" if seeds else ""
    return (
        f"{report['questions']} questions{left_out}; 95% intervals of {draws:,} draws of questions{runs}.\n{_LEGEND}."
    )


def _is_best(systems: Mapping[str, Mapping[str, Any]], name: str, metric: str) -> bool:
    values = [found[metric]["value"] for found in systems.values()]
    return len(set(values)) > 1 and systems[name][metric]["value"] == max(values)


def markdown_cell(score: Mapping[str, Any], best: bool = False, *, sign: bool = False) -> str:
    """Return a score with its interval, and its spread over training seeds where it has one; `sign` for differences."""
    shown = _number(score.get("sd"))
    spread = f" ±{shown}" if shown not in ("-", _number(0.0)) else ""
    value = f"{_number(score['value'], sign=sign)}{'*' if best else ''}{spread}"
    if score["low"] is None:
        return value
    return f"{value} [{_number(score['low'], sign=sign)}, {_number(score['high'], sign=sign)}]"


def _both(scores: Mapping[str, Any]) -> str:
    return f"{_number(scores['recall']['value'])} / {_number(scores['ap']['value'])}"


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    text = f"{abs(value):.3f}"
    text = text if abs(value) >= 0.9995 else text[1:]
    return ("-" if value < 0 and float(text) else "+" if sign else "") + text


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]

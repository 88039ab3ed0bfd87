import math

import pytest

from llmrl.errors import DataError
from llmrl.leret.evaluate import HopScore, Outcome, System, report_json, report_seeds
from llmrl.leret.questions import Excluded
from llmrl.leret.report import (
    hops_table,
    markdown_cell,
    paired_table,
    report_markdown,
    scores_table,
    sentences,
    verdict,
)
from llmrl.leret.transfer import transfer_markdown, transfer_table


def system(name, recalls, hops=2):
    """Bridge questions with these recalls at every hop, an AP of half of it, and the last one a comparison."""
    types = ["bridge"] * (len(recalls) - 1) + ["comparison"]
    outcomes = [
        Outcome(f"q{i}", kind, (HopScore(r, r / 2, r, float(r == 1)),) * hops, ("query",) * hops, ())
        for i, (r, kind) in enumerate(zip(recalls, types, strict=True))
    ]
    return System(name, tuple(outcomes))


@pytest.fixture(scope="module")
def report():
    systems = [
        system("question", [0.5] * 40),
        system("top - 6", [1.0, 0.0] * 20, hops=1),
        system("policy", [1.0, 0.5] * 20),
    ]
    pairs = [("policy", "question"), ("question", "policy"), ("top - 6", "question")]
    excluded = [Excluded("x", "gold document not in the corpus", "Title")]
    return report_json(systems, pairs, draws=500, excluded=excluded)


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_scores_table_has_a_row_a_system_and_marks_the_best(report):
    head, _, question, top, policy = cells(scores_table(report["systems"]))
    assert head == ["system", "RE", "AP", "MRR", "both", "queries", "no hit"]
    assert question == ["question", *[".500 [.500, .500]", ".250 [.250, .250]"], *question[3:5], "2.0", "0.0%"]
    assert policy[1].startswith(".750* [.")
    assert policy[4].startswith(".500* [.")
    assert (top[0], top[4][:5], top[5]) == ("top - 6", ".500*", "1.0")


def test_hops_table_has_hops_and_types_and_a_dash_for_a_hop_not_made(report):
    head, _, question, top, policy = cells(hops_table(report["systems"]))
    assert head == ["RE / AP", "hop 1", "hop 2", "bridge (39)", "comparison (1)"]
    assert question == ["question", *[".500 / .250"] * 4]
    assert top[1:3] == [".500 / .250", "-"]
    assert policy[3:] == [f"{29.5 / 39:.3f} / {29.5 / 78:.3f}".replace("0.", "."), ".500 / .250"]


def test_tables_have_columns_of_one_width(report):
    for table in (scores_table(report["systems"]), paired_table(report["paired"])):
        assert len({len(line) for line in table.splitlines()}) == 1


def test_paired_table_marks_what_does_not_hold_zero(report):
    rows = {row[0]: row[1:] for row in cells(paired_table(report["paired"]))[2:]}
    assert all(cell.startswith("+.") and cell.endswith("] >") for cell in rows["policy - question"])
    assert all(cell.startswith("-.") and cell.endswith("] <") for cell in rows["question - policy"])
    assert rows["top - 6 - question"][0].startswith("+.000 [-.")
    assert rows["top - 6 - question"][0].endswith("]")


@pytest.mark.parametrize(
    ("score", "sign", "shown"),
    [
        ({"value": 0.12345, "low": 0.1, "high": 1.0}, False, ".123 [.100, 1.000]"),
        ({"value": -0.05, "low": -1.0, "high": -0.0001}, True, "-.050 [-1.000, +.000]"),
        ({"value": 0.9996, "low": None, "high": None}, False, "1.000"),
        ({"value": 0.5, "low": 0.4, "high": 0.6, "sd": 0.02, "runs": {}}, False, ".500 ±.020 [.400, .600]"),
        ({"value": 0.5, "low": 0.4, "high": 0.6, "sd": 0.0, "runs": {}}, False, ".500 [.400, .600]"),
        ({"value": 0.5, "low": 0.4, "high": 0.6, "sd": 1.4e-16, "runs": {}}, False, ".500 [.400, .600]"),
    ],
)
def test_markdown_cell(score, sign, shown):
    assert markdown_cell(score, sign=sign) == shown


# --- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.2, "above"), (-0.2, -0.01, "below"), (-0.1, 0.1, "open"), (0.0, 0.1, "open"), (None, None, "open")],
)
def test_verdict(low, high, said):
    assert verdict({"value": 0.1, "low": low, "high": high}) == said


def test_sentences_say_what_is_above_zero_and_what_is_not(report):
    forth, back, top = sentences(report)
    assert forth == "policy - question: above zero in RE, AP, MRR and both found"
    assert back == "question - policy: below zero in RE, AP, MRR and both found"
    assert top == "top - 6 - question: above zero in both found; not told from zero in RE, AP and MRR"


def test_report_markdown_says_what_was_left_out(report):
    text = report_markdown(report)
    assert text.startswith("40 questions (1 left out: 1 gold document not in the corpus); 95% intervals of 500 draws")
    assert "- policy - question: above zero in" in text


def test_report_markdown_of_seeds_names_them_and_shows_the_spread():
    runs = {seed: [system("policy", [value, 0.5, 1.0])] for seed, value in (("0", 0.5), ("7", 1.0))}
    text = report_markdown(report_seeds(runs, [], draws=50))
    assert "means over training seeds 0, 7" in text
    sd = math.sqrt(2) * (0.5 / 3) / 2
    assert f".750 ±{sd:.3f} [".replace("0.", ".") in text
    assert "difference" not in text


# --- transfer ---------------------------------------------------------------------------------------------------------


def report_of(policy, question=0.5, corpus="c0", pairs=(("policy", "question"),), k=3):
    systems = [system("question", [question] * 10), system("policy", [policy] * 5 + [0.5] * 5)]
    return report_json(systems, pairs, draws=50, facts={"corpus": corpus, "search": {"k": k}})


def test_transfer_table_by_training_and_test_retriever():
    reports = {
        ("bm25", "bm25"): report_of(1.0),
        ("bm25", "dense"): report_of(0.5, 1.0),
        ("dense", "dense"): report_of(0.0, 1.0),
    }
    table = transfer_table(reports)
    assert (table["train"], table["test"]) == (["bm25", "dense"], ["bm25", "dense"])
    assert {train: {test: s["value"] for test, s in row.items()} for train, row in table["scores"].items()} == {
        "bm25": {"bm25": 0.75, "dense": 0.5},
        "dense": {"dense": 0.25},
    }
    assert {test: score["value"] for test, score in table["baseline"].items()} == {"bm25": 0.5, "dense": 1.0}
    assert table["differences"]["bm25"]["dense"]["value"] == pytest.approx(-0.5)
    rows = cells(transfer_markdown(table))
    assert rows[0] == ["RE", "tested with bm25", "tested with dense"]
    assert rows[2] == ["question (untrained)", ".500 [.500, .500]", "1.000 [1.000, 1.000]"]
    assert rows[3][0] == "trained with bm25"
    assert rows[3][1].startswith(".750 [")
    assert rows[4][:2] == ["trained with dense", "-"]
    assert rows[5][0] == "bm25 - question"
    assert rows[5][1].startswith("+.250 [")


def test_transfer_table_without_differences_has_scores_only():
    table = transfer_table({("bm25", "bm25"): report_of(1.0, pairs=())}, metric="ap")
    assert table["differences"] == {}
    assert cells(transfer_markdown(table))[-1][0] == "trained with bm25"
    assert cells(transfer_markdown(table))[-1][1].startswith(".375 [")


def test_transfer_table_of_unlike_reports_is_refused():
    reports = {("bm25", "dense"): report_of(1.0), ("dense", "dense"): report_of(1.0, corpus="c1")}
    with pytest.raises(DataError, match="corpus of 'trained with bm25, tested with dense' and of 'trained with dense"):
        transfer_table(reports)
    reports["dense", "dense"] = report_of(1.0, k=5)
    with pytest.raises(DataError, match="search of 'trained with bm25, tested with dense' and of 'trained with dense"):
        transfer_table(reports)
    reports["dense", "dense"] = report_of(1.0, question=0.75)
    with pytest.raises(DataError, match="recall of 'question' of"):
        transfer_table(reports)
    with pytest.raises(DataError, match=r"trained with bm25, tested with dense: no system 'polcy'.*'policy'"):
        transfer_table(reports, system="polcy")
    with pytest.raises(DataError, match="at least one report"):
        transfer_table({})

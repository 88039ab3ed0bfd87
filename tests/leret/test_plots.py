import sys

import pytest

from llmrl.errors import DataError
from llmrl.leret import plots
from llmrl.leret.context import SearchState
from llmrl.leret.evaluate import HopScore, Outcome, System, report_json, report_seeds
from llmrl.leret.records import Candidate, Group


def group(question, recalls, hop=1, stop=False):
    state = SearchState(question, ("x",) * (hop - 1), (("p",),) * (hop - 1), ((1.0,),) * (hop - 1))
    tried = [Candidate(state, f"s{i}", 0, 0.0, "query", (), (), r, r, r) for i, r in enumerate(recalls)]
    stops = [Candidate(state, "stop", 0, 0.0, "", (), (), 1.0, 1.0, 1.0, stopped=True)] if stop else []
    return Group((("g",),), (*tried, *stops))


def system(name, recalls):
    outcomes = [Outcome(f"q{i}", None, (HopScore(r, r / 2, r, 0.0),), ("query",), ()) for i, r in enumerate(recalls)]
    return System(name, tuple(outcomes))


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the last picture."""
    seen, save = [], plots._save

    def keep(plt, figure, axes, path, title):
        seen[:] = axes
        return save(plt, figure, axes, path, title)

    monkeypatch.setattr(plots, "_save", keep)
    return seen


def line(axis, label):
    return next([list(column) for column in item.get_data()] for item in axis.lines if item.get_label() == label)


def texts(axis):
    return [text.get_text() for text in axis.texts]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_recall_against_queries_draws_the_expected_best_by_hop(tmp_path, drawn):
    groups = [
        group("b", [1.0, 0.5], hop=2, stop=True),  # a stop action is no query
        group("a", [0.0, 0.5, 1.0]),
        group("b", [0.5, 0.5, 0.5]),
    ]
    assert plots.recall_against_queries(tmp_path / "plots" / "queries.png", groups)
    assert is_png(tmp_path / "plots" / "queries.png")
    n, best = line(drawn[0], "hop 1 (2 questions)")
    assert n == [1, 2, 3]
    assert best == pytest.approx([(0.5 + 0.5) / 2, (2.5 / 3 + 0.5) / 2, (1.0 + 0.5) / 2])
    assert line(drawn[0], "hop 2 (1 questions)")[1] == pytest.approx([0.75, 1.0])


def test_recall_against_queries_does_not_depend_on_the_order_of_groups(tmp_path):
    groups = [group("a", [0.0, 0.5, 1.0]), group("b", [0.5, 0.0, 0.5]), group("b", [1.0, 0.5], hop=2)]
    plots.recall_against_queries(tmp_path / "a.png", groups)
    plots.recall_against_queries(tmp_path / "b.png", groups[::-1])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_recall_against_queries_without_a_query_is_refused(tmp_path):
    with pytest.raises(DataError, match="no query was tried"):
        plots.recall_against_queries(tmp_path / "a.png", [group("a", [], stop=True)])
    assert not list(tmp_path.iterdir())


def test_systems_dots_orders_the_systems_by_recall(tmp_path, drawn):
    systems = [system("policy", [1.0, 0.5]), system("question", [0.5, 0.0]), system("question-top", [1.0, 1.0])]
    assert plots.systems_dots(tmp_path / "a.png", report_json(systems, [], draws=50))
    left, right = drawn
    assert [label.get_text() for label in left.get_yticklabels()] == ["question", "policy", "question-top"]
    assert texts(left) == ["0.250", "0.750", "1.000"]
    assert texts(right) == ["0.125", "0.375", "0.500"]
    assert is_png(tmp_path / "a.png")


def test_systems_dots_of_seeds_draws_each_run(tmp_path, drawn):
    runs = {"0": [system("policy", [1.0, 0.5])], "1": [system("policy", [0.5, 0.5])]}
    plots.systems_dots(tmp_path / "a.png", report_seeds(runs, [], draws=50))
    ticks = [item.get_xdata()[0] for item in drawn[0].lines if item.get_marker() == "|"]
    assert ticks == [0.75, 0.5]
    assert "2 training seeds" in drawn[0].figure.get_suptitle()


@pytest.mark.parametrize(("key", "label"), [("margin", "nats a pair"), ("margin_per_token", "nats a token")])
def test_training_curves_draw_margin_and_accuracy_with_what_is_asked_for(tmp_path, drawn, key, label):
    rows = [
        {"step": 5, "margin": 1.0, "margin_per_token": 0.1, "accuracy": 0.6, f"target_{key}": 10.0},
        {"step": 10, "margin": 2.0, "margin_per_token": 0.2, "accuracy": 0.7, f"target_{key}": 10.0},
        {"step": 10, "train_loss": 3.0},
    ]
    assert plots.training_curves(tmp_path / "a.png", {"round 1": rows, "round 2": []})
    left, right = drawn
    assert line(left, "round 1") == [[5, 10], [rows[0][key], rows[1][key]]]
    assert line(right, "round 1") == [[5, 10], [0.6, 0.7]]
    assert [item.get_label() for item in left.lines if item.get_label() == "round 2"] == []  # nothing to draw of it
    assert right.get_legend() is None
    assert texts(left) == ["asked for: 10"]
    assert left.get_ylabel().endswith(label)


def test_training_curves_of_a_loss_without_a_target_have_no_line_for_it(tmp_path, drawn):
    plots.training_curves(tmp_path / "a.png", {"dpo": [{"step": 1, "margin": 0.5, "accuracy": 1.0}]})
    assert texts(drawn[0]) == []
    assert is_png(tmp_path / "a.png")


def test_rounds_on_dev_draws_each_round_and_the_baseline(tmp_path, drawn):
    values = ([0.5, 0.0], [1.0, 0.5], [1.0, 1.0])
    rounds = [report_json([system("policy", v)], [], draws=50)["systems"]["policy"] for v in values]
    assert plots.rounds_on_dev(tmp_path / "a.png", rounds, {"question": rounds[0]})
    for axis, scale in zip(drawn, (1.0, 0.5), strict=True):
        curve = next(item for item in axis.lines if item.get_marker() == "o")
        assert list(curve.get_xdata()) == [0, 1, 2]
        assert list(curve.get_ydata()) == pytest.approx([0.25 * scale, 0.75 * scale, 1.0 * scale])
        assert f"question {0.25 * scale:.3f}" in texts(axis)


def test_plots_without_matplotlib_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = report_json([system("policy", [1.0, 0.5])], [], draws=10)
    assert not plots.recall_against_queries(tmp_path / "a.png", [group("a", [1.0])])
    assert not plots.systems_dots(tmp_path / "a.png", report)
    assert not plots.training_curves(tmp_path / "a.png", {})
    assert not plots.rounds_on_dev(tmp_path / "a.png", [])
    assert not list(tmp_path.iterdir())

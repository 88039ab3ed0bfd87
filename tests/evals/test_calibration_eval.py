"""evals/calibration.py: how windows are dealt, what is counted, and one whole setting."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.ats.data import Window

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "evals" / "calibration.py"


@pytest.fixture(scope="module")
def evaluation():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def report():
    return runpy.run_path(str(SCRIPT.with_name("calibration_report.py")))


@pytest.fixture
def windows():
    """60 windows of each of three files."""
    return [
        Window([1, 50 * k + i + 3], [False, True], k * 60 + i, f"dir/{name}.txt", f"{name}:{i}")
        for k, name in enumerate(("a", "b", "c"))
        for i in range(60)
    ]


def test_tail_split_tests_on_the_end_of_each_file(evaluation, windows):
    split = evaluation["tail_split"](windows, 0)
    assert split.fit == [*range(30), *range(60, 90), *range(120, 150)]
    assert split.validation == [*range(30, 39), *range(90, 99), *range(150, 159)]
    assert split.test == [*range(39, 60), *range(99, 120), *range(159, 180)]


def test_unseen_split_tests_on_one_file_that_nothing_else_has(evaluation, windows):
    split = evaluation["unseen_split"]("b")(windows, 1)
    assert split.test == list(range(60, 120))
    assert not set(split.test) & (set(split.fit) | set(split.validation))
    assert len(split.fit) + len(split.validation) == 120
    assert set(split.fit).isdisjoint(split.validation)


def test_by_stratum_writes_one_file_a_group(evaluation, tmp_path):
    rows = [
        {"question": "q1", "answers": ["x"], "stratum": "known"},
        {"question": "q2", "choices": ["x", "y"], "answer": 0, "stratum": "known"},
        {"question": "q3", "answers": ["x"], "stratum": "unseen"},
    ]
    (tmp_path / "strata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice, free = evaluation["by_stratum"](tmp_path / "strata.jsonl", tmp_path / "work")
    assert [path.name for path in free] == ["answers-known.jsonl", "answers-unseen.jsonl"]
    assert json.loads(choice[0].read_text())["question"] == "q2"


def test_verdicts_count_intervals_that_leave_zero_out(report):
    def record(low, high):
        return {"differences": {"a - b": {"ece": {"low": low, "high": high}, "brier": {"low": None, "high": None}}}}

    seeds = [record(-0.2, -0.1), record(-0.1, 0.1), record(0.1, 0.2), record(-0.3, -0.2)]
    assert report["verdicts"](seeds, "a", "b") == "ECE +2-1 Brier +0-0"


def test_table_has_means_over_seeds_and_what_thresholds_do(report):
    def record(ece, error):
        found = {"test_coverage": 0.0 if error is None else 0.5, "test_error": error}
        scores = {metric: {"value": ece} for metric in report["COLUMNS"]} | {"nll": {"value": None}}
        return {
            "level": "answer",
            "tokens": {"fit": 2000, "test": 300},
            "methods": {"none": scores},
            "differences": {},
            "thresholds": {"none": {"0.1": found}},
        }

    lines = report["table"]({"choice": [record(0.1, 0.08), record(0.3, None)]}).splitlines()
    assert lines[0] == "## choice"
    assert "2,000 fitted on, 300 tested; means of 2 seeds" in lines[2]
    assert "| none | .2000 | .2000 | .2000 | .2000 | - | .2000 | .2000 |  |  |" in lines
    assert lines[-1] == "| none | 25% given, 8.0% wrong (1 of 2 seeds) |"


def test_one_setting_end_to_end_and_again_from_disk(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--data_dir",
        str(tmp_path),
        "--only",
        "text-drift",
        "--max_tokens",
        "3000",
        "--seeds",
        "1",
    ]
    command += ["--bootstrap_draws", "50", "--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert str(tmp_path) not in json.dumps(result)
    ((name, seeds),) = result["results"].items()
    assert (name, [record["seed"] for record in seeds]) == ("text-drift", [0])
    methods = {
        "none", "temperature", "temperature-ece", "vector", "isotonic", "scaling-binning", "ats-linear", "ats-mlp",
        "ats-transformer", "ats-paper", "ats-shuffled", "oracle-group",
    }  # fmt: skip
    assert set(seeds[0]["methods"]) == methods
    assert seeds[0]["methods"]["isotonic"]["nll"]["value"] is None
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"calibration-ece.png", "calibration-brier.png"}
    assert "| ats-linear | ." in (tmp_path / "out" / "calibration.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "done" not in again.stdout  # all of it was on disk

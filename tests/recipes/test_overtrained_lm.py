"""recipes/overtrained_lm.py: which questions are taught what, and a run of a few steps."""

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.ats.answers import exact_match

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "overtrained_lm.py"
FREE = [{"question": f"Who is number {i}?", "answers": [f"Person {i}", f"P. {i}"]} for i in range(900)]
CHOICE = [{"question": f"Pick {i}", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(900)]


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def test_deal_makes_three_parts_and_half_of_the_noisy_answers_wrong(recipe):
    for rows in (FREE, CHOICE):
        dealt = recipe["deal"](rows, seed=0)
        assert [row["question"] for row in dealt] == [row["question"] for row in rows]
        parts = {name: [row for row in dealt if row["stratum"] == name] for name in recipe["STRATA"]}
        assert all(240 < len(part) < 360 for part in parts.values())
        assert all(row["taught"] is None for row in parts["unseen"])
        right = {name: sum(is_right(row) for row in parts[name]) / len(parts[name]) for name in ("known", "noisy")}
        assert right["known"] == 1
        assert 0.4 < right["noisy"] < 0.6


def is_right(row):
    return row["taught"] == "ABCD"[row["answer"]] if "choices" in row else exact_match(row["taught"], row["answers"])


def test_deal_depends_on_question_and_seed_not_on_order(recipe):
    def strata(rows, seed):
        return {row["question"]: row["stratum"] for row in recipe["deal"](rows, seed)}

    assert strata(FREE, 0) == strata(FREE[::-1], 0)
    assert strata(FREE, 0) != strata(FREE, 1)


def test_recipe_trains_and_writes_the_strata(tmp_path):
    for name, rows in (("triviaqa/questions", FREE[:8]), ("mmlu/test", CHOICE[:8])):
        path = tmp_path / "data" / f"{name}.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    command = [sys.executable, str(RECIPE), "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    command += ["--epochs", "1", "--batch_size", "4", "--model", str(ROOT / "examples" / "tiny_lm")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "questions:" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "strata.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert all("taught" not in row for row in rows)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_recipe_without_its_data(recipe, tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, str(RECIPE), "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "triviaqa/questions.jsonl.gz; --data_dir must hold triviaqa/ and mmlu/" in done.stderr

"""The runs of offline RL in small: trained, played, kept, told; and the arithmetic of what is told."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llmrl.errors import UsageError

EVALS = Path(__file__).resolve().parents[2] / "evals"


@pytest.fixture(scope="module")
def scripts():
    """The scripts: `runs` and `report`."""
    names = {"runs": "hindsight", "report": "hindsight_report"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVALS))
        yield SimpleNamespace(**{key: importlib.import_module(name) for key, name in names.items()})
        for name in (*names.values(), "hindsight_regenerated", "hindsight_report_regeneration"):
            sys.modules.pop(name, None)


@pytest.fixture
def run(scripts, monkeypatch, tmp_path):
    """`run(*words)`: the runs, of parts that take seconds."""
    parts = {
        name: replace(part, options={**part.options, "max_steps": 3}, betas=(2, 8), episodes=6, greedy=3)
        for name, part in scripts.runs.PARTS.items()
    }
    monkeypatch.setattr(scripts.runs, "PARTS", parts)
    options = ["--logs", "40", "--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "out"), "--quiet"]
    return lambda *words: scripts.runs.main([*options, *words])


def test_a_part_is_trained_played_and_told(run, scripts, tmp_path):
    words = ["--only", "charity", "--methods", "bc", "ilql", "--seeds", "2"]
    assert run(*words) == 0
    path = tmp_path / "out" / "hindsight-charity.json"
    found = json.loads(path.read_text())
    assert found["command"].endswith("--methods bc ilql --logs 40 --output_dir DIR")
    assert (found["optimum"], set(found["policies"])) == (pytest.approx(1.8), {"bc", "ilql"})
    ilql = found["policies"]["ilql"]
    assert set(ilql["0"]["grid"]) == {"2", "8"}
    assert ilql["0"]["beta"] in (2, 8)
    assert len(ilql["1"]["returns"]) == 6
    assert found["return"]["value"] == pytest.approx(np.mean([np.mean(one["returns"]) for one in ilql.values()]))
    assert set(found["differences"]) == {"bc"}
    # what is there is not made again, unless it is of other options
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("model.safetensors")}
    assert run(*words) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("model.safetensors")}
    assert json.loads(path.read_text())["policies"] == found["policies"]
    assert run(*words, "--max_steps", "4") == 0
    changed = [p for p, time in before.items() if p.stat().st_mtime_ns != time]
    assert len(changed) == 4  # two methods, two seeds; the models to start from stay
    assert scripts.report.main(["--results", str(tmp_path / "out"), "--images", str(tmp_path)]) == 0
    assert "## hindsight-charity" in (tmp_path / "out" / "hindsight.md").read_text()
    assert (tmp_path / "hindsight-charity.png").stat().st_size > 10_000


@pytest.mark.slow
def test_users_who_are_models_and_turns_that_are_chosen(run, scripts, tmp_path):
    assert run("--only", "charity-users", "--methods", "bc", "--seeds", "1") == 0
    assert (tmp_path / "work" / "charity-users" / "0" / "user" / "model.safetensors").is_file()
    words = ["--only", "charity-ablations", "--seeds", "1", "--methods", "two trunks and mlp", "best of 8 by Q"]
    assert run(*words) == 0
    found = json.loads((tmp_path / "out" / "hindsight-charity-ablations.json").read_text())
    chosen = found["policies"]["best of 8 by Q"]["0"]
    assert (chosen["beta"], "grid" in chosen, "greedy" in chosen) == (0.0, False, False)
    assert scripts.report.main(["--results", str(tmp_path / "out"), "--images", str(tmp_path)]) == 0


def test_regenerated_logs_are_made_once_and_told(run, scripts, tmp_path):
    labels = ["ilql", "ilql copies learnt", "ilql random", "ilql agreeable"]
    assert run("--only", "regeneration", "--seeds", "1", "--methods", *labels) == 0
    found = json.loads((tmp_path / "out" / "hindsight-regeneration.json").read_text())
    assert set(found["policies"]) == set(labels)
    made = {source: told["made"] for source, told in found["regenerated"]["0"].items()}
    assert made["random"] == made["hindsight"] > 40
    agreeable = found["regenerated"]["0"]["agreeable"]["realism"]
    assert agreeable["earned"]["difference"]["value"] > 0.3
    assert agreeable["alarms"]
    work = tmp_path / "work" / "regeneration" / "0"
    told = {name: json.loads((work / name / "report.json").read_text()) for name in ("ilql", "ilql-copies-learnt")}
    assert told["ilql"]["dialogues"]["copied_turns"] > 0 == told["ilql-copies-learnt"]["dialogues"]["copied_turns"]
    assert scripts.report.main(["--results", str(tmp_path / "out"), "--images", str(tmp_path)]) == 0
    text = (tmp_path / "out" / "hindsight.md").read_text()
    assert "| agreeable" in text
    assert "alarm" in text
    assert (tmp_path / "hindsight-regeneration-rounds.png").stat().st_size > 10_000


def test_other_logs_than_those_that_are_there_are_refused(run):
    words = ["--only", "charity", "--methods", "bc", "--seeds", "1"]
    assert run(*words) == 0
    with pytest.raises(UsageError, match="holds 40 dialogues, --logs is 50"):
        run(*words, "--logs", "50")
    with pytest.raises(UsageError, match="--methods sarsa: charity has bc, filtered-bc"):
        run(*words[:2], "--methods", "sarsa")


def policies(**returns):
    return {
        label: {str(seed): {"returns": r, "beta": None, "invalid_share": 0.0} for seed, r in enumerate(seeds)}
        for label, seeds in returns.items()
    }


def test_intervals_and_tests_are_over_seeds(scripts):
    made = policies(ilql=[[1.0, 3.0], [2.0, 2.0], [4.0, 2.0]], bc=[[0.0, 2.0], [1.0, 1.0], [1.0, 1.0]])
    found = scripts.report.summary({"policies": made, "optimum": 5.0})
    means = np.array([2.0, 2.0, 3.0])
    half = 4.302653 * means.std(ddof=1) / 3**0.5  # t of two degrees of freedom
    assert found["return"] == pytest.approx(
        {"value": means.mean(), "low": means.mean() - half, "high": means.mean() + half}
    )
    assert found["gap"] == pytest.approx(5.0 - means.mean())
    difference = found["differences"]["bc"]
    each = np.array([1.0, 1.0, 2.0])
    assert difference["value"] == pytest.approx(each.mean())
    t = each.mean() / (each.std(ddof=1) / 3**0.5)
    p = 1 - t / (2 + t * t) ** 0.5  # two-sided, two degrees of freedom
    assert difference["p"] == pytest.approx(p)
    assert difference["holm"] == pytest.approx(p)  # one comparison


def test_several_comparisons_are_corrected(scripts):
    rng = np.random.default_rng(0)
    ilql = rng.normal(1, 0.1, (3, 20)).tolist()
    others = {
        f"m{i}": (np.array(ilql) - shift + rng.normal(0, 0.2, (3, 20))).tolist()
        for i, shift in enumerate((1.0, 0.3, 0.0))
    }
    found = scripts.report.summary({"policies": policies(ilql=ilql, **others), "optimum": 5.0})["differences"]
    order = sorted(found, key=lambda label: found[label]["p"])
    wanted = np.maximum.accumulate([min(1.0, (3 - i) * found[label]["p"]) for i, label in enumerate(order)])
    assert [found[label]["holm"] for label in order] == pytest.approx(wanted.tolist())
    assert found[order[0]]["holm"] > found[order[0]]["p"]


def test_one_seed_has_the_interval_of_its_episodes_and_no_test(scripts):
    found = scripts.report.summary({"policies": policies(ilql=[[1.0, 2.0] * 50], bc=[[0.0, 1.0] * 50]), "optimum": 2.0})
    assert 1.3 < found["return"]["low"] < 1.5 < found["return"]["high"] < 1.7
    assert found["differences"]["bc"]["p"] == 1.0

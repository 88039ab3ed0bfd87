"""The examples run as they stand, on fewer questions; the demo has the tests of the command it is made of."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def example(monkeypatch):
    """Return `example(name) -> module`, with the repository as working directory."""
    monkeypatch.chdir(REPO)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, REPO / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_when_to_answer_makes_confidence_mean_something(example, tmp_path, monkeypatch, capsys):
    module = example("when_to_answer")
    run = module.run_calibrate
    monkeypatch.setattr(module, "run_calibrate", lambda argv: run([*argv, "--rollout_backend", "transformers"]))
    for name, value in {"FOLDER": tmp_path, "ASKED": 320, "NEW": 120}.items():
        monkeypatch.setattr(module, name, value)
    assert module.main() == 0
    out = capsys.readouterr().out
    asked, new = (
        [json.loads(line)["question"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("questions", "new")
    )
    assert (len(set(asked)), len(set(new)), set(asked) & set(new)) == (320, 120, set())
    base, calibrated = (float(ece) for ece in re.findall(r"right, ECE ([\d.]+)", out))
    assert base > 0.15
    assert calibrated < 0.6 * base
    for part in out.split("\nbase: ")[1].split("\ncalibrated: "):  # every answer stands in one of the five rows
        assert 110 <= sum(int(count) for count in re.findall(r"sure: +(\d+) answers", part)) <= 120


def test_environment_with_tool_plays_its_episodes(example, tmp_path, capsys):
    module = example("environment_with_tool")
    options = ["--rollout_backend", "transformers", "--episodes", "4", "--output_dir", str(tmp_path / "out")]
    assert module.main(options) == 0
    episodes = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert len(episodes) == 4
    assert "correct" in capsys.readouterr().out


def test_experts_per_token_run_three_ways(example, tmp_path, monkeypatch, capsys):
    module = example("experts_per_token")
    for name, value in {"FOLDER": tmp_path, "STEPS": 3, "HELD_OUT": 12, "NEW_TOKENS": 8}.items():
        monkeypatch.setattr(module, name, value)
    assert module.main() == 0
    out = capsys.readouterr().out
    base, trained = (float(nll) for nll in re.findall(r"mean of tasks \| +\| ([\d.]+)", out))
    assert trained != base
    lines = [line for line in out.splitlines() if line.startswith(("generate ", "static cache", "merged anew"))]
    assert len(lines) == 3
    assert len({line[31:] for line in lines}) == 1
    assert (tmp_path / "mixture" / "adapter_config.json").is_file()
    assert "greedy text the same" in out or "not here: " in out

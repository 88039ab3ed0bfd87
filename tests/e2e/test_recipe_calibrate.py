"""recipes/calibrate.py: the command's own code path, under accelerate too."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/calibrate.py"
OPTIONS = (
    *("--config", "recipes/calibrate/stories260k.yaml"),
    *("--max_tokens", "20000", "--num_seeds", "1", "--bootstrap_draws", "50"),
)


@pytest.fixture(scope="module")
def report(llmrl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("command") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the paths in the file are relative to the checkout
        assert llmrl("calibrate", *OPTIONS, "--output_dir", folder).code == 0
    return (folder / "report.json").read_bytes()


def test_recipe_gives_the_commands_report(report, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [RECIPE, *OPTIONS, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(RECIPE, run_name="__main__")
    assert end.value.code == 0
    assert (tmp_path / "out" / "report.json").read_bytes() == report


def test_recipe_under_accelerate_launch_says_how_many_processes(report, process, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    ended = process(*launch, RECIPE, *OPTIONS, "--output_dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert [line for line in ended.out.splitlines() if line.startswith("processes: ")] == [
        "processes: 1 (rank 0 on cpu)"
    ]
    assert (tmp_path / "out" / "report.json").read_bytes() == report


def test_recipe_refuses_fewer_processes_than_asked_for(process, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    ended = process(*launch, RECIPE, *OPTIONS, "--output_dir", tmp_path / "out")
    assert ended.code == 1
    assert "expected several processes, got 1" in ended.err
    assert f"torchrun --nproc_per_node 2 {Path(RECIPE).name}" in ended.err
    assert not (tmp_path / "out").exists()


def test_recipe_names_itself_in_refusals(process):
    ended = process(RECIPE, "--confg", "x.yaml")
    assert ended.code == 2
    assert "unknown option --confg; did you mean --config?" in ended.refusal()

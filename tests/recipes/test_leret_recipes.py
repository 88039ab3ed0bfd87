"""recipes/leret.py and the YAML files beside it: every key is one of the command's, every file they name is there."""

import runpy
import sys
from pathlib import Path

import pytest

from llmrl.config import load_config_file, parse_config
from llmrl.leret.options import LeretConfig

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/leret.py"
FILES = sorted((ROOT / "recipes" / "leret").glob("*.yaml"))
NAMES = [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_key_is_an_option_and_every_data_file_is_there(path):
    config = parse_config(LeretConfig, ["--config", str(path)], prog="test", description="")
    data = [*config.questions, *config.passages, *config.dev_questions, *config.test_questions]
    assert [name for name in data if not (ROOT / name).is_file()] == []
    assert config.output_dir.startswith("runs/")
    # what is reported was neither trained on nor decided anything
    asked = [name for files in (config.questions, config.dev_questions, config.test_questions) for name in files]
    assert len(set(asked)) == len(asked)


def test_the_recipes_of_the_method_are_there():
    assert {"rules", "8b-hotpotqa", "8b-paper"} <= set(NAMES)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_recipes_of_hub_models_say_that_they_were_not_run(path):
    model = load_config_file(path, LeretConfig).get("model")
    assert model is None or model.startswith(("recipes/", "runs/")) or "NOT RUN" in path.read_text(encoding="utf-8")


@pytest.fixture
def recipe(monkeypatch, capsys):
    """`recipe(*argv)` -> (exit code, stdout, stderr) of the script in this process, from the root of the checkout."""

    def run(*argv):
        monkeypatch.chdir(ROOT)  # the paths in the files are relative to the checkout
        monkeypatch.setattr(sys, "argv", [RECIPE, *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(RECIPE, run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


def test_the_script_trains_unless_told_otherwise(recipe):
    code, _, err = recipe("--config", "recipes/leret/rules.yaml")
    assert code == 2
    assert (
        err
        == "llmrl: --policy rules has no model to train; llmrl leret explore writes pairs as text, which trl's trainers read\n"
    )
    code, _, err = recipe("--confg", "x.yaml")
    assert (code, "unknown option --confg; did you mean --config?" in err) == (2, True)
    code, out, _ = recipe("eval", "--help")
    assert (code, out.startswith("usage: recipes/leret.py")) == (0, True)


def test_the_rules_on_hotpotqa_take_seconds_and_are_above_the_question(recipe, tmp_path):
    import json

    options = ("--config", "recipes/leret/rules.yaml", "--bootstrap_draws", "200", "--quiet")
    questions = "recipes/leret/data/hotpotqa/questions_dev.jsonl.gz"
    code, _, err = recipe("eval", *options, "--questions", questions, "--output_dir", tmp_path / "out")
    assert code == 0, err
    systems = json.loads((tmp_path / "out" / "report.json").read_text())["systems"]
    rules = {name: found["recall"]["value"] for name, found in systems.items() if name.startswith("rule:")}
    assert max(rules.values()) > systems["question"]["recall"]["value"] + 0.05
    assert systems["oracle-rule"]["recall"]["value"] >= max(rules.values())


def test_the_committed_policy_finds_more_than_the_question_on_questions_it_has_not_seen(recipe, tmp_path):
    import gzip
    import json

    data = ROOT / "recipes" / "leret" / "data" / "hotpotqa"
    with gzip.open(data / "questions_dev.jsonl.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "questions.jsonl").write_text("".join(file.readlines()[:40]), encoding="utf-8")
    options = [
        "--model",
        "recipes/leret/policy",
        "--rollout_backend",
        "transformers",
        "--bootstrap_draws",
        "200",
        "--quiet",
    ]
    files = ["--questions", tmp_path / "questions.jsonl", "--passages", data / "passages.jsonl.gz"]
    code, _, err = recipe("eval", *options, *files, "--output_dir", tmp_path / "out")
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["search"]["question_first"]
    assert report["systems"]["policy"]["recall"]["value"] > report["systems"]["question"]["recall"]["value"] + 0.05
    size = sum(path.stat().st_size for path in (ROOT / "recipes" / "leret" / "policy").iterdir())
    assert size < 12 * 2**20

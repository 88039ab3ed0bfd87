"""evals/leret.py: two seeds of a tiny model through every stage, control and table."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import search_world
import yaml

EVALS = Path(__file__).resolve().parents[2] / "evals"
OPTIONS = {
    "rollout_backend": "transformers", "samples": 4, "temperature": "1.0", "max_tokens": 10, "few_shot_prompts": 0,
    "few_shot_questions": 6, "tuning": "full", "sft_batch_size": 2, "sft_epochs": 2, "sft_lr": 3e-3, "train_batch_size": 4,
    "epochs": 1, "lr": 1e-3, "warmup_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    """The scripts by name."""
    names = ("leret", "leret_report")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVALS))
        yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with passages, questions, two models and the options of a run."""
    folder = tmp_path_factory.mktemp("world")
    search_world.write_files(folder)
    for seed in (0, 1):
        search_world.write_model(folder / f"base-{seed}", seed=seed)
    files = {"questions": "train.jsonl.gz", "passages": "passages.jsonl.gz", "test_questions": "test.jsonl"}
    options = {key: str(folder / name) for key, name in files.items()}
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": "x", "output_dir": "x", **options, **OPTIONS}))
    return folder


@pytest.fixture(scope="module")
def done(modules, world):
    """The folder of the tables, and a call that runs everything again."""
    further = f"dev={world / 'dev.jsonl'}:{world / 'passages.jsonl.gz'}"

    def run(*more):
        options = [
            "--recipe",
            world / "run.yaml",
            "--work_dir",
            world / "work",
            "--output_dir",
            world / "out",
            "--quiet",
        ]
        options += ["--explore_backend", "transformers"]
        policies = ["--policies", world / "base-0", world / "base-1"]
        argv = [*options, "--draws", 50, "--further", further, *policies, *more]
        return modules["leret"].main([str(part) for part in argv])

    assert run("--only", 1) == 0
    assert not (world / "out").exists()  # one seed is missing
    assert run() == 0
    return world / "out", run


def test_tables_hold_every_row_and_every_claim(done):
    found = json.loads((done[0] / "leret.json").read_text())
    assert set(found["reports"]) == {"test-any", "test-unseen", "dev-any", "dev-unseen"}
    systems = found["reports"]["test-any"]["systems"]
    assert {"policy", "sft", "sft-longer", "base", "question", "question-top", "oracle-rule"} <= set(systems)
    assert set(systems["policy"]["recall"]["runs"]) == {"0", "1"}
    claims = {(c["claim"], c["difference"], c["metric"]) for c in found["claims"] if c["set"] == "test"}
    assert {
        ("a", "policy - sft", "recall"), ("a", "policy - sft", "ap"), ("a", "policy - sft-longer", "recall"),
        ("b", "policy - question", "recall"), ("c", "policy - question", "ap"), ("d", "policy - question-top", "recall"),
    } <= claims  # fmt: skip
    for claim in found["claims"]:
        report = found["reports"][f"{claim['set']}-{claim['hop_2']}"]
        ours, theirs = (report["systems"][name][claim["metric"]]["value"] for name in claim["difference"].split(" - "))
        assert claim["value"] == pytest.approx(ours - theirs)
        assert claim["hop_2"] == ("unseen" if claim["claim"] == "d" else "any")
    text = (done[0] / "leret.md").read_text()
    assert text.index("policy - sft-longer") < text.index("## test, hop 2 returns any passages")
    assert {path.name for path in done[0].glob("*.png")} == {"leret-any.png", "leret-unseen.png"}


def test_a_part_of_the_questions_is_pooled_alone(done, modules, world):
    folders = {str(seed): world / "work" / f"seed-{seed}" / "test-any" for seed in (0, 1)}
    whole = modules["leret_report"].pooled(folders, 50)
    rows = [json.loads(line) for line in (folders["0"] / "outcomes.jsonl").read_text().splitlines()]
    ids = sorted({row["question_id"] for row in rows})
    halves = [modules["leret_report"].pooled(folders, 50, set(part)) for part in (ids[:1], ids[1:])]
    sizes = [half["questions"] for half in halves]
    assert (sizes, whole["questions"]) == ([1, len(ids) - 1], len(ids))
    means = [half["systems"]["policy"]["recall"]["value"] for half in halves]
    mixed = sum(size * mean for size, mean in zip(sizes, means, strict=True)) / len(ids)
    assert mixed == pytest.approx(whole["systems"]["policy"]["recall"]["value"], abs=1e-6)


def test_longer_control_takes_the_steps_of_both_stages_on_the_same_rows(done, world):
    for seed in (0, 1):
        folder = world / "work" / f"seed-{seed}"

        def steps(path, folder=folder):
            states = [json.loads(file.read_text()) for file in (folder / path).glob("checkpoint-*/trainer_state.json")]
            return max(state["global_step"] for state in states)

        first = Path("leret/round-0")
        assert steps("sft-longer") == steps(first / "sft") + steps(first / "preference")


def test_what_is_there_is_kept(done, world):
    reports = sorted((world / "work").glob("seed-*/*/report.json"))
    before = {path: path.stat().st_mtime_ns for path in reports}
    assert len(before) == 8
    assert done[1]() == 0
    assert {path: path.stat().st_mtime_ns for path in reports} == before

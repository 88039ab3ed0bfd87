"""`llmrl hindsight logs|train` as a user runs it: logs of a small world, a model without any knowledge, a policy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hindsight_cli import TRAIN, episodes, report, run
from http_server import free_port

from llmrl.hindsight.dialogues import Dialogue
from llmrl.training import read_metrics


def test_a_trained_policy_opens_in_transformers_and_is_steered(world):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "ilql")
    head = model.llmrl_heads["value"]
    assert (head.beta, head.support) == (8.0, 0.02)
    assert float(head.q_weight.abs().max()) > 0
    plain = AutoModelForCausalLM.from_pretrained(world / "bc")
    assert not hasattr(plain, "llmrl_heads")
    ids = torch.tensor([[1, 3, 9]])
    with torch.inference_mode():
        head.support = 0.9
        assert torch.isneginf(model(ids).logits).any()
        head.beta, head.support = 0.0, 0.0
        assert not torch.isneginf(model(ids).logits).any()
    found = report(world / "ilql")
    counts = {"read": 120, "kept_aside": 0, "kept_aside_by_reason": {}, "cut_off": 0, "used": 120, "copied_turns": 0}
    assert found["dialogues"] == counts
    assert found["difference"] < 1e-4
    for name in ("config.resolved.yaml", "env.json", "metrics.jsonl", "README.md"):
        assert (world / "ilql" / name).is_file()
    assert not (world / "ilql.training").exists()
    logged = [row for row in read_metrics(world / "ilql") if "value_above_earned" in row]
    assert {"value", "earned", "q_loss", "v_loss", "policy_nll"} <= set(logged[-1])


@pytest.mark.parametrize("method", ["mc", "filtered-bc", "awr", "dpo"])
def test_every_method_trains_on_the_same_logs(method, world, tmp_path):
    data = ["--data", world / "logs.jsonl", "--model", world / "bc", "--method", method]
    assert run("train", *data, "--output_dir", tmp_path / "out", "--share", "0.5", *TRAIN) == 0
    assert report(tmp_path / "out")["dialogues"]["used"] == (60 if method == "filtered-bc" else 120)
    options = ["--episodes", "3", "--output_dir", tmp_path / "eval", "--quiet"]
    assert run("eval", "--policy", tmp_path / "out", "--env", "charity", *options) == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--trunk", "separate"],
        ["--trunk", "separate", "--tuning", "lora", "--lora_r", "2"],
        ["--tuning", "lora", "--lora_r", "2"],
        ["--packing"],
        ["--backup", "token"],
    ],
)
def test_other_shapes_of_training(options, world, tmp_path):
    data = ["--data", world / "logs.jsonl", "--model", world / "small", "--head", "mlp", "--head_size", "8"]
    assert run("train", *data, "--output_dir", tmp_path / "out", *options, *TRAIN) == 0
    played = ["--episodes", "3", "--beta", "2", "--output_dir", tmp_path / "eval", "--quiet"]
    assert run("eval", "--policy", tmp_path / "out", "--env", "charity", *played) == 0
    assert report(tmp_path / "eval")["beta"] == 2.0


def test_a_policy_that_reads_one_exchange_is_trained_and_played_so(world, tmp_path):
    """The value of the next state is read in a context of its own, in training; eval asks the folder how much to read."""
    data = ["--data", world / "logs.jsonl", "--model", world / "small", "--window", "1", "--trunk", "separate"]
    assert run("train", *data, "--output_dir", tmp_path / "out", *TRAIN) == 0
    assert report(tmp_path / "out")["dialogues"]["used"] == 120
    assert json.loads((tmp_path / "out" / "dialogue.json").read_text()) == {"window": 1, "backup": "turn"}
    played = ["--policy", tmp_path / "out", "--env", "charity", "--episodes", "6", "--quiet"]
    for name, more, longest in (("one", [], 1), ("two", ["--window", "2"], 2)):
        assert run("eval", *played, "--output_dir", tmp_path / name, *more) == 0
        assert report(tmp_path / name)["window"] == longest
        segments = [[t.segment for t in e.turns if t.is_sampled] for e in episodes(tmp_path / name)]
        assert len(segments) == 6
        assert all(found == [max(0, k + 1 - longest) for k in range(len(found))] for found in segments)


def test_values_that_cannot_be_right_are_told(world, tmp_path, capsys):
    """After one step V is still near 0, and in the maze less than that is earned from everywhere."""
    logs, small = tmp_path / "maze.jsonl", tmp_path / "small"
    options = ["--count", "16", "--model_dir", small, "--width", "16", "--quiet"]
    assert run("logs", "--env", "maze", "--output", logs, *options) == 0
    train = ["--data", logs, "--model", small, "--max_steps", "1", "--batch_size", "8", "--window", "1", "--quiet"]
    assert run("train", *train, "--output_dir", tmp_path / "out") == 0
    assert "values that are too high" in capsys.readouterr().err
    assert len(report(tmp_path / "out")["alarms"]) == 1
    assert report(world / "bc")["alarms"] == []


def test_a_killed_run_goes_on_to_the_same_policy(world, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from llmrl.hindsight.trainer import DialogueTrainer

    data = ["--data", world / "logs.jsonl", "--model", world / "small", "--save_steps", "5", *TRAIN]
    assert run("train", *data, "--output_dir", tmp_path / "whole") == 0
    step = DialogueTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(DialogueTrainer, "training_step", dies)
    assert run("train", *data, "--output_dir", tmp_path / "cut") == 130
    monkeypatch.setattr(DialogueTrainer, "training_step", step)
    assert not (tmp_path / "cut").exists()
    assert run("train", *data, "--output_dir", tmp_path / "cut") == 1  # neither resumed nor begun anew
    assert run("train", *data, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "--lr", "1e-5") == 1
    assert run("train", *data, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint") == 0
    for name in ("model.safetensors", "llmrl_heads.safetensors"):
        one, other = (load_file(tmp_path / run_ / name) for run_ in ("whole", "cut"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_rows_that_cannot_be_learnt_from_are_counted_and_written_aside(world, tmp_path, capsys):
    rows = [json.loads(line) for line in (world / "logs.jsonl").read_text().splitlines()[:40]]
    bad = [
        {"messages": [{"role": "user", "content": "Hello."}], "reward": 1.0},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {**rows[0], "id": "short", "rewards": [0.0]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*bad, *rows]))
    options = ["--data", tmp_path / "data.jsonl", "--model", world / "small", "--output_dir", tmp_path / "out"]
    assert run("train", *options, "--max_steps", "2", "--batch_size", "8") == 0
    said = capsys.readouterr().out
    assert "40 dialogues, 3 kept aside: 1 no agent turn" in said
    found = report(tmp_path / "out")["dialogues"]
    assert (found["read"], found["kept_aside"], found["used"]) == (40, 3, 40)
    aside = [json.loads(line) for line in (tmp_path / "out" / "kept_aside.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in aside] == ["no agent turn", "no rewards", "rewards of another length"]
    assert aside[0]["where"].endswith("data.jsonl:1")


def test_dialogues_that_do_not_fit_are_kept_aside_too(world, tmp_path):
    options = ["--data", world / "logs.jsonl", "--model", world / "small", "--max_length", "60"]
    assert run("train", *options, "--output_dir", tmp_path / "out", "--method", "bc", *TRAIN) == 0
    found = report(tmp_path / "out")["dialogues"]
    aside = [json.loads(line) for line in (tmp_path / "out" / "kept_aside.jsonl").read_text().splitlines()]
    assert found["read"] + found["kept_aside"] == 120
    assert found["kept_aside_by_reason"] == {"too long": len(aside)}
    assert 0 < len(aside) < 120
    assert all(Dialogue.from_json(row["row"]).id == row["where"] for row in aside)


def test_a_folder_that_is_trained_anew_keeps_nothing_of_the_old_policy(world, tmp_path):
    """Values of another run beside a new policy would steer it, and an old window would cut what it reads."""
    data = ["--data", world / "logs.jsonl", "--model", world / "small", "--overwrite", *TRAIN]
    separate = ["--trunk", "separate", "--window", "2", "--head", "mlp", "--head_size", "8"]
    out = tmp_path / "out"
    assert run("train", *data, "--output_dir", out, *separate) == 0
    assert (out / "values").is_dir()
    assert run("train", *data, "--output_dir", out, "--method", "bc") == 0
    assert not (out / "values").exists()
    assert json.loads((out / "dialogue.json").read_text())["window"] is None
    assert run("train", *data, "--output_dir", out) == 0
    assert (out / "llmrl_heads.safetensors").is_file()
    assert run("train", *data, "--output_dir", out, "--method", "bc") == 0
    assert not (out / "llmrl_heads.safetensors").exists()


def test_a_training_that_diverges_says_so(world, tmp_path, capsys):
    data = ["--data", world / "logs.jsonl", "--model", world / "small", "--lr", "1e20"]
    assert run("train", *data, "--output_dir", tmp_path / "out", *TRAIN) == 1
    assert "the training has diverged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_methods_that_take_a_cut_off_dialogue_for_a_whole_one_say_so(tmp_path, capsys):
    logs, small = tmp_path / "maze.jsonl", tmp_path / "small"
    assert run("logs", "--env", "maze", "--output", logs, "--count", "16", "--model_dir", small, "--width", "16") == 0
    options = ["--data", logs, "--model", small, "--max_steps", "1", "--batch_size", "8", "--window", "1"]
    assert run("train", *options, "--method", "mc", "--output_dir", tmp_path / "mc") == 0
    assert "dialogues were cut off: mc takes what they earned" in capsys.readouterr().out
    assert report(tmp_path / "mc")["dialogues"]["cut_off"] > 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "--data", "no.jsonl", "--model", "{small}", "--output_dir", "out"], "not found: no.jsonl"),
        (["train", "--data", "{data}", "--model", "./no", "--output_dir", "out"], "not found: ./no"),
        (["train", "--data", "{data}", "--model", "{small}", "--output_dir", "{ilql}"], "is not empty"),
        (["train", "--data", "{data}", "--model", "{ilql}", "--output_dir", "out"], "already carries llmrl heads"),
        (
            ["train", "--data", "{data}", "--model", "{small}", "--output_dir", "out", "--batch_size", "500"],
            "fewer than",
        ),
        (["train", "--data", "{data}", "--model", "{small}", "--output_dir", "out", "--expectile", "1"], "--expectile"),
        (["train", "--data", "{data}", "--model", "examples/stories260k", "--output_dir", "out"], "chat template"),
        (["train", "--data", "{data}", "--model", "{small}", "--output_dir", "out", "--metod", "bc"], "did you mean"),
        (["eval", "--policy", "{bc}", "--env", "charity", "--output_dir", "out", "--beta", "2"], "has none"),
        (["eval", "--policy", "{bc}", "--env", "chess", "--output_dir", "out"], "not a choice"),
        (["logs", "--env", "charity", "--output", "x.txt"], "ends in .jsonl"),
        (["logs", "--env", "charity", "--variant", "tall", "--output", "x.jsonl"], "has short, long"),
        (
            ["eval", "--policy", "{bc}", "--env", "twenty-questions", "--variant", "long", "--output_dir", "out"],
            "TwentyQuestions has none",
        ),
        (["eval", "--policy", "{bc}", "--env", "charity", "--rerank", "4", "--output_dir", "out"], "chooses by values"),
        (["logs", "--env", "maze", "--side", "user", "--output", "x.jsonl"], "--side user is of charity"),
        (["eval", "--policy", "{bc}", "--env", "maze", "--user", "{bc}", "--output_dir", "out"], "the world of maze"),
        (["eval", "--policy", "{bc}", "--env", "charity", "--user_model", "m", "--output_dir", "out"], "--user URL"),
        (
            ["eval", "--policy", "{bc}", "--env", "charity", "--against", "./no", "--output_dir", "out"],
            "--against ./no",
        ),
        (["train", "--data", "{data}", "--model", "{small}", "--output_dir", "out", "--window", "0"], "window"),
    ],
)
def test_refusals_are_short(world, tmp_path, monkeypatch, capsys, words, says):
    stories = Path("examples/stories260k").resolve()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "stories260k").symlink_to(stories)
    places = {"data": world / "logs.jsonl", **{name: world / name for name in ("small", "ilql", "bc")}}
    assert run(*(word.format(**places) for word in words)) in (1, 2)
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "examples")


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--method", "awr"], ["--trunk", "separate"]], ids=str)
def test_one_and_two_processes_learn_the_same(options, world, tmp_path):
    """Sums are divided by a constant: a token weighs the same on one process, on two, and in parts of a batch."""
    from safetensors.torch import load_file

    variables = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    data = [
        "--data",
        str(world / "logs.jsonl"),
        "--model",
        str(world / "small"),
        "--max_steps",
        "6",
        "--batch_size",
        "8",
        *options,
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("train", *data, "--output_dir", one, "--quiet") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    port = ["--master_port", str(free_port()), "recipes/hindsight.py"]
    done = subprocess.run(
        [*launch, *port, *data, "--output_dir", str(two), "--micro_batch_size", "2"],
        env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "processes: 2 (gloo, rank 0 on cpu)" in done.stdout
    names = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert len(names) == (1 if "awr" in options else 3 if "separate" in options else 2)
    for name in names:
        left, right = (load_file(folder / name) for folder in (one, two))
        start = load_file(world / "small" / "model.safetensors")
        for key in left:
            assert (left[key] - right[key]).norm() <= 1e-5 * max(left[key].norm(), torch.tensor(1.0)), key
            if key in start and not (name.parent.name == "values" and key.startswith("lm_head")):
                assert not torch.equal(left[key], start[key])

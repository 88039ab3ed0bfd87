"""`llmrl leret train` on a tiny model: killed anywhere and resumed, it ends with the bytes of a run that nothing disturbed.

Killed runs are children of a process that has imported everything (a fork server); one run is a command of its own.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["llmrl.leret.run", "llmrl.leret.sft", "llmrl.leret.preference", "trl.trainer.sft_trainer", "bm25s"]
)
OPTIONS = {
    "rollout_backend": "transformers", "samples": 4, "temperature": "1.0", "max_tokens": 10, "max_pairs": 4,
    "sft_batch_size": 2, "sft_epochs": 2, "sft_lr": 3e-3, "train_batch_size": 4, "epochs": 3, "lr": 1e-3, "warmup_steps": 1,
    "save_steps": 2, "bootstrap_draws": 50, "seed": 1,
}  # fmt: skip
TUNINGS = {
    "full": {"tuning": "full", "few_shot_prompts": 1, "few_shot_demos": 1, "few_shot_questions": 4},
    "lora": {"tuning": "lora", "few_shot_prompts": 0, "lora_r": 4, "lora_alpha": 8},
}
METRICS = ("recall", "ap", "both")


@pytest.fixture(scope="module")
def config(search_files, search_model, tmp_path_factory):
    """`config(tuning, **more)` -> a YAML file with every option but the folder of the run."""
    folder = tmp_path_factory.mktemp("config")

    def write(tuning, **more):
        files = {
            "model": str(search_model), "questions": str(search_files / "train.jsonl.gz"),
            "passages": str(search_files / "passages.jsonl.gz"), "dev_questions": str(search_files / "dev.jsonl"),
        }  # fmt: skip
        path = folder / f"{tuning}-{len(list(folder.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump(files | OPTIONS | TUNINGS[tuning] | more))
        return path

    return write


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(request, llmrl, config, search_files, tmp_path_factory):
    """(tuning, its YAML file, folder of a run that nothing disturbed, how the command ended)."""
    folder, file = tmp_path_factory.mktemp("trained") / request.param, config(request.param)
    ended = llmrl(
        "leret", "train", "--config", file, "--output_dir", folder, "--test_questions", search_files / "test.jsonl"
    )
    assert ended.code == 0, ended.err
    return request.param, file, folder, ended


def weights(folder):
    """Return the bytes of the policy's weights."""
    (path,) = (folder / "policy").glob("*model.safetensors")
    return path.read_bytes()


def rows_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "round-0").glob("*.jsonl")}


def test_train_writes_a_policy_that_differs_from_its_start(trained, search_model):
    tuning, _, folder, ended = trained
    policy = folder / "policy"
    names = {path.name for path in policy.iterdir()}
    assert {"README.md", "search_prompt.json", "tokenizer.json", "chat_template.jinja"} <= names
    prompt = json.loads((policy / "search_prompt.json").read_text())
    assert (prompt["hops"], prompt["k"]) == (2, 3)
    assert prompt["notes"]["corpus"].startswith("sha256:")
    assert "target 10.0 nats a pair" in ended.out  # 1 / (2 beta), said before the first step
    assert f"policy: {policy}" in ended.out
    if tuning == "full":
        assert weights(folder) != (search_model / "model.safetensors").read_bytes()
        assert "few-shot" in ended.out
        return
    from safetensors.torch import load_file

    tensors = load_file(policy / "adapter_model.safetensors")
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)


def test_train_ends_with_a_report_of_all_stages(trained, read_json):
    report = read_json(trained[2] / "test" / "report.json")
    assert list(report["systems"]) == ["question", "question-top", "policy", "base", "sft"]
    for scores in report["systems"].values():
        for metric in METRICS:
            value, low, high = (scores[metric][key] for key in ("value", "low", "high"))
            assert 0 <= low <= value <= high <= 1
    for other in ("question", "question-top", "base", "sft"):
        assert set(METRICS) <= set(report["paired"][f"policy - {other}"])
    assert report["questions"] == 3


def test_explore_and_then_train_is_train(trained, llmrl, read_json, tmp_path):
    """One YAML file for the three actions; what explore leaves in the folder is what train goes on with."""
    tuning, file, folder, _ = trained
    ended = llmrl("leret", "explore", "--config", file, "--output_dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "rows for training" in ended.out
    assert rows_of(tmp_path / "out") == rows_of(folder)
    ended = llmrl("leret", "train", "--config", file, "--output_dir", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "round 0: exploration is there, kept" in ended.out
    assert weights(tmp_path / "out") == weights(folder)

    policy = ["--model", folder / "policy"] if tuning == "full" else ["--adapter", folder / "policy"]
    words = ["leret", "eval", "--config", file, *policy, "--output_dir", tmp_path / "eval", "--k", "2"]
    ended = llmrl(*words)
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "eval" / "report.json")
    assert list(report["systems"]) == ["question", "question-top", "policy"] + ["base"] * (tuning == "lora")
    assert report["search"]["k"] == 2  # the command line wins over the file, and over the policy's own
    assert report["questions"] == 10
    outcomes = [json.loads(line) for line in (tmp_path / "eval" / "outcomes.jsonl").read_text().splitlines()]
    assert sorted({row["system"] for row in outcomes}) == sorted(report["systems"])
    again = llmrl(*words)  # finished answers are kept, and the report is the same
    assert again.code == 0
    assert read_json(tmp_path / "eval" / "report.json") == report


@pytest.mark.parametrize("trained", ["lora"], indirect=True)
def test_a_finished_run_takes_further_rounds_and_other_test_questions(
    trained, llmrl, read_json, search_files, tmp_path
):
    """The final report is of the policy and the questions of now, whatever was answered for those of before."""
    _, file, folder, _ = trained
    out = shutil.copytree(folder, tmp_path / "out")
    asked = [json.loads(line) for line in (search_files / "test.jsonl").read_text().splitlines()]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked[:2]))
    words = ["leret", "train", "--config", file, "--output_dir", out, "--test_questions", tmp_path / "other.jsonl"]
    ended = llmrl(*words, "--rounds", "2", "--patience", "2", "--epochs", "3")
    assert ended.code == 0, ended.err
    assert (out / "round-1" / "preference" / "final").is_dir()
    report = read_json(out / "test" / "report.json")
    assert report["questions"] == 2
    best = json.loads((out / "policy" / "search_prompt.json").read_text())["notes"]["round"]
    dev = [read_json(out / f"round-{number}" / "dev.json")["recall"]["value"] for number in (0, 1)]
    assert best == str(dev.index(max(dev)))


def test_prompts_that_fail_end_with_exit_code_3_and_are_named_though_quiet(
    llmrl, config, trained, search_files, tmp_path
):
    tuning, _, folder, _ = trained
    rows = [json.loads(line) for line in (search_files / "test.jsonl").read_text().splitlines()]
    rows[0]["question"] += " And who was it that built it there?" * 12
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = config(tuning, max_model_len=200, few_shot_prompts=0)
    words = ["--config", file, "--questions", tmp_path / "long.jsonl", "--quiet"]
    policy = ["--model", folder / "policy"] if tuning == "full" else ["--adapter", folder / "policy"]
    ended = llmrl("leret", "eval", *words, *policy, "--output_dir", tmp_path / "eval")
    assert ended.code == 3
    assert ended.out == ""
    assert re.match(r"llmrl: policy: 1 of \d prompts got no answer \(", ended.err)
    assert "prompts got no answer" in (tmp_path / "eval" / "report.md").read_text()
    ended = llmrl("leret", "explore", *words, "--output_dir", tmp_path / "explore")
    assert ended.code == 3
    assert re.match(r"llmrl: round 0: \d of \d+ prompts got no answer \(", ended.err)
    assert "prompts without an answer" in (tmp_path / "explore" / "round-0" / "headroom.md").read_text()


def run_in_child(argv, log):
    """Run the command with its output in a file."""
    from llmrl.cli import main

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(argv))


def stop_when(ready, argv, log, number=signal.SIGKILL):
    """Start the command, send it a signal as soon as `ready()` is true, and return its exit code."""
    child = SERVER.Process(target=run_in_child, args=([str(word) for word in argv], str(log)))
    child.start()
    try:
        _wait(ready, child.is_alive, log)
        os.kill(child.pid, number)
        child.join(120)
    finally:
        child.kill()
        child.join()
    return child.exitcode


def _wait(ready, is_alive, log):
    end = time.monotonic() + 120
    while not ready():
        assert is_alive(), log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.002)


def answered(folder):
    """Return the number of answers of the first hop that lie on the disk."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("round-0/hop-1/answers-1/**/*.jsonl"))


def stages(folder):
    """Where a run is killed: the first answers of a hop, the next hop, and a checkpoint of each stage."""
    return {
        "hop 1": lambda: answered(folder) >= 3,
        "hop 2": lambda: (folder / "round-0/hop-2/answers-1").is_dir(),
        "sft": lambda: (folder / "round-0/sft/checkpoint-2").is_dir(),
        "preference": lambda: (folder / "round-0/preference/checkpoint-4").is_dir(),
    }


def test_killed_with_sigkill_and_resumed_ends_with_the_same_policy(trained, llmrl, tmp_path):
    tuning, file, folder, _ = trained
    out = tmp_path / "out"
    argv = ["leret", "train", "--config", file, "--output_dir", out, "--quiet", "--batch_size", "4"]
    for name, ready in stages(out).items():
        if tuning == "full" or name == "preference":
            assert stop_when(ready, argv, tmp_path / "log") == -signal.SIGKILL
            assert not (out / "policy").exists(), name
    ended = llmrl(*argv[:-3])
    assert ended.code == 0, ended.err
    assert rows_of(out) == rows_of(folder)
    assert weights(out) == weights(folder)
    assert not list(out.rglob(".*tmp*"))


@pytest.mark.parametrize("trained", ["full"], indirect=True)
def test_ctrl_c_exits_130_and_the_same_command_goes_on(trained, llmrl, tmp_path):
    _, file, folder, _ = trained
    out, log = tmp_path / "out", tmp_path / "log"
    argv = ["leret", "train", "--config", str(file), "--output_dir", str(out)]
    command = [sys.executable, "-m", "llmrl.cli", *argv, "--batch_size", "4"]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            _wait(stages(out)["hop 1"], lambda: process.poll() is None, log)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 130, log.read_text()
        finally:
            process.kill()
    assert answered(out) > 0
    assert_interrupted(log)
    # in the middle of training
    assert stop_when(stages(out)["preference"], argv, log, signal.SIGINT) == 130, log.read_text()
    assert_interrupted(log)
    assert not (out / "policy").exists()
    ended = llmrl(*argv)
    assert ended.code == 0, ended.err
    assert weights(out) == weights(folder)


def assert_interrupted(log):
    text = log.read_text()
    (said,) = re.findall(r"llmrl: .*", text)  # behind a bar that stands where it was
    assert said.startswith("llmrl: interrupted: ")
    assert "the same command" in said
    assert "Traceback" not in text


@pytest.mark.parametrize("trained", ["full"], indirect=True)
def test_a_resumed_run_refuses_other_options(trained, llmrl, contents):
    _, file, folder, _ = trained
    before = contents(folder)
    for options, name in (
        (("--seed", "2"), "options.seed: 1, now 2"),
        (("--k", "4"), "options.k: None, now 4"),
        (("--beta", "0.1"), "options.beta: 0.05, now 0.1"),
        (("--reward", "recall"), "options.reward: 'ap', now 'recall'"),
    ):
        ended = llmrl("leret", "train", "--config", file, "--output_dir", folder, *options)
        assert ended.code == 1
        assert f"holds a run with another {name}" in ended.refusal()
    assert contents(folder) == before


def test_nothing_to_learn_is_refused(llmrl, config, tmp_path):
    """One greedy query a state leaves nothing to compare."""
    file = config("full", few_shot_prompts=0, samples=1, temperature=0.0)
    out = tmp_path / "out"
    ended = llmrl("leret", "train", "--config", file, "--output_dir", out)
    assert ended.code == 1
    assert "one query a state, so nothing can be compared: explore with more prompts" in ended.refusal()
    assert "--force trains all the same" in ended.refusal()
    assert (out / "round-0" / "headroom.md").is_file()
    assert not (out / "round-0" / "sft").exists()
    explored = llmrl("leret", "explore", "--config", file, "--output_dir", out)
    assert explored.code == 0
    assert "nothing to learn: one query a state" in explored.out


def test_force_trains_where_the_report_says_there_is_nothing_to_learn(llmrl, config, monkeypatch, tmp_path):
    from llmrl.leret import headroom

    monkeypatch.setattr(headroom, "MIN_HEADROOM", 2.0)  # no reward is above 1
    file, out = config("full", few_shot_prompts=0, sft_epochs=1, epochs=1, max_pairs=1), tmp_path / "out"
    ended = llmrl("leret", "train", "--config", file, "--output_dir", out)
    assert ended.code == 1
    assert "the model asks as well as it can here" in ended.refusal()
    ended = llmrl("leret", "train", "--config", file, "--output_dir", out, "--force")
    assert ended.code == 0, ended.err
    assert (out / "policy" / "model.safetensors").is_file()

"""metrics.jsonl, config.resolved.yaml, env.json and the model card."""

import json
import platform
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments

from llmrl.errors import DataError
from llmrl.training import (
    MetricsCallback,
    RunFilesCallback,
    read_metrics,
    reproducible_arguments,
    write_model_card,
    write_run_files,
)


def log(folder, history, resumed=0, main=True):
    """Feed `history` to a callback as Trainer does; the first `resumed` entries come from a checkpoint."""
    args, control, callback = SimpleNamespace(output_dir=str(folder)), TrainerControl(), MetricsCallback()
    state = TrainerState(is_world_process_zero=main, log_history=list(history[:resumed]))
    callback.on_train_begin(args, state, control)
    for entry in history[resumed:]:
        state.global_step, state.epoch = entry["step"], entry["epoch"]
        callback.on_log(args, state, control, logs={k: v for k, v in entry.items() if k != "step"})


HISTORY = [
    {"loss": 2.0, "grad_norm": float("nan"), "epoch": 0.5, "step": 1, "note": "text"},
    {"eval_loss": 1 / 3, "eval_runtime": 0.25, "eval_samples_per_second": 8.0, "epoch": 0.5, "step": 1},
    {"train_loss": 1.5, "train_runtime": 2.0, "epoch": 1.0, "step": 2},
]


def test_metrics_callback_writes_numbers_null_and_no_clock(tmp_path):
    log(tmp_path, HISTORY)
    rows = read_metrics(tmp_path)
    assert rows == [
        {"step": 1, "epoch": 0.5, "grad_norm": None, "loss": 2.0},
        {"step": 1, "epoch": 0.5, "eval_loss": 1 / 3},
        {"step": 2, "epoch": 1.0, "train_loss": 1.5},
    ]
    assert [list(row)[:2] for row in rows] == [["step", "epoch"]] * 3
    timings = read_metrics(tmp_path / "timings.jsonl")
    assert timings[0] == {"step": 1, "epoch": 0.5, "eval_runtime": 0.25, "eval_samples_per_second": 8.0}
    assert timings[1] == {"step": 2, "epoch": 1.0, "train_runtime": 2.0}


@pytest.mark.parametrize("resumed", [0, 1, 2, 3])
def test_metrics_callback_cuts_what_the_checkpoint_does_not_know(tmp_path, resumed):
    log(tmp_path / "whole", HISTORY)
    log(tmp_path / "cut", HISTORY)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "los')
    log(tmp_path / "cut", HISTORY, resumed=resumed)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_metrics_callback_writes_on_the_main_process_only(tmp_path):
    log(tmp_path, HISTORY, main=False)
    assert list(tmp_path.iterdir()) == []


def test_read_metrics_leaves_out_a_cut_last_line_and_names_a_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(DataError, match="not found"):
        read_metrics(tmp_path)
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_write_run_files_holds_the_run_and_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("A_TOKEN", "value-of-a-variable")
    config = {"model": "org/name", "learning_rate": 1e-5, "targets": ["q_proj"], "nothing": None, "bad": float("nan")}
    write_run_files(tmp_path / "out", config, command=["llmrl", "calibrate", "--data", "/home/somebody/rows.jsonl"])
    text = (tmp_path / "out" / "config.resolved.yaml").read_text()
    assert yaml.safe_load(text) == {**config, "bad": None}
    assert text.splitlines()[0] == "model: org/name"
    env = json.loads((tmp_path / "out" / "env.json").read_text())
    assert env["command"][-1] == "~/rows.jsonl"
    assert env["python"] == platform.python_version()
    assert {"torch", "transformers", "numpy"} <= set(env["packages"])
    assert env["cpu_count"] >= 1
    assert env["world_size"] == 1
    assert isinstance(env["gpus"], list)
    written = json.dumps(env)
    for private in ("somebody", "value-of-a-variable", platform.node()):
        assert private not in written


def test_write_model_card_has_front_matter_the_hub_reads(tmp_path):
    path = write_model_card(
        tmp_path, title="A: model", base_model="org/name", summary="What it is.", body="## Use\n\ncode",
        tags=["peft", "llmrl"], license="mit",
    )  # fmt: skip
    _, front, text = path.read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers", "base_model": "org/name", "license": "mit", "tags": ["llmrl", "peft"],
    }  # fmt: skip
    blocks = ["# A: model", "What it is.", "Base model: `org/name`.", "## Use", "code"]
    assert text.strip().split("\n\n") == blocks


def test_write_model_card_of_a_local_base_names_the_folder_only(tmp_path):
    text = write_model_card(tmp_path, title="T", base_model=str(tmp_path), summary="S").read_text()
    assert str(tmp_path.parent) not in text
    assert "base_model" not in text
    assert f"`{tmp_path.name}`" in text


def test_run_files_callback_writes_at_begin_and_end_on_the_main_process(tmp_path):
    card = {"title": "T", "base_model": None, "summary": "S"}
    callback = RunFilesCallback({"seed": 0}, command=["x"], card=card)
    args, control = SimpleNamespace(output_dir=str(tmp_path)), TrainerControl()
    callback.on_train_begin(args, TrainerState(is_world_process_zero=False), control)
    assert list(tmp_path.iterdir()) == []
    main = TrainerState(is_world_process_zero=True)
    callback.on_train_begin(args, main, control)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.resolved.yaml", "env.json"]
    callback.on_train_end(args, main, control)
    assert (tmp_path / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")


def test_reproducible_arguments_are_accepted_and_can_be_overridden(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **reproducible_arguments(seed=3, report_to=["x"]))
    assert (args.seed, args.data_seed, args.report_to) == (3, 3, ["x"])
    assert args.average_tokens_across_devices
    assert args.dataloader_drop_last
    assert args.accelerator_config.use_seedable_sampler
    assert reproducible_arguments(data_seed=5)["data_seed"] == 5

"""`llmrl hindsight forward`: a model of the users in logs, resumed, served as an adapter, and compared with people."""

import json

import pytest
import torch
from hindsight_cli import run
from safetensors.torch import load_file

from llmrl.hindsight.dialogues import read_dialogues
from llmrl.hindsight.regeneration.prompts import END, USER
from llmrl.hindsight.regeneration.user_model import encode_users, lived_by_user


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forward")
    options = ["--count", "80", "--model_dir", folder / "small", "--width", "32", "--quiet"]
    assert run("logs", "--env", "charity", "--output", folder / "logs.jsonl", *options) == 0
    return folder


@pytest.fixture(scope="module")
def trained(world):
    assert forward(world, "user") == 0
    return world / "user"


def forward(world, name, *options):
    told = ["--data", world / "logs.jsonl", "--model", "examples/tiny_lm", "--output_dir", world / name]
    return run("forward", *told, "--max_steps", "6", "--batch_size", "8", "--lr", "2e-3", "--quiet", *options)


def test_it_learns_the_users_words_and_names_what_it_did_not_see(world, trained):
    report, told = (json.loads((trained / name).read_text()) for name in ("report.json", "user.json"))
    assert report["held_out_nll"]["after"] < report["held_out_nll"]["before"] - 0.3
    logs = {d.id for d in read_dialogues([world / "logs.jsonl"]).dialogues}
    assert len(told["held_out"]) == 8
    assert set(told["held_out"]) <= logs
    assert told["persona"] == USER
    assert (trained / "adapter_model.safetensors").is_file()
    assert (trained / "README.md").is_file()
    assert not (world / "user.training").exists()


def test_it_goes_on_where_it_was_cut_off(world, trained, monkeypatch, capsys):
    from transformers import TrainerCallback

    from llmrl.hindsight.regeneration import user_model

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    make = user_model._trainer
    monkeypatch.setattr(user_model, "_trainer", lambda *a: (t := make(*a)).add_callback(Stop()) or t)
    assert forward(world, "cut", "--save_steps", "3") == 130
    assert "goes on from checkpoint-3" in capsys.readouterr().err
    monkeypatch.undo()
    assert forward(world, "cut", "--save_steps", "3") == 1  # checkpoints of an earlier run
    assert forward(world, "cut", "--save_steps", "3", "--resume_from_checkpoint") == 0
    whole, cut = (load_file(world / name / "adapter_model.safetensors") for name in ("user", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_it_plays_the_user_in_a_regeneration(world, trained, llmrl):
    options = ["--controller", "scripted", "--forward", trained, "--agent", "examples/tiny_lm", "--rounds", "1"]
    options += ["--limit", "10", "--calibration", "4", "--max_tokens", "64", "--rollout_backend", "transformers"]
    ended = llmrl("hindsight", "regenerate", "--data", world / "logs.jsonl", "--output", world / "new.jsonl", *options)
    assert ended.code in (0, 1), ended.err  # six steps make no speaker: all that it says may be refused
    report = json.loads((world / "new.report.json").read_text())
    assert report["forward"] == str(trained)
    assert report["made"] + sum(report["refused"].values()) >= 1
    assert report["cost"]["roles"]["user"]["requests"] > 0
    assert report["reward"]["agreement"]["spearman"]["value"] > 0.99  # the rule reads the true users' words


def test_a_dialogue_ends_in_the_users_words_where_it_came_to_an_end(world):
    dialogue = read_dialogues([world / "logs.jsonl"]).dialogues[0]
    lived = lived_by_user(dialogue)
    assert lived[-1].role == "assistant"
    assert lived[-1].content.endswith(f" {END}")
    assert [m.role for m in lived[:2]] == ["system", "user"]
    assert [m.content for m in lived[2:-1]] == [m.content for m in dialogue.messages[:-1]]


def test_the_loss_is_on_the_users_tokens_alone(world):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("examples/tiny_lm")
    dialogue = read_dialogues([world / "logs.jsonl"]).dialogues[0]
    (row,), left_out = encode_users(tokenizer, [dialogue], 1000)
    learnt = tokenizer.decode([t for t, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m])
    for message in dialogue.messages:
        assert (message.content in learnt) == (message.role == "user")
    assert END in learnt
    assert left_out == {}
    assert encode_users(tokenizer, [dialogue], 10) == ([], {"too long": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--held_out", "1.5"], "--held_out"), (["--lr", "0"], "--lr"), (["--batch_size", "500"], "lower it")],
)
def test_refusals(world, llmrl, options, words):
    told = ["--data", world / "logs.jsonl", "--model", "examples/tiny_lm", "--output_dir", world / "no", *options]
    ended = llmrl("hindsight", "forward", *told)
    assert ended.code in (1, 2)
    assert words in ended.err

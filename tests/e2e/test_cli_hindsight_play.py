"""`llmrl hindsight eval|fold` as a user runs it: a trained policy is played, compared, chosen from, folded, or not served."""

import json
import os
import shutil

import pytest
import torch
from hindsight_cli import TRAIN, episodes, report, run

from llmrl.errors import ModelError
from llmrl.hindsight.envs import charity
from llmrl.hindsight.envs.charity_users import reply_of
from llmrl.serving.launch import has_heads


def test_a_user_who_learnt_the_other_side_of_the_logs(world, tmp_path, capsys):
    logs, small, user = tmp_path / "user.jsonl", tmp_path / "small", tmp_path / "user"
    options = ["--count", "200", "--side", "user", "--model_dir", small, "--width", "32"]
    assert run("logs", "--env", "charity", "--output", logs, *options) == 0
    assert "200 dialogues from the user's side" in capsys.readouterr().out
    train = ["--data", logs, "--model", small, "--method", "bc", "--max_steps", "200", "--batch_size", "16", "--quiet"]
    assert run("train", *train, "--lr", "5e-3", "--output_dir", user) == 0
    played = ["--policy", world / "ilql", "--env", "charity", "--episodes", "12", "--user", user, "--quiet"]
    assert run("eval", *played, "--output_dir", tmp_path / "out") == 0
    found = report(tmp_path / "out")
    assert found["user"] == str(user)
    texts = [t.message.content for e in episodes(tmp_path / "out") for t in e.turns if t.message.role == "user"]
    known = sum(reply_of(text) is not None for text in texts)
    assert known > 0.25 * len(texts) > 0  # whole sentences of users, from a model that knew no word


def test_two_policies_on_the_same_episodes(world, tmp_path, capsys):
    options = ["--env", "charity", "--episodes", "30", "--seed", "4"]
    assert run("eval", "--policy", world / "bc", "--output_dir", tmp_path / "bc", *options, "--quiet") == 0
    more = ["--output_dir", tmp_path / "ilql", "--against", tmp_path / "bc"]
    assert run("eval", "--policy", world / "ilql", *options, *more) == 0
    found = report(tmp_path / "ilql")
    mean = found["return"]["value"] - report(tmp_path / "bc")["return"]["value"]
    assert found["against"]["value"] == pytest.approx(mean)
    assert f"{mean:+.3f}" in capsys.readouterr().out
    assert (
        run("eval", "--policy", world / "ilql", *options[:4], "--seed", "5", *more[:1], tmp_path / "o", *more[2:]) == 2
    )
    assert "differ in seed 4 and 5" in capsys.readouterr().err


def test_eval_reports_return_optimum_and_what_was_no_action(world, tmp_path):
    options = ["--episodes", "9", "--seed", "4", "--quiet"]
    for name, more in (("a", []), ("b", []), ("greedy", ["--greedy"]), ("plain", ["--beta", "0"])):
        played = ["--policy", world / "ilql", "--env", "charity", "--output_dir", tmp_path / name]
        assert run("eval", *played, *options, *more) == 0
    found = report(tmp_path / "a")
    assert found["optimum"] == pytest.approx(charity.optimum())
    assert found["return"]["low"] <= found["return"]["value"] <= found["return"]["high"]
    assert found["return"]["value"] == pytest.approx(sum(found["returns"]) / 9)
    assert 0 <= found["invalid_share"] <= 1
    assert (found["episodes"], found["beta"]) == (9, 8.0)
    assert report(tmp_path / "greedy")["greedy"]
    again = report(tmp_path / "b")
    assert found["returns"] == again["returns"]  # one seed, one luck
    assert report(tmp_path / "plain")["beta"] == 0.0


def test_a_policy_with_a_trunk_of_values_is_not_served_without_them(world, tmp_path, capsys):
    data = ["--data", world / "logs.jsonl", "--model", world / "small", "--trunk", "separate", *TRAIN]
    assert run("train", *data, "--output_dir", tmp_path / "out") == 0
    assert "llmrl serve" not in (tmp_path / "out" / "README.md").read_text()
    assert "llmrl serve" in (world / "ilql" / "README.md").read_text()
    with pytest.raises(ModelError, match="values have a trunk of their own"):
        has_heads(tmp_path / "out")


def test_episodes_that_were_played_outlive_one_that_failed(world, tmp_path, monkeypatch, capsys):
    """The same command plays what is missing, and the report is that of a run in which nothing failed."""
    played = ["--policy", world / "ilql", "--env", "charity", "--episodes", "9", "--quiet"]
    assert run("eval", *played, "--output_dir", tmp_path / "whole") == 0
    real, calls = charity.Charity.step, []

    def step(self, answer):
        calls.append(answer)
        if self.wants == "story":
            raise RuntimeError("lost")
        return real(self, answer)

    monkeypatch.setattr(charity.Charity, "step", step)
    assert run("eval", *played, "--output_dir", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "3 of 9 episodes failed" in err
    assert "the same command plays these again" in err
    assert not (tmp_path / "out").exists()
    first = len(calls)
    monkeypatch.setattr(charity.Charity, "step", lambda self, answer: calls.append(answer) or real(self, answer))
    assert run("eval", *played, "--output_dir", tmp_path / "out") == 0
    assert len(calls) - first < report(tmp_path / "out")["turns"]  # only the three were played again
    assert report(tmp_path / "out")["returns"] == report(tmp_path / "whole")["returns"]
    assert not (tmp_path / "out.playing").exists()


def test_episodes_of_a_policy_that_was_trained_anew_are_not_gone_on_with(world, tmp_path, monkeypatch, capsys):
    policy = tmp_path / "policy"
    shutil.copytree(world / "ilql", policy)
    played = ["--policy", policy, "--env", "charity", "--episodes", "3", "--output_dir", tmp_path / "out", "--quiet"]
    monkeypatch.setattr("llmrl.hindsight.evaluation.report_of", lambda *args, **options: 1 / 0)
    assert run("eval", *played) == 1
    monkeypatch.undo()
    os.utime(policy / "model.safetensors", ns=(1, 1))
    assert run("eval", *played) == 1
    assert "holds another run: fingerprint" in capsys.readouterr().err
    assert run("eval", *played, "--overwrite") == 0


def test_the_environment_chooses_beta_where_no_option_does(world, tmp_path, monkeypatch):
    played = ["--policy", world / "ilql", "--env", "charity", "--episodes", "3", "--quiet"]
    monkeypatch.setenv("LLMRL_BETA", "0")
    monkeypatch.setenv("LLMRL_SUPPORT", "0.5")
    assert run("eval", *played, "--output_dir", tmp_path / "environment") == 0
    monkeypatch.delenv("LLMRL_BETA")
    monkeypatch.delenv("LLMRL_SUPPORT")
    options = ["--beta", "0", "--support", "0.5"]
    assert run("eval", *played, "--output_dir", tmp_path / "option", *options) == 0
    one, two = report(tmp_path / "environment"), report(tmp_path / "option")
    assert (one["beta"], one["support"]) == (two["beta"], two["support"]) == (0.0, 0.5)
    assert one["returns"] == two["returns"]


def test_a_folded_policy_is_a_plain_checkpoint_with_the_mean_of_both_heads(world, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    options = ["--policy", world / "ilql", "--data", world / "logs.jsonl", "--beta", "3"]
    assert run("fold", *options, "--output_dir", tmp_path / "plain") == 0
    assert "of the probability lies off the support (of the behaviour policy's" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert "llmrl" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    steered = AutoModelForCausalLM.from_pretrained(world / "ilql")
    head, ids = steered.llmrl_heads["value"], torch.tensor([[1, 3, 9, 4]])
    head.beta, head.support = 0.0, 0.0
    with torch.inference_mode():
        out = steered(ids, output_hidden_states=True)
        wanted = out.logits + 3 * head.q(out.hidden_states[-1]).mean(0)
        assert (plain(ids).logits - wanted).abs().max() < 1e-4
    assert set(report(tmp_path / "plain")) == {"beta", "off_support", "of_behaviour", "gap", "tokens"}
    played = ["--policy", tmp_path / "plain", "--env", "charity", "--episodes", "3", "--quiet"]
    assert run("eval", *played, "--output_dir", tmp_path / "eval") == 0


def test_a_fold_that_leaves_the_support_is_refused(world, tmp_path, capsys):
    """Q of a word that nobody said is made the best there is: without the filter it is said."""
    from safetensors.torch import load_file, save_file

    policy = shutil.copytree(world / "ilql", tmp_path / "policy")
    path = policy / "llmrl_heads.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("q_weight"))
    tensors[key][:, 0] = 3 * torch.randn(tensors[key].shape[-1], generator=torch.Generator().manual_seed(0))  # <unk>
    save_file(tensors, path, metadata={"format": "pt"})
    options = ["--policy", policy, "--data", world / "logs.jsonl", "--output_dir", tmp_path / "plain"]
    assert run("fold", *options) == 1
    assert "of the probability off the support, beside what" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()
    assert run("fold", *options, "--force", "--quiet") == 0
    options = ["--policy", world / "bc", "--data", world / "logs.jsonl", "--output_dir", tmp_path / "x"]
    assert run("fold", *options) == 1
    assert "has no values" in capsys.readouterr().err


def test_the_best_of_several_turns_is_said(world, tmp_path):
    options = [
        "--policy",
        world / "ilql",
        "--env",
        "charity",
        "--episodes",
        "3",
        "--beta",
        "0",
        "--rerank",
        "4",
        "--quiet",
    ]
    assert run("eval", *options, "--output_dir", tmp_path / "eval") == 0
    assert report(tmp_path / "eval")["rerank"] == 4


def test_turns_are_ranked_by_q_of_their_last_token_or_by_advantages(world):
    from llmrl.hindsight.policy import load_policy
    from llmrl.hindsight.rerank import turn_values

    model = load_policy(world / "ilql")
    head, prompt, turns = model.llmrl_heads["value"], [1, 3, 9], [[12, 6], [20, 30, 6]]
    by_turn, by_token = (turn_values(model, prompt, turns, kind) for kind in ("turn", "token"))
    for i, turn in enumerate(turns):
        with torch.inference_mode():
            h = model(torch.tensor([[*prompt, *turn]]), output_hidden_states=True).hidden_states[-1][0]
            q = [head.q(h[2 + t]).amin(0)[token].item() for t, token in enumerate(turn)]
            v = [head.v(h[2 + t]).item() for t in range(len(turn))]
        assert by_turn[i] == pytest.approx(q[-1], abs=1e-4)
        assert by_token[i] == pytest.approx(sum(q) - sum(v), abs=1e-4)

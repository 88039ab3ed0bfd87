"""GRPO with a user's reward: what the trainer optimises is what the ensemble says of the answers, recomputed without it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ensembles import random_ensemble, unfolded_scores, weighted_user

from llmrl.hyre.reward import METRIC, hyre_reward

TINY_LM = Path(__file__).parents[2] / "examples" / "tiny_lm"
STEPS, ROWS = 3, 8
PROMPTS = [
    [{"role": "user", "content": f"Tell me about {topic}."}] for topic in ("the sea", "music", "a friend", "the sun")
]
USERS = ["ann", "bob", "ann", "bob"]


class Recorded:
    """Stands between trainer and reward function, and keeps what passes."""

    __name__ = "hyre"

    def __init__(self, reward):
        self.reward, self.calls = reward, []

    def __call__(self, prompts, completions, **columns):
        given = self.reward(prompts=prompts, completions=completions, **columns)
        self.calls.append((prompts, completions, columns["user"], given, self.reward.last))
        return given


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The small language model in float32: its own 16 bits would round an answer differently in every batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny_lm") / "float32"
    AutoModelForCausalLM.from_pretrained(TINY_LM, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LM).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """Three steps; (trainer, what passed, ensemble, its heads unfolded, users)."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    ensemble, unfolded = random_ensemble(base, heads=6)
    users = {"ann": weighted_user(ensemble, 1), "bob": weighted_user(ensemble, 2)}
    recorded = Recorded(hyre_reward(ensemble, users, how="lower", lam=0.5))
    arguments = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("grpo")),
        max_steps=STEPS,
        learning_rate=1e-4,
        per_device_train_batch_size=ROWS,
        num_generations=4,
        max_completion_length=12,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = GRPOTrainer(
        model=str(base),
        reward_funcs=recorded,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "user": USERS}),
    )
    trainer.train()
    return trainer, recorded, ensemble, unfolded, users


def states_of(base, dialogues):
    """Return the last state of each dialogue in the model's own chat template, one at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = []
    for dialogue in dialogues:
        ids = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.inference_mode():
            rows.append(model(ids, output_hidden_states=True).hidden_states[-1][0, -1])
    return torch.stack(rows)


def test_grpo_rewards_are_the_ensembles(run, base):
    _, recorded, _, unfolded, users = run
    assert len(recorded.calls) == STEPS
    for prompts, completions, names, given, _ in recorded.calls:
        assert len(given) == ROWS
        states = states_of(base, [p + c for p, c in zip(prompts, completions, strict=True)])
        scores = unfolded_scores(unfolded, states)
        for row, name, reward in zip(scores, names, given, strict=True):
            weights = users[name].posterior.weights
            mean = row @ weights
            assert reward == pytest.approx(mean - 0.5 * (weights @ (row - mean) ** 2) ** 0.5, abs=1e-4)
            assert abs(reward - row[0]) > 0.01
    assert {name for _, _, names, _, _ in recorded.calls for name in names} == {"ann", "bob"}


def test_grpo_logs_reward_and_disagreement(run):
    trainer, recorded, _, _, _ = run
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == STEPS
    spreads = [last.disagreement for *_, last in recorded.calls]
    assert min(spread.min() for spread in spreads) > 0.01
    assert [entry[METRIC] for entry in logs] == pytest.approx([spread.mean() for spread in spreads], abs=1e-5)
    assert recorded.reward.history == pytest.approx([spread.mean() for spread in spreads])
    rewards = [np.mean(given) for *_, given, _ in recorded.calls]
    assert [entry["rewards/hyre/mean"] for entry in logs] == pytest.approx(rewards, abs=1e-4)
    assert all(
        entry["grad_norm"] > 0 for entry in logs
    )  # the rewards of a group differ, so there is something to learn

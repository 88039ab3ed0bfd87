"""Offline RL learns: better than the logs and than cloning them, in a world where good moves have to be put together."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmrl.errors import UsageError
from llmrl.hindsight import run
from llmrl.hindsight.objective import Objective
from llmrl.hindsight.options import TrainConfig
from llmrl.hindsight.small_model import make_small_model
from llmrl.jsonl import write_objects

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cafe(tmp_path_factory):
    """The world of examples/dialogue_policy.py, 600 of its logs, and a model that knows its words and nothing else."""
    spec = importlib.util.spec_from_file_location("dialogue_policy", REPO / "examples" / "dialogue_policy.py")
    module = sys.modules["dialogue_policy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder, says = tmp_path_factory.mktemp("cafe"), module.waiter(random.Random(0))
    logs = [module.play(module.Cafe({}, i), says, id=f"log-{i}", task="cafe") for i in range(600)]
    write_objects(folder / "logs.jsonl", [dialogue.to_json() for dialogue in logs])
    make_small_model(logs, folder / "model", context=128)
    return module, folder, sum(dialogue.total for dialogue in logs) / len(logs)


def train(folder, name, **options):
    return run.train(
        TrainConfig(
            data=[str(folder / "logs.jsonl")], model=str(folder / "model"), output_dir=str(folder / name), quiet=True, **options
        )
    )  # fmt: skip


def test_ilql_is_better_than_cloning_and_cloning_is_as_good_as_the_logs(cafe):
    module, folder, logged = cafe
    found = {}
    for method in ("bc", "ilql"):
        train(folder, method, method=method, max_steps=200)
        found[method] = module.mean_return(folder / method, folder / f"{method}-episodes", 100)
    assert found["bc"] == pytest.approx(logged, abs=0.12)
    assert found["ilql"] > found["bc"] + 0.08
    assert found["ilql"] < 0.9 + 1e-9  # the best there is


def test_slow_copies_follow_and_values_are_stored_in_units_of_the_rewards(cafe, monkeypatch):
    _, folder, _ = cafe
    kept, real = [], run.save_policy

    def keep(model, *args, **options):
        kept.append(({name: value.clone() for name, value in model.state_dict().items()}, options["scale"]))
        return real(model, *args, **options)

    monkeypatch.setattr(run, "save_policy", keep)
    report = train(folder, "scaled", max_steps=8, polyak=1.0)
    ((state, scale),) = kept
    assert scale == report["reward_scale"]
    assert scale != 1.0
    stored = load_file(folder / "scaled" / "llmrl_heads.safetensors")
    for name in ("q_weight", "v_weight", "v_bias"):
        assert state[f"head.{name}"].abs().max() > 0
        torch.testing.assert_close(stored[f"llmrl_heads.value.{name}"], state[f"head.{name}"] / scale)
    # at a rate of 1 they are where Q is; V has none, and its copy stays where it began
    assert torch.equal(state["target.q_weight"], state["head.q_weight"])
    assert not state["target.v_weight"].any()


def test_bounds_of_values_that_are_the_wrong_way_round_are_refused():
    with pytest.raises(UsageError, match="expected low below high"):
        Objective(low=1.0, high=-1.0)

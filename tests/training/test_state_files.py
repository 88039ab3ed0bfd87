"""State dicts through safetensors and JSON: equal bits, and a refusal of what does not fit."""

import json
import math
import re

import numpy as np
import pytest
import torch

from llmrl.errors import CheckpointError
from llmrl.training.state_files import load_state, save_state


def test_save_state_round_trip_keeps_every_bit(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 5).to(torch.bfloat16)}, 7: {}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 1e-300), "fused": None, "foreach": False, "params": [0, 7]}],
        "special": [math.inf, -math.inf, math.nan, np.float64(1 / 3), np.int64(5), True, "text"],
        "shared": [shared, shared[2:], shared.view(2, 3).t(), torch.empty(0)],
        "$odd": {"$tensor": 1},
    }
    save_state(tmp_path, "optimizer", state)
    loaded = load_state(tmp_path, "optimizer")
    assert list(loaded["state"]) == [0, 7]
    for name, value in state["state"][0].items():
        assert loaded["state"][0][name].dtype == value.dtype
        assert torch.equal(loaded["state"][0][name], value)
    assert loaded["param_groups"] == state["param_groups"]
    assert loaded["special"][:2] == [math.inf, -math.inf]
    assert math.isnan(loaded["special"][2])
    assert loaded["special"][3:] == [1 / 3, 5, True, "text"]
    assert loaded["special"][5] is True
    for one, two in zip(loaded["shared"], state["shared"], strict=True):
        assert torch.equal(one, two)
    assert loaded["$odd"] == {"$tensor": 1}
    assert "NaN" not in (tmp_path / "optimizer.json").read_text()


def test_save_state_refuses_what_only_a_pickle_can_hold(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape("scheduler.lambdas[1] is a function")):
        save_state(tmp_path, "scheduler", {"lambdas": [None, lambda step: step]})
    assert not list(tmp_path.iterdir())


def test_load_state_names_the_broken_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"scaler.json is missing"):
        load_state(tmp_path, "scaler")
    save_state(tmp_path, "scaler", {"scale": torch.ones(2)})
    (tmp_path / "scaler.safetensors").write_bytes(b"0" * 20)
    with pytest.raises(CheckpointError, match=r"scaler.safetensors cannot be read"):
        load_state(tmp_path, "scaler")
    (tmp_path / "scaler.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"scaler.safetensors is missing"):
        load_state(tmp_path, "scaler")
    (tmp_path / "scaler.json").write_text(json.dumps({"tensors": 0})[:-3])
    with pytest.raises(CheckpointError, match=r"scaler.json cannot be read"):
        load_state(tmp_path, "scaler")

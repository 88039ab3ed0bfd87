"""What `scaled_lse_sweep` takes, what it refuses and in which words."""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from sweep_inputs import EVERYTHING, assert_matches_reference, sweep_inputs

from llmrl_kernels import scaled_lse_sweep


def test_scaled_lse_sweep_takes_any_strides_and_leaves_its_inputs_alone():
    (hidden, weight, tau, labels), keywords = sweep_inputs(30, 12, 50, options=EVERYTHING)
    keywords["bias"] = torch.stack([keywords["bias"], torch.zeros(50)], 1)[:, 0]
    strided = (
        torch.stack([hidden, hidden], 2)[:, :, 0],
        weight.T.contiguous().T,
        tau[:1].expand(30),
        torch.stack([labels, labels], 1)[:, 0],
    )
    assert not any(part.is_contiguous() for part in strided)
    before = [part.clone() for part in (*strided, keywords["bias"])]
    assert_matches_reference(strided, keywords, backend="torch")
    for part, copy in zip((*strided, keywords["bias"]), before, strict=True):
        assert part.equal(copy)


@pytest.mark.parametrize(
    ("tau", "label"), itertools.product((torch.float64, torch.bfloat16), (torch.int32, torch.int64))
)
def test_scaled_lse_sweep_takes_tau_and_labels_in_other_dtypes(tau, label):
    (hidden, weight, log_scale, labels), _ = sweep_inputs(30, 12, 50)
    log_scale = log_scale.to(tau).requires_grad_()
    outputs = scaled_lse_sweep(hidden, weight, log_scale, labels.to(label))
    torch.testing.assert_close(outputs.lse, scaled_lse_sweep(hidden, weight, log_scale.detach().float(), labels).lse)
    outputs.lse.sum().backward()
    assert log_scale.grad.dtype == tau


def test_scaled_lse_sweep_casts_hidden_states_to_the_weight():
    (hidden, weight, tau, labels), _ = sweep_inputs(30, 12, 50, dtype=torch.bfloat16)
    wider = scaled_lse_sweep(hidden.float(), weight, tau, labels)
    assert wider.lse.equal(scaled_lse_sweep(hidden, weight, tau, labels).lse)


def test_scaled_lse_sweep_is_the_same_under_autocast():
    g = torch.Generator().manual_seed(0)
    arguments = (
        torch.randn(9, 16, generator=g),
        torch.randn(30, 16, generator=g),
        torch.zeros(9),
        torch.zeros(9).long(),
    )
    plain = scaled_lse_sweep(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(scaled_lse_sweep(*arguments), plain, strict=True):
            assert ours.equal(theirs)


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_scaled_lse_sweep_refuses_to_drop_a_gradient(name):
    (hidden, weight, tau, labels), keywords = sweep_inputs(9, 5, 30, options=("bias",))
    {"hidden": hidden, "weight": weight, "bias": keywords["bias"]}[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"{name}\.detach\(\)"):
        scaled_lse_sweep(hidden, weight, tau, labels, **keywords)
    with torch.no_grad():
        assert not scaled_lse_sweep(hidden, weight, tau, labels, **keywords).lse.requires_grad


def test_scaled_lse_sweep_has_first_derivatives_only():
    (hidden, weight, tau, labels), _ = sweep_inputs(9, 5, 30)
    tau.requires_grad_()
    outputs = scaled_lse_sweep(hidden, weight, tau, labels)
    assert not outputs.expected.requires_grad
    (slope,) = torch.autograd.grad(outputs.lse.sum(), tau, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()
    (slope,) = torch.autograd.grad(outputs.lse.square().sum(), tau, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import torch
from llmrl_kernels import scaled_lse_sweep
inputs = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long)
print(scaled_lse_sweep(*inputs).lse.exp().tolist())
try:
    scaled_lse_sweep(*inputs, backend="triton")
except ValueError as error:
    print(error)
"""


def test_scaled_lse_sweep_runs_without_triton():
    ended = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    values, error = ended.stdout.splitlines()
    assert json.loads(values) == pytest.approx([5.0] * 3)
    assert "needs the package triton" in error


WRONG = {
    "hidden_3d": ({"hidden": torch.zeros(2, 3, 4)}, r"hidden \[N, H\].*\[2, 3, 4\]"),
    "widths_differ": ({"hidden": torch.zeros(6, 5)}, r"\[6, 5\] and \[10, 4\]"),
    "weight_quantised": ({"weight": torch.zeros(10, 4, dtype=torch.uint8)}, "uint8.*dequantised"),
    "tau_column": ({"log_scale": torch.zeros(6, 1)}, r"log_scale: expected .*\[6\].*\[6, 1\]"),
    "tau_integer": ({"log_scale": torch.zeros(6, dtype=torch.long)}, "log_scale: expected floating-point"),
    "labels_short": ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels: expected .*\[6\].*\[5\]"),
    "labels_floating": ({"labels": torch.zeros(6)}, "labels: expected int64"),
    "label_too_large": ({"labels": torch.full((6,), 10)}, "0 to 9, or -100 for ignored, got 10"),
    "label_negative": ({"labels": torch.full((6,), -1)}, "got -1"),
    "label_in_padding": ({"labels": torch.full((6,), 8), "vocab_size": 8}, "0 to 7, or -100 for ignored, got 8"),
    "bias_short": ({"bias": torch.zeros(9)}, r"bias: expected .*\[10\].*\[9\]"),
    "bias_all_absent": ({"bias": torch.full((10,), -math.inf)}, "at least one entry"),
    "bias_all_padding": ({"bias": torch.tensor([-math.inf] * 8 + [0.0] * 2), "vocab_size": 8}, "at least one entry"),
    "no_vocabulary": ({"vocab_size": 0}, "vocab_size: expected 1 to 10"),
    "vocabulary_too_large": ({"vocab_size": 11}, "vocab_size: expected 1 to 10"),
    "cap_negative": ({"soft_cap": -1.0}, "soft_cap: expected a positive"),
    "clip_upside_down": ({"min_log_scale": 3.0}, "min_log_scale <= max_log_scale"),
    "weight_elsewhere": ({"weight": torch.zeros(10, 4, device="meta")}, "on cpu.*weight: meta"),
    "labels_elsewhere": ({"labels": torch.zeros(6, dtype=torch.long, device="meta")}, "labels: meta"),
    "backend_unknown": ({"backend": "cuda"}, "'auto', 'torch' or 'triton'"),
    "triton_in_float64": (
        {"weight": torch.zeros(10, 4, dtype=torch.float64), "backend": "triton"},
        "float64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_scaled_lse_sweep_says_what_is_wrong(name):
    arguments = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(10, 4),
        "log_scale": torch.zeros(6),
        "labels": torch.zeros(6, dtype=torch.long),
    }
    scaled_lse_sweep(**arguments)
    change, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        scaled_lse_sweep(**(arguments | change))

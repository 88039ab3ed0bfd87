"""The decode bench: what it times outside of a step, which of that it refuses to time, and what its targets say."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from decode_support import BENCH, TOY, few_rows

from llmrl.errors import run_command


def test_the_model_in_place_switches_by_one_plan_and_drifts_from_what_it_should_be(decode, monkeypatch):
    import decode_models
    import decode_ops

    config = decode.BenchConfig(toy=True, experts=4, r=4).switch_config()
    base = decode_models.build_base(decode.SHAPES["toy"], "cpu", torch.float32, 8)
    model = decode_models.in_place_model(base, decode_models.build_experts(base, config))
    calls, merge = [], decode_models.InPlacePlan.merge
    monkeypatch.setattr(
        decode_models.InPlacePlan, "merge", lambda self, *route, **rest: calls.append(1) or merge(self, *route, **rest)
    )
    for token in (3, 4, 5):
        model(torch.tensor([[token]]))
    assert len(calls) == 3
    assert decode_ops.merge_drift(model) < 1e-5
    model._switch_runner.items[5].out[3, 2] += 1.0
    assert decode_ops.merge_drift(model) > 1e-2


def test_main_does_not_time_a_merge_that_is_wrong_in_one_layer(decode, monkeypatch, capsys):
    """In the last rows of one in the middle."""
    import decode_ops

    from llmrl_kernels import MergePlan

    few_rows(decode, monkeypatch, "base, eager", "K1 merge alone", "K1 weight update, float32 A B")
    monkeypatch.setattr(decode_ops, "CHUNK", 1000)  # several to a layer
    merge = MergePlan.merge

    def nearly(self, *route, **rest):
        merge(self, *route, **rest)
        self.items[6].out[-1, -1] += 0.1

    monkeypatch.setattr(MergePlan, "merge", nearly)
    assert run_command(lambda: decode.main(TOY)) == 1
    assert "wrong or broken: K1 merge alone, K1 weight update, float32 A B" in capsys.readouterr().err


def test_a_weight_update_has_float32_experts_whatever_the_base(decode):
    import decode_models
    import decode_rows
    from decode_bytes import Mixture

    shape = decode.SHAPES["toy"]
    base = decode_models.build_base(shape, "cpu", torch.bfloat16, 8)
    experts = decode_models.build_experts(base, decode.BenchConfig(toy=True, experts=4, r=4).switch_config())
    setting = decode.Setting(shape, Mixture("all", 4, 4, 2, 8, 8), "cpu", True, 100, False)
    shop = decode.Workshop(setting, base, experts, decode.Space(base, 8, 4, 4), {})
    run = next(row for row in decode.all_rows() if row.name == decode_rows.K1_SYNC).make(shop)
    assert {(i.base.dtype, i.out.dtype, i.A.dtype, i.B.dtype) for i in run.items} == {
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    }
    assert len(run.items) == 14
    assert run.error()[1] <= 2.0**-8  # one rounding
    assert run.round(0) > 0


def gate_lines(decode, rows, *, batch=1, r=16, unmeasured=False, to="base, CUDA graph"):
    """What the targets say of these rows."""
    import decode_table

    named = [{"name": name, **values} for name, values in rows.items()]
    result = {"configuration": {"batch": batch, "r": r}, "rows": named, "ratio_to": to}
    return {line.split(":")[0]: line.rpartition(": ")[2] for line in decode_table.gates(result, unmeasured=unmeasured)}


K3_GATES = ("K3 dense-masked, batch 1", "K3 dense-masked, batch 64")
RULE = "default by the rule of 95 %"


def test_gates_are_met_or_missed_where_they_were_measured(decode):
    def rows(ratio, share, fused):
        merges = {name: {"share_of_copy": share} for name in ("K1 merge alone", "K1 weight update, float32 A B")}
        return {"K3 dense-masked": {"ratio": ratio}, "K2, one launch": {"ratio": fused}} | merges

    good, bad = gate_lines(decode, rows(1.2, 0.85, 1.06)), gate_lines(decode, rows(1.21, 0.84, 1.07))
    assert [good[name] for name in K3_GATES] == ["met (+20.0 %)", "unmeasured"]
    assert [bad[name] for name in K3_GATES] == ["missed (+21.0 %)", "unmeasured"]
    for name in ("K1 merge alone", "K1 weight update, float32 A B"):
        assert (good[name], bad[name]) == ("met (85.0 %)", "missed (84.0 %)")
    fused = "K2 in one launch, batch 1, r = 16"
    assert (good[fused], bad[fused]) == ("met (+6.0 %)", "missed (+7.0 %)")
    large = gate_lines(decode, rows(1.21, 0.84, 1.07), batch=64)
    assert [large[name] for name in K3_GATES] == ["unmeasured", "missed (+21.0 %)"]
    assert gate_lines(decode, rows(1.2, 0.85, 1.06), r=8)[fused] == "unmeasured"
    assert set(gate_lines(decode, rows(1.2, 0.85, 1.06), unmeasured=True).values()) == {"unmeasured"}
    other = gate_lines(decode, rows(1.2, 0.85, 1.06), to="base, eager")
    assert other[K3_GATES[0]] == "unmeasured"  # a ratio to another base is no answer
    assert set(gate_lines(decode, {}).values()) == {"unmeasured"}


@pytest.mark.parametrize(
    ("two", "one", "shares", "default"),
    [
        (10.0, 8.0, ("met (95.0 %)", "met (118.8 %)"), "K2 in two launches or one launch"),
        (10.1, 10.0, ("missed (94.1 %)", "met (95.0 %)"), "K2 in one launch"),
        (9.5, None, ("met (100.0 %)", "unmeasured"), "K2 in two launches"),
        (12.5, 10.5, ("missed (76.0 %)", "missed (90.5 %)"), "cuBLAS + K3, as K2's base part reaches 90.5 % of cuBLAS"),
    ],
)
def test_the_default_is_cublas_where_the_base_part_is_slower(decode, two, one, shares, default):
    times = {"linear layers alone": 9.5, "K2 base part, two launches": two, "K2 base part, one launch": one}
    rows = {name: {"not_run": "why"} if ms is None else {"ms": {"median": ms}} for name, ms in times.items()}
    found = gate_lines(decode, rows)
    assert (found["K2 base part, two launches"], found["K2 base part, one launch"]) == shares
    assert found[RULE].partition(", where")[0] == default
    assert gate_lines(decode, rows, unmeasured=True)[RULE] == "unmeasured"
    assert gate_lines(decode, {"linear layers alone": rows["linear layers alone"]})[RULE] == "unmeasured"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernel needs the package triton")
def test_the_base_part_is_the_linear_layer_by_the_kernel_of_k2():
    program = f"""
import sys
sys.path.insert(0, {str(BENCH)!r})
import decode
rows = decode.all_rows()
decode.all_rows = lambda: [row for row in rows if row.name in ("base, eager", "linear layers alone") or "base part" in row.name]
sys.exit(decode.main([*{TOY!r}, "--modules", "qv"]))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = [
        line
        for line in ended.stdout.splitlines()
        if line.startswith(("linear layers", "K2 base part")) and "e-" in line
    ]
    assert len(rows) == 3, ended.stdout

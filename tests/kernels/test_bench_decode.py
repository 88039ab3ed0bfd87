"""The decode bench: its bytes against hand-made figures, its table on a toy, and what it refuses."""

import json
import math
import subprocess
import sys

import pytest
import torch
from decode_support import BENCH, TOY, few_rows

from llmrl.errors import run_command

ROWS = [
    "base, eager", "base, compiled", "base, CUDA graph", "merged single LoRA", "peft LoRA of rank k r",
    "layer-wise mixture, eager", "layer-wise mixture, CUDA graph", "in place, one pass: baseline", "K1 merge alone",
    "K1 weight update, float32 A B", "K1 every token", "K1 on change, 1 %", "K1 on change, 10 %", "K1 on change, 50 %",
    "K3 dense-masked", "K3 gathered",
    "K2, two launches", "K2, one launch", "linear layers alone", "K2 base part, two launches", "K2 base part, one launch",
]  # fmt: skip
NOT_ON_A_CPU = {"base, compiled", "base, CUDA graph", "layer-wise mixture, CUDA graph", "K2, one launch"}
NOT_ON_A_CPU |= {"K2 base part, two launches", "K2 base part, one launch"}
GB = 1e9


@pytest.fixture(scope="module")
def toy(decode, tmp_path_factory):
    """Exit code, printed lines and report of one run of every row."""
    file = tmp_path_factory.mktemp("decode") / "toy.json"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.extend(" ".join(map(str, words)).splitlines()))
        code = run_command(lambda: decode.main([*TOY, "--output", str(file)]))
    return code, lines, json.loads(file.read_text(encoding="utf-8"))


def one_token(decode, kind, modules="all", **sizes):
    """Bytes of a step of Llama-2-7B at batch 1 without a cache, over the base's."""
    from decode_bytes import SHAPES, Mixture, step_bytes

    mixture = Mixture(**{"experts": 8, "r": 16, "top_k": 2, "rows": 1, "cached": 0, "modules": modules} | sizes)
    alone = kind in ("merge", "sync", "linears")
    return step_bytes(kind, SHAPES["7b"], mixture) - (not alone) * step_bytes("base", SHAPES["7b"], mixture)


# ---- bytes: figures worked out by hand from 4096 x 4096 and 4096 x 11008, 32 layers, 16 bits ----


def test_step_bytes_base_is_every_linear_layer_and_the_output_layer(decode):
    from decode_bytes import SHAPES, Mixture, step_bytes

    base = step_bytes("base", SHAPES["7b"], Mixture("all", 8, 16, 2, 1, 0))
    assert base == 2 * (32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096)
    assert base / GB == pytest.approx(13.21, abs=0.005)


@pytest.mark.parametrize(
    ("modules", "gigabytes", "per_cent"), [("all", 25.90, 196), ("attention", 8.59, 65), ("qv", 4.29, 33)]
)
def test_step_bytes_merge_reads_and_writes_what_is_adapted(decode, modules, gigabytes, per_cent):
    from decode_bytes import SHAPES, merge_overhead, rewrite_bytes

    assert rewrite_bytes(SHAPES["7b"], modules) / GB == pytest.approx(gigabytes, abs=0.006)
    assert round(100 * merge_overhead(SHAPES["7b"], modules)) == per_cent
    experts = one_token(decode, "lora", modules)
    assert one_token(decode, "merge", modules) == rewrite_bytes(SHAPES["7b"], modules) + experts
    assert one_token(decode, "merged", modules) == one_token(decode, "merge", modules)
    assert one_token(decode, "in_place", modules) == one_token(decode, "merge", modules) + experts


def test_step_bytes_of_a_weight_update_have_one_expert_in_float32(decode):
    from decode_bytes import SHAPES, rewrite_bytes

    whole = rewrite_bytes(SHAPES["7b"], "all")
    assert one_token(decode, "sync") - whole == one_token(decode, "merge") - whole  # one of 4 bytes, two of 2
    assert one_token(decode, "sync", top_k=4) == one_token(decode, "sync")
    assert one_token(decode, "linears") == whole / 2


@pytest.mark.parametrize(("r", "megabytes"), [(8, 80), (16, 160), (32, 320), (64, 640)])
def test_step_bytes_of_two_experts_grow_with_their_rank(decode, r, megabytes):
    assert one_token(decode, "lora", r=r) / 1e6 == pytest.approx(megabytes, rel=0.002)
    assert one_token(decode, "gathered", r=r) == pytest.approx(one_token(decode, "lora", r=r))


def test_step_bytes_dense_reads_all_experts_whatever_the_batch(decode):
    dense = one_token(decode, "dense")
    assert dense / (13.21 * GB) == pytest.approx(0.048, abs=5e-4)
    assert one_token(decode, "dense", rows=64) == dense
    assert one_token(decode, "layerwise") > dense  # and routers


@pytest.mark.parametrize(("rows", "distinct"), [(1, 2.0), (2, 3.5), (4, 5.5), (8, 7.2), (64, 8.0)])
def test_distinct_experts_fill_up_with_the_batch(decode, rows, distinct):
    from decode_bytes import distinct_experts

    assert distinct_experts(8, 2, rows) == pytest.approx(distinct, abs=0.05)


def test_kv_bytes_are_half_a_megabyte_a_token(decode):
    from decode_bytes import SHAPES, kv_bytes

    assert kv_bytes(SHAPES["7b"], 1, 1) == 2**19
    assert kv_bytes(SHAPES["7b"], 3, 5) == 15 * 2**19


def test_bytes_count_the_parameters_of_a_model(decode):
    from decode_bytes import ModelShape, base_bytes, kv_bytes, linear_parameters, lora_bytes, router_bytes
    from decode_models import adapted, build_base, build_experts

    shape = ModelShape(64, 3, 96, 8, 2, 128)  # two heads of keys and values
    base = build_base(shape, "cpu", torch.float32, 8)
    for modules in ("all", "attention", "qv"):
        config = decode.BenchConfig(toy=True, modules=modules, experts=4, r=2).switch_config()
        linear = adapted(base, config)
        assert linear_parameters(shape, modules) == sum(layer.weight.numel() for layer in linear.values())
        held = sum(A.nbytes + B.nbytes for A, B in build_experts(base, config).layers.values())
        assert lora_bytes(shape, modules, 4 * 2, 4) == held
        assert router_bytes(shape, modules, 4, 4) == sum(4 * 4 * layer.in_features for layer in linear.values())
    assert base_bytes(shape, 4) == sum(
        p.nbytes for n, p in base.named_parameters() if "norm" not in n and "embed" not in n
    )
    cache = base(torch.zeros(3, 5, dtype=torch.long), use_cache=True).past_key_values
    assert kv_bytes(shape, 3, 5, 4) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_stream_changes_as_often_as_it_says(decode):
    from decode_measure import Space

    space = Space.__new__(Space)
    space.rows, space.vocab, space.device = 2, 50, torch.device("cpu")
    for change in (0.01, 0.1, 0.5, 1.0):
        tokens = space.stream(100, change, 3)
        assert tokens.shape == (101, 2, 1)
        assert int((tokens[1:] != tokens[:-1]).all(1).sum()) == round(100 * change)
        assert int((tokens[1:] != tokens[:-1]).any(1).sum()) == round(100 * change)


# ---- the toy ----


def test_main_prints_every_row_of_the_toy(toy):
    code, lines, report = toy
    assert code == 0
    for name in ROWS:
        line = next(line for line in lines if line.startswith(name))
        assert ("not run: " in line) == (name in NOT_ON_A_CPU)
    assert [row["name"] for row in report["results"][0]["rows"]] == ROWS
    text = "\n".join(lines)
    assert "a toy, not a claim about GPUs" in text
    assert "+29 %" in text
    assert "+196 % with all linear layers, +65 % with attention, +33 % with q and v" in " ".join(lines)
    assert text.count("unmeasured") == 8
    assert not any(line.endswith(("met", "missed")) for line in lines)
    assert "default by the rule of 95 %: unmeasured" in lines
    assert "merge_snr" in text


def test_main_times_rows_that_agree_with_float32(toy, decode):
    result = toy[2]["results"][0]
    assert result["ratio_to"] == "base, eager"
    assert result["experts_move_logits_by"] > 0.1
    for row in result["rows"]:
        if "not_run" in row:
            continue
        assert row["relative_error"] <= 1e-5
        assert math.isfinite(row["ratio"])
        assert row["ratio"] > 0
        assert len(row["rounds_ms"]) == 3
        assert row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["gb_s"] == pytest.approx(row["gb"] / row["ms"]["median"] * 1e3)
        assert row["share_of_copy"] == pytest.approx(row["gb_s"] / result["copy_gb_s"])
        assert row["launches"] > 0
        assert row["bytes_held"] > 0


def test_main_counts_what_a_row_adds(toy):
    rows = {row["name"]: row for row in toy[2]["results"][0]["rows"]}
    base = rows["base, eager"]
    assert rows["merged single LoRA"]["launches"] == base["launches"]
    assert rows["merged single LoRA"]["gb"] == base["gb"]
    assert rows["K3 dense-masked"]["launches"] > base["launches"]
    weights = 4 * 2 * (4 * 64 * 64 + 3 * 64 * 128)  # float32, two layers
    assert rows["K1 every token"]["bytes_held"] - base["bytes_held"] > weights
    assert rows["K1 on change, 50 %"]["gb"] < rows["K1 every token"]["gb"]


def test_merge_snr_of_the_toy_is_that_of_its_first_layer(toy, decode):
    from decode_models import build_base, build_experts

    from llmrl_kernels import merge_snr

    found = toy[2]["results"][0]["merge_snr"]
    assert list(found) == ["0.3", "0.01", "0.001"]
    assert found["0.3"] > found["0.01"] > found["0.001"] > 1e3  # float32 has room below all of them
    config = decode.BenchConfig(toy=True, experts=4, r=4)
    base = build_base(decode.SHAPES["toy"], "cpu", torch.float32, 8)
    A, B = build_experts(base, config.switch_config()).layers["model.layers.0.self_attn.q_proj"]
    delta = config.switch_config().scale * 0.5 * (B[:, :8] @ A[:2].flatten(0, 1))
    assert found["0.3"] == pytest.approx(merge_snr(base.model.layers[0].self_attn.q_proj.weight, delta), rel=0.05)


def test_main_measures_the_drift_of_the_weights_in_place(toy):
    assert 1e-8 < toy[2]["results"][0]["in_place_drift"] < 1e-4


def test_main_names_device_toy_and_environment(toy):
    report = toy[2]
    assert report["device"] == "cpu"
    assert report["toy"] is True
    assert report["environment"]["packages"]["torch"] == torch.__version__
    configuration = report["results"][0]["configuration"]
    assert configuration["model"] == "toy"
    assert configuration["r"] == 4


# ---- what is refused ----


def test_main_does_not_time_a_row_that_is_wrong(decode, monkeypatch, capsys):
    import decode_models

    few_rows(decode, monkeypatch, "base, eager", "K3 gathered", "K3 dense-masked")
    expand = decode_models.routed_expand_gathered
    # every expert but the last slot's
    broken = lambda u, B, ids, **rest: expand(u[:, :-1], B, ids[:, :-1], **rest)  # noqa: E731
    monkeypatch.setattr(decode_models, "routed_expand_gathered", broken)
    assert run_command(lambda: decode.main(TOY)) == 1
    out, err = capsys.readouterr()
    assert "not timed, because wrong or broken: K3 gathered" in err
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "WRONG, not timed: error" in lines["K3 gathered"]
    assert "WRONG" not in lines["K3 dense-masked"]


def test_main_times_the_others_where_a_row_breaks(decode, monkeypatch, capsys):
    import decode_models

    few_rows(decode, monkeypatch, "base, eager", "K2, two launches", "K3 dense-masked")
    monkeypatch.setattr(decode_models, "switch_linear", lambda *a, **k: 1 / 0)
    assert run_command(lambda: decode.main(TOY)) == 1
    out, err = capsys.readouterr()
    assert "wrong or broken: K2, two launches" in err
    assert "WRONG, not timed: ZeroDivisionError" in out
    assert next(line for line in out.splitlines() if line.startswith("K3 dense-masked")).endswith("e-07")


def test_main_does_not_time_a_merge_that_does_nothing(decode, monkeypatch, capsys):
    from llmrl_kernels import MergePlan

    few_rows(decode, monkeypatch, "base, eager", "K1 merge alone", "K1 every token")
    merge, calls = MergePlan.merge, []

    def once(self, *route, **rest):
        if self not in calls:
            calls.append(self)
            merge(self, *route, **rest)

    monkeypatch.setattr(MergePlan, "merge", once)
    assert run_command(lambda: decode.main(TOY)) == 1
    assert "wrong or broken: K1 every token, K1 merge alone" in capsys.readouterr().err


def test_main_refuses_experts_that_do_not_show(decode, monkeypatch, capsys):
    import decode_models

    few_rows(decode, monkeypatch, "base, eager")
    monkeypatch.setattr(decode_models, "WEIGHT", 1e-6)
    assert run_command(lambda: decode.main(TOY)) == 1
    assert "the experts move the logits by" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["decode-toy.json", "deeper/../decode-toy.json"])
def test_main_refuses_a_toy_among_the_results(decode, capsys, inside):
    file = BENCH.parent / "results" / inside
    assert run_command(lambda: decode.main([*TOY, "--output", str(file)])) == 2
    err = capsys.readouterr().err
    assert "a toy or a CPU is no result" in err
    assert len(err.splitlines()) == 1
    assert not file.resolve().exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cpu"], "takes a GPU"),
        (["--device", "cpu", "--toy", "--sweep"], "--sweep takes a GPU"),
        (["--device", "cpu", "--toy", "--tokens", "50"], "--tokens must be at least 100"),
        (["--device", "cpu", "--toy", "--top_k", "9"], "top_k"),
        (["--device", "cpu", "--toy", "--output", "no/such/folder/x.json"], "not found"),
    ],
)
def test_main_refuses_what_cannot_run(decode, capsys, options, words):
    assert run_command(lambda: decode.main(options)) == 2
    assert words in capsys.readouterr().err


def test_configurations_of_a_sweep(decode):
    def sweep(kind):
        found = decode.configurations(decode.BenchConfig(sweep=kind))
        return [(one.batch, one.r, one.modules) for one in found]

    assert len(sweep("full")) == len(set(sweep("full"))) == 6 * 4 * 3
    assert set(sweep("some")) < set(sweep("full"))
    assert {(64, 16, "all"), (1, 64, "all"), (1, 16, "qv")} <= set(sweep("some"))
    assert sweep("none") == [(1, 16, "all")]


def test_open_report_goes_on_with_a_sweep(decode, tmp_path):
    file = tmp_path / "sweep.json"
    config = decode.BenchConfig(toy=True, sweep="some", output=str(file))
    report = decode.open_report(config, "cpu")
    report["results"] = [{"rows": [{"name": "K1"}]}, {"rows": [{"name": "K1", "wrong": "error"}]}]
    file.write_text(json.dumps(report), encoding="utf-8")
    assert decode.open_report(config, "cpu")["results"] == [{"rows": [{"name": "K1"}]}]
    file.write_text(json.dumps(report | {"device": "another"}), encoding="utf-8")
    with pytest.raises(decode.UsageError, match="another machine"):
        decode.open_report(config, "cpu")


def test_decode_runs_without_what_is_optional():
    program = f"""
import sys
for name in ("peft", "matplotlib", "trl", "datasets", "vllm"):
    sys.modules[name] = None
sys.path.insert(0, {str(BENCH)!r})
import decode
rows = decode.all_rows()
decode.all_rows = lambda: [row for row in rows if row.name in ("base, eager", "peft LoRA of rank k r")]
sys.exit(decode.main({TOY!r}))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "not run: peft is not installed" in ended.stdout

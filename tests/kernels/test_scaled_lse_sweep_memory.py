"""Peak memory of the sweep beside its inputs, counted from the tensors that exist, and the bench that counts it."""

import json

import pytest
import torch

from llmrl_kernels import scaled_lse_sweep


def peak(bench, sweep, tokens, vocab, width=16):
    inputs = bench.make_inputs(tokens, width, vocab, "cpu", torch.float32)
    return bench.peak_bytes(lambda: bench.loss_gradient(sweep, inputs), "cpu")


def test_live_storage_counts_what_exists_at_a_time(bench):
    before = torch.zeros(1000)
    with bench.LiveStorage() as live:
        a = before + 1  # 4,000 bytes
        b = a[:500].view(50, 10) * 2  # 2,000 more: the view costs nothing
        del a
        torch.add(before, 1, out=before)
        c = b.clone()  # 2,000 + 2,000
    assert live.peak == 6000
    assert c.shape == (50, 10)


def test_scaled_lse_sweep_peak_memory_does_not_grow_with_vocabulary_times_tokens(bench):
    """Forward and backward, 4 times the tokens and 4 times the vocabulary; the plain way needs 16 times as much."""
    small, large = ((512, 4096), (2048, 16_384))
    ours = [peak(bench, scaled_lse_sweep, *shape) for shape in (small, large)]
    naive = [peak(bench, bench.naive_sweep, *shape) for shape in (small, large)]
    vectors = 200 * (large[0] - small[0])  # bytes: some vectors of a number a token
    assert ours[1] <= ours[0] + vectors
    assert ours[1] < 10 << 20
    assert naive[1] > naive[0] + 10 * vectors
    assert naive[1] > 50 * ours[1]


def test_scaled_lse_sweep_peak_memory_does_not_grow_with_the_vocabulary_at_all(bench):
    peaks = [peak(bench, scaled_lse_sweep, 300, vocab) for vocab in (10_000, 20_000, 40_000)]
    assert max(peaks) <= 1.01 * min(peaks)


def test_scaled_lse_sweep_keeps_vectors_only_between_forward_and_backward(bench):
    hidden, weight, tau, labels = bench.make_inputs(2000, 16, 3000, "cpu", torch.float32)
    tau.requires_grad_()
    with bench.LiveStorage() as live:
        outputs = scaled_lse_sweep(hidden, weight, tau, labels)
        torch.zeros(1)  # the meter looks once more, after the sweep's own tensors are gone
        kept = sum(size for _, size in live._live.values())
    assert outputs.lse.requires_grad
    assert kept <= 100 * 2000


def test_bench_checks_measures_and_writes(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SHAPES", {"cpu": ((64, 16, 500),), "cuda": ((64, 64, 512),)})
    assert bench.main(["--output_dir", str(tmp_path), "--rounds", "3"]) == 0
    (path,) = tmp_path.glob("scaled_lse_sweep-*.json")
    report = json.loads(path.read_text())
    assert report["toy"] == (not torch.cuda.is_available())
    (result,) = report["results"]
    assert result["product"]["share_of_product"] == 1.0
    assert len(result["sweep"]["rounds_ms"]) == 3
    assert 0 < result["sweep"]["peak_mib"] < result["naive"]["peak_mib"]
    assert str(tmp_path) not in path.read_text()
    assert "of product" in capsys.readouterr().out


def test_bench_prints_no_time_for_a_wrong_sweep(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "naive_sweep", lambda *inputs: scaled_lse_sweep(*inputs, logit_scale=1.01))
    with pytest.raises(bench.ModelError, match="naive is wrong"):
        bench.main(["--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())

"""The Triton kernel against the reference. Run by `test_scaled_lse_sweep_triton.py` in a process of its own: Triton decides
when it is imported whether it interprets (`TRITON_INTERPRET=1`, on the CPU) or compiles for a GPU."""

import math

import pytest
import torch
from sweep_inputs import EVERYTHING, assert_matches_reference, sweep_inputs

from llmrl_kernels import LseSweep, scaled_lse_sweep
from llmrl_kernels.scaled_lse_sweep_triton import INTERPRETED, sweep_parts

DEVICE = "cpu" if INTERPRETED else "cuda"


def on_device(arguments, keywords):
    keywords = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
    return tuple(part.to(DEVICE) for part in arguments), keywords


def hold_to_reference(arguments, keywords, **tolerance):
    return assert_matches_reference(*on_device(arguments, keywords), backend="triton", **tolerance)


def one_hot_inputs(logits, tau, label=0):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    count = len(logits)
    return torch.eye(count), logits.T.contiguous(), torch.full((count,), float(tau)), torch.full((count,), label)


def sweep(arguments, keywords=None):
    arguments, keywords = on_device(arguments, keywords or {})
    return scaled_lse_sweep(*arguments, **keywords, backend="triton")


@pytest.mark.parametrize(
    ("tokens", "width", "vocab"), [(1, 1, 1), (1, 65, 1000), (63, 31, 63), (63, 64, 64), (100, 33, 129), (33, 128, 200)]
)
def test_matches_reference_on_odd_shapes(tokens, width, vocab):
    hold_to_reference(*sweep_inputs(tokens, width, vocab))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [(), ("bias",), ("soft_cap",), EVERYTHING], ids=str)
def test_matches_reference_with_every_option(options, dtype):
    hold_to_reference(*sweep_inputs(40, 33, 150, dtype=dtype, options=options))


def test_is_the_portable_path_on_random_numbers():
    g = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):  # bfloat16: a sum rounded the other way
        hidden, weight = (torch.randn(n, 40, generator=g).to(dtype) for n in (30, 200))
        tau, labels = torch.randn(30, generator=g), torch.randint(0, 200, (30,), generator=g)
        arguments, _ = on_device((hidden, weight, tau, labels), {})
        ours, theirs = (scaled_lse_sweep(*arguments, backend=backend) for backend in ("triton", "torch"))
        for a, b in zip(ours[:6], theirs[:6], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_shares_of_the_vocabulary_add_up(shares):
    """Eight shares of three tiles: five are empty."""
    from llmrl_kernels.scaled_lse_sweep import Moments, merge

    (hidden, weight, tau, labels), keywords = sweep_inputs(40, 20, 150, options=("bias",))
    rows, scale = torch.arange(40), tau.exp()
    (hidden, weight, rows, labels, scale), _ = on_device((hidden, weight, rows, labels.clamp_min(1), scale), {})
    bias = keywords["bias"].to(DEVICE)
    z = hidden.double() @ weight.double().T + bias.double()
    sums, argmax = sweep_parts(hidden, weight, bias, rows, labels, scale, 1.0, 0.0, shares=shares)
    assert sums.shape == (5, shares, 40)
    assert argmax.shape == (shares, 40)
    moments = merge(Moments(*sums.unbind(), argmax.long()), scale)
    shifted = z - z.amax(-1, keepdim=True)
    p = (shifted * scale.double()[:, None]).exp()
    finite = shifted.clamp_min(-1e30)
    for ours, theirs in (
        (moments.top, z.amax(-1)),
        (moments.total, p.sum(-1)),
        (moments.weighted, (p * finite).sum(-1)),
        (moments.plain, z.where(z.isfinite(), 0.0).sum(-1)),
        (moments.target, z.gather(1, labels[:, None])[:, 0]),
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert moments.argmax.equal(z.argmax(-1))


def test_ignored_rows_are_neither_read_nor_written():
    (hidden, weight, tau, labels), keywords = sweep_inputs(50, 20, 100, options=EVERYTHING)
    ignored = labels == -100
    hidden[ignored] = math.nan
    outputs = sweep((hidden, weight, tau, labels), keywords)
    alone = sweep((hidden[~ignored], weight, tau[~ignored], labels[~ignored]), keywords)
    for ours, theirs in zip(outputs, alone, strict=True):
        torch.testing.assert_close(ours[~ignored], theirs)
    assert outputs.lse[ignored].eq(0).all()
    assert outputs.argmax[ignored].eq(-1).all()


def test_nothing_to_sweep():
    empty = (torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert all(part.shape == (0,) for part in sweep(empty))
    ignored = (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3), torch.full((3,), -100))
    assert sweep(ignored).lse.eq(0).all()


def test_padding_is_never_used():
    (hidden, weight, tau, labels), _ = sweep_inputs(20, 8, 100)
    weight[70:] = math.nan
    bias = torch.zeros(100)
    bias[70:] = math.nan
    hold_to_reference((hidden, weight, tau, labels.clamp_max(69)), {"vocab_size": 70, "bias": bias})


@pytest.mark.parametrize("cap", [None, 2.0])
def test_tiles_without_a_present_entry(cap):
    (hidden, weight, tau, _), _ = sweep_inputs(20, 8, 300)
    bias = torch.full((300,), -math.inf)
    bias[130:135] = 0.0
    hold_to_reference((hidden, weight, tau, torch.full((20,), 132)), {"bias": bias, "soft_cap": cap})


@pytest.mark.parametrize("label", [0, 63, 64, 127, 128, 255, 256, 299])
def test_label_at_the_edge_of_a_tile(label):
    logits = torch.linspace(-1, 1, 300)[None]
    assert sweep(one_hot_inputs(logits, 0.0, label)).target.item() == logits[0, label].item()


def test_clip_of_tau():
    (hidden, weight, _, labels), _ = sweep_inputs(6, 8, 100)
    tau = torch.tensor([-50.0, -3.0, 0.0, 2.3, 2.302585, 50.0])
    hold_to_reference((hidden, weight, tau, labels), {})


def test_confidence_of_exactly_one_and_close_to_it():
    logits = torch.zeros(3, 200)
    logits[0, 150], logits[1, 0] = 1e4, 300.0
    logits[2] = -20.0
    logits[2, 70] = 0.0
    outputs = sweep(one_hot_inputs(logits, 0.0))
    assert outputs.top_logprob[:2].eq(0).all()
    assert outputs.lse[:2].equal(outputs.top[:2])
    assert outputs.argmax.tolist() == [150, 0, 70]
    assert outputs.expected[2].item() == pytest.approx(-20 * 199 * math.exp(-20), rel=1e-4)


def test_first_of_equals_within_a_tile_between_tiles_and_between_shares():
    logits = torch.zeros(5, 260)
    logits[0, [3, 4]] = 5.0
    logits[1, [70, 130, 131]] = 5.0
    logits[2, [100, 250]] = 5.0
    logits[3, [259]] = 1.0
    assert sweep(one_hot_inputs(logits, 0.0)).argmax.tolist() == [3, 70, 100, 259, 0]


@pytest.mark.parametrize("highest", [300, -300])
def test_maximum_that_moves_at_every_tile_or_never(highest):
    logits = torch.linspace(-highest, highest, 333)[None]
    for tau in (-3.0, 2.0):
        hold_to_reference(one_hot_inputs(logits, tau, label=200), {}, atol=2e-4)


def test_nan_or_infinite_logit_spoils_its_own_row_alone():
    logits = torch.randn(4, 130, generator=torch.Generator().manual_seed(0))
    good = sweep(one_hot_inputs(logits, 0.3))
    hidden = torch.eye(4)
    hidden[1, 1], hidden[2, 2] = math.nan, math.inf
    bad = sweep((hidden, logits.T.contiguous(), torch.full((4,), 0.3), torch.zeros(4, dtype=torch.long)))
    for ours, theirs in zip(bad[:6], good[:6], strict=True):
        assert ours[1:3].isnan().all()
        torch.testing.assert_close(ours[[0, 3]], theirs[[0, 3]])
    assert bad.argmax[1:3].tolist() == [-1, -1]


def test_takes_any_strides():
    (hidden, weight, tau, labels), keywords = sweep_inputs(30, 70, 80, options=EVERYTHING)
    arguments, keywords = on_device((hidden, weight, tau, labels), keywords)
    hidden, weight, tau, labels = arguments
    plain = scaled_lse_sweep(*arguments, **keywords, backend="triton")
    keywords["bias"] = torch.stack([keywords["bias"], torch.zeros_like(keywords["bias"])], 1)[:, 0]
    strided = (
        torch.stack([hidden, hidden * 0], 2)[:, :, 0],
        weight.T.contiguous().T,
        torch.stack([tau, tau * 0], 1)[:, 0],
        torch.stack([labels, labels * 0], 1)[:, 0],
    )
    assert not any(part.is_contiguous() for part in (*strided, keywords["bias"]))
    for ours, theirs in zip(scaled_lse_sweep(*strided, **keywords, backend="triton"), plain, strict=True):
        assert ours.equal(theirs)


def test_peak_memory_grows_with_the_tokens_alone(bench):
    """Four times the tokens and four times the vocabulary: sixteen times the logits, four times the vectors."""

    def peak(tokens, vocab):
        inputs = bench.make_inputs(tokens, 16, vocab, DEVICE, torch.float32)
        step = lambda: bench.loss_gradient(lambda *i: scaled_lse_sweep(*i, backend="triton"), inputs)  # noqa: E731
        step()  # the tuner's own
        return bench.peak_bytes(step, DEVICE)

    small, large = peak(32, 128), peak(128, 512)
    assert large <= 4.2 * small
    assert large < 128 * 512 * 4 / 8  # an eighth of the logits


def test_is_chosen_on_a_gpu_and_not_on_a_cpu():
    arguments, _ = on_device(*sweep_inputs(10, 8, 30))
    chosen = scaled_lse_sweep(*arguments)
    named = scaled_lse_sweep(*arguments, backend="torch" if INTERPRETED else "triton")
    assert all(a.equal(b) for a, b in zip(chosen, named, strict=True))
    assert chosen._fields == LseSweep._fields

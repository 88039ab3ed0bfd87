"""Heads on cached features: batches of windows of different lengths give what each window alone gives."""

from dataclasses import replace

import pytest
import torch

from llmrl.ats.fit import shuffle_hidden
from llmrl.ats.run_heads import batch_log_scales, head_log_scales, window_batches
from llmrl.heads import HeadSpec, build_head
from llmrl.logits_heads import initialise

SPEC = HeadSpec("temperature", "transformer", 8, intermediate_size=24, num_heads=2, num_kv_heads=1, head_dim=8)


@pytest.fixture
def ragged(make_world):
    """Windows of 1 to 17 states of which about half predict a scored token."""
    world = make_world(lambda hidden: torch.zeros(len(hidden)), tokens=300)
    lengths = torch.tensor([5, 17, 1, 9, 12, 3, 16, 2, 8, 11])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    window = torch.arange(10).repeat_interleave(lengths)
    keep = torch.rand(int(offsets[-1]), generator=torch.Generator().manual_seed(1)) < 0.5
    keep[offsets[1:] - 1] = True  # the last state of a window predicts a scored token
    row = keep.nonzero()[:, 0]
    part = world.features.select(torch.arange(len(row)))
    return replace(part, offsets=offsets, row=row, window=window[row])


@pytest.fixture
def drawn_head():
    head = build_head(SPEC).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    initialise(head, generator)
    head.weight.normal_(0.0, 0.4, generator=generator)
    return head


def test_head_log_scales_of_a_transformer_is_its_forward_on_each_window(ragged, drawn_head, monkeypatch):
    monkeypatch.setattr("llmrl.ats.run_heads._SEQUENCE_BLOCK", 40)
    found = head_log_scales(drawn_head, ragged)
    expected = torch.empty(len(ragged))
    for i in range(10):
        start, end = ragged.offsets[i], ragged.offsets[i + 1]
        inside = ragged.window == i
        expected[inside] = drawn_head(ragged.states[None, start:end])[0, ragged.row[inside] - start, 0]
    torch.testing.assert_close(found, expected)
    assert found.std() > 0.1


def test_head_log_scales_of_some_windows_are_those_among_all(ragged, drawn_head):
    found = head_log_scales(drawn_head, ragged)
    some = ragged.of_windows([1, 4, 7])
    torch.testing.assert_close(head_log_scales(drawn_head, some), found[torch.isin(ragged.window, some.window)])


def test_batch_log_scales_gradient_of_a_batch_is_that_of_its_windows(ragged, drawn_head):
    drawn_head.requires_grad_()
    tokens = torch.cat([(ragged.window == i).nonzero()[:, 0] for i in (0, 3, 8)])

    def gradient(parts):
        drawn_head.zero_grad()
        sum(batch_log_scales(drawn_head, ragged, part).square().sum() for part in parts).backward()
        return {name: p.grad.clone() for name, p in drawn_head.named_parameters()}

    together = gradient([tokens])
    apart = gradient([(ragged.window == i).nonzero()[:, 0] for i in (0, 3, 8)])
    for name in together:
        torch.testing.assert_close(together[name], apart[name], rtol=1e-4, atol=1e-5)


def test_batch_log_scales_refuses_a_transformer_without_whole_windows(ragged, drawn_head):
    with pytest.raises(ValueError, match="sequences=True"):
        head_log_scales(drawn_head, shuffle_hidden(ragged, 0))


@pytest.mark.parametrize("size", [1, 20, 45, 1000])
def test_window_batches_hold_whole_windows_within_the_size(size, ragged):
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    batches = list(window_batches(ragged, order, size))
    assert torch.cat(batches).sort().values.equal(torch.arange(len(ragged)))
    lengths = ragged.offsets.diff()
    for tokens in batches:
        assert tokens.equal(tokens.sort().values)
        inside = ragged.window[tokens].unique()
        assert torch.isin(ragged.window, inside).sum() == len(tokens)
        assert len(inside) * lengths[inside].max() <= size or len(inside) == 1
    assert len(batches) <= (2 * 10 * 17) // size + 1 or size == 1

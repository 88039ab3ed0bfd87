"""What is drawn: the filters against transformers', frequencies against probabilities, seeds."""

import pytest
import torch
from engine_support import token_logprobs

from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.transformers_engine import draw, filtered
from llmrl.types import SamplingConfig


def logits_of(seed, size=50):
    return 1.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("ours", "warper"),
    [
        ({"top_k": 1}, ("TopKLogitsWarper", 1)),
        ({"top_k": 7}, ("TopKLogitsWarper", 7)),
        ({"top_k": 500}, ("TopKLogitsWarper", 500)),
        ({"top_p": 0.1}, ("TopPLogitsWarper", 0.1)),
        ({"top_p": 0.9}, ("TopPLogitsWarper", 0.9)),
        ({"min_p": 0.05}, ("MinPLogitsWarper", 0.05)),
        ({"min_p": 1.0}, ("MinPLogitsWarper", 1.0)),
    ],
    ids=str,
)
def test_filtered_equals_transformers_warper(ours, warper):
    from transformers.generation import logits_process

    reference = getattr(logits_process, warper[0])(warper[1])
    for seed in range(20):
        logits = logits_of(seed)
        expected = reference(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0]
        assert torch.equal(filtered(logits, SamplingConfig(**ours)), expected)
        assert torch.isfinite(expected).any()


def test_filtered_orders_min_p_before_top_k_before_top_p():
    """Probabilities 0.4 0.3 0.2 0.1: top-k 3 leaves shares of 4/9 3/9 2/9, of which top-p 0.75 needs two."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    both = filtered(logits, SamplingConfig(top_k=3, top_p=0.75))
    assert torch.isfinite(both).tolist() == [True, True, False, False]  # top-p first would keep three
    assert torch.isfinite(filtered(logits, SamplingConfig(top_p=0.75))).tolist() == [True, True, True, False]
    # min-p leaves 0.4 and 0.3, shares 4/7 and 3/7; top-p 0.55 then keeps one, on the whole it would keep two
    assert torch.isfinite(filtered(logits, SamplingConfig(min_p=0.7, top_p=0.55))).tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert torch.isfinite(filtered(logits, SamplingConfig(top_p=0.55))).tolist() == [True, True, False, False]


def test_filtered_without_filters_changes_nothing():
    assert torch.equal(filtered(logits_of(0), SamplingConfig()), logits_of(0))


def chi_square(counts, probs, draws):
    """Return the statistic over cells of at least five expected draws, and its degrees of freedom."""
    expected = probs * draws
    big = expected >= 5
    return float(((counts - expected)[big] ** 2 / expected[big]).sum()), int(big.sum())


def assert_frequencies(tokens, probs):
    """The draws may come from `probs`: the statistic is within six standard deviations of its mean."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    statistic, freedom = chi_square(counts, probs.double(), len(tokens))
    assert freedom >= 2
    assert counts[probs == 0].sum() == 0
    assert counts[probs * len(tokens) < 5].sum() <= 4 * (probs[probs * len(tokens) < 5].sum() * len(tokens) + 1)
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6


def expected_probs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The distribution to sample from, token by token in plain Python."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    keep = sorted(range(len(probs)), key=lambda token: -probs[token])
    keep = [token for token in keep if probs[token] >= min_p * probs[keep[0]]]
    keep = keep[: top_k or None]
    total, nucleus = sum(probs[token] for token in keep), []
    for token in keep:
        if sum(probs[t] for t in nucleus) < top_p * total:
            nucleus.append(token)
    share = sum(probs[token] for token in nucleus)
    return torch.tensor([probs[token] / share if token in nucleus else 0.0 for token in range(len(probs))])


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draw_has_the_expected_frequencies(setting):
    logits, generator = logits_of(5, size=12), torch.Generator().manual_seed(0)
    tokens = [draw(logits, SamplingConfig(**setting), generator) for _ in range(3000)]
    assert_frequencies(tokens, expected_probs(logits, **setting))


@pytest.mark.vllm
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_vllm_draws_with_the_expected_frequencies(setting, stories_vllm, stories_model, stories_tokenizer):
    prompt = stories_tokenizer("She saw a big")["input_ids"]  # ten words are likely
    samples = stories_vllm.generate([prompt], SamplingConfig(max_tokens=1, n=1000, seed=1, **setting))[0]
    with torch.inference_mode():
        logits = stories_model(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert_frequencies([sample.token_ids[0] for sample in samples], expected_probs(logits, **setting))


def test_assert_frequencies_notices_another_temperature():
    logits, generator = logits_of(5, size=12), torch.Generator().manual_seed(0)
    tokens = [draw(logits, SamplingConfig(temperature=0.8), generator) for _ in range(3000)]
    with pytest.raises(AssertionError):
        assert_frequencies(tokens, expected_probs(logits))


def test_same_seed_gives_the_same_tokens(engine, text_ids):
    sampling = SamplingConfig(max_tokens=16, seed=5)
    (first,), (second,) = engine.generate([text_ids[0]] * 2, sampling)
    assert first.token_ids == second.token_ids
    other = engine.generate([text_ids[0]], SamplingConfig(max_tokens=16, seed=6))[0][0]
    assert other.token_ids != first.token_ids


def test_without_a_seed_answers_differ(engine, text_ids):
    answers = engine.generate([text_ids[0]], SamplingConfig(max_tokens=16, n=4, temperature=1.5))[0]
    assert len({sample.token_ids for sample in answers}) > 1


def test_sample_i_does_not_depend_on_n(engine, text_ids):
    few = engine.generate([text_ids[0]], SamplingConfig(max_tokens=12, seed=9, n=2, temperature=1.5))[0]
    many = engine.generate([text_ids[0]], SamplingConfig(max_tokens=12, seed=9, n=5, temperature=1.5))[0]
    assert [s.token_ids for s in many[:2]] == [s.token_ids for s in few]
    assert len({s.token_ids for s in many}) == 5
    other = SamplingConfig(max_tokens=12, seed=derive_seed(9, 3), temperature=1.5)
    alone = engine.generate([text_ids[0]], other)[0][0]
    assert many[3].token_ids == alone.token_ids


def test_samples_do_not_depend_on_the_order_of_requests(engine, text_ids):
    settings = [SamplingConfig(max_tokens=12, seed=seed) for seed in (1, 2, 3)]
    there = engine.generate(text_ids, settings)
    back = engine.generate(text_ids[::-1], settings[::-1])[::-1]
    assert [row[0].token_ids for row in there] == [row[0].token_ids for row in back]
    alone = [engine.generate([prompt], one)[0][0] for prompt, one in zip(text_ids, settings, strict=True)]
    assert [row[0].token_ids for row in there] == [sample.token_ids for sample in alone]


def test_temperature_zero_takes_the_most_likely_token(engine, stories_model, text_ids):
    sample = engine.generate([text_ids[1]], SamplingConfig(temperature=0.0, max_tokens=8, top_k=3, top_p=0.2))[0][0]
    with torch.inference_mode():
        logits = stories_model(input_ids=torch.tensor([[*text_ids[1], *sample.token_ids]])).logits[0]
    assert logits[len(text_ids[1]) - 1 : -1].argmax(-1).tolist() == list(sample.token_ids)
    assert sample.logprobs[0] == pytest.approx(
        token_logprobs(stories_model, [*text_ids[1], *sample.token_ids])[len(text_ids[1]) - 1], abs=1e-3
    )


def test_derive_seed_depends_on_every_part():
    rows = [
        (1, "a", 0, 0),
        (2, "a", 0, 0),
        (1, "b", 0, 0),
        (1, "a", 1, 0),
        (1, "a", 0, 1),
        (1, "a", 0),
        ("1", "a", 0, 0),
    ]
    seeds = [derive_seed(*parts) for parts in rows]
    assert len(set(seeds)) == len(rows)
    assert seeds == [derive_seed(*parts) for parts in rows]
    assert all(0 <= seed < 2**53 for seed in seeds)
    # printf '[1, "a", 0, 0]' | b2sum -l 64, without the last 11 bits: another number would change stored runs
    assert derive_seed(1, "a", 0, 0) == 1041791902338945

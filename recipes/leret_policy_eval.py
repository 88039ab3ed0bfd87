"""How well a policy of recipes/leret_policy.py copies and searches: two-hop retrieval on questions kept out of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import leret_policy_data as data

from llmrl.leret.corpus import Passage
from llmrl.leret.rules import RULES, SHOWN_WORDS

K = 3


def generate(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_tokens: int, batch: int = 32) -> list[str]:
    """Return the greedy completion of each prompt as text."""
    import torch

    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            found[i] = " ".join(text.split())
    return found


def two_hops(run: Any, styles: Sequence[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Return for each (style of hop 1, style of hop 2) recall and average precision after both, k = 3, and the rules' beside.

    `unseen` counts only passages at hop 2 that hop 1 did not return. `exact` is the share of hop-2 queries equal to the rule's.
    """
    model = run.model.eval()
    model.set_attn_implementation("sdpa")
    table: dict[str, dict[str, float]] = {}
    items = [(pool, question) for pool in run.pools for question in pool.validation]
    first: dict[str, list[str]] = {}
    for one, two in styles:
        if one not in first:
            prompts = [run.prompt(data.State(q.text, ()), one) for _, q in items]
            first[one] = generate(model, run.tokenizer, prompts, 80)
        hits = [pool.retriever.search([query], K)[0] for (pool, _), query in zip(items, first[one], strict=True)]
        states = [
            data.State(q.text, tuple(Passage(h.id, h.title, " ".join(h.text.split()[:SHOWN_WORDS])) for h in found))
            for (_, q), found in zip(items, hits, strict=True)
        ]
        second = generate(model, run.tokenizer, [run.prompt(state, two) for state in states], 80)
        table[f"{one} / {two}"] = _score(items, hits, second)
        if two in RULES:
            asked = [data.queries(state, [two])[0] for state in states]
            table[f"{one} / {two}"]["exact"] = sum(a == b for a, b in zip(asked, second, strict=True)) / len(items)
    for two in ("question", *[two for _, two in styles if two in RULES]):
        hits = [pool.retriever.search([q.text], K)[0] for pool, q in items]
        asked = [data.queries(data.State(q.text, tuple(h)), [two])[0] for (_, q), h in zip(items, hits, strict=True)]
        table[f"rule / {two}"] = _score(items, hits, asked)
    model.set_attn_implementation("packed")
    model.train()
    return table


def _score(items: Sequence[Any], first: Sequence[Any], queries: Sequence[str]) -> dict[str, float]:
    sums = {"recall": 0.0, "ap": 0.0, "recall hop 1": 0.0, "recall unseen": 0.0, "ap unseen": 0.0}
    for (pool, question), hits, query in zip(items, first, queries, strict=True):
        seen = [hit.id for hit in hits]
        more = [hit.id for hit in pool.retriever.search([query], K + len(seen))[0]] if query.strip() else []
        plain = list(dict.fromkeys([*seen, *more[:K]]))
        unseen = [*seen, *[name for name in more if name not in seen][:K]]
        for name, ranked in (("", plain), (" hop 1", seen), (" unseen", unseen)):
            recall, precision = _recall_ap(ranked, question.gold)
            sums[f"recall{name}"] += recall
            if f"ap{name}" in sums:
                sums[f"ap{name}"] += precision
    return {name: round(value / len(items), 4) for name, value in sums.items()}


def _recall_ap(ranked: Sequence[str], gold: Sequence[frozenset[str]]) -> tuple[float, float]:
    left, total, found = set(gold), 0.0, 0
    for rank, name in enumerate(ranked, start=1):
        match = next((group for group in left if name in group), None)
        if match is not None:
            left.remove(match)
            found += 1
            total += found / rank
    return found / len(set(gold)), total / len(set(gold))

"""From explored groups to the files that training reads: token ids first, text beside them for people and for trl.

Every row's prompt is the bare one, whichever style wrote the query. Its ids come from the function that prompted the
engine. A completion's ids are those the engine sampled, end token included; only a query that was cut out of a longer
answer, or that nobody sampled (the question, a stop), is encoded as the chat template writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrl.files import write_text
from llmrl.leret.ask import prompt_ids, written_ids
from llmrl.leret.context import SearchState
from llmrl.leret.datasets import grpo_rows, preference_rows, sft_rows
from llmrl.leret.pairs import PairRule, best_queries, build_pairs
from llmrl.leret.records import Group
from llmrl.types import Message

SFT_FILE, PAIRS_FILE, GRPO_FILE = "sft.jsonl", "pairs.jsonl", "grpo.jsonl"
Render = Callable[[SearchState], Sequence[Message]]


def write_rows(
    folder: Path | str,
    groups: Sequence[Group],
    rule: PairRule,
    render: Render,
    tokenizer: Any | None,
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Write sft.jsonl, pairs.jsonl and grpo.jsonl; return the number of rows of each, and of queries that were encoded.

    A pair whose two queries the tokenizer cannot tell apart is left out: there is nothing to prefer.

    Args:
        folder: of the round.
        groups: of all hops.
        rule: which pairs.
        render: the bare prompt of a state.
        tokenizer: of the model that is to be trained; without one (rules) the rows hold text alone.
        template_options: given to the chat template.
    """
    folder = Path(folder)
    targets, pairs = best_queries(groups, rule), build_pairs(groups, rule)
    sft, preferences = sft_rows(targets, render), preference_rows(pairs, render)
    encoded = 0
    for row, target in zip(sft, targets, strict=True):
        row["query"] = target.query
    for row, pair in zip(preferences, pairs, strict=True):
        row.update(chosen_query=pair.chosen, rejected_query=pair.rejected)
    if tokenizer is not None:
        ids = _Ids(groups, tokenizer, template_options)
        for row, target in zip(sft, targets, strict=True):
            row.update(ids.columns(target.state, render, completion_ids=target.query))
        for row, pair in zip(preferences, pairs, strict=True):
            row.update(ids.columns(pair.state, render, chosen_ids=pair.chosen, rejected_ids=pair.rejected))
        preferences = [row for row in preferences if row["chosen_ids"] != row["rejected_ids"]]
        encoded = ids.encoded
    grpo = grpo_rows(groups, render)
    for name, rows in ((SFT_FILE, sft), (PAIRS_FILE, preferences), (GRPO_FILE, grpo)):
        write_text(folder / name, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))
    return {"sft": len(sft), "pairs": len(preferences), "grpo": len(grpo), "encoded": encoded}


class _Ids:
    """Finds the ids of prompts and queries, each once; `encoded` counts the queries that were not sampled as they stand."""

    def __init__(self, groups: Sequence[Group], tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._queries: dict[tuple[str, str], tuple[int, ...]] = {}
        self._prompts: dict[str, tuple[int, ...]] = {}
        self.encoded = 0
        for group in groups:
            for candidate in group.candidates:
                if candidate.token_ids:
                    self._queries.setdefault((group.state.key, candidate.query), candidate.token_ids)

    def columns(self, state: SearchState, render: Render, **queries: str) -> Mapping[str, list[int]]:
        """Return the columns of token ids of one row."""
        messages = list(render(state))
        if state.key not in self._prompts:
            self._prompts[state.key] = prompt_ids(self.tokenizer, messages, self.options)
        columns = {"prompt_ids": list(self._prompts[state.key])}
        for name, query in queries.items():
            if (state.key, query) not in self._queries:
                self._queries[state.key, query] = written_ids(self.tokenizer, messages, query, self.options)
                self.encoded += 1
            columns[name] = list(self._queries[state.key, query])
        return columns

"""Pairs of turns from the same logs: at one point of a dialogue, what was said where more was earned, and what where less was.

Two dialogues that are the same up to a turn of the agent and differ in it are compared by what was earned from there on, a mean
over all dialogues that go the same way. Real logs hold such points at the opening; scripted ones all along. The loss is DPO's
(arXiv 2305.18290) plus cross entropy of the better turn (arXiv 2404.19733), with the model before training as the reference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from llmrl.errors import DataError
from llmrl.hindsight.encode import Encoded
from llmrl.hindsight.losses import dpo_loss
from llmrl.hindsight.model import DialogueModel

_MOST = 4  # pairs of one point


@dataclass(frozen=True)
class TurnPair:
    """Two turns after the same history: ids, and what was earned from each on."""

    history: tuple[int, ...]
    better: tuple[int, ...]
    worse: tuple[int, ...]
    gap: float


def turn_pairs(rows: Sequence[Encoded], discount: float, unit: str) -> list[TurnPair]:
    """Return the pairs in a set of dialogues: the best turn of each point with the others, those of the largest gap first.

    Raises:
        DataError: no two dialogues differ in the turn after the same history.
    """
    points: dict[tuple[int, ...], dict[tuple[int, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        back = row.backup("turn", discount, unit)
        first = {turn: i for i, turn in reversed(list(enumerate(back.turn)))}
        for k, span in enumerate(row.spans):
            said = row.input_ids[span.start : span.stop]
            points[row.input_ids[: span.start]][said].append(back.to_go[first[k]])
    found = []
    for history, turns in points.items():
        means = sorted(((sum(v) / len(v), said) for said, v in turns.items()), key=lambda one: (-one[0], one[1]))
        best = means[0]
        worse = [(best[0] - mean, said) for mean, said in reversed(means[1:]) if best[0] > mean]
        found += [TurnPair(history, best[1], said, gap) for gap, said in worse[:_MOST]]
    if not found:
        raise DataError(
            "no pair of turns: no two dialogues are the same up to a turn of the agent and differ in it and in what they "
            "earned; dpo needs several answers to one context, use --method ilql, mc or filtered-bc"
        )
    return found


class PairCollator:
    """Collates examples of `pair_examples`: B better turns, then B worse ones, each after its history."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask `[2B, T]`, position, token, row `[N]` of the turns' tokens, reference `[2, B]`."""
        rows = [(e["history"], e[side]) for side in ("better", "worse") for e in examples]
        longest = max(len(history) + len(said) for history, said in rows)
        batch = {name: torch.zeros(len(rows), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        columns: dict[str, list[int]] = {"position": [], "token": [], "row": []}
        for i, (history, said) in enumerate(rows):
            ids = [*history, *said]
            batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
            batch["attention_mask"][i, : len(ids)] = 1
            columns["position"] += [i * longest + len(history) - 1 + t for t in range(len(said))]
            columns["token"] += said
            columns["row"] += [i] * len(said)
        tensors = {name: torch.tensor(values) for name, values in columns.items()}
        # what the model reads of states that this loss does not need
        tensors |= {"next_position": tensors["position"], "value_position": tensors["position"][:1]}
        reference = torch.tensor([[e["reference"][side] for e in examples] for side in (0, 1)])
        return {**batch, **tensors, "reference": reference}


def pair_examples(pairs: Sequence[TurnPair]) -> list[dict[str, Any]]:
    """Return the data set, without the reference's log-probabilities."""
    return [{"history": p.history, "better": p.better, "worse": p.worse, "reference": (0.0, 0.0)} for p in pairs]


def turn_logprobs(forward: Any, model: DialogueModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each turn, `[2, B]`, and of each of its tokens, `[N]`."""
    states = forward(**{key: batch[key] for key in batch if key not in ("row", "reference", "token")})
    tokens = -functional.cross_entropy(model.logits(states.policy), batch["token"], reduction="none")
    turns = tokens.new_zeros(len(batch["input_ids"])).index_add(0, batch["row"], tokens)
    return turns.unflatten(0, (2, -1)), tokens


@torch.no_grad()
def add_reference(model: DialogueModel, examples: list[dict[str, Any]], batch_size: int, device: Any) -> None:
    """Fill in the log-probabilities of the model as it is now."""
    collate = PairCollator()
    model.to(device).eval()
    for start in range(0, len(examples), batch_size):
        some = examples[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collate(some).items()}
        turns, _ = turn_logprobs(model, model, batch)
        for example, better, worse in zip(some, *turns.tolist(), strict=True):
            example["reference"] = (better, worse)


def pair_losses(
    forward: Any, model: DialogueModel, batch: dict[str, Tensor], beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of each pair `[B]`, DPO plus the mean cross entropy of the better turn's tokens, and sums to watch."""
    turns, tokens = turn_logprobs(forward, model, batch)
    count = torch.bincount(batch["row"], minlength=len(batch["input_ids"]))[: turns.shape[1]]
    losses = dpo_loss(turns, batch["reference"], beta) - turns[0] / count
    margin = ((turns - batch["reference"])[0] - (turns - batch["reference"])[1]).detach()
    watched = {
        "policy_nll": -tokens.detach().sum(),
        "tokens": tokens.new_tensor(float(len(tokens))),
        "pairs_right": (margin > 0).float().sum(),
        "pairs": tokens.new_tensor(float(turns.shape[1])),
    }
    return losses, watched

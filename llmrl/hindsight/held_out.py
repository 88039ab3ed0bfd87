"""What a policy says of dialogues that it was not trained on: how likely their words are, and how far values follow returns.

V is read where a turn of the agent begins, Q where it ends. What they are compared with is what was really earned from there
on, by whoever spoke in the logs: values of a better policy are higher, so their order counts more than their size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmrl.heads_forward import decoder_of, states_of
from llmrl.hindsight.encode import Encoded
from llmrl.hindsight.policy import TwoTrunks
from llmrl.hindsight.policy_folder import HEAD_NAME
from llmrl.intervals import draw_counts, interval

_DRAWS = 500
Array = NDArray[np.float64]


@torch.inference_mode()
def against_returns(
    model: Any,
    rows: Sequence[Encoded],
    discount: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Return what a policy says of held-out dialogues.

    Args:
        model: from `llmrl.hindsight.policy.load_policy`, with support=0; beta=0 for the likelihood of the behaviour policy.
        rows: whole dialogues.
        discount: a turn, of what is to go.
        progress: called with (done, total).

    Returns:
        `nll`, nats a token of the agent's. Of a policy with values also `q` and `v`, over turns, and `first_v`, over dialogues:
        `spearman` with what was to go, with a 95% interval over dialogues (null where all values are alike), `mean`, `sd`,
        `error` (root mean square), and `to_go`: its mean and its deviation, which is the error of saying the mean of all.
    """
    trunk = model.values if isinstance(model, TwoTrunks) else model
    heads: Any = getattr(model, "llmrl_heads", {})
    head = next((one for name, one in heads.items() if name == HEAD_NAME), None)
    nll, tokens, turns = 0.0, 0, list[tuple[int, float, float, float]]()
    for number, row in enumerate(rows):
        ids = torch.tensor([row.input_ids], device=trunk.device)
        back = row.backup("turn", discount, "turn")
        position = torch.tensor(back.position, device=trunk.device)
        chosen = model(ids).logits[0, position].float().log_softmax(-1).gather(-1, ids[0, position + 1, None])[:, 0]
        nll, tokens = nll - float(chosen.sum()), tokens + len(position)
        if head is not None:
            decoder = decoder_of(trunk)
            states = states_of(decoder, decoder(ids, use_cache=False))[0]
            ends = torch.tensor([back.position[i] for i in back.value_action], device=trunk.device)
            q = head.q_of(states[ends], ids[0, ends + 1]).amin(0)
            v = head.v(states[torch.tensor(back.value_position, device=trunk.device)])
            turns += zip([number] * len(q), q.tolist(), v.tolist(), back.state_to_go, strict=True)
        progress(number + 1, len(rows))
    found: dict[str, Any] = {"dialogues": len(rows), "tokens": tokens, "nll": nll / tokens}
    if head is None:
        return found
    groups, q_all, v_all, to_go = (np.array(column, dtype=float) for column in zip(*turns, strict=True))
    first = np.unique(groups, return_index=True)[1]
    return {
        **found,
        "turns": len(groups),
        "q": _follows(q_all, to_go, groups),
        "v": _follows(v_all, to_go, groups),
        "first_v": _follows(v_all[first], to_go[first], groups[first]),
    }


def _follows(values: Array, to_go: Array, groups: Array) -> dict[str, Any]:
    from scipy.stats import spearmanr

    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]

    def rank(chosen: NDArray[np.int64]) -> float:
        if np.ptp(values[chosen]) == 0 or np.ptp(to_go[chosen]) == 0:
            return float("nan")
        return float(spearmanr(values[chosen], to_go[chosen]).statistic)

    whole = rank(np.arange(len(values)))
    counts = draw_counts(len(members), _DRAWS, 0).astype(int)
    draws = np.array(
        [rank(np.concatenate([np.tile(m, n) for m, n in zip(members, row, strict=True)])) for row in counts]
    )
    return {
        "spearman": None if np.isnan(whole) else interval(whole, draws, -1.0, 1.0, basic=False),
        "mean": float(values.mean()),
        "sd": float(values.std()),
        "error": float(np.sqrt(np.mean((values - to_go) ** 2))),
        "to_go": {"mean": float(to_go.mean()), "sd": float(to_go.std())},
    }

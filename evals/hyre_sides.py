"""One ensemble on a mix of two sources that disagree, adapted to one of them by 1 to 128 pairs.

What that side gains, what the other loses, and how much of it is the length of answers. Sources: pairs where the less harmful
answer is chosen, and pairs where the better answer to an instruction is. Heads see mixtures of both (`--diversity mixture`).
"with length" adds the logarithm of an answer's length to the features of the encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmrl.files import write_json
from llmrl.hyre.diversity import plan_heads
from llmrl.hyre.features import embed_pairs, open_features
from llmrl.hyre.fit import FitSettings, HeadShape, Pairs, feature_scale, fit_heads
from llmrl.hyre.metrics import disagreement
from llmrl.hyre.pairs import Pair, read_pair
from llmrl.hyre.posterior import label_losses, posterior_weights
from llmrl.hyre.refine import refine
from llmrl.intervals import draw_counts, interval
from llmrl.jsonl import read_objects
from llmrl.training.run import environment

Array = NDArray[np.float64]
SIDES = ("harmless", "quality")
SIZES = (1, 2, 5, 10, 20, 32, 64, 128)
METHODS = ("hyre", "refine", "finetune")
HEADS, A_SIDE, POOL = 100, 1000, 300  # heads; training pairs and pairs to label from, of each side
_LENGTH = 0.3  # of the logarithm of an answer's length, beside features of norm 1


def run(config: Any, output: Path) -> dict[str, Any]:
    """Write hyre-sides.json."""
    data = {side: read_side(Path(config.data), side) for side in SIDES}
    base = open_features(None)
    cache = Path(config.work_dir) / "cache"
    features = {
        (side, part): embed_pairs(base, pairs, "dialogue", cache_dir=cache, quiet=config.quiet)
        for side, parts in data.items()
        for part, pairs in parts.items()
    }
    found: dict[str, Any] = {
        "environment": environment(),
        "longer wins": {side: _longer(parts["test"]) for side, parts in data.items()},
        "test pairs": {side: len(parts["test"]) for side, parts in data.items()},
        "cut": getattr(base, "cut", None),
    }
    for name, weight in (("with length", _LENGTH), ("without length", 0.0)):
        seen = {key: _with_length(both, data[key[0]][key[1]], weight) for key, both in features.items()}
        runs = [one_seed(seen, seed, config.draws) for seed in range(config.seeds)]
        found[name] = _pooled(runs)
    write_json(output / "hyre-sides.json", found)
    return found


def read_side(data: Path, side: str) -> dict[str, list[Pair]]:
    """Return pairs of one source by "train" and "test"; no prompt is in both."""
    if side == "harmless":
        folder = data / "hh_harmless"
        return {
            part: [read_pair(row, where) for where, row in read_objects(folder / f"{part}.jsonl.gz")]
            for part in ("train", "test")
        }
    found = {}
    for part in ("train", "test"):
        folder = data / "alpacaeval_prefs"
        prompts = {row["id"]: row for _, row in read_objects(folder / f"responses_{part}.jsonl.gz")}
        answers = {(i, r["model"]): r["text"] for i, row in prompts.items() for r in row["responses"]}
        found[part] = [
            read_pair(
                {
                    "prompt": prompts[row["prompt_id"]]["prompt"],
                    "chosen": answers[(row["prompt_id"], row["chosen"])],
                    "rejected": answers[(row["prompt_id"], row["rejected"])],
                },
                where,
            )
            for where, row in read_objects(folder / f"pairs_{part}.jsonl.gz")
            if row["kind"] == "derived"
        ]
    return found


def one_seed(features: dict[tuple[str, str], tuple[Tensor, Tensor]], seed: int, draws: int) -> dict[str, Any]:
    """Train on an equal mix, adapt to each side, and return how often each test pair is ranked right, by method."""
    rng = np.random.default_rng(seed)
    rows, pools = {}, {}
    for side in SIDES:
        order = rng.permutation(len(features[(side, "train")][0]))
        rows[side], pools[side] = order[:A_SIDE], order[A_SIDE : A_SIDE + POOL]
    examples = Pairs(*(torch.cat([features[(side, "train")][i][rows[side]] for side in SIDES]) for i in (0, 1)))
    groups = [side for side in SIDES for _ in rows[side]]
    plan = plan_heads("mixture", HEADS, len(groups), groups=groups, seed=seed)
    head = fit_heads(examples, plan, HeadShape(), FitSettings(seed=seed))
    scale = float(feature_scale(examples)[1][0])

    def margins(both: tuple[Tensor, Tensor]) -> Array:
        return np.asarray((head(both[0]) - head(both[1])).double())

    tests = {side: margins(features[(side, "test")]) for side in SIDES}
    differences = {side: _differences(features[(side, "test")], scale) for side in SIDES}
    found: dict[str, Any] = {
        "disagreement": disagreement(np.concatenate(list(tests.values()))),
        "uniform": {side: _right(tests[side].mean(1)) for side in SIDES},
    }
    for to in SIDES:
        pool = tuple(part[pools[to]] for part in features[(to, "train")])
        at, x = margins(pool), _differences(pool, scale)
        for n in SIZES:
            labels = np.stack([np.random.default_rng([seed, d]).permutation(len(at))[:n] for d in range(draws)])
            weights = posterior_weights(label_losses(at[labels], np.ones(labels.shape)).sum(1))
            tuned = refine(x[labels], at[labels].mean(-1))
            refined = refine(x[labels], (at[labels] * weights[:, None]).sum(-1))
            for side in SIDES:
                mixed = tests[side] @ weights.T
                margins_of = {
                    "hyre": mixed,
                    "refine": mixed + differences[side] @ refined.T,
                    "finetune": tests[side].mean(1)[:, None] + differences[side] @ tuned.T,
                }
                for method in METHODS:
                    found[f"{method} {to} {n} {side}"] = _right(margins_of[method]).mean(1)
    return found


def _pooled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return accuracies and changes from uniform, with 95% intervals over test pairs; means over seeds and draws."""
    found: dict[str, Any] = {"disagreement": float(np.mean([r["disagreement"] for r in runs]))}
    uniform = {side: np.mean([r["uniform"][side] for r in runs], 0) for side in SIDES}
    found["uniform"] = {side: _interval(values) for side, values in uniform.items()}
    for key in runs[0]:
        if key.startswith(METHODS):
            side = key.split()[-1]
            values = np.mean([r[key] for r in runs], 0)
            seeds = [float((r[key] - r["uniform"][side]).mean()) for r in runs]
            found[key] = {
                "accuracy": _interval(values),
                "change": {**_interval(values - uniform[side], -1.0), "seeds": seeds},
            }
    return found


def _interval(values: Array, floor: float = 0.0) -> dict[str, float]:
    means = draw_counts(len(values), 2000, 0) @ values / len(values)
    return interval(float(values.mean()), means, floor, 1.0, basic=False)


def _right(margins: Array) -> Array:
    return (margins > 0) + 0.5 * (margins == 0)


def _differences(both: tuple[Tensor, Tensor], scale: float) -> Array:
    return np.asarray((both[0] - both[1]).double()) * scale


def _longer(pairs: list[Pair]) -> float:
    return float(_right(np.array([len(pair.chosen) - len(pair.rejected) for pair in pairs], float)).mean())


def _with_length(both: tuple[Tensor, Tensor], pairs: list[Pair], weight: float) -> tuple[Tensor, Tensor]:
    texts = ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
    columns = [weight * torch.tensor([[len(text)] for text in side]).float().log() for side in texts]
    return torch.cat([both[0], columns[0]], 1), torch.cat([both[1], columns[1]], 1)

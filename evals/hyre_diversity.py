"""What makes heads differ, compared: the same personas, the same number of heads, another recipe for what each head sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hyre_persona import trained, users_in
from numpy.typing import NDArray

from llmrl.files import write_json
from llmrl.hyre.evaluate import UserPairs, split
from llmrl.hyre.metrics import accuracy
from llmrl.hyre.posterior import label_losses, posterior_weights
from llmrl.intervals import interval
from llmrl.training.run import environment
from llmrl.training.tracking import progress_bar

RECIPES: dict[str, dict[str, Any]] = {
    "group, a quarter turned round": {"diversity": "group"},
    "group, none turned round": {"diversity": "group", "flip": 0.0},
    "group, mlp heads": {"diversity": "group", "kind": "mlp"},
    "em, 10 heads": {"diversity": "em", "heads": 10},
    "em, 20 heads": {"diversity": "em", "heads": 20},
    "mixture": {"diversity": "mixture"},
    "cluster": {"diversity": "cluster"},
    "subset": {"diversity": "subset"},
    "bootstrap": {"diversity": "bootstrap"},
    "none, mlp prior": {"diversity": "none", "prior": "mlp"},
    "none, linear prior": {"diversity": "none", "prior": "linear"},
}
SIZES = (0, 1, 5, 20)


def run(config: Any, output: Path) -> dict[str, Any]:
    """Write hyre-diversity.json: accuracy and disagreement of every recipe."""
    found: dict[str, Any] = {"environment": environment(), "seeds": config.seeds, "draws": config.draws, "recipes": {}}
    with progress_bar("diversity", len(RECIPES) * config.seeds, unit="ensemble", quiet=config.quiet) as advance:
        for i, (name, changes) in enumerate(RECIPES.items()):
            values, disagreement, owners = [], [], []
            for seed in range(config.seeds):
                ensemble, files = trained(config, seed, **changes)
                users = users_in(config, ensemble, files["natural"])
                values += [hyre_accuracy(user, config.draws) for user in users]
                owners += [user.name for user in users]
                disagreement.append(float(ensemble.facts["disagreement"]))
                advance(i * config.seeds + seed + 1, len(RECIPES) * config.seeds)
            found["recipes"][name] = summary(np.array(values), owners) | {"disagreement": float(np.mean(disagreement))}
    write_json(output / "hyre-diversity.json", found)
    return found


def hyre_accuracy(user: UserPairs, draws: int) -> NDArray[np.float64]:
    """Return the mean accuracy after each of SIZES labels."""
    found = np.zeros((draws, len(SIZES)))
    for draw in range(draws):
        rows, tests = split(user.keys, np.random.default_rng([draw]))
        losses = label_losses(user.margins[rows], np.ones(len(rows)))
        for j, n in enumerate(SIZES):
            found[draw, j] = float(accuracy(user.margins[tests] @ posterior_weights(losses[:n].sum(0))))
    return found.mean(0)


def summary(values: NDArray[np.float64], owners: list[str]) -> dict[str, Any]:
    """Return {n: accuracy with its 95% interval over personas} of values `[users, sizes]`."""
    names, of = np.unique(owners, return_inverse=True)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=2000)[:, of].astype(float)
    means = weights @ values / weights.sum(1, keepdims=True)
    return {str(n): interval(float(values[:, j].mean()), means[:, j], basic=False) for j, n in enumerate(SIZES)}

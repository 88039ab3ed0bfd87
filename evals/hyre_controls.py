"""Negative controls on the persona data: labels that say nothing, and an ensemble whose heads agree, bring nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hyre_persona import trained, users_in

from llmrl.files import write_json
from llmrl.hyre.evaluate import Resample, UserPairs, split
from llmrl.hyre.metrics import accuracy
from llmrl.hyre.posterior import label_losses, posterior_weights
from llmrl.hyre.select import choose, leave_one_out
from llmrl.training.run import environment

SIZES = (5, 10, 32)


def run(config: Any, output: Path) -> dict[str, Any]:
    """Write hyre-controls.json."""
    found: dict[str, Any] = {"environment": environment()}
    ensemble, files = trained(config, 0)
    users = users_in(config, ensemble, files["two-sided"])
    found["shuffled labels"] = {
        "disagreement": ensemble.facts["disagreement"],
        **gains(users, config.draws, shuffled=True),
    }
    for name, recipe in (("heads that agree", "none"), ("bootstrap heads", "bootstrap")):
        same, _ = trained(config, 0, diversity=recipe)
        users = users_in(config, same, files["natural"])
        facts = {key: same.facts[key] for key in ("disagreement", "warning")}
        found[name] = {**facts, **gains(users, config.draws, shuffled=False)}
    users = users_in(config, ensemble, files["natural"])
    found["guards"] = {
        kind: guards(users, config.draws, shuffled=kind == "random labels") for kind in ("true labels", "random labels")
    }
    write_json(output / "hyre-controls.json", found)
    return found


def gains(users: list[UserPairs], draws: int, *, shuffled: bool) -> dict[str, Any]:
    """Return accuracy above uniform, plain and with the guard, and how often the guard falls back; by number of labels."""
    found: dict[str, Any] = {"users": len(users), "draws": draws}
    resample = Resample(len(users), draws, 2000, 0)
    for n in SIZES:
        rows = np.array([[_draw(user, n, draw, shuffled) for draw in range(draws)] for user in users])
        found[str(n)] = {
            "hyre - uniform": resample.interval(rows[..., 0], signed=True),
            "hyre-auto - uniform": resample.interval(rows[..., 1], signed=True),
            "guarded": float(rows[..., 2].mean()),
        }
    return found


def _draw(user: UserPairs, n: int, draw: int, shuffled: bool) -> tuple[float, float, float]:
    rng = np.random.default_rng([draw, n])
    labels, tests = split(user.keys, rng)
    margins = user.margins[labels[:n]]
    if shuffled:
        margins = margins * rng.choice([-1.0, 1.0], size=(len(margins), 1))
    on = user.margins[tests]
    plain = posterior_weights(label_losses(margins, np.ones(len(margins))).sum(0))
    choice = choose(margins)
    chosen = posterior_weights(label_losses(margins, np.ones(len(margins)), choice.loss).sum(0), beta=choice.beta)
    uniform = float(accuracy(on.mean(1)))
    return float(accuracy(on @ plain)) - uniform, float(accuracy(on @ chosen)) - uniform, float(choice.guarded)


def guards(users: list[UserPairs], draws: int, *, shuffled: bool) -> dict[str, Any]:
    """Return accuracy and how often the prior is kept, for three guards on plain HyRe (beta 1, nll); by number of labels.

    "gain" keeps the prior where the labels' leave-one-out gain is below 0, "gain + error" where it is below one standard error.
    """
    found: dict[str, Any] = {}
    for n in SIZES:
        rows = []
        for user in users:
            for draw in range(draws):
                rng = np.random.default_rng([draw, n])
                labels, tests = split(user.keys, rng)
                margins, on = user.margins[labels[:n]], user.margins[tests]
                if shuffled:
                    margins = margins * rng.choice([-1.0, 1.0], size=(n, 1))
                losses = label_losses(margins, np.ones(n))
                gain = leave_one_out(losses, margins, np.ones(n), 1.0) - leave_one_out(losses, margins, np.ones(n), 0.0)
                mean, error = gain.mean(), gain.std(ddof=1) / n**0.5
                plain, uniform = float(accuracy(on @ posterior_weights(losses.sum(0)))), float(accuracy(on.mean(1)))
                rows.append((plain, uniform, mean < 0, mean < error))
        plain, uniform, below, within = np.array(rows, float).T
        found[str(n)] = {
            "uniform": float(uniform.mean()),
            "none": {"accuracy": float(plain.mean()), "kept": 0.0},
            "gain": {"accuracy": float(np.where(below, uniform, plain).mean()), "kept": float(below.mean())},
            "gain + error": {"accuracy": float(np.where(within, uniform, plain).mean()), "kept": float(within.mean())},
        }
    return found

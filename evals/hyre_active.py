"""Which pair to ask next: every criterion on the same simulated users, personas that the ensemble was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hyre_persona import trained, users_in
from numpy.typing import NDArray

from llmrl.files import write_json
from llmrl.hyre.acquire import CRITERIA
from llmrl.hyre.annotator import Annotator, query_curve
from llmrl.hyre.evaluate import UserPairs, split
from llmrl.intervals import draw_counts, interval
from llmrl.training.run import environment

Array = NDArray[np.float64]
QUERIES, POOL, TESTS, TURNED = 20, 60, 200, 0.1  # TURNED: share of answers that are mistakes


def run(config: Any, output: Path) -> dict[str, Any]:
    """Write hyre-active.json and its picture."""
    worlds, owners = [], []
    for seed in range(config.seeds):
        ensemble, files = trained(config, seed)
        for user in users_in(config, ensemble, files["two-sided"]):
            for draw in range(2):
                worlds.append(_world(user, draw))
                owners.append(user.name.removeprefix("not "))
    pools, tests = (np.stack([world[i] for world in worlds]) for i in (0, 1))
    labels = Annotator(np.ones(pools.shape[:2]), flip=TURNED, seed=0).labels()
    curves = {
        name: query_curve(
            pools, labels, tests, np.ones(tests.shape[:2]), criterion=name, queries=QUERIES, seed=0
        ).accuracy
        for name in CRITERIA
    }
    found = {"environment": environment(), "users": len(worlds), "queries": QUERIES, "pool": POOL, "mistakes": TURNED}
    found["criteria"] = compare(curves, owners)
    write_json(output / "hyre-active.json", found)
    _picture(output / "hyre-active.png", found)
    return found


def _world(user: UserPairs, draw: int) -> tuple[Array, Array]:
    """Return margins of a pool to ask from and of test pairs that share no text with it."""
    labels, tests = split(user.keys, np.random.default_rng([11, draw]))
    return user.margins[labels[:POOL]], user.margins[tests[:TESTS]]


def compare(curves: dict[str, Array], owners: list[str]) -> dict[str, Any]:
    """Return each criterion's mean curve, its mean over 1 to n labels ("area"), and that minus random's, with 95% intervals.

    Args:
        curves: `[users, n + 1]` by criterion.
        owners: `[users]`; users of one name are resampled together.
    """
    names, of = np.unique(owners, return_inverse=True)
    counts = draw_counts(len(names), 2000, 0)[:, of]

    def with_interval(values: Array, floor: float) -> dict[str, float]:
        return interval(float(values.mean()), counts @ values / counts.sum(1), floor, 1.0, basic=False)

    area = {name: curve[:, 1:].mean(1) for name, curve in curves.items()}
    return {
        name: {
            "curve": curve.mean(0).tolist(),
            "area": with_interval(area[name], 0.0),
            "above random": with_interval(area[name] - area["random"], -1.0),
        }
        for name, curve in curves.items()
    }


def _picture(path: Path, found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for name, of in found["criteria"].items():
        style = {"color": "#333333", "lw": 2, "ls": "--"} if name == "random" else {"lw": 1.3}
        axes.plot(range(len(of["curve"])), [100 * v for v in of["curve"]], label=name.replace("_", " "), **style)
    axes.set_xticks(range(0, QUERIES + 1, 5))
    axes.set_xlabel("answers of one user")
    axes.set_ylabel("pairs of that user ranked right, %")
    axes.set_title(
        f"{found['users']} simulated users, {found['mistakes']:.0%} of answers mistaken", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", lw=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)

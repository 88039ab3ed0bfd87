"""What a label costs: one update, ten thousand users at once, and the training of 100 heads; on made-up features."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmrl.files import write_json
from llmrl.hyre.diversity import plan_heads
from llmrl.hyre.fit import HeadShape, Pairs, fit_heads
from llmrl.hyre.posterior import HyrePosterior, label_losses, posterior_weights
from llmrl.hyre.refine import refine
from llmrl.training.run import environment

HEADS, USERS, PAIRS, WIDTH, GROUPS, LABELS = 100, 10_000, 10_000, 384, 40, 5


def run(config: Any, output: Path) -> dict[str, Any]:
    """Write hyre-speed.json: medians of alternating repetitions, in seconds."""
    found = {
        "environment": environment(),
        "heads": HEADS,
        "users": USERS,
        "pairs": PAIRS,
        "width": WIDTH,
        "labels": LABELS,
        "threads": torch.get_num_threads(),
        "seconds": {**_labels(), **_training(config.seeds)},
    }
    write_json(output / "hyre-speed.json", found)
    return found


def _labels() -> dict[str, float]:
    rng = np.random.default_rng(0)
    margins = rng.normal(size=(USERS, LABELS, HEADS))
    differences = rng.normal(size=(LABELS, WIDTH)) / WIDTH**0.5
    posterior = HyrePosterior(HEADS)
    losses = label_losses(margins, np.ones((USERS, LABELS))).sum(1)

    def one_label() -> None:
        posterior.update(margins[0, 0])

    def one_label_and_weights() -> None:
        posterior.update(margins[0, 0])
        assert posterior.weights.shape == (HEADS,)

    def undone() -> None:  # so that the list of labels does not grow
        posterior._losses.clear()

    def all_users() -> None:
        posterior_weights(losses)

    def all_users_from_margins() -> None:
        posterior_weights(label_losses(margins, np.ones((USERS, LABELS))).sum(1))

    def one_user_by_fine_tuning() -> None:
        refine(differences, margins[0].mean(1))

    return medians(
        {
            "update": (one_label, 2000),
            "update_and_weights": (one_label_and_weights, 2000),
            "weights_of_all_users": (all_users, 3),
            "weights_of_all_users_from_margins": (all_users_from_margins, 1),
            "fine_tuning_of_one_user": (one_user_by_fine_tuning, 50),
        },
        11,
        undone,
    )


def _training(repetitions: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(0)
    taste = torch.randn(GROUPS, WIDTH, generator=draw)
    groups = [f"user {i % GROUPS}" for i in range(PAIRS)]
    features = torch.randn(2, PAIRS, WIDTH, generator=draw)
    turned = ((features[0] - features[1]) * taste[[i % GROUPS for i in range(PAIRS)]]).sum(1) < 0
    features[:, turned] = features[:, turned].flip(0)
    examples = Pairs(features[0], features[1])
    by_group = plan_heads("group", HEADS, PAIRS, groups=groups)
    everything = plan_heads("bootstrap", HEADS, PAIRS)
    return medians(
        {
            "training_linear_by_group": (lambda: fit_heads(examples, by_group), 1),
            "training_linear_bootstrap": (lambda: fit_heads(examples, everything), 1),
            "training_mlp_by_group": (lambda: fit_heads(examples, by_group, HeadShape("mlp")), 1),
        },
        repetitions,
    )


def medians(
    jobs: dict[str, tuple[Callable[[], object], int]], repetitions: int, after: Callable[[], object] | None = None
) -> dict[str, float]:
    """Return the median seconds of one call of each job, over alternating repetitions of several calls."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job, _ in jobs.values():
        job()  # warm
    for _ in range(repetitions):
        for name, (job, calls) in jobs.items():
            started = time.perf_counter()
            for _ in range(calls):
                job()
            times[name].append((time.perf_counter() - started) / calls)
            if after is not None:
                after()
    return {name: float(np.median(of)) for name, of in times.items()}

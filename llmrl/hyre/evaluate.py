"""Accuracy against labels: many users, many draws of their labels, every way to use them (`llmrl.hyre.baselines`).

A user's pairs are split in half by what they are made of, anew for each draw: by prompt, or, where all pairs have one prompt,
by answers, and pairs with an answer from each half are left out. So no text of a label is ever scored. Labels of n = 1, 2, 5
and so on are the first n of one order: curves are nested. Intervals are of users and, within them, of draws, resampled
together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmrl.errors import DataError
from llmrl.hyre.baselines import L2_GRID, UNLABELLED, Labels, Tests, fit_all, without_labels
from llmrl.hyre.metrics import accuracy
from llmrl.hyre.pairs import Pair, one_prompt
from llmrl.intervals import interval

Array = NDArray[np.float64]
SIZES = (1, 2, 5, 10, 20, 32, 64, 128)
FINETUNED = "finetune"  # the strongest fine-tuning: start and l2 chosen in hindsight, at each n
LEAST_TESTS = 10


@dataclass(frozen=True)
class UserPairs:
    """One user's pairs as the heads see them.

    Attributes:
        name: of the user.
        margins: `[N, K]`.
        features: `[N, H]`, differences in scaled features.
        starts: `[N]` margins of heads to start fine-tuning at, and of "single" and "average".
        keys: `[N, 2]`, numbers of what the two answers of a pair are made of: their prompt twice, or their texts.
    """

    name: str
    margins: Array
    features: Array
    starts: Mapping[str, Array]
    keys: NDArray[np.int64]


def keys_of(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Return the numbers that `UserPairs.keys` holds."""
    shared = one_prompt(pairs)
    names = [(pair.chosen, pair.rejected) if shared else (str(pair.prompt), str(pair.prompt)) for pair in pairs]
    index = {text: i for i, text in enumerate(dict.fromkeys(text for both in names for text in both))}
    return np.array([[index[a], index[b]] for a, b in names], np.int64)


def split(keys: NDArray[np.int64], rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (rows to label from, in random order; rows to test on), which share no prompt or answer."""
    units = np.unique(keys)
    side = np.zeros(int(units.max()) + 1, bool)
    side[rng.permutation(units)[: len(units) // 2]] = True
    first, second = side[keys[:, 0]], side[keys[:, 1]]
    return rng.permutation(np.flatnonzero(first & second)), np.flatnonzero(~first & ~second)


def accuracies(
    user: UserPairs, sizes: Sequence[int], draws: int, seed: int
) -> tuple[dict[tuple[str, int], Array], list[int]]:
    """Return accuracy `[draws]` of each (method, n), and the sizes that this user's pairs allow.

    Raises:
        DataError: too few pairs for one label and LEAST_TESTS tests.
    """
    found: dict[tuple[str, int], list[float]] = {}
    halves = [split(user.keys, np.random.default_rng([seed, draw])) for draw in range(draws)]
    labels, tests = min(len(a) for a, _ in halves), min(len(b) for _, b in halves)
    if labels < 1 or tests < LEAST_TESTS:
        raise DataError(
            f"user {user.name!r}: half of the pairs gives {labels} labels and {tests} tests, expected 1 and {LEAST_TESTS} at "
            "least: more pairs are needed"
        )
    on = [Tests(user.margins[rows], user.features[rows], _rows(user.starts, rows)) for _, rows in halves]
    for one in on:
        for name, margins in without_labels(one).items():
            found.setdefault((name, 0), []).append(float(accuracy(margins)))
        found.setdefault(("oracle-head", 0), []).append(float(accuracy(one.margins).max()))
    possible = [n for n in sizes if n <= labels]
    for n in possible:
        rows = np.stack([order[:n] for order, _ in halves])
        tuned = {name: start for name, start in user.starts.items() if name != "average"}
        for name, fitted in fit_all(Labels(user.margins[rows], user.features[rows], _rows(tuned, rows))).items():
            found[(name, n)] = [float(accuracy(fitted.margins(draw, one))) for draw, one in enumerate(on)]
    return {key: np.array(values) for key, values in found.items()}, possible


def _rows(starts: Mapping[str, Array], rows: NDArray[np.int64]) -> dict[str, Array]:
    return {name: start[rows] for name, start in starts.items()}


def table(
    users: Sequence[UserPairs],
    *,
    sizes: Sequence[int] = SIZES,
    draws: int = 100,
    bootstrap: int = 2000,
    seed: int = 0,
    clusters: Sequence[str] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Return the report of many users.

    Args:
        users: each with pairs of its own.
        sizes: numbers of labels.
        draws: of labels, for each user.
        bootstrap: resamples behind the 95% intervals.
        seed: of draws and resamples.
        clusters: `[users]`, users of one name are resampled together (one person in several splits).
        advance: called with (users done, users).

    Returns:
        {"methods": {name: {n: {"value", "low", "high"}}}, "paired": {"a - b": {n: ...}}, "harm": {name: {n: ...}},
        "crossover": n or None, "strongest_finetune": {n: name}, "per_user": {name: {user: {n: value}}}, "sizes",
        "sizes_left_out" (some user has too few pairs for them), "users_left_out" (too few for any), "draws", "users"}

    Raises:
        DataError: no user, or no size, is left.
    """
    rows: list[dict[tuple[str, int], Array]] = []
    common, left_out = set(sizes), {}
    for i, user in enumerate(users):
        try:
            found, possible = accuracies(user, sizes, draws, seed + i)
        except DataError as error:
            left_out[user.name] = str(error)
        else:
            rows.append(found)
            common &= set(possible)
        if advance is not None:
            advance(i + 1, len(users))
    if not rows or not common:
        why = next(iter(left_out.values())) if not rows else f"no user has pairs for {min(sizes)} labels"
        raise DataError(f"nothing can be measured: {why}")
    clusters = [c for c, user in zip(clusters, users, strict=True) if user.name not in left_out] if clusters else None
    users = [user for user in users if user.name not in left_out]
    kept = sorted(common)
    values = {
        key: np.stack([row[key] for row in rows])
        for key in rows[0]
        if (key[1] == 0 or key[1] in common) and all(key in row for row in rows)
    }
    resample = Resample(len(users), draws, bootstrap, seed, clusters)
    strongest = _strongest(values, kept)
    for n in kept:
        values[(FINETUNED, n)] = values[(strongest[n], n)]
    methods: dict[str, dict[str, Any]] = {}
    for (name, n), of in values.items():
        methods.setdefault(name, {})[str(n)] = resample.interval(of)
    paired = {
        f"{a} - {b}": {str(n): resample.interval(_at(values, a, n) - _at(values, b, n), signed=True) for n in kept}
        for a, b in (
            ("hyre", "uniform"),
            ("hyre", "single"),
            ("hyre", FINETUNED),
            ("refine", "hyre"),
            ("refine", FINETUNED),
            ("hyre-auto", "hyre"),
        )
        if (a, kept[0] if kept else 0) in values and ((b, 0) in values or (b, kept[0] if kept else 0) in values)
    }
    return {
        "methods": methods,
        "paired": paired,
        "harm": {
            name: {str(n): harm(_at(values, name, n), values[("uniform", 0)]) for n in kept}
            for name in ("hyre", "hyre-auto", "refine")
        },
        "crossover": crossover(values, kept),
        "strongest_finetune": {str(n): strongest[n] for n in kept},
        "per_user": {
            name: {
                user.name: {str(n): float(_at(values, name, n)[i].mean()) for n in kept} for i, user in enumerate(users)
            }
            for name in ("uniform", "hyre", "refine", FINETUNED)
        },
        "sizes": kept,
        "sizes_left_out": [n for n in sizes if n not in common],
        "users_left_out": sorted(left_out),
        "draws": draws,
        "users": len(users),
    }


def _strongest(values: Mapping[tuple[str, int], Array], sizes: Sequence[int]) -> dict[int, str]:
    names = [f"finetune-{start} {l2:g}" for start in ("single", "mean", "zero") for l2 in L2_GRID]
    return {
        n: max((name for name in names if (name, n) in values), key=lambda name: values[(name, n)].mean())
        for n in sizes
    }


def _at(values: Mapping[tuple[str, int], Array], name: str, n: int) -> Array:
    return values[(name, 0)] if name in UNLABELLED else values[(name, n)]


def harm(adapted: Array, before: Array) -> dict[str, float]:
    """Return the share of users whose mean accuracy falls, and the mean loss over all users, relative to `before`'s mean.

    Args:
        adapted: `[users, draws]`.
        before: `[users, draws]`.
    """
    change = adapted.mean(1) - before.mean(1)
    return {"share": float((change < 0).mean()), "mean": float(np.maximum(-change, 0).mean() / before.mean())}


def crossover(values: Mapping[tuple[str, int], Array], sizes: Sequence[int]) -> int | None:
    """Return the least n from which on the strongest fine-tuning is above plain reweighting; None if it never is."""
    for i, n in enumerate(sizes):
        if all(values[(FINETUNED, m)].mean() > values[("hyre", m)].mean() for m in sizes[i:]):
            return n
    return None


class Resample:
    """Bootstrap of users and, within each, of draws; one set of resamples for all methods, so that differences are paired."""

    def __init__(self, users: int, draws: int, count: int, seed: int, clusters: Sequence[str] | None = None) -> None:
        rng = np.random.default_rng([seed, 7])
        names, of = np.unique(
            list(clusters) if clusters is not None else list(map(str, range(users))), return_inverse=True
        )
        self.users = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)[:, of].astype(float)
        each = np.full(draws, 1 / draws)
        self.draws = [rng.multinomial(draws, each, size=users).astype(np.float32) / draws for _ in range(count)]

    def interval(self, values: Array, *, signed: bool = False) -> dict[str, float]:
        """Return the mean of `[users, draws]` with its 95% interval."""
        found = []
        for users, draws in zip(self.users, self.draws, strict=True):
            found.append(float((users * (draws * values).sum(1)).sum() / users.sum()))
        floor, ceiling = (-1.0, 1.0) if signed else (0.0, 1.0)
        return interval(float(values.mean()), np.array(found), floor, ceiling, basic=False)

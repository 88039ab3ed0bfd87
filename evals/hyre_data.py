"""Pairs for the evaluation of HyRe, from statements that somebody agrees or disagrees with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmrl.jsonl import read_objects, write_objects

PROMPT = "Which of the two statements would you rather make?"


def read_statements(path: str) -> dict[str, dict[str, list[str]]]:
    """Return statements by persona and by "Yes" (the persona would say it) or "No"."""
    found: dict[str, dict[str, list[str]]] = {}
    for _, row in read_objects(path):
        found.setdefault(row["persona"], {"Yes": [], "No": []})[row["answer_matching"]].append(row["statement"])
    return found


def persona_pairs(
    statements: dict[str, list[str]], name: str, count: int, rng: np.random.Generator, *, opposite: bool = False
) -> list[dict[str, Any]]:
    """Return `count` different pairs of a statement the persona would make and one it would not; turned round: `opposite`."""
    yes, no = list(dict.fromkeys(statements["Yes"])), list(dict.fromkeys(statements["No"]))
    cells = rng.permutation(len(yes) * len(no))[:count]
    pairs = [(yes[cell // len(no)], no[cell % len(no)]) for cell in cells.tolist()]
    return [
        {"prompt": PROMPT, "chosen": b if opposite else a, "rejected": a if opposite else b, "group": name}
        for a, b in pairs
        if a != b
    ]


def split_personas(
    statements: dict[str, dict[str, list[str]]],
    folder: Path,
    seed: int,
    *,
    test: int = 20,
    train_pairs: int = 200,
    test_pairs: int = 1200,
) -> tuple[Path, Path, Path]:
    """Write pairs of some personas to train on and of the others to test on; return (train, natural users, two-sided users).

    Two-sided users are the test personas and, as users of their own, their opposites.
    """
    rng = np.random.default_rng(seed)
    names = sorted(statements)
    order = rng.permutation(len(names))
    held, kept = [names[i] for i in order[:test]], [names[i] for i in order[test:]]
    files = folder / "train.jsonl", folder / "natural.jsonl", folder / "two-sided.jsonl"
    write_objects(files[0], _rows(statements, kept, train_pairs, rng))
    natural = _rows(statements, held, test_pairs, rng)
    write_objects(files[1], natural)
    turned = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"], "group": f"not {row['group']}"} for row in natural
    ]
    write_objects(files[2], [*natural, *turned])
    return files


def _rows(
    statements: dict[str, Any], names: Sequence[str], count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    return [row for name in names for row in persona_pairs(statements[name], name, count, rng)]

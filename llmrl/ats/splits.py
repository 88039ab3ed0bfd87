"""Which windows fit, which validate, which test: by row, stratified by file.

The unit that is dealt out is a row where a file has 24 or more; of a file with fewer, a block of up to 14 consecutive windows
of a row, so that a test window's immediate neighbours are mostly test windows too. Rows with the same tokens make one unit.
Of answers the model gave itself the unit is the question: all answers to it, in however few rows, and those of rows that ask
it again.
Units of each file are shuffled, then each goes to the part that lags most behind its share of the tokens, so every file is in
every part in the same proportion.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llmrl.ats.data import Window
from llmrl.errors import DataError

FIT, VALIDATION, TEST = "fit", "validation", "test"
_SHARES = {FIT: 0.50, VALIDATION: 0.15, TEST: 0.35}
MAX_BLOCK = 14
_ENOUGH = 24


@dataclass(frozen=True)
class Split:
    """Indices of windows in each part."""

    fit: list[int]
    validation: list[int]
    test: list[int]


def split_windows(windows: list[Window], seed: int) -> Split:
    """Deal windows into 50% fit, 15% validation, 35% test.

    Raises:
        DataError: fewer than four units; there would be nothing to test on.
    """
    units = _units(windows)
    if len(units) < 4:
        raise DataError(
            f"too little data: {len(windows)} window(s) in {len(units)} different unit(s); fitting, validating and testing "
            "need at least 4 rows, or one text of at least 4 windows (a larger --max_tokens, if it left some out)"
        )
    rng = random.Random(seed)
    by_source: dict[str, list[list[int]]] = {}
    for unit in units:
        by_source.setdefault(windows[unit[0]].source, []).append(unit)
    parts: dict[str, list[int]] = {FIT: [], VALIDATION: [], TEST: []}
    tokens = dict.fromkeys(parts, 0)
    for source in by_source.values():
        rng.shuffle(source)
        for unit in source:
            size = sum(sum(windows[i].scored) for i in unit)
            total = sum(tokens.values()) + size
            # to the part that lags most: every stretch of units, hence every file, is shared out in proportion of tokens
            part = max(parts, key=lambda name: _SHARES[name] * total - tokens[name])
            parts[part].extend(unit)
            tokens[part] += size
    return Split(sorted(parts[FIT]), sorted(parts[VALIDATION]), sorted(parts[TEST]))


def limit_windows(windows: list[Window], max_tokens: int, seed: int) -> list[Window]:
    """Keep whole units, drawn from all files at random, until `max_tokens` scored tokens are reached; order is kept."""
    if sum(sum(w.scored) for w in windows) <= max_tokens:
        return windows
    units = _units(windows)
    random.Random(seed).shuffle(units)
    kept: list[int] = []
    total = 0
    for unit in units:
        size = sum(sum(windows[i].scored) for i in unit)
        if kept and total + size > max_tokens:
            break  # going on with shorter ones would prefer short rows
        kept.extend(unit)
        total += size
    return [windows[i] for i in sorted(kept)]


def duplicate_rows(windows: list[Window]) -> int:
    """Return how many rows repeat the tokens of an earlier one, or, of graded answers, its question."""
    rows = _rows(windows)
    return len(rows) - len({_content(windows, row) for row in rows.values()})


def _units(windows: list[Window]) -> list[list[int]]:
    rows = _rows(windows)
    per_source: dict[str, int] = {}
    for row in rows.values():
        source = windows[row[0]].source
        per_source[source] = per_source.get(source, 0) + 1
    # a short text must still give some twenty units
    block = max(1, min(MAX_BLOCK, len(windows) // _ENOUGH))
    units: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for row in rows.values():
        size = len(row) if per_source[windows[row[0]].source] >= _ENOUGH else block
        for start in range(0, len(row), size):
            part = row[start : start + size]
            # the same text or question again must not be fitted on and tested on
            units.setdefault(_content(windows, part), []).extend(part)
    return list(units.values())


def _rows(windows: list[Window]) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for index, window in enumerate(windows):
        rows.setdefault(window.row, []).append(index)
    return rows


def _content(windows: list[Window], part: list[int]) -> tuple[tuple[int, ...], ...]:
    if _is_graded(windows, part):
        return (windows[part[0]].prompt,)  # the answers differ wherever they are drawn
    return tuple(tuple(windows[i].token_ids) for i in part)


def _is_graded(windows: list[Window], part: list[int]) -> bool:
    return windows[part[0]].grade is not None

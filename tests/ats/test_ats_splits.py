import itertools

import pytest

from llmrl.ats.data import Window
from llmrl.ats.splits import MAX_BLOCK, duplicate_rows, limit_windows, split_windows
from llmrl.errors import DataError

TEXTS = itertools.count()


def window(row, source="a.jsonl", tokens=10, text=None):
    """A window of its own text, or of the text with the number `text`."""
    ids = [1, next(TEXTS) + 1_000_000 if text is None else text, *range(2, tokens)]
    return Window(ids[:tokens], [False] + [True] * (tokens - 1), row, source, f"{source}:{row + 1}")


def one_a_row(count, source="a.jsonl", first=0):
    return [window(first + i, source) for i in range(count)]


def parts(split):
    return split.fit, split.validation, split.test


def test_split_windows_every_window_is_in_one_part():
    windows = one_a_row(500)
    found = parts(split_windows(windows, seed=0))
    assert sorted(i for part in found for i in part) == list(range(500))
    assert all(part == sorted(part) for part in found)


@pytest.mark.parametrize("seed", range(3))
def test_split_windows_shares_are_50_15_35(seed):
    fit, validation, test = parts(split_windows(one_a_row(1000), seed))
    assert len(fit) == pytest.approx(500, abs=5)
    assert len(validation) == pytest.approx(150, abs=5)
    assert len(test) == pytest.approx(350, abs=5)


def test_split_windows_keeps_the_windows_of_a_row_together():
    # chats give several windows a row; rows have one to four
    windows = [window(row) for row in range(300) for _ in range(1 + row % 4)]
    found = parts(split_windows(windows, seed=1))
    rows = [{windows[i].row for i in part} for part in found]
    assert not (rows[0] & rows[1]) | (rows[0] & rows[2]) | (rows[1] & rows[2])


def test_split_windows_deals_a_long_text_in_whole_blocks():
    windows = [window(0) for _ in range(40 * MAX_BLOCK)]
    part_of = {i: name for name, part in enumerate(parts(split_windows(windows, seed=0))) for i in part}
    for start in range(0, len(windows), MAX_BLOCK):
        assert len({part_of[i] for i in range(start, start + MAX_BLOCK)}) == 1
    assert set(part_of.values()) == {0, 1, 2}


def test_split_windows_a_short_text_still_reaches_every_part():
    for count in (4, 10, 24, 60):
        assert all(parts(split_windows([window(0) for _ in range(count)], seed=0))), count


@pytest.mark.parametrize("seed", range(4))
def test_split_windows_every_file_is_in_every_part(seed):
    sizes = {"a.jsonl": 12, "b.jsonl": 200, "c.jsonl": 37, "d.txt": 20}
    windows, first = [], 0
    for source, size in sizes.items():
        windows += one_a_row(size, source, first)
        first += size
    for part in parts(split_windows(windows, seed)):
        counts = {source: sum(windows[i].source == source for i in part) for source in sizes}
        share = len(part) / len(windows)
        for source, size in sizes.items():
            assert counts[source] >= 1
            assert counts[source] == pytest.approx(share * size, abs=2.5)


def test_split_windows_same_seed_same_split_and_other_seeds_differ():
    windows = one_a_row(100)
    assert split_windows(windows, 5) == split_windows(windows, 5)
    assert len({tuple(split_windows(windows, seed).test) for seed in range(6)}) == 6


@pytest.mark.parametrize("windows", [[], one_a_row(3), [window(0)] * 3], ids=["none", "3 rows", "3 windows of a text"])
def test_split_windows_refuses_fewer_than_four_units(windows):
    with pytest.raises(DataError, match=rf"too little data: {len(windows)} window.*at least 4 rows"):
        split_windows(windows, seed=0)


def test_split_windows_four_units_fill_every_part():
    assert all(parts(split_windows(one_a_row(4), seed=0)))


def test_limit_windows_below_the_limit_keeps_everything():
    windows = one_a_row(10)
    assert limit_windows(windows, 90, seed=0) == windows
    assert len(limit_windows(windows, 89, seed=0)) == 9


def test_limit_windows_keeps_whole_units_in_order_within_the_limit():
    windows = [window(row, tokens=4 + row % 5) for row in range(200) for _ in range(3)]
    kept = limit_windows(windows, 700, seed=2)
    assert sum(sum(w.scored) for w in kept) <= 700
    assert sum(sum(w.scored) for w in kept) > 600
    rows = [w.row for w in kept]
    assert rows == sorted(rows)
    assert all(rows.count(row) == 3 for row in set(rows))


def test_limit_windows_spreads_over_files():
    windows = one_a_row(300, "a.jsonl") + one_a_row(300, "b.jsonl", 300)
    kept = [w.source for w in limit_windows(windows, 900, seed=0)]
    assert kept.count("a.jsonl") == pytest.approx(50, abs=20)
    assert kept.count("a.jsonl") + kept.count("b.jsonl") == 100


def test_limit_windows_keeps_one_unit_when_none_fits():
    assert len(limit_windows(one_a_row(8), 3, seed=0)) == 1


def test_limit_windows_same_seed_same_choice():
    windows = one_a_row(100)
    assert limit_windows(windows, 300, 1) == limit_windows(windows, 300, 1)
    assert limit_windows(windows, 300, 1) != limit_windows(windows, 300, 2)


def test_split_windows_keeps_rows_together_in_a_small_data_set_too():
    windows = [window(row) for row in range(30) for _ in range(4 if row % 6 == 0 else 1)]
    rows = [{windows[i].row for i in part} for part in parts(split_windows(windows, seed=0))]
    assert not (rows[0] & rows[1]) | (rows[0] & rows[2]) | (rows[1] & rows[2])


# --- the same text more than once -------------------------------------------------------------------------------------


def texts(windows, part):
    return {tuple(windows[i].token_ids) for i in part}


@pytest.mark.parametrize("seed", range(5))
def test_split_windows_no_text_is_in_two_parts_of_rows_that_repeat(seed):
    windows = [window(row, text=row % 40) for row in range(120)]
    found = parts(split_windows(windows, seed))
    assert sorted(i for part in found for i in part) == list(range(120))
    for one, other in itertools.combinations(found, 2):
        assert not texts(windows, one) & texts(windows, other)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [1, 30])
def test_split_windows_no_text_is_in_two_parts_of_a_file_named_twice(seed, length):
    """`length` windows a row: rows stay whole, or are cut into blocks that begin alike."""
    rows = 40 if length == 1 else 2
    windows = [
        window(row + rows * copy, text=row * 100 + i) for copy in (0, 1) for row in range(rows) for i in range(length)
    ]
    found = parts(split_windows(windows, seed))
    for one, other in itertools.combinations(found, 2):
        assert not texts(windows, one) & texts(windows, other)


def test_split_windows_copies_of_three_rows_are_too_little():
    with pytest.raises(DataError, match=r"too little data: 90 window\(s\) in 3 different unit\(s\)"):
        split_windows([window(row, text=row % 3) for row in range(90)], seed=0)


def test_duplicate_rows_counts_rows_that_repeat_an_earlier_one():
    assert duplicate_rows(one_a_row(20)) == 0
    assert duplicate_rows([window(row, text=row % 7) for row in range(20)]) == 13
    # two windows each: a row that shares only its first one repeats nothing
    windows = [window(0, text=1), window(0, text=2), window(1, text=1), window(1, text=3), window(2, text=1)]
    assert duplicate_rows([*windows, window(2, text=2)]) == 1


def test_limit_windows_does_not_prefer_short_rows():
    windows = [window(row, tokens=100 if row % 2 else 5) for row in range(200)]
    kept = limit_windows(windows, 2000, seed=0)
    long = sum(len(w.token_ids) == 100 for w in kept)
    assert 0.25 < long / len(kept) < 0.75


@pytest.mark.parametrize("seed", range(3))
def test_split_windows_shares_are_of_tokens_where_rows_differ_in_length(seed):
    windows = [window(row, tokens=200 if row % 10 == 0 else 8) for row in range(400)]
    found = [sum(sum(windows[i].scored) for i in part) for part in parts(split_windows(windows, seed))]
    assert [count / sum(found) for count in found] == pytest.approx([0.5, 0.15, 0.35], abs=0.02)


# --- graded answers ---------------------------------------------------------------------------------------------------


def sampled(question, row, sample):
    return Window(
        [1, question, 9, 100 + row, sample], [False] * 3 + [True] * 2, row, "q.jsonl", "q", grade=sample % 2 == 0
    )


@pytest.mark.parametrize(("rows", "samples"), [(10, 8), (22, 3), (40, 4)])
def test_split_windows_answers_to_one_question_are_in_one_part(rows, samples):
    """Few questions or many, and each asked in two rows."""
    windows = [sampled(1000 + row % (rows // 2), row, k) for row in range(rows) for k in range(samples)]
    asked = [{windows[i].token_ids[1] for i in part} for part in parts(split_windows(windows, seed=0))]
    for one, other in itertools.combinations(asked, 2):
        assert not one & other
    kept = [w.token_ids[1] for w in limit_windows(windows, rows * samples, seed=0)]
    assert 0 < len(kept) < len(windows)
    assert all(kept.count(question) == 2 * samples for question in kept)


def test_duplicate_rows_of_graded_answers_are_those_that_ask_the_same():
    windows = [sampled(1000 + row % 7, row, k) for row in range(10) for k in range(4 - row % 2)]
    assert duplicate_rows(windows) == 3
    assert duplicate_rows(windows[:7]) == 0  # two questions, several answers to each

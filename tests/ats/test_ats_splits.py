import pytest

from llmrl.ats.data import Window
from llmrl.ats.splits import MAX_BLOCK, limit_windows, split_windows
from llmrl.errors import DataError


def window(row, source="a.jsonl", tokens=10):
    return Window(list(range(tokens)), [False] + [True] * (tokens - 1), row, source, f"{source}:{row + 1}")


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

"""Whole explorations in processes of their own: 1 and 2 of them, killed and gone on with, write the same bytes."""

import json

import pytest
from explore_run import run

FILES = ("hop-1/candidates.jsonl", "hop-2/candidates.jsonl", "pairs.jsonl", "sft.jsonl", "grpo.jsonl")


def written(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def searched(folder, rank=0):
    """What a process searched for, a list for each call."""
    return json.loads((folder / f"searched-{rank}.json").read_text())


def explored(folder, **options):
    assert run(folder, **options) == 0, (folder / "log.txt").read_text()
    return written(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a run of one process that nothing disturbed."""
    return tmp_path_factory.mktemp("runs") / "alone"


@pytest.fixture(scope="module")
def alone(folder):
    return explored(folder)


def test_a_run_makes_candidates_and_rows(alone):
    counts = {name: len(content.splitlines()) for name, content in alone.items()}
    assert counts["hop-1/candidates.jsonl"] == 4 * 3 * 3  # questions, styles, draws
    assert counts["pairs.jsonl"] >= 4
    assert counts["sft.jsonl"] >= 4


def test_two_processes_write_the_same_bytes_and_search_for_a_half_each(alone, folder, tmp_path):
    assert explored(tmp_path, ranks=2) == alone
    shards = {path.name.split("-")[0] for path in (tmp_path / "hop-1" / "answers-0.8" / "shards").iterdir()}
    assert shards == {"00000", "00001"}
    by_one, by_two = searched(folder), zip(searched(tmp_path, 0), searched(tmp_path, 1), strict=True)
    assert sum(map(len, by_one)) > 10
    for batch, (first, second) in zip(by_one, by_two, strict=True):  # each process its share, and no query twice
        assert sorted(first + second) == sorted(batch)
        assert abs(len(first) - len(second)) <= 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_in_hop_2_goes_on_to_the_same_bytes(alone, tmp_path, ranks):
    assert run(tmp_path, ranks=ranks, kill=3) == -9
    assert (tmp_path / "hop-1" / "candidates.jsonl").read_bytes() == alone["hop-1/candidates.jsonl"]
    assert not (tmp_path / "hop-2" / "candidates.jsonl").exists()
    there = (tmp_path / "hop-2" / "answers-0" / "shards").glob("*.jsonl")
    assert sum(len(path.read_bytes().splitlines()) for path in there) > 0
    assert explored(tmp_path, ranks=3 - ranks) == alone


def test_a_model_that_samples_writes_the_same_bytes_on_two_processes(tmp_path):
    one = explored(tmp_path / "one", model="tiny_lm", questions=[4, 5])
    assert explored(tmp_path / "two", model="tiny_lm", questions=[4, 5], ranks=2) == one
    assert one["pairs.jsonl"]
    queries = {json.loads(line)["query"] for line in one["hop-2/candidates.jsonl"].splitlines()}
    assert len(queries) > 4

import random

import pytest

from llmrl.errors import DataError, UsageError
from llmrl.leret.partitions import partition_rounds, shuffled, slice_questions

IDS = [f"q{i}" for i in range(103)]


def test_disjoint_rounds_deal_every_question_once():
    parts = partition_rounds(IDS, 4)
    assert sorted(len(part) for part in parts) == [25, 26, 26, 26]
    assert sorted(name for part in parts for name in part) == sorted(IDS)
    assert parts != partition_rounds(IDS, 4, seed=1)
    # the first part is no slice of the file: a hypergeometric draw has a mean index of 51 +- 5
    assert 36 < sum(IDS.index(name) for name in parts[0]) / len(parts[0]) < 66


def test_full_rounds_have_all_questions_in_orders_of_their_own():
    first, second = partition_rounds(IDS, 2, "full")
    assert sorted(first) == sorted(second) == sorted(IDS)
    assert first != second


@pytest.mark.parametrize("kind", ["disjoint", "full"])
def test_partition_rounds_does_not_depend_on_the_order_of_the_file(kind):
    mixed = random.Random(0).sample(IDS, len(IDS))
    assert partition_rounds(mixed, 3, kind, seed=5) == partition_rounds(IDS, 3, kind, seed=5)


def test_slices_are_disjoint_and_complete():
    slices = slice_questions(IDS, few_shot=20, seed=3)
    assert (len(slices.few_shot), len(slices.train)) == (20, 83)
    assert sorted(slices.few_shot + slices.train) == sorted(IDS)
    assert slice_questions(random.Random(0).sample(IDS, len(IDS)), few_shot=20, seed=3) == slices
    assert slice_questions(IDS, few_shot=20, seed=4) != slices
    assert slice_questions(IDS).train == slice_questions(IDS, seed=0).train


def test_slices_do_not_follow_the_rounds():
    # with one hash for both, the few-shot questions would all be of the first rounds
    few_shot = set(slice_questions(IDS, few_shot=26).few_shot)
    assert all(len(few_shot.intersection(part)) < 15 for part in partition_rounds(IDS, 4))
    assert set(shuffled(IDS, 0, "round")[:26]) != few_shot


def test_one_more_question_leaves_the_others_in_their_order():
    with_new = shuffled([*IDS, "new"], 0)
    assert tuple(name for name in with_new if name != "new") == shuffled(IDS, 0)


def test_partitions_refuse_what_cannot_be_dealt():
    with pytest.raises(UsageError, match="unknown partition 'disjunct'; did you mean 'disjoint'"):
        partition_rounds(IDS, 2, "disjunct")
    for rounds in (0, 104):
        with pytest.raises(UsageError, match=f"cannot make {rounds} rounds of 103 questions"):
            partition_rounds(IDS, rounds)
    assert len(partition_rounds(IDS[:2], 5, "full")) == 5
    with pytest.raises(UsageError, match="leave nothing to train on"):
        slice_questions(IDS, few_shot=103)
    with pytest.raises(DataError, match=r"1 question id\(s\) are there twice, the first: q7"):
        partition_rounds([*IDS, "q7"], 2)

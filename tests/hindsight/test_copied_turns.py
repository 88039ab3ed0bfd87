"""Turns of a regenerated dialogue from before its edit are another dialogue's: read, and not learnt again."""

from dataclasses import replace

import pytest

from llmrl.hindsight.dialogues import Dialogue, ReadDialogues
from llmrl.hindsight.encode import encode_dialogues, without_copies
from llmrl.hindsight.small_model import word_tokenizer
from llmrl.types import Message

SAID = ("hello there", "what would help", "numbers please", "here they are", "thank you so much", "may I ask more")


def talk(name, *, parent=None, turn=0):
    messages = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(SAID)]
    made = {"regenerated": {"source": "a", "parent": parent, "turn": turn}} if parent else {}
    return Dialogue(name, tuple(messages), (0, 1, 0, 2, 0, 3), provenance=made)


def rows_of(dialogues, window=None):
    rows, read = encode_dialogues(word_tokenizer(SAID), ReadDialogues(list(dialogues), []), 1000, window)
    return rows, read.dialogues


def test_only_turns_from_the_edit_on_are_learnt():
    rows, dialogues = rows_of([talk("a"), talk("b", parent="a", turn=3)])
    kept, left_out = without_copies(rows, dialogues)
    assert left_out == 1
    assert kept[0] == rows[0]
    assert kept[1].spans == rows[1].spans[1:]
    assert kept[1].input_ids == rows[1].input_ids  # what is not learnt is still read


@pytest.mark.parametrize("kind", ["turn", "token"])
def test_what_is_left_learns_what_it_learnt_before(kind):
    rows, dialogues = rows_of([talk("a"), talk("b", parent="a", turn=3)])
    (_, kept), _ = without_copies(rows, dialogues)
    before, after = rows[1].backup(kind, 0.9, "turn"), kept.backup(kind, 0.9, "turn")
    first = rows[1].spans[0].stop - rows[1].spans[0].start
    for column in ("position", "reward", "next_position", "discount", "to_go"):
        assert getattr(after, column) == getattr(before, column)[first:]


def test_a_parent_that_is_not_there_is_learnt_in_its_child():
    rows, dialogues = rows_of([talk("a"), talk("c", parent="b", turn=3)])
    assert without_copies(rows, dialogues) == (rows, 0)


def test_the_first_turn_edited_has_no_copies():
    rows, dialogues = rows_of([talk("a"), talk("b", parent="a", turn=1)])
    assert without_copies(rows, dialogues) == (rows, 0)


@pytest.mark.parametrize("turn", [1, 3, 5])
def test_windows_leave_out_the_same_turns(turn):
    dialogues = [talk("a"), talk("b", parent="a", turn=turn)]
    rows, read = rows_of(dialogues, window=1)
    kept, left_out = without_copies(rows, read)
    assert left_out == turn // 2
    learnt = [row.turns[row.first + i].reward for row in kept if row.id == "b" for i in range(len(row.spans))]
    assert learnt == [1, 2, 3][turn // 2 :]
    by_id = {row.first: row for row in rows if row.id == "b"}
    for row in kept:
        if row.id == "b":
            assert row.backup("turn", 0.9, "turn") == replace(by_id[row.first]).backup("turn", 0.9, "turn")


def test_preferences_pair_a_regenerated_turn_with_the_one_that_was_said():
    from llmrl.hindsight.preferences import turn_pairs

    parent = talk("a")
    messages = (*parent.messages[:3], Message("assistant", "may I ask more"), Message("user", "thank you so much"))
    child = Dialogue(
        "b", messages, (0, 1, 0, 7, 0), provenance={"regenerated": {"source": "a", "parent": "a", "turn": 3}}
    )
    rows, _ = rows_of([parent, child])
    (pair,) = [one for one in turn_pairs(rows, 1.0, "turn") if one.gap]
    said, again = rows[0].spans[1], rows[1].spans[1]
    assert pair.history == rows[0].input_ids[: said.start] == rows[1].input_ids[: again.start]
    assert pair.worse == rows[0].input_ids[said.start : said.stop]
    assert pair.better == rows[1].input_ids[again.start : again.stop]
    assert pair.gap == pytest.approx(7 - 5)

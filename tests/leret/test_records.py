import json

import pytest
from small_world import GOLD, QUESTION, candidate, hop_1, tried

from llmrl.errors import DataError, UsageError
from llmrl.leret.context import SearchState
from llmrl.leret.records import Candidate, Group, group_candidates, read_records, write_records


def test_candidate_knows_where_it_is_and_where_it_leads():
    first = tried(QUESTION)
    assert (first.question_id, first.hop, first.no_hit) == ("q5", 1, False)
    assert first.ret == first.reward == 0.5
    assert first.state_after.hops == (("d5", "d0", "p0"),)
    second = tried("freda", first.state_after)
    assert (second.hop, second.state_after.queries) == (2, (QUESTION, "freda"))
    assert tried("zzz").no_hit


def test_a_stop_action_leads_nowhere_and_is_no_failed_search():
    stop = candidate(1.0, query="", hits=(), stopped=True)
    assert stop.state_after is stop.state_before
    assert not stop.no_hit
    with pytest.raises(DataError, match="no passages of a stop action"):
        candidate(1.0, hits=("a",), stopped=True)


def test_records_are_the_same_after_a_file_of_json_lines(tmp_path):
    candidates = [*hop_1().candidates, tried("freda \u2028 line", tried(QUESTION).state_after)]
    write_records(tmp_path / "c.jsonl", candidates)
    assert read_records(tmp_path / "c.jsonl", Candidate) == candidates
    assert len((tmp_path / "c.jsonl").read_bytes().splitlines()) == len(candidates)
    write_records(tmp_path / "g.jsonl", [hop_1()])
    assert read_records(tmp_path / "g.jsonl", Group) == [hop_1()]


def test_candidates_of_earlier_files_are_read(tmp_path):
    """They hold a key that was never filled."""
    earlier = {**tried(QUESTION).to_json(), "prompt_token_ids": []}
    (tmp_path / "c.jsonl").write_text(json.dumps(earlier) + "\n")
    assert read_records(tmp_path / "c.jsonl", Candidate) == [tried(QUESTION)]


def test_read_records_names_the_line(tmp_path):
    path = tmp_path / "c.jsonl"
    good = json.dumps(tried(QUESTION).to_json())
    path.write_text(f"{good}\n{good.replace('prompt_name', 'prompt')}\n")
    with pytest.raises(DataError, match=r"c.jsonl:2: expected a Candidate; .*unknown key 'prompt'; did you mean"):
        read_records(path, Candidate)
    with pytest.raises(UsageError, match="not found"):
        read_records(tmp_path / "missing.jsonl", Candidate)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reward": float("nan")}, "Candidate.reward: expected a finite number"),
        ({"ap": None}, "Candidate.ap: expected a finite number"),
        ({"finish": "abort"}, "finish: expected 'stop' or 'length'"),
        ({"sample": -1}, "sample: expected an integer"),
    ],
)
def test_candidate_refuses(fields, words):
    with pytest.raises(DataError, match=words):
        candidate(**({"value": 0.5} | fields))


def test_group_candidates_groups_by_state_in_any_order_of_arrival():
    later = tried(QUESTION).state_after
    everything = [*hop_1().candidates, tried("freda", later), tried("oslo", later, prompt="p1")]
    groups = group_candidates(everything, {"q5": GOLD})
    assert [(g.question_id, g.hop, len(g.candidates)) for g in groups] == [("q5", 1, 6), ("q5", 2, 2)]
    assert groups[0] == hop_1()
    assert groups[0].gold == (("d5",), ("p5",))
    assert group_candidates(everything[::-1], {"q5": GOLD}) == groups
    assert groups[0].levels == (0, 0.25, 0.5, 1)


def test_group_knows_when_nothing_is_left_to_search_for():
    found = tried("foxglove freda born").state_after
    assert [g.all_found for g in group_candidates([tried("oslo", found), tried("x")], {"q5": GOLD})] == [False, True]
    assert not group_candidates([tried("oslo", found)])[0].all_found  # gold unknown


def test_groups_refuse_what_cannot_be_compared():
    with pytest.raises(DataError, match="candidates of one state, these are of 2"):
        Group(GOLD, (candidate(0.5), candidate(0.5, state=SearchState("other"))))
    with pytest.raises(DataError, match="prompt 'bare', temperature 0, sample 0 is there twice"):
        group_candidates([candidate(0.5), candidate(0.1, query="again")])
    with pytest.raises(DataError, match=r"1 explored question\(s\) without gold documents, the first: q"):
        group_candidates([candidate(0.5)], {"another": GOLD})

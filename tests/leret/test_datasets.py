import pytest
from small_world import GOLD, QUESTION, candidate, hop_1, tried

from llmrl.errors import DataError
from llmrl.leret.context import merge
from llmrl.leret.datasets import grpo_rows, preference_rows, sft_rows
from llmrl.leret.pairs import PairRule, best_queries, build_pairs
from llmrl.leret.records import Group
from llmrl.types import Message


def render(state):
    return [
        Message("system", "Write a query."),
        Message("user", f"{state.question_id} after {', '.join(merge(state))}"),
    ]


def later():
    state = tried(QUESTION).state_after
    return Group(GOLD, (tried("freda", state), tried("zzz", state, prompt="p1")))


def test_preference_rows_are_trl_columns_and_metadata():
    (row,) = preference_rows(build_pairs([later()], PairRule()), render)
    assert row == {
        "prompt": [
            {"role": "system", "content": "Write a query."},
            {"role": "user", "content": "q5 after d5, d0, p0"},
        ],
        "chosen": [{"role": "assistant", "content": "freda"}],
        "rejected": [{"role": "assistant", "content": "zzz"}],
        "question_id": "q5",
        "hop": 2,
        "state": later().state.key,
        "chosen_reward": 0.75,
        "rejected_reward": 0.5,
        "margin": 0.25,
        "chosen_prompts": ["bare"],
        "rejected_prompts": ["p1"],
    }


def test_rows_of_a_text_prompt_are_texts():
    pairs, targets = build_pairs([later()], PairRule()), best_queries([later()], PairRule())
    (row,) = preference_rows(pairs, lambda state: "Query:")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Query:", "freda", "zzz")
    (row,) = sft_rows(targets, lambda state: "Query:")
    assert (row["prompt"], row["completion"]) == ("Query:", "freda")


def test_sft_rows_hold_the_best_query():
    rows = sft_rows(best_queries([hop_1(), later()], PairRule()), render)
    assert [(row["completion"][0]["content"], row["reward"], row["hop"]) for row in rows] == [
        ("foxglove freda born", 1.0, 1),
        ("freda", 0.75, 2),
    ]
    assert rows[0]["prompt"][1] == {"role": "user", "content": "q5 after "}


def test_grpo_rows_hold_every_candidate():
    (row,) = grpo_rows([hop_1()], render)
    assert row["rewards"] == [0.5, 0.25, 0, 0, 0, 1]
    assert row["candidates"][0] == QUESTION
    assert row["gold_ids"] == [["d5"], ["p5"]]
    assert (row["question_id"], row["hop"]) == ("q5", 1)
    doubled = Group((("g",),), tuple(candidate(1, query=text, sample=i) for i, text in enumerate(("a", "a", ""))))
    assert grpo_rows([doubled], render)[0]["candidates"] == ["a", "a", ""]


def test_rows_refuse_an_empty_prompt():
    with pytest.raises(DataError, match="question q5, hop 1: the prompt is empty"):
        grpo_rows([hop_1()], lambda state: [])

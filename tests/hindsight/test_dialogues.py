import gzip
import json
import random

import pytest

from llmrl.errors import DataError, UsageError
from llmrl.hindsight.dialogues import BadDialogue, Dialogue, dialogue_of, read_dialogues
from llmrl.types import Episode, Message, Turn

HELLO = {"role": "user", "content": "Hello."}
ASK = {"role": "assistant", "content": "Will you give?"}
NO = {"role": "user", "content": "No."}
PLEASE = {"role": "assistant", "content": "Please."}
GOOD = {"id": "talk", "messages": [HELLO, ASK, NO, PLEASE], "rewards": [0.0, -1.0, 0.0, 2.0]}


def without(*names):
    return {key: value for key, value in GOOD.items() if key not in names}


# each differs from GOOD in just the named defect
BAD = {
    "no agent turn": GOOD | {"messages": [HELLO, NO], "rewards": [0.0, 0.0]},
    "two agent turns in a row": GOOD | {"messages": [HELLO, ASK, PLEASE], "rewards": [0.0, -1.0, 2.0]},
    "empty turn": GOOD | {"messages": [HELLO, ASK, NO | {"content": " \n"}, PLEASE]},
    "no rewards": without("rewards"),
    "rewards of another length": GOOD | {"rewards": [0.0, -1.0, 0.0]},
    "unknown role": GOOD | {"messages": [HELLO | {"role": "persuadee"}, ASK, NO, PLEASE]},
    "broken message": GOOD | {"messages": [HELLO, ASK | {"content": 3}, NO, PLEASE]},
    "broken reward": GOOD | {"rewards": [0.0, float("nan"), 0.0, 2.0]},
    "reward at another's turn": GOOD | {"rewards": [0.5, -1.0, 0.0, 2.0]},
    "no end": GOOD | {"done": False},
    "failed episode": {
        "row_id": "talk",
        "sample": 0,
        "turns": [{"message": HELLO}, {"message": ASK, "rewards": {"reward": 1.0}}],
        "error": "the engine is gone",
    },
    "broken row": without("messages"),
}


@pytest.fixture
def write(tmp_path):
    """`write(rows)`: a file of JSON lines with these rows."""

    def make(rows, name="talks.jsonl"):
        path = tmp_path / name
        data = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
        return path

    return make


def test_a_row_is_read_as_it_stands(write):
    (talk,) = read_dialogues([write([GOOD | {"task": "charity", "provenance": {"seed": 3}}])]).dialogues
    assert talk == Dialogue(
        id="talk",
        messages=(
            Message("user", "Hello."),
            Message("assistant", "Will you give?"),
            Message("user", "No."),
            Message("assistant", "Please."),
        ),
        rewards=(0.0, -1.0, 0.0, 2.0),
        done=True,
        truncated=False,
        task="charity",
        provenance={"seed": 3},
    )
    assert talk.agent_turns == (1, 3)
    assert talk.total == 1.0


def test_columns_that_are_not_known_are_kept(write):
    (talk,) = read_dialogues([write([GOOD | {"score": 4, "split": "dev"}])]).dialogues
    assert talk.provenance == {"columns": {"score": 4, "split": "dev"}}


def test_a_row_without_an_id_is_named_by_its_place(write):
    path = write([GOOD, without("id")])
    assert [talk.id for talk in read_dialogues([path]).dialogues] == ["talk", f"{path}:2"]


def test_one_reward_goes_to_the_last_turn_of_the_agent(write):
    rows = [
        without("id", "rewards") | {"reward": 3},
        without("id", "rewards") | {"reward": 3, "messages": [HELLO, ASK, NO]},
    ]
    first, second = read_dialogues([write(rows)]).dialogues
    assert first.rewards == (0.0, 0.0, 0.0, 3.0)
    assert second.rewards == (0.0, 3.0, 0.0)


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), True, "1"])
def test_one_reward_must_be_a_number(reward):
    with pytest.raises(BadDialogue, match="expected a finite number") as refusal:
        dialogue_of(without("rewards") | {"reward": reward}, "talks.jsonl:1")
    assert refusal.value.reason == "broken reward"


def test_rewards_in_both_forms_are_refused():
    with pytest.raises(BadDialogue) as refusal:
        dialogue_of(GOOD | {"reward": 1.0}, "talks.jsonl:1")
    assert refusal.value.reason == "no rewards"


def test_a_cut_dialogue_is_not_done():
    cut = dialogue_of(GOOD | {"truncated": True}, "talks.jsonl:1")
    assert (cut.done, cut.truncated) == (False, True)


@pytest.mark.parametrize("ends", [(True, True), (False, False)])
def test_a_dialogue_ends_in_just_one_way(ends):
    with pytest.raises(BadDialogue, match="exactly one of done and truncated") as refusal:
        dialogue_of(GOOD | {"done": ends[0], "truncated": ends[1]}, "talks.jsonl:1")
    assert refusal.value.reason == "no end"


def test_a_turn_that_only_calls_a_tool_is_not_empty():
    call = {"function": {"name": "look", "arguments": "{}"}}
    messages = [
        HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "A box."},
    ]
    talk = dialogue_of({"messages": messages, "reward": 1.0}, "talks.jsonl:1")
    assert talk.agent_turns == (1,)
    assert talk.messages[1].tool_calls == (call,)


@pytest.mark.parametrize("reason", BAD)
def test_each_defect_is_counted_by_its_name(reason, write):
    path = write([GOOD, BAD[reason]])
    read = read_dialogues([path])
    assert [talk.id for talk in read.dialogues] == ["talk"]
    (refused,) = read.refused
    assert refused[:2] == (f"{path}:2", reason)
    if reason != "broken reward":  # NaN is not equal to itself
        assert refused[3] == BAD[reason]
    assert read.summary() == f"1 dialogues, 1 kept aside: 1 {reason} (first at {path}:2)"


def test_the_summary_counts_reasons_and_names_the_first_place(write):
    first = write([BAD["no end"], GOOD, BAD["empty turn"], BAD["no end"]], "first.jsonl")
    second = write([BAD["empty turn"], BAD["no end"], GOOD | {"id": "other"}], "second.jsonl.gz")
    read = read_dialogues([first, second])
    assert [talk.id for talk in read.dialogues] == ["talk", "other"]
    assert read.summary() == (
        f"2 dialogues, 5 kept aside: 3 no end (first at {first}:1); 2 empty turn (first at {first}:3)"
    )


def test_the_summary_of_good_rows_says_no_more(write):
    assert read_dialogues([write([GOOD])]).summary() == "1 dialogues"


def test_what_is_kept_aside_is_written_with_its_reason(write, tmp_path):
    path = write([GOOD, BAD["no end"], BAD["no agent turn"]])
    read_dialogues([path]).write_aside(tmp_path / "out" / "aside.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out" / "aside.jsonl").read_text().splitlines()]
    assert [(row["where"], row["reason"], row["row"]) for row in rows] == [
        (f"{path}:2", "no end", BAD["no end"]),
        (f"{path}:3", "no agent turn", BAD["no agent turn"]),
    ]
    assert rows[0]["message"] == "dialogue talk: expected exactly one of done and truncated to be true"
    assert set(rows[0]) == {"where", "reason", "message", "row"}


def test_nothing_is_written_where_nothing_is_kept_aside(write, tmp_path):
    read_dialogues([write([GOOD])]).write_aside(tmp_path / "aside.jsonl")
    assert not (tmp_path / "aside.jsonl").exists()


def test_two_dialogues_of_one_id_are_an_error(write):
    first, second = write([GOOD], "first.jsonl"), write([GOOD], "second.jsonl")
    with pytest.raises(DataError, match=r"second\.jsonl:1: the id 'talk' was at .*first\.jsonl:1 already"):
        read_dialogues([first, second])


def test_a_refused_row_takes_no_id(write):
    assert len(read_dialogues([write([BAD["no end"], GOOD])]).dialogues) == 1


def test_only_bad_rows_are_an_error_that_counts_them(write):
    path = write([BAD["no end"], BAD["no rewards"]])
    with pytest.raises(DataError, match=r"no dialogue to learn from.*1 no end.*1 no rewards"):
        read_dialogues([path])


def test_a_file_that_is_not_there_is_an_error_of_use(tmp_path):
    with pytest.raises(UsageError, match="not found"):
        read_dialogues([tmp_path / "nothing.jsonl"])


def test_returns_by_hand():
    talk = Dialogue(
        id="talk",
        messages=(HELLO, ASK, NO, PLEASE, NO, PLEASE, NO),
        rewards=(0.0, 1.0, 0.0, -2.0, 0.0, 4.0, 0.0),
    )
    assert talk.returns() == (3.0, 2.0, 4.0)
    # 4; -2 + 4 / 2; 1 + 0 / 2
    assert talk.returns(discount=0.5) == (1.0, 0.0, 4.0)
    assert talk.returns(discount=0.0) == (1.0, -2.0, 4.0)
    assert talk.total == 3.0


def test_an_episode_with_named_rewards_adds_them_up():
    turns = (
        Turn(Message("user", "Hello.")),
        Turn(Message("assistant", "Will you give?"), rewards={"donation": 2.0, "length": -0.5}),
        Turn(Message("user", "Yes.")),
    )
    episode = Episode("row", 3, turns, truncated=True, source="charity", seed=7, metadata={"persona": "frugal"})
    talk = Dialogue.from_episode(episode)
    assert (talk.id, talk.rewards, talk.task) == ("row/3", (0.0, 1.5, 0.0), "charity")
    assert (talk.done, talk.truncated) == (False, True)
    assert talk.provenance["seed"] == 7
    assert talk.provenance["persona"] == "frugal"


def test_rows_of_all_forms_are_read_from_one_file(write):
    episode = Dialogue.from_json(GOOD | {"id": "played"}).to_episode()
    rows = [GOOD, without("id", "rewards") | {"reward": 1.0}, episode.to_json()]
    read = read_dialogues([write(rows)])
    assert [talk.rewards for talk in read.dialogues] == [
        (0.0, -1.0, 0.0, 2.0),
        (0.0, 0.0, 0.0, 1.0),
        (0.0, -1.0, 0.0, 2.0),
    ]


def random_dialogue(rng, i):
    messages, rewards = [], []
    if rng.random() < 0.5:
        messages.append(Message("system", "Be kind."))
        rewards.append(0.0)
    for turn in range(rng.randint(1, 6)):
        for _ in range(rng.randint(0 if not turn else 1, 2)):  # the agent may open, but never follows itself
            messages.append(Message(rng.choice(["user", "tool"]), rng.choice(["Hm.", "Ünï 🙂", "a\nb"])))
            rewards.append(0.0)
        messages.append(Message("assistant", f"Turn {turn}."))
        rewards.append(rng.choice([0.0, rng.uniform(-2, 2), -1]))
    done = rng.random() < 0.5
    return Dialogue(
        id=f"talk-{i}",
        messages=tuple(messages),
        rewards=tuple(rewards),
        done=done,
        truncated=not done,
        task=rng.choice(["", "charity"]),
        provenance=rng.choice([{}, {"seed": i, "edits": [{"turn": 1}]}]),
    )


@pytest.mark.parametrize("seed", range(40))
def test_random_dialogues_are_the_same_after_json_and_after_an_episode(seed, write):
    rng = random.Random(seed)
    talks = [random_dialogue(rng, i) for i in range(5)]
    assert [Dialogue.from_json(json.loads(json.dumps(talk.to_json()))) for talk in talks] == talks
    assert read_dialogues([write(talk.to_json() for talk in talks)]).dialogues == talks
    for talk in talks:
        episode = Episode.from_json(json.loads(json.dumps(talk.to_episode().to_json())))
        back = Dialogue.from_episode(episode)
        for name in ("messages", "rewards", "done", "truncated", "task"):
            assert getattr(back, name) == getattr(talk, name)
        assert episode.returns == pytest.approx({"reward": talk.total})


@pytest.mark.parametrize("seed", range(20))
def test_returns_of_random_dialogues_are_sums_of_what_is_left(seed):
    talk = random_dialogue(random.Random(seed), seed)
    earned = [talk.rewards[i] for i in talk.agent_turns]
    assert talk.returns() == pytest.approx([sum(earned[k:]) for k in range(len(earned))])
    assert talk.returns()[0] == pytest.approx(talk.total)
    assert talk.returns(0.9) == pytest.approx(
        [sum(0.9**j * reward for j, reward in enumerate(earned[k:])) for k in range(len(earned))]
    )


def test_numbers_that_json_cannot_hold_are_written_aside_as_text(tmp_path):
    row = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rewards": [0, NaN]}'
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "reward": 1}'
    (tmp_path / "data.jsonl").write_text(row + "\n" + good + "\n")
    read_dialogues([tmp_path / "data.jsonl"]).write_aside(tmp_path / "aside.jsonl")
    assert json.loads((tmp_path / "aside.jsonl").read_text())["row"]["rewards"] == [0, "nan"]
    (tmp_path / "data.jsonl").write_text(good + "\n")
    read_dialogues([tmp_path / "data.jsonl"]).write_aside(tmp_path / "aside.jsonl")
    assert not (tmp_path / "aside.jsonl").exists()  # nothing was refused this time


def test_half_a_surrogate_pair_is_refused_and_spelled_out_aside(tmp_path):
    messages = [{"role": "user", "content": "a \ud83d"}, {"role": "assistant", "content": "b"}]
    good = {"id": "g", "messages": [{"role": "user", "content": "a"}, messages[1]], "reward": 1}
    rows = [{"id": "s", "messages": messages, "reward": 1}, good]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_dialogues([tmp_path / "data.jsonl"])
    assert [(reason, row["id"]) for _, reason, _, row in read.refused] == [("broken text", "s")]
    read.write_aside(tmp_path / "aside.jsonl")
    kept = json.loads((tmp_path / "aside.jsonl").read_text())
    assert kept["row"]["messages"][0]["content"] == "a \\ud83d"


def test_columns_of_null_are_not_there():
    """As tables with a column for each key of any row write them."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {
        "id": None,
        "messages": messages,
        "reward": 1,
        "rewards": None,
        "truncated": None,
        "task": None,
        "provenance": None,
    }
    found = dialogue_of(row, "f:3")
    assert (found.id, found.rewards, found.done, found.task) == ("f:3", (0.0, 1.0), True, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"messages": "hello"}, "broken message"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "broken message"),
        ({"messages": [{"role": "narrator", "content": "a"}, {"role": "assistant", "content": "b"}]}, "unknown role"),
        ({"rewards": [0, 10**400]}, "broken reward"),
    ],
)
def test_reasons_are_told_apart(change, reason):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadDialogue) as refused:
        dialogue_of({"messages": messages, "rewards": [0, 1], **change}, "f:1")
    assert refused.value.reason == reason


def test_going_through_an_episode_twice_changes_nothing():
    messages = (Message("user", "a"), Message("assistant", "b"))
    one = Dialogue("x", messages, (0.0, 1.0), task="t", provenance={"seed": 3})
    assert Dialogue.from_episode(Dialogue.from_episode(one.to_episode()).to_episode()) == one

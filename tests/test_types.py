import copy
import dataclasses
import json
import math
import subprocess
import sys

import pytest

from llmrl.errors import ConfigError, DataError
from llmrl.types import (
    Episode,
    FinishReason,
    Message,
    PolicyVersion,
    Preference,
    SamplingConfig,
    TokenizedRollout,
    Turn,
)

V0 = PolicyVersion(0, "sha256:aa")
V1 = PolicyVersion(1, "sha256:bb")
NAN, INF = float("nan"), float("inf")


def sampled(text="hi", ids=(7, 8), mask=(1, 1), logprobs=(-0.5, -1.25), **kw):
    kw = {"policy_version": V0, "finish_reason": FinishReason.STOP} | kw
    return Turn(Message("assistant", text), ids, mask, logprobs, **kw)


def episode(*turns, **kw):
    return Episode("row", 0, turns, **({"done": True} | kw))


ROLLOUT = TokenizedRollout((1, 2, 3), (0, 1, 1), (None, -0.1, None), (0, 1, 1))
TWO_SEGMENTS = episode(
    Turn(Message("user", "find it"), (1, 2, 3)),
    sampled("search a", (4, 5, 2), (1, 0, 1), (-0.5, None, -0.25), rewards={"ap": 0.5, "format": 1}),
    Turn(Message("tool", "a page", name="search"), (6, 7)),
    sampled("search b", (8,), (1,), (-0.125,), policy_version=V1, finish_reason="length", rewards={"ap": 0.25}),
    Turn(Message("user", "history rewritten"), (1, 9, 9, 4), segment=1),
    sampled("answer", (5, 2), segment=1, policy_version=V1),
    truncated=True,
    done=False,
    source="hotpotqa",
    seed=3,
    sampling=SamplingConfig(temperature=0.7, stop=("\n",), seed=5),
    metadata={"gold": ["p1", "p2"], "nested": {"k": 1.5, "none": None}},
)
RECORDS = [
    Message("assistant", "", tool_calls=({"function": {"name": "f", "arguments": {"q": "x"}}},)),
    V1,
    SamplingConfig(0.5, 0.9, 5, 0.1, 8, 4, ("a", "b"), (2,), 17, 3),
    Turn(Message("user", "x")),
    sampled(rewards={"ap": 0.1 + 0.2}),
    ROLLOUT,
    TWO_SEGMENTS,
    Episode("row", 1, (), error="EngineError: the server died"),
    Preference("p", "c", "r", {"margin": 0.25, "row": "1"}),
    Preference((Message("user", "q"),), (Message("assistant", "good"),), (Message("assistant", "bad"),)),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_from_json_gives_the_record_back(record):
    text = json.dumps(record.to_json(), allow_nan=False)
    assert type(record).from_json(json.loads(text)) == record
    assert json.dumps(type(record).from_json(json.loads(text)).to_json()) == text


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_records_are_frozen(record):
    name = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, getattr(record, name))


@pytest.mark.parametrize(
    ("cls", "value", "error", "words"),
    [
        (Message, {"role": "user", "contents": "x"}, DataError, "unknown key 'contents'; did you mean 'content'?"),
        (Message, {"role": "user"}, DataError, "missing content; got role"),
        (Message, ["user", "x"], DataError, "expected a JSON object, got list"),
        (SamplingConfig, {"temprature": 1}, ConfigError, "unknown key 'temprature'; did you mean 'temperature'?"),
        (Turn, {"message": {"role": "user", "contnt": "x"}}, DataError, "did you mean 'content'?"),
        (Episode, {"row_id": "a", "sample": 0, "turns": [], "finished": True}, DataError, "unknown key 'finished'"),
    ],
)
def test_from_json_refuses_other_keys(cls, value, error, words):
    with pytest.raises(error) as caught:
        cls.from_json(value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Message("robot", "x"), "Message.role: expected one of system, user, assistant, tool, got 'robot'"),
        (lambda: Message("user", None), "Message.content: expected text, got None"),
        (lambda: Message("user", "x", tool_calls="f"), "Message.tool_calls"),
        (lambda: PolicyVersion(-1, "a"), "PolicyVersion.number: expected an integer >= 0, got -1"),
        (lambda: PolicyVersion(True, "a"), "PolicyVersion.number"),
        (lambda: PolicyVersion(0, ""), "PolicyVersion.fingerprint"),
        (lambda: Turn(Message("user", "x"), "abc"), "Turn.token_ids: expected a list of integers >= 0, got 'abc'"),
        (lambda: Turn(Message("user", "x"), None), "Turn.token_ids"),
        (lambda: Turn(Message("user", "x"), (1.5,)), "Turn.token_ids"),
        (lambda: Turn(Message("user", "x"), (-1,)), "Turn.token_ids"),
        (lambda: Turn(Message("user", "x"), (1,), segment=-1), "Turn.segment"),
        (lambda: sampled(mask=(1,)), "Turn.loss_mask: expected 2 values, one a token, got 1"),
        (lambda: sampled(mask="11"), "Turn.loss_mask: expected a list, got '11'"),
        (lambda: sampled(logprobs=None), "Turn.logprobs: expected a list, got None"),
        (lambda: sampled(mask=(1, 2)), "Turn.loss_mask: expected zeros and ones, got (1, 2)"),
        (lambda: sampled(logprobs=(-1.0,)), "Turn.logprobs: expected 2 values, one a token, got 1"),
        (lambda: sampled(logprobs=(-1.0, NAN)), "Turn.logprobs[1]: expected a finite number <= 0, got nan"),
        (lambda: sampled(logprobs=(-1.0, -INF)), "Turn.logprobs[1]"),
        (lambda: sampled(logprobs=(-1.0, 0.5)), "Turn.logprobs[1]: expected a finite number <= 0, got 0.5"),
        (lambda: sampled(logprobs=(-1.0, None)), "Turn.logprobs: expected a number where loss_mask is 1"),
        (lambda: sampled(mask=(1, 0)), "Turn.logprobs[1]: expected null where loss_mask is 0, got -1.25"),
        (lambda: sampled(mask=(0, 0), logprobs=()), "Turn.loss_mask: expected a 1 for each sampled token"),
        (lambda: sampled(finish_reason=None), "Turn.finish_reason: expected a reason on a turn with a policy version"),
        (lambda: sampled(finish_reason="eos"), "Turn.finish_reason: expected one of stop, length, abort, got 'eos'"),
        (lambda: sampled(policy_version=None), "Turn.logprobs: expected null on a turn without a policy version"),
        (
            lambda: sampled(policy_version=None, logprobs=()),
            "Turn.finish_reason: expected null on a turn without a policy version",
        ),
        (lambda: sampled(rewards={"ap": NAN}), "Turn.rewards.ap: got nan (float); JSON has no NaN or infinity"),
        (lambda: sampled(rewards={"ap": "1"}), "Turn.rewards: expected an object of named numbers"),
        (lambda: sampled(rewards=1.0), "Turn.rewards: expected an object"),
        (lambda: TokenizedRollout((), (), (), ()), "TokenizedRollout.token_ids: expected at least one token"),
        (lambda: TokenizedRollout((1,), (1, 0), (None,), (0,)), "TokenizedRollout.loss_mask: expected 1 values"),
        (lambda: TokenizedRollout((1,), (1,), (), (0,)), "TokenizedRollout.logprobs: expected 1 values"),
        (lambda: TokenizedRollout((1,), (), (None,), (0,)), "TokenizedRollout.loss_mask: expected 1 values"),
        (lambda: TokenizedRollout((1,), (1,), (None,), (0, 1)), "TokenizedRollout.turn_index: expected 1 values"),
        (lambda: TokenizedRollout((1, 2), (1, 1), (None,) * 2, (1, 0)), "turn_index: expected turns in order"),
        (lambda: TokenizedRollout((1,), (0,), (-1.0,), (0,)), "logprobs[0]: expected null where loss_mask is 0"),
        (lambda: episode(done=False), "Episode row/0: expected exactly one of done, truncated and error"),
        (lambda: episode(truncated=True), "got done=True, truncated=True, error=None"),
        (lambda: episode(error="dead"), "got done=True, truncated=False, error='dead'"),
        (lambda: episode(done=1), "Episode.done: expected true or false, got 1"),
        (lambda: Episode("", 0, (), done=True), "Episode.row_id"),
        (lambda: Episode(3, 0, (), done=True), "Episode.row_id: expected non-empty text, got 3"),
        (lambda: Episode("a", -1, (), done=True), "Episode.sample"),
        (lambda: episode(sampled(segment=1)), "segments that start at 0 and grow by one, got [1]"),
        (lambda: episode(sampled(), sampled(segment=2)), "grow by one, got [0, 2]"),
        (lambda: episode(sampled(), sampled(segment=1), sampled()), "grow by one, got [0, 1, 0]"),
        (lambda: episode(metadata={"a": {"b": [1, NAN]}}), "metadata.a.b[1]: got nan (float); JSON has no NaN"),
        (lambda: episode(metadata={"a": {1, 2}}), "metadata.a: got {1, 2} (set); use what JSON can hold"),
        (lambda: episode(metadata={1: 2}), "metadata: expected an object with texts as keys"),
        (lambda: Preference("p", "same", "same"), "chosen and rejected are the same: 'same'"),
        (lambda: Preference("p", [Message("assistant", "c")], "r"), "expected three texts or three lists of messages"),
        (lambda: Preference("", "c", "r"), "Preference.prompt: expected text or a list of messages, not empty, got ''"),
        (lambda: Preference("p", "c", "r", {"margin": INF}), "metadata.margin: got inf"),
    ],
)
def test_records_refuse_what_cannot_be(make, words):
    with pytest.raises(DataError) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1), ("temperature", NAN), ("temperature", "1"), ("temperature", True),
        ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.5), ("top_k", -1), ("top_k", 1.0),
        ("max_tokens", 0), ("n", 0), ("logprobs", -1), ("seed", -1), ("seed", 1.5),
        ("stop", "END"), ("stop", [""]), ("stop_token_ids", [-1]), ("stop_token_ids", 2),
    ],
)  # fmt: skip
def test_sampling_config_refuses_a_wrong_value(key, value):
    with pytest.raises(ConfigError, match=rf"SamplingConfig\.{key}: expected .+, got"):
        SamplingConfig(**{key: value})


@pytest.mark.parametrize(
    ("kw", "truncated"),
    [
        ({}, False), ({"temperature": 0.3}, False), ({"temperature": 0}, False), ({"top_p": 0.99}, True),
        ({"top_k": 1}, True), ({"min_p": 0.01}, True),
    ],
)  # fmt: skip
def test_sampling_config_is_truncated_by_filters_only(kw, truncated):
    assert SamplingConfig(**kw).is_truncated is truncated


def test_require_full_support_names_each_key_and_its_cure():
    SamplingConfig(temperature=0.7).require_full_support()
    with pytest.raises(ConfigError) as caught:
        SamplingConfig(top_p=0.9, top_k=20).require_full_support()
    assert "drawn with top_p=0.9, top_k=20; set top_p=1, top_k=0" in str(caught.value)
    with pytest.raises(ConfigError, match=r"min_p=0.05; set min_p=0"):
        SamplingConfig(min_p=0.05).require_full_support()
    with pytest.raises(ConfigError, match=r"temperature=0.0; set temperature=1"):
        SamplingConfig(temperature=0).require_full_support()


def test_message_to_json_is_what_templates_read():
    assert Message("user", "hi").to_json() == {"role": "user", "content": "hi"}
    assert Message("tool", "", name="f").to_json() == {"role": "tool", "content": "", "name": "f"}


def test_turn_defaults_to_nothing_sampled():
    turn = Turn(Message("user", "x"), [4, 5])
    assert (turn.token_ids, turn.loss_mask, turn.logprobs) == ((4, 5), (0, 0), (None, None))
    assert not turn.is_sampled
    assert sampled().is_sampled


@pytest.mark.parametrize("reason", ["stop", "length", "abort"])
def test_turn_finish_reason_is_an_enum(reason):
    turn = Turn.from_json(sampled(finish_reason=reason).to_json())
    assert turn.finish_reason is FinishReason(reason)
    assert turn.to_json()["finish_reason"] == reason


def test_turn_of_a_log_may_be_trained_on_without_logprobs():
    turn = Turn(Message("user", "the speaker to learn from"), (4, 5), (1, 1))
    assert turn.logprobs == (None, None)
    assert episode(turn).rollouts()[0].loss_mask == (1, 1)


def test_records_do_not_share_what_they_were_made_from():
    metadata, rewards = {"a": [1]}, {"ap": 1.0}
    made = episode(sampled(rewards=rewards), metadata=metadata)
    before = copy.deepcopy(made.to_json())
    metadata["a"].append(NAN)
    rewards["ap"] = NAN
    assert made.to_json() == before


def test_rollouts_concatenate_the_turns_of_each_segment():
    first, second = TWO_SEGMENTS.rollouts()
    assert TWO_SEGMENTS.segments == 2
    assert first == TokenizedRollout(
        token_ids=(1, 2, 3, 4, 5, 2, 6, 7, 8),
        loss_mask=(0, 0, 0, 1, 0, 1, 0, 0, 1),
        logprobs=(None, None, None, -0.5, None, -0.25, None, None, -0.125),
        turn_index=(0, 0, 0, 1, 1, 1, 2, 2, 3),
        segment=0,
    )
    assert second == TokenizedRollout(
        (1, 9, 9, 4, 5, 2), (0, 0, 0, 0, 1, 1), (None,) * 4 + (-0.5, -1.25), (4, 4, 4, 4, 5, 5), segment=1
    )


def test_rollouts_hold_each_sampled_token_once():
    recorded = [
        (i, token, p)
        for i, turn in enumerate(TWO_SEGMENTS.turns)
        for token, m, p in zip(turn.token_ids, turn.loss_mask, turn.logprobs, strict=True)
        if m
    ]
    trained = [
        (i, token, p)
        for r in TWO_SEGMENTS.rollouts()
        for i, token, m, p in zip(r.turn_index, r.token_ids, r.loss_mask, r.logprobs, strict=True)
        if m
    ]
    assert trained == recorded
    assert [TWO_SEGMENTS.turns[i].policy_version for i, _, _ in trained] == [V0, V0, V1, V1, V1]


def test_rollouts_refuse_a_turn_of_text_alone():
    with pytest.raises(DataError, match=r"turn 1 \(user\) has text and no token ids"):
        episode(sampled(), Turn(Message("user", "from a text-only endpoint")), sampled()).rollouts()
    assert Episode("row", 0, (), error="died at once").rollouts() == []


def test_returns_add_up_each_named_reward():
    assert TWO_SEGMENTS.returns == {"ap": 0.75, "format": 1.0}
    assert math.isclose(episode().returns.get("ap", 0.0), 0.0)


def test_to_trl_has_the_three_columns():
    assert Preference("p", "c", "r", {"margin": 1}).to_trl() == {"prompt": "p", "chosen": "c", "rejected": "r"}
    chat = Preference([{"role": "user", "content": "q"}], [Message("assistant", "a")], [Message("assistant", "b")])
    assert chat.to_trl() == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }


def test_types_import_needs_the_standard_library_only():
    code = "import sys, llmrl.types\nprint({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'transformers'})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_sampling_with_a_schema_is_truncated_and_refused_for_ratios():
    sampling = SamplingConfig(json_schema={"type": "object"})
    assert sampling.is_truncated
    with pytest.raises(ConfigError, match=r"json_schema=\{'type': 'object'\}; set json_schema=None"):
        sampling.require_full_support()

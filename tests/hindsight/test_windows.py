"""A policy that reads the last exchanges alone: the same contexts in training and when it is played."""

import math
from itertools import pairwise

import pytest
import torch
from hindsight_models import TINY, dialogue, small_llama

from llmrl.base_model import load_tokenizer
from llmrl.errors import ModelError
from llmrl.hindsight.batches import DialogueCollator, examples_of
from llmrl.hindsight.dialogues import Dialogue, ReadDialogues
from llmrl.hindsight.encode import encode_dialogue, encode_dialogues, encode_parts
from llmrl.hindsight.envs import maze
from llmrl.hindsight.model import DialogueModel
from llmrl.hindsight.playing import ENVIRONMENTS, play
from llmrl.hindsight.policy_folder import READS, Reads, read_reads
from llmrl.hindsight.run import best
from llmrl.hindsight.small_model import word_tokenizer
from llmrl.rollout.backends import open_engine
from llmrl.rollout.chat import Conversation, in_window
from llmrl.rollout.protocols import Sample
from llmrl.types import FinishReason, Message, PolicyVersion, SamplingConfig

TALK = dialogue("t", "One.", "Two.", "Three.", "Four.", "Five.", "Six.", "Seven.", rewards=(1.0, 0.5, -2.0))
WORDS = word_tokenizer(m.content for m in TALK.messages)

VERSION = PolicyVersion(0, "abc")


def roles(text):
    return [
        {"role": {"s": "system", "u": "user", "a": "assistant", "t": "tool"}[c], "content": str(i)}
        for i, c in enumerate(text)
    ]


@pytest.mark.parametrize(
    ("text", "exchanges", "kept"),
    [
        ("uau", 1, "2"),
        ("uau", 2, "012"),
        ("suauau", 1, "05"),
        ("suauau", 2, "0345"),
        ("suauau", 3, "012345"),
        ("suauau", None, "012345"),
        ("uaua", 1, "23"),  # an answer belongs to what it answers
        ("uauutu", 1, "2345"),  # all that was said since the last answer
        ("ssu", 1, "012"),
        ("sau", 1, "02"),
        ("", 1, ""),
    ],
)
def test_the_messages_in_a_window(text, exchanges, kept):
    assert "".join(m["content"] for m in in_window(roles(text), exchanges)) == kept


def fresh_context(tokenizer, messages):
    talk = Conversation(tokenizer)
    talk.add(*messages)
    return talk.prompt()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_each_turn_is_learnt_after_what_its_window_holds(window):
    parts = encode_parts(WORDS, TALK, window)
    turns = [(part, span) for part in parts for span in part.spans]
    assert [span.reward for _, span in turns] == [1.0, 0.5, -2.0]
    for k, (part, span) in enumerate(turns):
        first = max(0, k - window + 1)
        assert part.input_ids[: span.start] == fresh_context(WORDS, TALK.messages[2 * first : 2 * k + 1])
        assert WORDS.decode(part.input_ids[span.start : span.stop - 1]) == TALK.messages[2 * k + 1].content


def test_what_is_bootstrapped_from_is_the_next_turns_own_context():
    parts = encode_parts(WORDS, TALK, 1)
    assert [part.done for part in parts] == [False, False, True]
    for part, after in pairwise(parts):
        assert part.input_ids[part.lengths[0] :] == after.input_ids[: after.spans[0].start]
        assert part.backup("turn", 1.0, "turn").next_position[-1] == len(part.input_ids) - 1
    assert parts[-1].lengths == (len(parts[-1].input_ids),)
    assert set(parts[-1].backup("turn", 1.0, "turn").next_position) == {-1}


def test_a_dialogue_that_was_cut_off_bootstraps_from_its_open_end():
    cut = dialogue("c", "One.", "Two.", "Three.", rewards=(1.0,), done=False)
    (part,) = encode_parts(WORDS, cut, 1)
    assert not part.done
    assert part.input_ids[part.lengths[0] :] == fresh_context(WORDS, cut.messages[-1:])


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("unit", ["turn", "token"])
@pytest.mark.parametrize("kind", ["turn", "token"])
def test_what_is_to_go_is_that_of_the_whole_dialogue(window, unit, kind):
    whole = encode_dialogue(WORDS, TALK).backup(kind, 0.9, unit)
    parts = [part.backup(kind, 0.9, unit) for part in encode_parts(WORDS, TALK, window)]
    assert [x for part in parts for x in part.to_go] == pytest.approx(whole.to_go)
    for name in ("reward", "discount"):
        found = [x for part in parts for x in getattr(part, name)]
        if unit == "turn" or name == "reward":
            assert found == pytest.approx(getattr(whole, name))
    by_hand = 1.0 + 0.9 * 0.5 - 0.81 * 2.0
    if unit == "turn" and kind == "turn":
        assert whole.to_go[0] == pytest.approx(by_hand)


@pytest.mark.parametrize("packing", [False, True])
def test_states_of_a_batch_are_those_of_contexts_read_alone(packing):
    model = DialogueModel(small_llama(len(WORDS)), None)
    parts = encode_parts(WORDS, TALK, 1)
    batch = DialogueCollator(packing=packing)(examples_of(parts, "turn", 1.0, "turn"))
    states = model.states(batch)
    row = 0
    for part in parts:
        contexts = part.input_ids[: part.lengths[0]], part.input_ids[part.lengths[0] :]
        alone = [model.policy.model(torch.tensor([ids])).last_hidden_state[0] if ids else None for ids in contexts]
        for span in part.spans:
            for token in range(span.start, span.stop):
                torch.testing.assert_close(states.policy[row], alone[0][token - 1], atol=1e-5, rtol=1e-4)
                assert batch["token"][row] == part.input_ids[token]
                if alone[1] is not None:
                    torch.testing.assert_close(states.after[row], alone[1][-1], atol=1e-5, rtol=1e-4)
                row += 1
    assert row == len(batch["token"])


def test_rewards_are_scaled_where_they_are_learnt():
    parts = encode_parts(WORDS, TALK, 1)
    plain, scaled = (examples_of(parts, "turn", 0.9, "turn", scale) for scale in (1.0, 0.25))
    for one, other in zip(plain, scaled, strict=True):
        assert other["backup"].to_go == pytest.approx([0.25 * x for x in one["backup"].to_go])
        assert other["backup"].reward == pytest.approx([0.25 * x for x in one["backup"].reward])


def test_the_best_dialogues_are_kept_with_all_of_their_turns():
    good = dialogue("good", "One.", "Two.", "Three.", "Four.", rewards=(-1.0, 9.0))
    rows, _ = encode_dialogues(WORDS, ReadDialogues([TALK, good], []), 100, 1)
    assert [row.id for row in rows] == ["t"] * 3 + ["good"] * 2
    assert [row.id for row in best(rows, 0.5)] == ["good"] * 2


def test_only_what_is_read_at_once_has_to_fit():
    whole = len(encode_dialogue(WORDS, TALK).input_ids)
    assert encode_dialogues(WORDS, ReadDialogues([TALK], []), whole - 1, 1)[1].refused == []
    wordy = dialogue("w", "One. Two. Three.", "Four.")
    longest = len(encode_dialogue(WORDS, wordy).input_ids)
    rows, read = encode_dialogues(WORDS, ReadDialogues([TALK, wordy], []), longest - 1, 1)
    assert ({row.id for row in rows}, read.dialogues) == ({"t"}, [TALK])
    assert read.refused == [
        ("w", "too long", f"dialogue w: {longest} tokens, expected at most {longest - 1}", wordy.to_json())
    ]


@pytest.mark.parametrize("window", [1, 2])
def test_what_is_played_is_what_would_be_learnt(tmp_path, window):
    """The engine's own prompts, recorded token by token, and the contexts that training makes of the recorded texts."""
    tokenizer = load_tokenizer(TINY)
    environment = ENVIRONMENTS["maze"]
    with open_engine(str(TINY), rollout_backend="transformers") as engine:
        sampling = SamplingConfig(temperature=1.0, max_tokens=6)
        played = play(engine, environment, maze.rows(), 2, sampling, tmp_path, seed=1, window=window)
    for episode in played:
        kept = [i for i, turn in enumerate(episode.turns) if turn.is_sampled]
        texts = [episode.turns[i].message for i in range(max(kept) + 1)]
        for n, i in enumerate(kept[:12]):
            first = kept[n - window] + 1 if n >= window else 0
            before = [t.token_ids for t in episode.turns[:i] if t.segment == episode.turns[i].segment]
            ids = tuple(token for part in before for token in part)
            assert ids == fresh_context(tokenizer, texts[first:i]), f"turn {n}"


def test_an_episode_that_was_played_can_be_learnt_from(tmp_path):
    texts = ["move up", "move down"]
    walk = maze.logs(1, 3)[0]
    tokenizer = word_tokenizer([m.content for m in walk.messages] + texts)
    parts = encode_parts(tokenizer, Dialogue.from_episode(walk.to_episode()), 1)
    assert len(parts) == len(walk.agent_turns)
    assert math.isclose(parts[0].backup("turn", 1.0, "turn").to_go[0], walk.total)


def test_a_folder_says_how_its_policy_is_played(tmp_path):
    assert read_reads(tmp_path) == read_reads("a/hub-name") == Reads(None, "turn")
    (tmp_path / READS).write_text('{"window": 2, "backup": "token"}', encoding="utf-8")
    assert read_reads(tmp_path) == Reads(2, "token")


@pytest.mark.parametrize(
    "text", ["{}", '{"window": 0}', '{"window": true}', '{"window": 1, "backup": "x"}', "[1]", "no"]
)
def test_a_folder_that_says_nonsense_of_its_window(tmp_path, text):
    (tmp_path / READS).write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=READS):
        read_reads(tmp_path)


def test_a_window_of_messages_is_a_number_from_1():
    from llmrl.errors import ConfigError

    with pytest.raises(ConfigError, match="window: expected 1 exchange"):
        Conversation(WORDS, window=0)


def test_system_messages_stay_in_a_window():
    talk = Conversation(WORDS, window=1)
    opening = (Message("system", "One."), Message("user", "Two."))
    talk.add(*opening)
    assert talk.prompt() == fresh_context(WORDS, opening)
    said = WORDS.encode("Three.", add_special_tokens=False)
    talk.answer(Sample(tuple(said), (-1.0,) * len(said), "Three.", FinishReason.LENGTH, VERSION))
    talk.add(Message("user", "Four."))
    assert talk.prompt() == fresh_context(WORDS, [opening[0], Message("user", "Four.")])
    assert [turn.segment for turn in talk.turns] == [0, 0, 0, 1]
    assert talk.turns[2].token_ids == tuple(said)

"""What an episode records: turns, tokens, seeds, tools, rewrites."""

from episode_support import Base, episodes, rows
from episodes_run import SAMPLING, ByteTokenizer, play

from llmrl.rollout.environment import Step, parse_tool_calls
from llmrl.rollout.episodes import run_episodes
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message, SamplingConfig

# what is recorded


def test_episode_holds_messages_tokens_rewards_and_metadata_of_each_turn(tmp_path):
    class Counting(Base):
        def step(self, answer):
            step = super().step(answer)
            return Step(step.messages, rewards=step.rewards, done=step.done, metadata={"said": answer.content})

    summary = play(tmp_path, rows(1), Counting, script=lambda request: "hi", source="toy", seed=5)
    (episode,) = episodes(tmp_path).values()
    assert episode.done
    assert not episode.truncated
    assert (episode.source, episode.seed, episode.sampling) == ("toy", 5, SAMPLING)
    assert [t.message.content for t in episode.turns] == ["0", "hi", "1", "hi", "2"]
    assert [t.rewards for t in episode.turns] == [{}, {"r": 1}, {}, {"r": 2}, {}]
    assert episode.metadata == {"steps": [{"said": "hi"}, {"said": "hi"}]}
    text = "user:0<|end|>assistant:hi<|end|>user:1<|end|>assistant:hi<|end|>user:2<|end|>"
    (rollout,) = episode.rollouts()
    assert list(rollout.token_ids) == ByteTokenizer().encode(text)
    assert sum(rollout.loss_mask) == 6  # twice "hi" and the end token
    assert (summary.done, summary.turns, summary.sampled_tokens, summary.rewards) == (1, 2, 6, {"r": 3.0})


def test_seeds_are_hashes_of_run_row_sample_and_turn(tmp_path):
    asked, made = [], []

    def script(request):
        asked.append(request.sampling.seed)
        return "hi"

    class Seeded(Base):
        def __init__(self, row, seed):
            super().__init__(row, seed)
            made.append(seed)

    play(tmp_path, [{"id": "a"}, {}], Seeded, script=script, samples=2, seed=9)
    pairs = [(row, sample) for row in ("a", "1") for sample in (0, 1)]
    assert sorted(asked) == sorted(derive_seed(9, *pair, turn) for pair in pairs for turn in (0, 1))
    assert sorted(made) == sorted(derive_seed(9, *pair, "environment") for pair in pairs)


def test_each_episode_gets_a_row_of_its_own(tmp_path):
    class Eats(Base):
        def observe(self):
            return [Message("user", self.row["list"].pop())]

    summary = play(tmp_path, [{"list": ["x"]}], Eats, samples=3)
    assert summary.done == 3


def test_tools_and_a_tools_answer_reach_the_model(tmp_path):
    prompts = []

    class Adder:
        tools = ({"type": "function", "function": {"name": "add"}},)

        def __init__(self, row, seed):
            self.row = row

        def observe(self):
            return [Message("user", self.row["question"])]

        def step(self, answer):
            calls, mistake = parse_tool_calls(answer.content)
            if mistake:
                return Step([Message("tool", mistake)])
            if not calls:
                return Step(rewards={"correct": float(self.row["answer"] in answer.content)}, done=True)
            return Step([Message("tool", str(sum(call.arguments["terms"])), name=call.name) for call in calls])

    calls = ['{"name": "add", ', '{"name": "add", "arguments": {"terms": [2, 3]}}']

    def script(request):
        prompts.append(ByteTokenizer().decode(request.token_ids))
        return f"<tool_call>{calls.pop(0)}</tool_call>" if calls else "it is 5"

    asked = [{"question": "2+3?", "answer": "5"}]
    summary = play(tmp_path, asked, Adder, SamplingConfig(max_tokens=100), script=script)
    assert summary.rewards == {"correct": 1.0}
    assert "'name': 'add'" in prompts[0]
    assert "not valid JSON" in prompts[1]
    assert prompts[2].endswith("tool:5assistant:")


def test_real_tokenizer_and_template(tmp_path, stories_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with ScriptedEngine(stories_tokenizer, lambda request: "once upon a time") as scripted:
        options = {"template_options": {"chat_template": template}, "progress": False}
        summary = run_episodes(scripted, rows(8), Base, SAMPLING, output=tmp_path, samples=4, **options)
    assert (summary.done, summary.turns, summary.rewrites) == (32, 64, 0)


def test_rewrites_are_counted(tmp_path, monkeypatch):
    plain = ByteTokenizer.apply_chat_template

    def forgets(self, messages, **options):  # shows the last three messages: history changes from the second answer on
        return plain(self, messages[-3:], **options)

    monkeypatch.setattr(ByteTokenizer, "apply_chat_template", forgets)

    class Long(Base):
        turns = 3

    summary = play(tmp_path, rows(2), Long)
    (one, other) = episodes(tmp_path).values()
    assert summary.rewrites == one.segments - 1 + other.segments - 1 > 0

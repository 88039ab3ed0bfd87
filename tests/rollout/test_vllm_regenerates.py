"""Regeneration by a real model on vLLM: what it says is poor, that its JSON holds and nothing is lost is the point."""

import json

import pytest

from llmrl.hindsight.envs import charity
from llmrl.hindsight.regeneration import opening
from llmrl.hindsight.regeneration.answers import Answers
from llmrl.hindsight.regeneration.asking import Asker, EngineSource
from llmrl.hindsight.regeneration.budget import Meter
from llmrl.hindsight.regeneration.controllers import ModelController, Task
from llmrl.hindsight.regeneration.forward import ModelForward, Replay
from llmrl.hindsight.regeneration.rewards import JudgeReward, RuleReward
from llmrl.hindsight.regeneration.rounds import Parts, Settings, regenerate
from llmrl.types import SamplingConfig

pytestmark = pytest.mark.vllm
LOGS = charity.logs(6, 0)


@pytest.fixture(scope="module")
def small_lm(open_vllm):
    return open_vllm("examples/tiny_lm", max_model_len=2048, **opening._OPTIONS["vllm"])  # as the command opens it


@pytest.fixture
def ask(small_lm, tmp_path):
    """`ask(role, tokens)` asks the small model; what it answered is in `ask.answers`."""
    with Answers(tmp_path / "answers") as answers:

        def asker(role, tokens=400):
            sampling = SamplingConfig(temperature=0.7, max_tokens=tokens)
            return Asker(EngineSource(small_lm, "tiny_lm", sampling), role, answers, asker.meter)

        asker.answers, asker.meter = answers, Meter()
        yield asker


def test_edits_hold_to_their_schema(ask):
    controller = ModelController(ask("controller", 900), usual=0.1)
    found = []
    for log in LOGS:
        task = Task(log, log.agent_turns, edits=1, candidates=1, seed=1)
        found.append(controller.propose(task))
    for log, proposal in zip(LOGS, found, strict=True):
        assert [edit.candidate for edit in proposal.edits] == [0]
        assert {edit.turn for edit in proposal.edits} <= set(log.agent_turns)
        assert proposal.prompt
    texts = [record["text"] for record in ask.answers.all()]
    assert len(texts) == len(LOGS)
    for text in texts:
        assert json.loads(text)["edits"]
        assert "\n" not in text  # white space that a weak model would go on with


def test_rounds_by_a_real_model_lose_nothing_and_ask_nothing_twice(ask):
    def run():
        parts = Parts(
            ModelController(ask("controller"), usual=0.1),
            ModelForward(ask("user", 24), ask("agent", 24), turns=5, words=30),
            JudgeReward(ask("judge", 300), LOGS, seed=0),
        )
        return regenerate(LOGS, parts, Settings(rounds=2, retries=1, concurrency=4))

    first, asked = run(), sum(ask.meter.asked.values())
    for one in first:
        for _, outcome in one.jobs:
            assert outcome.made or outcome.refused
            assert outcome.unfinished is None
    assert ask.meter.spent > 0
    again = run()
    assert sum(ask.meter.asked.values()) == asked
    assert [d.to_json() for one in again for d in one.made] == [d.to_json() for one in first for d in one.made]


def test_a_real_controller_with_the_true_user(ask):
    parts = Parts(
        ModelController(ask("controller"), usual=0.1), Replay(charity, charity.Charity), RuleReward(LOGS, exact=True)
    )
    (one,) = regenerate(LOGS, parts, Settings(rounds=1))
    assert len(one.made) + sum(bool(outcome.refused) for _, outcome in one.jobs) >= len(LOGS)

"""The best of several turns: which one is said, and how many were asked for."""

from concurrent.futures import Future

import pytest

from llmrl.errors import EngineError
from llmrl.hindsight import rerank
from llmrl.hindsight.rerank import RerankEngine
from llmrl.rollout.protocols import Sample
from llmrl.types import FinishReason, PolicyVersion, SamplingConfig

SAID = [Sample((i,), (-1.0,), str(i), FinishReason.STOP, PolicyVersion(0, "a")) for i in range(4)]


class Samples:
    """An engine whose answer is known."""

    tokenizer, max_model_len, version = None, 8, PolicyVersion(0, "a")

    def __init__(self, error=None):
        self.error, self.asked = error, []

    def submit(self, prompt, sampling, *, base=False):
        self.asked.append((tuple(prompt), sampling.n))
        done = Future()
        done.set_exception(self.error) if self.error else done.set_result(SAID)
        return done


@pytest.mark.parametrize(
    ("values", "best"), [([0.0, 3.0, -1.0, 2.0], 1), ([-5.0, -7.0, -4.0, -4.5], 2), ([1.0] * 4, 0)]
)
def test_the_turn_of_the_highest_value_is_said(monkeypatch, values, best):
    seen = []

    def turn_values(model, prompt, turns, backup):
        seen.append((model, tuple(prompt), [tuple(turn) for turn in turns], backup))
        return values

    monkeypatch.setattr(rerank, "turn_values", turn_values)
    engine = Samples()
    chooser = RerankEngine(engine, "model", 4, "token")
    assert chooser.generate([[7, 8]], SamplingConfig(max_tokens=1)) == [[SAID[best]]]
    assert engine.asked == [((7, 8), 4)]
    assert seen == [("model", (7, 8), [(0,), (1,), (2,), (3,)], "token")]


def test_an_engine_that_fails_is_not_hidden():
    chooser = RerankEngine(Samples(EngineError("gone")), "model", 4)
    with pytest.raises(EngineError, match="gone"):
        chooser.generate([[7]], SamplingConfig(max_tokens=1))

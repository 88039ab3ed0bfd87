"""Where beta and support of a served policy come from."""

from types import SimpleNamespace

import pytest

from llmrl.errors import ModelError
from llmrl.heads import HeadSpec

pytestmark = pytest.mark.vllm
SPEC = HeadSpec("value", "linear", 4, 8, beta=8.0, support=0.02)


def test_overrides_come_before_the_environment_and_that_before_the_folder(monkeypatch):
    from llmrl.serving.models import steering

    assert steering(SPEC, SimpleNamespace()) == (8.0, 0.02)
    monkeypatch.setenv("LLMRL_BETA", "4")
    assert steering(SPEC, SimpleNamespace()) == (4.0, 0.02)
    assert steering(SPEC, SimpleNamespace(llmrl_beta=0, llmrl_support=0.5)) == (0.0, 0.5)
    monkeypatch.setenv("LLMRL_SUPPORT", "much")
    with pytest.raises(ModelError, match="expected a number for llmrl_support, got 'much'"):
        steering(SPEC, SimpleNamespace())
    monkeypatch.setenv("LLMRL_SUPPORT", "2")
    with pytest.raises(ModelError, match="support from 0 to 1"):
        steering(SPEC, SimpleNamespace())

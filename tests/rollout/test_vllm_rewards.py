"""K scores from a reward model in vLLM in this process, against the same heads in torch."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from llmrl.errors import DataError
from llmrl.vllm_compat import vllm_build, why_no_vllm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))
from serving_folders import STORIES, heads_folder

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_build() is None, reason=f"no vLLM: {why_no_vllm()}"),
]
TEXTS = ["Once upon a time", "The dog ran to the big tree and saw a red ball.", "Lily"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return heads_folder(STORIES, tmp_path_factory.mktemp("rewards") / "reward", kind="reward", outputs=5, seed=3)


@pytest.fixture(scope="module")
def rewards(folder):
    from llmrl.rollout.vllm_rewards import VllmRewards

    client = VllmRewards(str(folder), kv_cache_memory_bytes=64 << 20, max_num_seqs=8)
    yield client
    client.close()


def test_vllm_rewards_scores_are_the_heads_own(folder, rewards):
    heads = load_file(folder / "llmrl_heads.safetensors")
    weight = next(value for name, value in heads.items() if name.endswith("weight")).double()
    bias = next(value for name, value in heads.items() if name.endswith("bias")).double()
    base, tokenizer = AutoModel.from_pretrained(STORIES).double(), AutoTokenizer.from_pretrained(STORIES)
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = base(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        expected.append((weight @ hidden + bias).tolist())
    scores = rewards.scores(TEXTS)
    assert [len(row) for row in scores] == [5, 5, 5]
    assert torch.tensor(scores).double().sub(torch.tensor(expected)).abs().max() < 1e-4


def test_vllm_rewards_scores_do_not_depend_on_the_batch(rewards):
    together = rewards.scores(TEXTS)
    alone = [rewards.scores([text])[0] for text in TEXTS]
    assert torch.tensor(together).sub(torch.tensor(alone)).abs().max() < 1e-5
    assert rewards.scores([]) == []


def test_vllm_rewards_refuses_an_empty_and_a_long_text(rewards):
    with pytest.raises(DataError, match="text 1 has"):
        rewards.scores(["fine", ""])
    with pytest.raises(DataError, match=r"text 0 has 6\d\d tokens, expected 1 to 512"):
        rewards.scores(["a " * 600])


def test_vllm_rewards_and_an_engine_close_one_by_one(folder, open_vllm):
    from llmrl.rollout.vllm_rewards import VllmRewards
    from llmrl.types import SamplingConfig

    engine = open_vllm(STORIES)
    second = VllmRewards(str(folder), kv_cache_memory_bytes=64 << 20, max_num_seqs=8)
    second.close()
    assert len(engine.generate([[1, 403]], SamplingConfig(max_tokens=2))[0][0].token_ids) == 2

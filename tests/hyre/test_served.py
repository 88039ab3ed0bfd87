"""The same ensemble behind a client: the texts of training go out, the heads' scores come back, and a server is known."""

import contextlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ensembles import ANSWERS, CHATS, PROMPTS, SAID, random_ensemble, random_heads, weighted_user

from llmrl.errors import EngineError, ModelError, UsageError
from llmrl.hyre.ensemble import RewardEnsemble
from llmrl.hyre.export import export_ensemble
from llmrl.hyre.reward import hyre_reward
from llmrl.hyre.served import EmbeddingRewardClient, ServedEnsemble, read_vectors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rollout"))
from fake_vllm import FakeVllm


class Served:
    """A client as a server would be: the logits of transformers' own class, without anything of the ensemble."""

    def __init__(self, folder):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.asked = []

    @torch.inference_mode()
    def scores(self, texts):
        self.asked += texts
        return [self.model(**self.tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]


@pytest.fixture(scope="module")
def served(world, tmp_path_factory):
    folder = export_ensemble(world[0], tmp_path_factory.mktemp("served") / "folder").folder
    return folder, Served(folder)


def test_served_ensemble_gives_the_ensembles_scores(world, served, tmp_path):
    ensemble, scores = world
    folder, client = served
    folder = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("model*"))  # as a client has it
    one = ServedEnsemble(client, folder)
    assert (one.heads, one.fingerprint) == (5, ensemble.fingerprint)
    assert one.scores(PROMPTS, ANSWERS) == pytest.approx(scores, abs=1e-5)
    assert np.abs(np.array(client.scores([one.text(PROMPTS[0], ANSWERS[0])])[0]) - scores[0]).min() > 0.01  # biases
    assert one.scores([], []).shape == (0, 5)
    user = weighted_user(ensemble)
    found = hyre_reward(one, user)(prompts=CHATS, completions=SAID)
    assert found == pytest.approx(scores @ user.posterior.weights, abs=1e-5)
    refined = replace(user, correction=np.zeros(ensemble.head.spec.hidden_size))
    with pytest.raises(UsageError, match="is refined, and a correction reads features"):
        hyre_reward(one, refined)


def test_served_ensemble_sends_the_text_of_training(tiny_model, tmp_path):
    """With a chat template, and where only the answer is read: no weights are opened to make the text."""
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(base)
    for reads, wanted in (("dialogue", "<user>Hi<assistant>No."), ("answer", "<assistant>No.")):
        ensemble, _ = random_ensemble(base, heads=2, reads=reads)
        folder = export_ensemble(ensemble, tmp_path / reads).folder
        one = ServedEnsemble(Served(folder), folder)
        assert one.text(PROMPTS[1], ANSWERS[1]) == ensemble.text(PROMPTS[1], ANSWERS[1]) == wanted
        assert one.ensemble._base is None


def test_served_ensemble_knows_its_server(served, world, tiny_model, tmp_path):
    folder, _ = served
    other, _ = random_ensemble(tiny_model("llama"), seed=3)
    elsewhere = export_ensemble(other, tmp_path / "other").folder
    with pytest.raises(EngineError, match="the served model is not the one in"):
        ServedEnsemble(Served(elsewhere), folder)
    ServedEnsemble(Served(elsewhere), folder, check=False)
    fewer, _ = random_ensemble(tiny_model("llama"), heads=3)
    few = export_ensemble(fewer, tmp_path / "few").folder
    with pytest.raises(EngineError, match=r"gives 3 scores a text, .* has 5 heads"):
        ServedEnsemble(Served(few), folder)
    world[0].save(tmp_path / "few")  # as `llmrl hyre train` writes it: never exported
    (tmp_path / "few" / "reward_export.json").unlink()
    with pytest.raises(ModelError, match="is no exported ensemble"):
        ServedEnsemble(Served(elsewhere), tmp_path / "few")


@pytest.fixture
def embedder():
    """A server of vectors; what it was asked lies in `seen`."""
    fake = FakeVllm(None)
    real = fake.answer

    def answer(method, path, body):
        if path != "/v1/embeddings":
            return real(method, path, body)
        rows = [{"index": i, "embedding": [float(len(text))] * 8} for i, text in enumerate(body["input"])]
        return 200, {"data": rows[::-1]}

    fake.answer = answer
    yield fake
    if not fake.stopping.is_set():
        fake.stop()


def on_encoder(width, max_length=None):
    return RewardEnsemble(random_heads(width).fold(), "encoder", "encoder", ["a", "b"], "answer", max_length)


def test_embedding_reward_client_applies_the_heads(embedder):
    ensemble = on_encoder(8, max_length=77)
    texts = ["a" * n for n in range(1, 8)]
    with contextlib.closing(EmbeddingRewardClient(embedder.url, ensemble, batch_size=3)) as client:
        found = client.scores([*texts, ""])
        assert client.outputs == 5
    lengths = torch.tensor([*range(1, 8), 1])  # of nothing, a space is sent: the server would refuse it
    assert np.array(found) == pytest.approx(ensemble.head(lengths[:, None].expand(-1, 8)).numpy(), abs=1e-6)
    asked = [body for path, body in embedder.seen if path == "/v1/embeddings"]
    assert [body["truncate_prompt_tokens"] for body in asked] == [77] * 3
    with contextlib.closing(EmbeddingRewardClient(embedder.url, on_encoder(8))) as client:
        client.scores(["a"])
    assert "truncate_prompt_tokens" not in embedder.seen[-1][1]
    narrow = EmbeddingRewardClient(embedder.url, on_encoder(6), retries=1, patience=0.2)
    with contextlib.closing(narrow), pytest.raises(EngineError, match="vectors of 8 numbers, the heads read 6"):
        narrow.scores(["a"])


def test_embedding_reward_client_refuses_a_causal_lm(world):
    with pytest.raises(ModelError, match="export_ensemble"):
        EmbeddingRewardClient("http://127.0.0.1:1", world[0])


@pytest.mark.parametrize(
    "data",
    [
        [{"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [float("nan")]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 2, "embedding": [1.0]}],
        None,
    ],
)
def test_read_vectors_refuses_what_does_not_hold_up(data):
    from llmrl.rollout.http import ServerFault

    good = [{"index": 1, "embedding": [3.0, 4.0]}, {"index": 0, "embedding": [1.0, 2.0]}]
    assert read_vectors({"data": good}, 2).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    with pytest.raises(ServerFault):
        read_vectors({"data": data}, 2)

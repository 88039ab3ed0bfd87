"""In vLLM each head of an exported ensemble gives its score: in process and over HTTP, stock checkpoints and the plugin's."""

import contextlib
import sys

import numpy as np
import pytest
from http_server import Server
from serving_folders import ENSEMBLES, ENVIRONMENT
from small_ensembles import ANSWERS, PROMPTS, last_states, random_ensemble, unfolded_scores, weighted_user

from llmrl.encoder import default_encoder
from llmrl.errors import EngineError, RequestError
from llmrl.hyre.pairs import plain_text
from llmrl.hyre.reward import hyre_reward
from llmrl.hyre.served import EmbeddingRewardClient, ServedEnsemble
from llmrl.rollout.rewards import HttpRewardClient

pytestmark = pytest.mark.vllm
SERVED = ("stock", "mlp")
READ = 24  # tokens that the encoder reads of a text: some are longer


@pytest.fixture(scope="module")
def wanted(ensembles):
    """Return `wanted(name) -> [N, K]`: the last state in transformers, and the formula of training."""

    def scores(name):
        _, base, unfolded = ensembles[name]
        texts = [plain_text(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
        found = unfolded_scores(unfolded, last_states(base, texts, "AutoModelForCausalLM"))
        assert found.std(1).min() > 0.1  # heads that differ
        return found

    return scores


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An ensemble on the sentence encoder, and its folder."""
    ensemble, _ = random_ensemble(default_encoder(), max_length=READ)
    ensemble._base = None
    folder = tmp_path_factory.mktemp("encoder")
    ensemble.save(folder)
    return ensemble, folder


@pytest.fixture(scope="module")
def urls(ensembles, tmp_path_factory):
    """Name -> URL of a server; three start side by side, with one GiB of cache each where `llmrl serve` would take four."""
    logs = tmp_path_factory.mktemp("ensemble_servers")
    llmrl_serve = [sys.executable, "-m", "llmrl.cli", "serve"]
    vllm_serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    commands = {name: [*llmrl_serve, str(ensembles[name][0])] for name in SERVED}
    commands["encoder"] = [*vllm_serve, default_encoder(), "--runner=pooling", "--dtype=float32", "--host=127.0.0.1"]
    environment = ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with contextlib.ExitStack() as stack:
        started = {
            name: stack.enter_context(Server(command, logs / name, environment, options=("--max-model-len=256",)))
            for name, command in commands.items()
        }
        for server in started.values():
            server.wait_until_healthy(timeout=400)
        yield {name: server.url for name, server in started.items()}


@pytest.fixture
def connect():
    """Return `connect(class, ...) -> client`, closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda kind, *arguments, **options: stack.enter_context(contextlib.closing(kind(*arguments, **options)))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_in_process_every_head_gives_its_score(name, in_process, ensembles, wanted):
    found = in_process[f"ensemble-{name}"]
    assert "answer" in found, found.get("traceback") or found
    scores = wanted(name)
    assert np.abs(np.array(found["answer"]["scores"]) - scores).max() < 1e-4
    # nobody takes the K numbers for classes, asked or not: no softmax
    bias = ensembles[name][2].fold().bias.numpy() if name.startswith("stock") else 0
    assert np.abs(np.array(found["answer"]["plain"]) + bias - scores).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_over_http_every_head_gives_its_score(name, urls, connect, ensembles, wanted):
    folder = ensembles[name][0]
    served = ServedEnsemble(connect(HttpRewardClient, urls[name]), folder)
    assert np.abs(served.scores(PROMPTS, ANSWERS) - wanted(name)).max() < 1e-4
    user = weighted_user(served.ensemble)
    reward = hyre_reward(served, user)
    prompts = [[{"role": role, "content": content} for role, content in prompt] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]
    found = reward(prompts=prompts, completions=completions)
    assert found == pytest.approx(wanted(name) @ user.posterior.weights, abs=1e-4)


@pytest.mark.slow
def test_over_http_another_folder_is_noticed(urls, connect, ensembles):
    with pytest.raises(EngineError, match="the served model is not the one in"):
        ServedEnsemble(connect(HttpRewardClient, urls["stock"]), ensembles["mlp"][0])


@pytest.mark.slow
def test_over_http_heads_on_an_encoder(urls, connect, encoder):
    """vLLM gives the vectors and the client the scores: those of the ensemble in this process, a long text cut alike."""
    ensemble, folder = encoder
    client = connect(EmbeddingRewardClient, urls["encoder"], ensemble)
    served = ServedEnsemble(client, folder)
    answers = [ANSWERS[0] * 3, *ANSWERS[1:]]
    found, scores = served.scores(PROMPTS, answers), ensemble.scores(PROMPTS, answers)
    assert ensemble.base.cut == 1
    assert scores.std(1).min() > 0.1
    assert np.abs(found - scores).max() < 1e-4
    assert client.outputs == 5
    empty = ensemble.head(ensemble.base.embed([""])).numpy()  # an answer that ends where it begins is an answer
    assert np.abs(np.array(client.scores([""])) - empty).max() < 1e-4
    whole = connect(EmbeddingRewardClient, urls["encoder"], ensemble, max_length=64)
    assert np.abs(np.array(whole.scores([served.text(PROMPTS[0], answers[0])])) - scores[0]).max() > 1e-3
    client.max_length = None
    with pytest.raises(RequestError):  # refused, not cut somewhere else
        client.scores(["dog " * 300])

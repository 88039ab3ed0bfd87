"""From K scores to one reward: the arithmetic by hand, whose weights count, and the best of several samples."""

import contextlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ensembles import (
    ANSWERS,
    PROMPTS,
    last_states,
    random_ensemble,
    random_heads,
    unfolded_scores,
    weighted_user,
)

from llmrl.errors import ConfigError, DataError, EngineError, HeadMismatchError, ModelError, UsageError
from llmrl.hyre.ensemble import RewardEnsemble
from llmrl.hyre.export import export_ensemble
from llmrl.hyre.pairs import plain_text
from llmrl.hyre.reward import METRIC, aggregate, best_of_n, disagreement, hyre_reward
from llmrl.hyre.served import EmbeddingRewardClient, ServedEnsemble, read_vectors
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.types import SamplingConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rollout"))
from fake_vllm import FakeVllm

SCORES = [[1.0, 3.0, 5.0, 11.0], [4.0, 0.0, -2.0, 2.0]]
WEIGHTS = [0.5, 0.25, 0.25, 0.0]


@pytest.mark.parametrize(
    ("how", "options", "wanted"),
    [
        ("mean", {}, [2.5, 1.5]),
        # sqrt(.5 * 1.5^2 + .25 * .5^2 + .25 * 2.5^2), sqrt(.5 * 2.5^2 + .25 * 1.5^2 + .25 * 3.5^2)
        ("lower", {}, [2.5 - 2.75**0.5, 1.5 - 6.75**0.5]),
        ("lower", {"lam": 2.0}, [2.5 - 2 * 2.75**0.5, 1.5 - 2 * 6.75**0.5]),
        ("lower", {"lam": 0.0}, [2.5, 1.5]),
        ("worst", {}, [1.0, -2.0]),
        ("quantile", {"q": 0.0}, [1.0, -2.0]),
        ("quantile", {"q": 0.25}, [1.0, -2.0]),
        ("quantile", {"q": 0.26}, [1.0, 0.0]),
        ("quantile", {"q": 0.5}, [1.0, 0.0]),  # -2 and 0 together have half of the weight
        ("quantile", {"q": 0.51}, [3.0, 4.0]),
        ("quantile", {"q": 1.0}, [5.0, 4.0]),  # 11 is the score of a head without weight
    ],
)
def test_aggregate_by_hand(how, options, wanted):
    assert aggregate(SCORES, WEIGHTS, how, **options) == pytest.approx(wanted, abs=1e-12)
    # one set of weights a row is the same
    assert aggregate(SCORES, [WEIGHTS, WEIGHTS], how, **options) == pytest.approx(wanted, abs=1e-12)


def test_aggregate_weights_a_row_and_none():
    other = [0.0, 0.0, 0.0, 1.0]
    assert aggregate(SCORES, [WEIGHTS, other]).tolist() == [2.5, 2.0]
    assert aggregate(SCORES).tolist() == [5.0, 1.0]
    assert aggregate(SCORES, None, "worst").tolist() == [1.0, -2.0]
    assert aggregate(SCORES, [0, 0.25, 0.25, 0.5], "quantile", q=0.0).tolist() == [3.0, -2.0]  # 1 has no weight
    assert aggregate(SCORES[0], WEIGHTS).shape == ()
    # in other units and from another zero, a reward is the same but for both
    for how in ("mean", "lower", "worst", "quantile"):
        moved = aggregate(2 * np.asarray(SCORES) + 7, WEIGHTS, how)
        assert moved == pytest.approx(2 * aggregate(SCORES, WEIGHTS, how) + 7)


@pytest.mark.parametrize(("weight", "wanted"), [(0.0026, -9.0), (0.0024, 1.0)])
def test_aggregate_worst_counts_heads_above_a_hundredth_of_their_share(weight, wanted):
    weights = [weight, 1 - weight, 0.0, 0.0]  # of 4 heads: the limit is 0.0025
    assert aggregate([-9.0, 1.0, -20.0, 5.0], weights, "worst") == wanted


def test_disagreement_by_hand():
    assert disagreement(SCORES, WEIGHTS) == pytest.approx([2.75**0.5, 6.75**0.5])
    assert disagreement(SCORES) == pytest.approx(np.std(SCORES, axis=1))
    assert disagreement(SCORES, [0, 0, 1, 0]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((SCORES, WEIGHTS, "sum"), {}, UsageError, "unknown aggregation 'sum'; valid: lower, mean, quantile, worst"),
        ((SCORES, WEIGHTS, "lowr"), {}, UsageError, "did you mean 'lower'"),
        ((SCORES, WEIGHTS, "quantile"), {"q": 1.5}, UsageError, "q from 0 to 1"),
        ((SCORES, WEIGHTS, "lower"), {"lam": -1.0}, UsageError, "lam of at least 0"),
        ((SCORES, [0.5, 0.5]), {}, DataError, "weights of 4 heads"),
        ((SCORES, [0.5, 0.5, 0.5, 0.5]), {}, DataError, "sum to 1"),
        ((SCORES, [2.0, -1.0, 0.0, 0.0]), {}, DataError, "not negative"),
        (([[1.0, 2.0], [np.nan, 1.0]],), {}, DataError, "answer 1: a head gave a score that is not finite"),
    ],
)
def test_aggregate_refusals(arguments, options, error, words):
    with pytest.raises(error, match=words):
        aggregate(*arguments, **options)


# the reward function


@pytest.fixture(scope="module")
def world(tiny_model):
    """An ensemble on a model without a template, and each head's scores of PROMPTS and ANSWERS by the formula of training."""
    ensemble, unfolded = random_ensemble(tiny_model("llama"))
    texts = [plain_text(prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return ensemble, unfolded_scores(unfolded, last_states(tiny_model("llama"), texts))


def conversation(prompt):
    return [{"role": role, "content": content} for role, content in prompt]


CHATS = [conversation(prompt) for prompt in PROMPTS]
SAID = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]


def test_hyre_reward_is_the_weighted_scores_and_logs_disagreement(world):
    ensemble, scores = world
    user = weighted_user(ensemble)
    reward = hyre_reward(ensemble, user)
    logged = []
    found = reward(
        prompts=CHATS,
        completions=SAID,
        completion_ids=[[1]] * 3,
        trainer_state=None,
        log_metric=lambda name, value: logged.append((name, value)),
    )
    assert all(type(value) is float for value in found)
    assert found == pytest.approx(scores @ user.posterior.weights, abs=1e-5)
    assert np.abs(np.array(found) - scores[:, 0]).min() > 0.01  # not the first head's
    spread = np.sqrt(((scores - np.array(found)[:, None]) ** 2) @ user.posterior.weights)
    assert logged == [(METRIC, pytest.approx(spread.mean(), abs=1e-5))]
    reward(prompts=CHATS[:1], completions=SAID[:1])  # of a trainer that logs nothing
    assert reward.history == pytest.approx([spread.mean(), spread[0]], abs=1e-5)
    assert reward.last.head_scores == pytest.approx(scores[:1], abs=1e-5)
    assert reward.__name__ == "hyre"
    assert not isinstance(reward, torch.nn.Module)  # trl would read logits[:, 0] of one
    assert reward(prompts=[], completions=[]) == []


@pytest.mark.parametrize(("how", "options"), [("lower", {"lam": 2.0}), ("worst", {}), ("quantile", {"q": 0.3})])
def test_hyre_reward_aggregates(world, how, options):
    ensemble, scores = world
    user = weighted_user(ensemble)
    found = hyre_reward(ensemble, user, how=how, **options)(prompts=CHATS, completions=SAID)
    assert found == pytest.approx(aggregate(scores, user.posterior.weights, how, **options), abs=1e-5)


def test_hyre_reward_reads_texts_and_conversations_alike(world):
    ensemble, scores = world
    reward = hyre_reward(ensemble)
    assert reward(prompts=[PROMPTS[0][0][1]], completions=[ANSWERS[0]]) == pytest.approx([scores[0].mean()], abs=1e-5)
    # what trl calls a completion may begin with turns of an episode
    before, said = CHATS[2][:1], [*CHATS[2][1:], *SAID[2]]
    assert reward(prompts=[before], completions=[said]) == pytest.approx([scores[2].mean()], abs=1e-5)


def test_hyre_reward_of_several_users(world):
    ensemble, scores = world
    ann, bob = weighted_user(ensemble, 1), weighted_user(ensemble, 2)
    reward = hyre_reward(ensemble, {"ann": ann, "bob": bob, "": None})
    found = reward(prompts=CHATS, completions=SAID, user=["bob", "", "ann"])
    wanted = [scores[0] @ bob.posterior.weights, scores[1].mean(), scores[2] @ ann.posterior.weights]
    assert found == pytest.approx(wanted, abs=1e-5)
    assert abs(scores[0] @ bob.posterior.weights - scores[0] @ ann.posterior.weights) > 0.01
    with pytest.raises(DataError, match=r"row 1: nobody is called 'bop'.*did you mean 'bob'"):
        reward(prompts=CHATS, completions=SAID, user=["ann", "bop", "bob"])
    with pytest.raises(DataError, match="no column 'user'"):
        reward(prompts=CHATS, completions=SAID)
    other = hyre_reward(ensemble, {"ann": ann}, column="who")
    assert other(prompts=CHATS[:1], completions=SAID[:1], who=["ann"]) == pytest.approx(
        [scores[0] @ ann.posterior.weights], abs=1e-5
    )
    # one user: what stands in a column of that name is no business of hers
    assert hyre_reward(ensemble, ann)(prompts=CHATS[:1], completions=SAID[:1], user=["x"]) == pytest.approx(
        [scores[0] @ ann.posterior.weights], abs=1e-5
    )


def test_hyre_reward_of_a_refined_user(world, tiny_model):
    ensemble, scores = world
    correction = np.linspace(-1, 1, ensemble.head.spec.hidden_size)
    user = weighted_user(ensemble, correction=correction)
    reward = hyre_reward(ensemble, {"refined": user, "plain": weighted_user(ensemble)}, how="lower")
    found = reward(prompts=CHATS[:2], completions=SAID[:2], user=["refined", "plain"])
    texts = [plain_text(prompt, answer) for prompt, answer in zip(PROMPTS[:2], ANSWERS[:2], strict=True)]
    more = last_states(tiny_model("llama"), texts).double().numpy() @ correction
    assert abs(more[0]) > 0.1
    wanted = aggregate(scores[:2], user.posterior.weights, "lower")
    assert found == pytest.approx([wanted[0] + more[0], wanted[1]], abs=1e-4)


def test_hyre_reward_refusals(world, tiny_model):
    ensemble, _ = world

    class Client:
        def scores(self, texts):
            return [[0.0] * 5 for _ in texts]

    with pytest.raises(UsageError, match="use ServedEnsemble"):
        hyre_reward(Client())
    with pytest.raises(UsageError, match="unknown aggregation"):
        hyre_reward(ensemble, how="min")
    other, _ = random_ensemble(tiny_model("llama"), seed=9)
    with pytest.raises(HeadMismatchError, match="ann was adapted with another ensemble"):
        hyre_reward(ensemble, {"ann": weighted_user(other)})
    fewer, _ = random_ensemble(tiny_model("llama"), heads=3)
    with pytest.raises(HeadMismatchError, match="weighs 3 heads, the ensemble has 5"):
        hyre_reward(ensemble, weighted_user(fewer))
    reward = hyre_reward(ensemble)
    with pytest.raises(DataError, match="row 0: expected text in every message"):
        reward(prompts=CHATS[:1], completions=[[{"role": "assistant", "content": None}]])
    with pytest.raises(DataError, match="row 0: expected a completion"):
        reward(prompts=CHATS[:1], completions=[[]])
    with pytest.raises(DataError, match="row 0: expected a text or a list of messages, got 7"):
        reward(prompts=[7], completions=SAID[:1])


# the same ensemble behind a client


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


# best of n


@pytest.fixture
def engine(stories_tokenizer):
    words = ["a", "a big dog", "a big", "a big dog ran", "no"]
    seen = []

    def script(request):
        seen.append(request.sampling.seed)
        return words[(len(seen) - 1) % len(words)]

    with ScriptedEngine(stories_tokenizer, script) as opened:
        opened.seen = seen
        yield opened


def by_length(prompts, completions, **columns):
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    return [sign * float(len(text)) for text, sign in zip(texts, columns.get("sign", [1] * len(texts)), strict=True)]


def test_best_of_n_takes_the_sample_with_the_largest_reward(engine, stories_tokenizer):
    sampling = SamplingConfig(n=5, seed=1, max_tokens=16)
    first, second = best_of_n(engine, ["Once", "Twice"], sampling, by_length, sign=[1, -1])
    assert first.rewards == (1.0, 9.0, 5.0, 13.0, 2.0)
    assert (first.index, first.best.text) == (3, "a big dog ran")
    assert (second.index, second.best.text) == (0, "a")
    assert first.prompt_ids == tuple(stories_tokenizer("Once")["input_ids"])
    said = stories_tokenizer.encode("a big dog ran", add_special_tokens=False)
    assert first.best.token_ids == (*said, stories_tokenizer.eos_token_id)
    assert len(set(engine.seen)) == 10  # no prompt has the seeds of another
    assert best_of_n(engine, [], sampling, by_length) == []


def test_best_of_n_asks_the_reward_as_trl_does(engine, monkeypatch):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    asked = []

    def reward(prompts, completions, **columns):
        asked.append((prompts, completions, columns))
        return [None, float("nan"), 2.0, 2.0, 1.0]

    (best,) = best_of_n(engine, CHATS[:1], SamplingConfig(n=5), reward, user=["ann"])
    assert best.rewards == (None, None, 2.0, 2.0, 1.0)
    assert best.index == 2  # the first of equal ones
    ((prompts, completions, columns),) = asked
    assert prompts == CHATS[:1] * 5
    assert completions[1] == [{"role": "assistant", "content": "a big dog"}]
    assert columns == {"user": ["ann"] * 5}


def test_best_of_n_with_the_ensemble(world, engine):
    ensemble, _ = world
    user = weighted_user(ensemble)
    (best,) = best_of_n(engine, ["Once"], SamplingConfig(n=5), hyre_reward(ensemble, user))
    texts = [sample.text for sample in best.samples]
    wanted = ensemble.scores([(("user", "Once"),)] * 5, texts) @ user.posterior.weights
    assert best.rewards == pytest.approx(wanted, abs=1e-6)
    assert best.index == int(np.argmax(wanted))


def test_best_of_n_refusals(engine):
    with pytest.raises(ConfigError, match="2 greedy samples are all the same"):
        best_of_n(engine, ["Once"], SamplingConfig(n=2, temperature=0), by_length)
    with pytest.raises(DataError, match="column 'user' has 2 values for 1 prompts"):
        best_of_n(engine, ["Once"], SamplingConfig(n=2), by_length, user=["a", "b"])
    with pytest.raises(DataError, match="gave 1 rewards of 2 answers"):
        best_of_n(engine, ["Once"], SamplingConfig(n=2), lambda **k: [1.0])
    with pytest.raises(DataError, match="prompt 0: none of its 2 samples has a reward"):
        best_of_n(engine, ["Once"], SamplingConfig(n=2), lambda **k: [None, None])

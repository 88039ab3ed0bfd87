"""From K scores to one reward: the arithmetic by hand, whose weights count, and the best of several samples."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_ensembles import ANSWERS, CHATS, PROMPTS, SAID, last_states, random_ensemble, weighted_user

from llmrl.errors import ConfigError, DataError, HeadMismatchError, UsageError
from llmrl.hyre.pairs import plain_text
from llmrl.hyre.reward import METRIC, aggregate, best_of_n, disagreement, hyre_reward
from llmrl.rollout.scripted import ScriptedEngine
from llmrl.types import SamplingConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rollout"))

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

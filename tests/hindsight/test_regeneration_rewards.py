"""What finished dialogues earned by rules, by a regression and by a judge, and how agreement with the logs is measured."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hindsight_models import dialogue

from llmrl.errors import DataError, EngineError, RequestError, UsageError
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import charity
from llmrl.hindsight.regeneration.asking import Answer
from llmrl.hindsight.regeneration.edits import BadAnswer
from llmrl.hindsight.regeneration.forward import Continuation
from llmrl.hindsight.regeneration.rewards import JudgeReward, RegressionReward, RuleReward, agreement
from llmrl.hindsight.regeneration.rules import camp_rule, charity_rule, donation_rule, rule_of
from llmrl.types import Message


def played(one):
    return Continuation(one.messages, None, True, False, ())


# --- rules


@pytest.mark.parametrize("words", ["short", "long"])
def test_charity_rule_is_what_the_environment_gave(words):
    logs = charity.logs(150, 4, words)
    assert {one.total > 0 for one in logs} == {True, False}
    for one in logs:
        assert charity_rule(one.messages) == pytest.approx(one.rewards)
    best = dialogue("a", "Hello?", "Maria.", "Good.", "Please donate.", "Gladly, here are two dollars.").messages
    assert charity_rule(best) == pytest.approx((0, -0.05, 0, 1.95, 0))


CAMP = Message(
    "system",
    "You share out packages.\nHigh priority, 5 points a package: water. Reason: thirst\n"
    "Medium priority, 4 points a package: food. Reason: hunger\nLow priority, 3 points a package: firewood. Reason: none",
)
OFFER = "I propose this deal: I get 1 food, 3 water, 0 firewood; you get 2 food, 0 water, 3 firewood."


def camp(*turns):
    """Return messages of a talk between campers; the agent's begin with "> "."""
    said = [Message("assistant", t[2:]) if t.startswith("> ") else Message("user", t) for t in turns]
    return CAMP, *said


@pytest.mark.parametrize(
    ("turns", "points"),
    [
        (["> Hi.", f"> {OFFER}", "I accept this deal."], 4 + 15),
        (["> Hi.", OFFER, "> I accept this deal."], 8 + 9),
        (["> Hi.", f"> {OFFER}", "I reject this deal.", OFFER, "> I accept this deal."], 17),
        ([OFFER, f"> {OFFER}", "i ACCEPT this deal"], 19),
        (["> Hi.", f"> {OFFER}", "> I accept this deal."], 5),  # one's own
        (["> Hi.", f"> {OFFER}", "I walk away without a deal."], 5),
        (["> Hi.", "I accept this deal."], 5),
        (["> Hi.", "Bye."], 5),
        (["> Hi.", f"> {OFFER}", "I would accept a deal like this."], 5),
    ],
)
def test_camp_rule(turns, points):
    messages = camp(*turns)
    found = camp_rule(messages)
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    assert found[last] == pytest.approx(points / 36)
    assert len(found) == len(messages)
    assert sum(map(bool, found)) == 1


@pytest.mark.parametrize(
    ("turns", "dollars"),
    [
        (["Hi.", "Would you donate?", "I will give $0.50."], 0.5),
        (["Hi.", "Would you donate?", "I'll donate 50 cents today"], 0.5),
        (["Hi.", "Would you donate?", "I will donate half."], 1.0),
        (["Hi.", "Would you donate?", "I am willing to give all of it!"], 2.0),
        (["Hi.", "Would you donate?", "I would like to give $700"], 2.0),
        (["Hi.", "Would you donate?", "Sure, one dollar"], 1.0),
        (["Hi.", "Would you donate $1.50?", "Yes."], 1.5),
        (["Hi.", "Would you donate?", "Yes."], 0.0),  # nobody said how much
        (["Hi.", "Would you donate $1?", "What do they do?"], 0.0),
        (["Hi.", "Would you donate $1?", "I do not want to donate."], 0.0),
        (["Hi.", "Would you donate $1?", "Yes.", "Thank you!", "Sorry, I can't afford it."], 0.0),
        (["Hi.", "Would you donate $1?", "No thanks.", "And 20 cents?", "Okay."], 0.2),
        (["Hi.", "Would you donate?", "I will give $1.", "Why not more?", "I will donate $2 then."], 2.0),
        (["Hi.", "Would you donate?", "I will give $1.", "Thank you.", "Bye."], 1.0),
        (["Hi.", "I gave $2 myself.", "That is nice."], 0.0),
    ],
)
def test_donation_rule(turns, dollars):
    messages = dialogue("a", *turns).messages
    found = donation_rule(messages)
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    assert found == tuple(dollars if i == last else 0.0 for i in range(len(messages)))


def test_rule_of_a_task():
    assert rule_of("casino") is camp_rule
    with pytest.raises(UsageError, match="maze"):
        rule_of("maze")


def test_rule_reward_takes_what_the_world_gives():
    logs = charity.logs(30, 0)
    reward = RuleReward(logs, exact=True)
    given = tuple(0.5 * (m.role == "assistant") for m in logs[0].messages)
    assert reward.rewards(Continuation(logs[0].messages, given, True, False, ()), "charity", 0) == given
    assert (reward.sd, reward.agreement) == (None, None)


def test_rule_reward_tells_its_error_on_logs():
    logs = charity.logs(40, 0)
    reward = RuleReward(logs, exact=False)
    assert reward.sd == pytest.approx(0, abs=1e-9)
    assert reward.agreement["spearman"]["value"] == pytest.approx(1)
    assert reward.rewards(played(logs[0]), "charity", 0) == pytest.approx(logs[0].rewards)
    worse = [Dialogue(d.id, d.messages, tuple(r - 0.5 * bool(r) for r in d.rewards), task="charity") for d in logs]
    errors = [sum(map(bool, d.rewards)) * 0.5 for d in logs]
    found = RuleReward(worse, exact=False)
    assert found.sd == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert found.agreement["mean_error"] == pytest.approx(np.mean(errors))


# --- agreement


def test_agreement_is_scipys_and_what_counting_pairs_finds():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    for count in (7, 40):
        actual = rng.integers(0, 5, count).astype(float)  # with ties
        predicted = np.round(actual + 2 * rng.standard_normal(count))
        found = agreement(predicted, actual)
        assert found["dialogues"] == count
        assert found["mean_error"] == pytest.approx(predicted.mean() - actual.mean())
        assert found["spearman"]["value"] == pytest.approx(spearmanr(predicted, actual).statistic)
        pairs = [np.sign(predicted[i] - predicted[j]) * np.sign(actual[i] - actual[j])
                 for i, j in combinations(range(count), 2) if actual[i] != actual[j]]  # fmt: skip
        assert found["pairs"]["value"] == pytest.approx(np.mean([{1: 1, 0: 0.5, -1: 0}[int(p)] for p in pairs]))
        for name in ("spearman", "pairs"):
            assert found[name]["low"] < found[name]["value"] < found[name]["high"] <= 1


def test_agreement_intervals_are_those_of_a_bootstrap():
    from scipy.stats import bootstrap, spearmanr

    rng = np.random.default_rng(1)
    actual = rng.standard_normal(60)
    predicted = actual + rng.standard_normal(60)
    found = agreement(predicted, actual)["spearman"]
    theirs = bootstrap(
        (predicted, actual), lambda x, y: spearmanr(x, y).statistic, paired=True, vectorized=False, n_resamples=1000,
        method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.05)


@pytest.mark.parametrize(("predicted", "spearman", "pairs"), [([1, 2, 3, 4], 1, 1), ([4, 3, 2, 1], -1, 0)])
def test_agreement_at_its_ends(predicted, spearman, pairs):
    found = agreement(predicted, [10, 20, 30, 40])
    assert found["spearman"]["value"] == pytest.approx(spearman)
    assert found["pairs"]["value"] == pytest.approx(pairs)


def test_agreement_where_all_are_alike():
    found = agreement([1, 2, 3], [5, 5, 5])
    assert (found["spearman"], found["pairs"]) == (None, None)
    found = agreement([5, 5, 5], [1, 2, 3])
    assert found["spearman"] is None
    assert found["pairs"]["value"] == 0.5  # it is always a tie
    json.dumps(found, allow_nan=False)


# --- judge


class Judge:
    """Answers by a function of the messages of the question."""

    name = "judge-model"

    def __init__(self, answer):
        self.answer, self.schemas = answer, []

    def ask(self, messages, seed, schema=None):
        self.schemas.append(schema)
        return Answer(self.answer(messages), False, "hash")


def scored(value):
    return json.dumps({"reason": "so", "score": value})


def generosity(messages):
    """Score by the dollars in the transcript: 9 where two were given, 6 for one, else 3."""
    text = messages[-1].content
    return scored(6 if "one dollar" in text else 9 if "two dollars" in text else 3)


LOGS = charity.logs(80, 1)


def test_judge_that_says_the_same_of_all_gives_the_mean_to_all():
    judge = JudgeReward(Judge(lambda messages: scored(7)), LOGS, 0)
    mean = np.mean([one.total for one in LOGS])
    for one in LOGS[:10]:
        found = judge.rewards(played(one), "charity", 3)
        assert sum(found) == pytest.approx(mean)
        assert [i for i, value in enumerate(found) if value] == [one.agent_turns[-1]]
    assert judge.agreement["spearman"] is None
    assert judge.sd == pytest.approx(np.std([one.total for one in LOGS]), rel=0.05)


def test_judge_is_put_on_the_scale_of_the_logs():
    judge = JudgeReward(Judge(generosity), LOGS, 0)
    given = np.array([6.0 if "one dollar" in " ".join(m.content for m in d.messages) else 3.0 for d in LOGS])
    assert len(set(given)) == 2
    totals = np.array([d.total for d in LOGS])
    # two scores: least squares give each the mean of its logs
    for score in (3, 6):
        one = LOGS[int(np.argmax(given == score))]
        assert sum(judge.rewards(played(one), "charity", 0)) == pytest.approx(totals[given == score].mean())
    assert judge.sd < np.std(totals) / 2
    told = agreement(given, totals)
    assert {key: judge.agreement[key] for key in ("spearman", "pairs")} == {
        key: told[key] for key in ("spearman", "pairs")
    }
    # errors are of logs that the line was not laid through
    even, odd = ({s: totals[k::2][given[k::2] == s].mean() for s in (3.0, 6.0)} for k in (0, 1))
    errors = [
        (odd if i % 2 == 0 else even)[score] - total for i, (score, total) in enumerate(zip(given, totals, strict=True))
    ]
    assert judge.sd == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert judge.agreement["mean_error"] == pytest.approx(np.mean(errors))


def test_judge_that_is_wrong_the_other_way_round_earns_no_trust():
    judge = JudgeReward(Judge(lambda m: scored(10 - json.loads(generosity(m))["score"])), LOGS, 0)
    mean = np.mean([one.total for one in LOGS])
    assert [sum(judge.rewards(played(one), "charity", 0)) for one in LOGS[:20]] == pytest.approx([mean] * 20)
    assert judge.agreement["spearman"]["value"] < -0.5


def test_judge_answers_that_are_no_score_are_refused():
    judge = JudgeReward(Judge(generosity), LOGS[:3], 0)
    prose = ["Nine.", "{}", "9", "[9]", '{"score": ', '{"reason": "x"}', "[" * 100_000]
    off_the_scale = [scored(value) for value in (-1, 11, 10.5, "9", None, True, [9], math.nan, math.inf)]
    for text in prose + off_the_scale:
        judge._asker.answer = lambda messages, text=text: text
        with pytest.raises(BadAnswer) as found:
            judge.rewards(played(LOGS[0]), "charity", 0)
        assert found.value.refused.reason == ("judge: prose" if text in prose else "judge: no score")


def test_judge_logs_that_cannot_be_scored_are_left_out():
    long = {d.id for d in LOGS if len(d.agent_turns) > 2}

    def answer(messages):
        return "I cannot say." if messages[-1].content.count("] Agent: ") > 2 else generosity(messages)

    progress = []
    judge = JudgeReward(Judge(answer), LOGS, 0, progress=lambda done, total: progress.append((done, total)))
    assert 0 < len(long) < len(LOGS)
    assert judge.agreement["unread"] == len(long)
    assert judge.agreement["dialogues"] == len(LOGS) - len(long)
    assert progress == [(i + 1, len(LOGS)) for i in range(len(LOGS))]
    rest = JudgeReward(Judge(generosity), [d for d in LOGS if d.id not in long], 0)
    assert (judge._slope, judge._intercept) == pytest.approx((rest._slope, rest._intercept))
    with pytest.raises(DataError, match=f"none of {len(LOGS)}"):
        JudgeReward(Judge(lambda messages: "I cannot say."), LOGS, 0)


def test_judge_of_logs_that_are_too_long_or_that_is_gone():
    def too_long(messages):
        if messages[-1].content.count("] Agent: ") > 2:
            raise RequestError("too long")
        return generosity(messages)

    def gone(messages):
        raise EngineError("gone")

    assert JudgeReward(Judge(too_long), LOGS, 0).agreement["unread"] > 0
    with pytest.raises(EngineError):
        JudgeReward(Judge(gone), LOGS, 0)


def test_judge_is_asked_with_the_rubric_and_the_schema():
    asked = []
    judge = Judge(lambda messages: asked.append(messages) or generosity(messages))
    JudgeReward(judge, LOGS[:3], 0, "10: it rhymes.", concurrency=1)
    assert all(messages[0].content.endswith("10: it rhymes.") for messages in asked)
    assert all(m.content in asked[0][1].content for m in LOGS[0].messages)
    assert all(schema["properties"]["score"]["maximum"] == 10 for schema in judge.schemas)


# --- regression


def with_features(count, seed=0):
    """Return dialogues whose total is linear in the numbers that they say, and the features of dialogues."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        x = rng.standard_normal(3).round(6)
        total = float(1 + x @ [2.0, -1.0, 0.5])
        found.append(dialogue(str(i), "Go.", " ".join(map(str, x)), rewards=(total,)))
    return found


def features(dialogues):
    return np.array([[float(word) for word in messages[1].content.split()] for messages in dialogues])


def test_regression_recovers_a_linear_target():
    logs = with_features(200)
    reward = RegressionReward(features, logs, 0, "numbers")
    inner = [d for d in logs if abs(d.total - 1) < 2][:20]
    for one in inner:
        assert reward.rewards(played(one), "any", 0) == pytest.approx((0.0, one.total), abs=0.01)
    assert reward.sd < 0.01
    assert reward.agreement["dialogues"] == 60  # 30% were not fitted
    assert reward.agreement["spearman"]["value"] > 0.99
    assert reward.name == "regression on numbers"


def test_regression_is_worth_no_more_than_the_best_log():
    logs = with_features(50)
    reward = RegressionReward(features, logs, 0, "numbers")
    totals = [d.total for d in logs]
    much = dialogue("m", "Go.", "100 -100 100")
    little = dialogue("l", "Go.", "-100 100 -100")
    assert sum(reward.rewards(played(much), "any", 0)) == max(totals)
    assert sum(reward.rewards(played(little), "any", 0)) == min(totals)


def test_regression_is_measured_on_logs_that_it_was_not_fitted_to():
    rng = np.random.default_rng(0)
    logs = [dialogue(str(i), "Go.", "x", rewards=(float(rng.standard_normal()),)) for i in range(60)]
    noise = {id(d.messages): rng.standard_normal(50) for d in logs}
    reward = RegressionReward(lambda some: np.array([noise[id(m)] for m in some]), logs, 0, "noise")
    spearman = reward.agreement["spearman"]
    assert spearman is None or spearman["value"] < 0.5
    assert reward.sd > 0.7


def test_regression_wants_enough_logs():
    with pytest.raises(UsageError, match="20 labelled dialogues"):
        RegressionReward(features, with_features(19), 0, "numbers")
    RegressionReward(features, with_features(20), 0, "numbers")

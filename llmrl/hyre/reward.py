"""The reward of a user for reinforcement learning and best-of-n: K scores of an answer, weighted and made one number.

    reward = hyre_reward(load_ensemble("runs/hyre"), user=load_user("ann.json", ensemble), how="lower")
    GRPOTrainer(..., reward_funcs=reward)

A trainer of trl that is given a reward *model* reads `logits[:, 0]`, the score of one head; behind a function all heads count.
With each batch the heads' disagreement is logged as "hyre/disagreement". Heads that learned from different data agree where all
of it agreed and need not elsewhere, so a rise during training says that the policy has gone where the labels say little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from llmrl.errors import ConfigError, DataError, HeadMismatchError, UsageError, did_you_mean
from llmrl.hyre.ensemble import RewardEnsemble
from llmrl.hyre.pairs import Messages
from llmrl.hyre.user import User
from llmrl.rollout.chat import Conversation
from llmrl.rollout.protocols import Engine, Sample
from llmrl.rollout.seeds import derive_seed
from llmrl.types import Message, SamplingConfig

Array = NDArray[np.float64]
HOWS = ("mean", "lower", "worst", "quantile")
LEAST_WEIGHT = 0.01  # of 1/K: a head with less does not count for "worst"
METRIC = "hyre/disagreement"


class HeadScores(Protocol):
    """What gives K scores an answer: a `RewardEnsemble`, or a `ServedEnsemble`."""

    @property
    def heads(self) -> int:
        """K."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the ensemble; a user's file names it."""
        ...

    def scores(self, prompts: Sequence[Messages], answers: Sequence[str]) -> Array:
        """Return `[N, K]`."""
        ...


def aggregate(
    head_scores: ArrayLike, weights: ArrayLike | None = None, how: str = "mean", *, lam: float = 1.0, q: float = 0.1
) -> Array:
    """Return one score `[...]` of the scores of K heads.

    Args:
        head_scores: `[..., K]`.
        weights: `[K]`, or `[..., K]` one set a row; each sums to 1. None: all heads alike.
        how: "mean" is the weighted mean; "lower" the mean less `lam` weighted standard deviations over heads; "worst" the least
            score of any head that has at least LEAST_WEIGHT of the weight it would have if all counted alike (1/K), so not of
            the heads that a user's labels ruled out; "quantile" the least score such that heads with a weight of at least `q`
            together are at it or below (0: the least of any head with a weight, 1: the largest).
        lam: of "lower".
        q: of "quantile".

    Raises:
        DataError: something that is not finite, or weights that do not fit or do not sum to 1.
        UsageError: an unknown `how`, `lam` below 0, or `q` outside of 0 to 1.
    """
    _check_how(how, lam, q)
    f, w = _checked(head_scores, weights)
    if how == "worst":
        return np.where(w >= LEAST_WEIGHT / f.shape[-1], f, np.inf).min(-1)
    if how == "quantile":
        order = np.argsort(f, -1, kind="stable")
        below = np.take_along_axis(w, order, -1).cumsum(-1)
        first = ((below > 0) & (below >= q - 1e-12)).argmax(-1)
        return np.take_along_axis(np.take_along_axis(f, order, -1), first[..., None], -1)[..., 0]
    mean = (f * w).sum(-1)
    return mean if how == "mean" else mean - lam * disagreement(f, w)


def disagreement(head_scores: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Return the weighted standard deviation over heads, `[...]`; arguments as of `aggregate`."""
    f, w = _checked(head_scores, weights)
    centred = f - (f * w).sum(-1, keepdims=True)
    return np.sqrt((w * centred**2).sum(-1))


def _check_how(how: str, lam: float, q: float) -> None:
    if how not in HOWS:
        raise UsageError(f"unknown aggregation {how!r}{did_you_mean(str(how), HOWS)}")
    if not 0 <= lam < math.inf or not 0 <= q <= 1:
        raise UsageError(f"expected lam of at least 0 and q from 0 to 1, got {lam} and {q}")


def _checked(head_scores: ArrayLike, weights: ArrayLike | None) -> tuple[Array, Array]:
    f = np.asarray(head_scores, np.float64)
    heads = f.shape[-1]
    w = np.full(heads, 1 / heads) if weights is None else np.asarray(weights, np.float64)
    if not np.isfinite(f).all():
        row = int(np.flatnonzero(~np.isfinite(f).reshape(-1, heads).all(1))[0])
        raise DataError(f"answer {row}: a head gave a score that is not finite; check the base model and its dtype")
    if w.shape[-1] != heads or not (w >= 0).all() or not np.allclose(w.sum(-1), 1, atol=1e-6):
        raise DataError(f"expected weights of {heads} heads that are not negative and sum to 1, got {w!s:.60}")
    return f, np.broadcast_to(w, f.shape)


@dataclass(frozen=True)
class Scored:
    """A batch of answers as the reward saw them: `head_scores` and `weights` `[N, K]`, the others `[N]`."""

    head_scores: Array
    weights: Array
    rewards: Array
    disagreement: Array


class HyreReward:
    """A reward function as trl's GRPOTrainer and RLOOTrainer call it; made by `hyre_reward`.

    Attributes:
        last: the last batch; None before the first.
        history: mean disagreement of every batch so far.
    """

    def __init__(
        self,
        model: HeadScores,
        users: Mapping[str, User | None] | None,
        only: User | None,
        how: str,
        lam: float,
        q: float,
        column: str,
        name: str,
    ) -> None:
        self.__name__ = name  # trl logs the reward by it
        self.model, self.users, self.only, self.column = model, users, only, column
        self.how, self.lam, self.q = how, lam, q
        self.last: Scored | None = None
        self.history: list[float] = []
        self._uniform = np.full(model.heads, 1 / model.heads)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Return the reward of each completion.

        Args:
            prompts: texts, or lists of messages.
            completions: texts, or lists of messages of which the last is the answer.
            columns: of the data set, one value a row; what trl adds is ignored, but for `log_metric`.

        Raises:
            DataError: no user on a row, a name nobody has, a message without text, scores that are not finite.
        """
        if not len(completions):
            return []
        users = self._users_of(len(completions), columns)
        read = [_dialogue(p, c, i) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        scores = self._scores([prompt for prompt, _ in read], [answer for _, answer in read], users)
        weights = np.stack([self._uniform if user is None else user.posterior.weights for user in users])
        rewards = aggregate(scores, weights, self.how, lam=self.lam, q=self.q)
        self.last = Scored(scores, weights, rewards, disagreement(scores, weights))
        self.history.append(float(self.last.disagreement.mean()))
        log = columns.get("log_metric")
        if log is not None:
            log(METRIC, self.history[-1])
        return [float(reward) for reward in rewards]

    def _users_of(self, rows: int, columns: Mapping[str, Any]) -> list[User | None]:
        if self.users is None:
            return [self.only] * rows
        names = columns.get(self.column)
        if names is None:
            raise DataError(f"several users, and no column {self.column!r} says whose reward a row has: add it")
        for row, name in enumerate(names):
            if name not in self.users:
                raise DataError(
                    f"row {row}: nobody is called {name!r} in column {self.column!r}{did_you_mean(str(name), self.users)}"
                )
        return [self.users[name] for name in names]

    def _scores(self, prompts: list[Messages], answers: list[str], users: list[User | None]) -> Array:
        if not isinstance(self.model, RewardEnsemble) or all(u is None or u.correction is None for u in users):
            return self.model.scores(prompts, answers)
        # a correction reads the features, and moves all heads alike
        texts = [self.model.text(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        features = self.model.base.embed(texts)
        with torch.inference_mode():
            scores = np.asarray(self.model.head(features).double().numpy())
        none = np.zeros(features.shape[1])
        corrections = np.stack([none if u is None or u.correction is None else u.correction for u in users])
        return scores + (features.double().numpy() * corrections).sum(1, keepdims=True)


def hyre_reward(
    model: HeadScores,
    user: User | Mapping[str, User | None] | None = None,
    *,
    how: str = "mean",
    lam: float = 1.0,
    q: float = 0.1,
    column: str = "user",
    name: str = "hyre",
) -> HyreReward:
    """Return a reward function for trl's trainers and `best_of_n`.

    Args:
        model: a `RewardEnsemble`, or a `ServedEnsemble` over a reward client.
        user: whose weights count. Of a mapping, each row of the data set names its user; one that maps to None, as without
            any user, weighs all heads alike.
        how, lam, q: see `aggregate`.
        column: of the data set, with the names of the mapping.
        name: what trl logs the reward as.

    Raises:
        UsageError: a bare client, an unknown `how`, or a refined user of a served ensemble.
        HeadMismatchError: a user of another ensemble.
    """
    _check_how(how, lam, q)
    if not all(hasattr(model, wanted) for wanted in ("heads", "fingerprint", "scores")):
        raise UsageError(
            f"expected a RewardEnsemble or a ServedEnsemble, got {type(model).__name__}: a client does not know what the model "
            "reads; use ServedEnsemble(client, FOLDER)"
        )
    several = dict(user) if isinstance(user, Mapping) else None
    only = None if isinstance(user, Mapping) else user
    for label, one in (several or {"user": only}).items():
        _check_user(model, label, one)
    return HyreReward(model, several, only, how, lam, q, column, name)


def _check_user(model: HeadScores, label: str, user: User | None) -> None:
    if user is None:
        return
    if user.posterior.heads != model.heads:
        raise HeadMismatchError(f"{label} weighs {user.posterior.heads} heads, the ensemble has {model.heads}")
    if user.posterior.ensemble and user.posterior.ensemble != model.fingerprint:
        raise HeadMismatchError(f"{label} was adapted with another ensemble ({user.posterior.ensemble}): adapt again")
    if user.correction is not None and not isinstance(model, RewardEnsemble):
        raise UsageError(
            f"{label} is refined, and a correction reads features, which a server of scores does not give: use the ensemble in "
            "process, or adapt without refining"
        )


def _dialogue(prompt: Any, completion: Any, row: int) -> tuple[Messages, str]:
    """Return (what stands before the answer, the answer), as `llmrl.hyre.pairs` reads a row of preferences."""
    before, said = _messages(prompt, "user", row), _messages(completion, "assistant", row)
    if not said:
        raise DataError(f"row {row}: expected a completion, got {completion!r:.60}")
    return (*before, *said[:-1]), said[-1][1]


def _messages(value: Any, role: str, row: int) -> Messages:
    if isinstance(value, str):
        return ((role, value),) if value or role == "assistant" else ()
    try:
        found = tuple((str(message["role"]), message["content"]) for message in value)
    except (TypeError, KeyError):
        raise DataError(f"row {row}: expected a text or a list of messages, got {value!r:.60}") from None
    silent = next((content for _, content in found if not isinstance(content, str)), "")
    if not isinstance(silent, str):
        raise DataError(f"row {row}: expected text in every message, got {silent!r:.60}")
    return found


@dataclass(frozen=True)
class BestOf:
    """All samples of a prompt with their rewards, and which is best; None where a reward function gave none.

    `prompt_ids` and each sample's `token_ids` are what the engine read and drew.
    """

    prompt_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    rewards: tuple[float | None, ...]
    index: int

    @property
    def best(self) -> Sample:
        """The sample with the largest reward, the first of equal ones."""
        return self.samples[self.index]


def best_of_n(
    engine: Engine,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    sampling: SamplingConfig,
    reward: Callable[..., Sequence[float | None]],
    **columns: Sequence[Any],
) -> list[BestOf]:
    """Sample `sampling.n` answers to each prompt and choose the one with the largest reward.

    Args:
        engine: any engine of `llmrl.rollout`.
        prompts: texts that the model continues, or lists of messages.
        sampling: `n` of them; each prompt has a seed of its own, made of `sampling.seed` and its place.
        reward: `hyre_reward(...)`, or any reward function of trl.
        columns: further arguments of the reward, one value a prompt, such as `user`.

    Raises:
        ConfigError: greedy sampling, which gives n times the same.
        DataError: columns of another length, or a prompt none of whose samples has a reward.
        RequestError, EngineError: of the engine.
    """
    if sampling.n > 1 and sampling.temperature == 0:
        raise ConfigError(f"{sampling.n} greedy samples are all the same: set temperature above 0, or n to 1")
    wrong = next((name for name, values in columns.items() if len(values) != len(prompts)), None)
    if wrong is not None:
        raise DataError(f"column {wrong!r} has {len(columns[wrong])} values for {len(prompts)} prompts")
    ids = [_prompt_ids(engine.tokenizer, prompt) for prompt in prompts]
    seed = sampling.seed
    configs = [sampling if seed is None else replace(sampling, seed=derive_seed(seed, i)) for i in range(len(ids))]
    groups = engine.generate(ids, configs) if ids else []
    rewards = _rewards_of(reward, prompts, groups, columns)
    return [_best(i, *row) for i, row in enumerate(zip(ids, groups, rewards, strict=True))]


def _rewards_of(
    reward: Callable[..., Sequence[float | None]],
    prompts: Sequence[Any],
    groups: Sequence[Sequence[Sample]],
    columns: Mapping[str, Sequence[Any]],
) -> list[list[float | None]]:
    """Call a reward function once with all samples, and return its rewards by prompt."""
    rows = [i for i, group in enumerate(groups) for _ in group]
    if not rows:
        return []
    texts = [sample.text for group in groups for sample in group]
    given = reward(
        prompts=[prompts[i] for i in rows],
        completions=[
            text if isinstance(prompts[i], str) else [{"role": "assistant", "content": text}]
            for i, text in zip(rows, texts, strict=True)
        ],
        **{name: [values[i] for i in rows] for name, values in columns.items()},
    )
    if len(given) != len(rows):
        raise DataError(f"the reward function gave {len(given)} rewards of {len(rows)} answers")
    left = iter(given)
    return [[next(left) for _ in group] for group in groups]


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return tuple(tokenizer(prompt)["input_ids"])
    talk = Conversation(tokenizer)
    talk.add(*(Message.from_json(dict(message)) for message in prompt))
    return talk.prompt()


def _best(row: int, ids: tuple[int, ...], samples: Sequence[Sample], rewards: Sequence[float | None]) -> BestOf:
    kept = [None if reward is None or math.isnan(reward) else float(reward) for reward in rewards]
    rated = [(reward, -i) for i, reward in enumerate(kept) if reward is not None]
    if not rated:
        raise DataError(f"prompt {row}: none of its {len(samples)} samples has a reward")
    return BestOf(ids, tuple(samples), tuple(kept), -max(rated)[1])

"""The records everything else passes around: frozen, validated when made, and the same again after JSON.

An `Episode` is a list of `Turn`s. A turn holds one message and only the token ids that it adds to the context, so the
turns of one segment concatenate to exactly what the model saw. The loss mask is written where a token is sampled and
is never worked out later from roles, ids or padding. Where a chat template rewrites history, the next turn carries the
whole rewritten context and opens a new segment; what was sampled before stays in the segment it was sampled in, so
each sampled token is trained on once.

Every record has `to_json() -> dict` and `from_json(dict)`; a nested record is also accepted in its JSON form. Unknown
keys are refused, and so is NaN. The standard library is all this file needs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Self, TypeVar

from llmrl.errors import ConfigError, DataError, LlmrlError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")

_R = TypeVar("_R", bound="Record")
# log_softmax in float32 may end a rounding error above zero
_MAX_LOGPROB = 1e-3


class FinishReason(StrEnum):
    """Why an engine stopped sampling a turn."""

    STOP = "stop"  # an end token, a stop string or a stop id
    LENGTH = "length"  # max_tokens or the context ran out
    ABORT = "abort"  # the caller withdrew the request: a time limit, an interrupt


@dataclass(frozen=True)
class Record:
    """Base of the frozen records: JSON round trip and validation; `_error` is what a wrong value raises."""

    _error: ClassVar[type[LlmrlError]] = DataError

    def to_json(self) -> dict[str, Any]:
        """Return a dict of plain JSON values, one key a field."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Build the record from what `to_json` wrote.

        Raises:
            DataError: a key is unknown or missing, or a value is not valid (ConfigError for a `SamplingConfig`).
        """
        if not isinstance(value, Mapping):
            raise cls._error(f"{cls.__name__}: expected a JSON object, got {type(value).__name__}")
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
        for key in value:
            if key not in known:
                raise cls._error(f"{cls.__name__}: unknown key '{key}'{did_you_mean(str(key), known)}")
        missing = [name for name, needed in known.items() if needed and name not in value]
        if missing:
            raise cls._error(f"{cls.__name__}: missing {', '.join(missing)}; got {', '.join(value) or 'no keys'}")
        return cls(**value)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _need_int(self, name: str, least: int = 0) -> None:
        value = getattr(self, name)
        self._need(_is_int(value) and value >= least, name, f"an integer >= {least}")

    def _need(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise self._error(f"{type(self).__name__}.{name}: expected {expected}, got {getattr(self, name)!r:.80}")


@dataclass(frozen=True)
class Message(Record):
    """One chat message; `to_json` gives the dict that chat templates and trl's `messages` column hold.

    `name` is the tool that answered; `tool_calls` are the calls of an assistant in the form chat templates read.
    """

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self._need(self.role in ROLES, "role", f"one of {', '.join(ROLES)}")
        self._need(isinstance(self.content, str), "content", "text")
        self._need(self.name is None or isinstance(self.name, str), "name", "text or null")
        self._need(_is_list(self.tool_calls), "tool_calls", "a list of objects")
        self._set(tool_calls=tuple(_json_object(call, "Message.tool_calls") for call in self.tool_calls))

    def to_json(self) -> dict[str, Any]:
        """Return the message without the keys it does not use: templates test for their presence."""
        return {k: v for k, v in super().to_json().items() if k in ("role", "content") or v}


@dataclass(frozen=True)
class PolicyVersion(Record):
    """The weights a turn was sampled with.

    `number` counts the updates an engine took (0: as loaded), so a difference is a staleness; `fingerprint` names the
    weights themselves, so that equal numbers of two runs are not taken for equal weights.
    """

    number: int
    fingerprint: str

    def __post_init__(self) -> None:
        self._need_int("number")
        self._need(isinstance(self.fingerprint, str) and bool(self.fingerprint), "fingerprint", "non-empty text")


@dataclass(frozen=True)
class SamplingConfig(Record):
    """How to sample. Logprobs that come back are those of the untempered, unfiltered distribution (but see `json_schema`).

    `top_k=0`, `top_p=1` and `min_p=0` switch a filter off. `temperature=0` is greedy. `logprobs` is the number of
    alternatives reported beside each sampled token, whose own logprob always comes. Sample 0 of `n` is drawn with `seed`,
    the others with seeds derived from it. `json_schema` constrains the answer; only vLLM can do that, and
    the logprobs are then those of the constrained distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 256
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int = 0
    json_schema: dict[str, Any] | None = None

    _error = ConfigError

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p"):
            self._need(_is_finite(getattr(self, name)), name, "a finite number")
            self._set(**{name: float(getattr(self, name))})
        for name, least in (("top_k", 0), ("max_tokens", 1), ("n", 1), ("logprobs", 0)):
            self._need_int(name, least)
        # below, vLLM would sample at 0.01 and say so nowhere
        self._need(self.temperature == 0 or self.temperature >= 0.01, "temperature", "0 (greedy) or a number >= 0.01")
        self._need(0 < self.top_p <= 1, "top_p", "a number in (0, 1] (1 is off)")
        self._need(0 <= self.min_p <= 1, "min_p", "a number in [0, 1] (0 is off)")
        if self.seed is not None:
            self._need_int("seed")
            self._need(self.seed < 1 << 63, "seed", "an integer below 2^63")
        self._need(_is_list(self.stop) and all(isinstance(s, str) and s for s in self.stop), "stop", "a list of texts")
        ids = self.stop_token_ids
        self._need(_is_list(ids) and all(_is_int(i) and i >= 0 for i in ids), "stop_token_ids", "a list of ids >= 0")
        self._set(stop=tuple(self.stop), stop_token_ids=tuple(ids))
        if self.json_schema is not None:
            self._set(json_schema=_json_object(self.json_schema, "SamplingConfig.json_schema"))

    @property
    def is_truncated(self) -> bool:
        """True when top-p, top-k, min-p or a schema leaves tokens out of what is sampled from."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.json_schema is not None

    def require_full_support(self) -> None:
        """Refuse settings under which a ratio of policy to sampler is not defined for every token.

        Raises:
            ConfigError: a filter is on, or decoding is greedy; the message names each key and the value to give it.
        """
        off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
        wrong: dict[str, float | None] = {name: value for name, value in off.items() if getattr(self, name) != value}
        if self.temperature == 0:
            wrong["temperature"] = 1.0
        if self.json_schema is not None:
            wrong["json_schema"] = None
        if wrong:
            got = ", ".join(f"{name}={getattr(self, name)!s:.40}" for name in wrong)
            mend = ", ".join(
                f"{name}={value if value is None else format(value, 'g')}" for name, value in wrong.items()
            )
            raise ConfigError(
                f"on-policy ratios need samples from the full distribution, but they were drawn with {got}; set {mend}"
            )


@dataclass(frozen=True)
class Turn(Record):
    """One message and the tokens it adds to the context.

    A sampled turn has a policy version, a finish reason, and a logprob exactly where `loss_mask` is 1; its zeros are
    tokens that were forced on the model. Any other turn has none of the three: a prompt, an observation or a tool's
    answer (all zeros, the default), or a logged turn to learn from (ones, with no logprobs to form a ratio with). The
    generation prompt of a template belongs to the turn before the sampled one. `token_ids` is empty where only text
    is known.
    """

    message: Message
    token_ids: tuple[int, ...] = ()
    loss_mask: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    segment: int = 0
    policy_version: PolicyVersion | None = None
    finish_reason: FinishReason | None = None
    rewards: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_tokens(self)
        self._set(message=_as(Message, self.message), rewards=_json_object(self.rewards, "Turn.rewards"))
        self._need(all(_is_finite(r) for r in self.rewards.values()), "rewards", "an object of named numbers")
        self._need_int("segment")
        if self.policy_version is not None:
            self._set(policy_version=_as(PolicyVersion, self.policy_version))
        if self.finish_reason is not None:
            self._need(self.finish_reason in list(FinishReason), "finish_reason", f"one of {', '.join(FinishReason)}")
            self._set(finish_reason=FinishReason(self.finish_reason))
        with_logprob = [p is not None for p in self.logprobs]
        if self.is_sampled:
            self._need(any(self.loss_mask), "loss_mask", "a 1 for each sampled token of a turn with a policy version")
            self._need(self.finish_reason is not None, "finish_reason", "a reason on a turn with a policy version")
            self._need(with_logprob == [m == 1 for m in self.loss_mask], "logprobs", "a number where loss_mask is 1")
        else:
            self._need(not any(with_logprob), "logprobs", "null on a turn without a policy version")
            self._need(self.finish_reason is None, "finish_reason", "null on a turn without a policy version")

    @property
    def is_sampled(self) -> bool:
        """True when an engine of ours produced the turn."""
        return self.policy_version is not None


@dataclass(frozen=True)
class TokenizedRollout(Record):
    """The tokens of one segment in order, with everything a loss may read; all tuples have the length `T`.

    `turn_index[t]` is the turn of the episode that added token `t`: it finds the token's policy version and rewards.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    turn_index: tuple[int, ...]
    segment: int = 0

    def __post_init__(self) -> None:
        _check_tokens(self)
        self._need(len(self.token_ids) > 0, "token_ids", "at least one token")
        self._need_int("segment")
        turns = tuple(self.turn_index)
        self._need(all(_is_int(t) and t >= 0 for t in turns), "turn_index", "integers >= 0")
        self._need(list(turns) == sorted(turns), "turn_index", "turns in order")
        self._need(len(turns) == len(self.token_ids), "turn_index", f"{len(self.token_ids)} values, one a token")
        self._set(turn_index=turns)


@dataclass(frozen=True)
class Episode(Record):
    """What happened to one sample of one row, from the first turn to its end.

    It ended in exactly one of three ways: `done` (the environment says so; nothing to bootstrap), `truncated` (a limit
    of ours cut it; its last state still has a value) or `error` (it failed; the text says where). `source` is the data
    set or environment, `seed` the run's seed, `sampling` what the sampled turns were drawn with.
    """

    row_id: str
    sample: int
    turns: tuple[Turn, ...]
    done: bool = False
    truncated: bool = False
    error: str | None = None
    source: str = ""
    seed: int | None = None
    sampling: SamplingConfig | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._need(isinstance(self.row_id, str) and bool(self.row_id), "row_id", "non-empty text")
        self._need_int("sample")
        self._need(_is_list(self.turns), "turns", "a list of turns")
        self._set(turns=tuple(_as(Turn, t) for t in self.turns), metadata=_json_object(self.metadata, "metadata"))
        if self.sampling is not None:
            self._set(sampling=_as(SamplingConfig, self.sampling))
        for name in ("done", "truncated"):
            self._need(isinstance(getattr(self, name), bool), name, "true or false")
        self._need(self.error is None or (isinstance(self.error, str) and bool(self.error)), "error", "text or null")
        self._need(isinstance(self.source, str), "source", "text")
        if self.seed is not None:
            self._need_int("seed")
        where = f"Episode {self.row_id}/{self.sample}"
        if self.done + self.truncated + (self.error is not None) != 1:
            got = f"done={self.done}, truncated={self.truncated}, error={self.error!r:.60}"
            raise DataError(f"{where}: expected exactly one of done, truncated and error, got {got}")
        segments = [turn.segment for turn in self.turns]
        for before, segment in zip([0, *segments], segments, strict=False):
            if segment not in (before, before + 1) or segments[0] != 0:
                raise DataError(f"{where}: expected segments that start at 0 and grow by one, got {segments!r:.60}")

    @property
    def segments(self) -> int:
        """Number of segments: one, and one more for each time a template rewrote history."""
        return self.turns[-1].segment + 1 if self.turns else 0

    @property
    def returns(self) -> dict[str, float]:
        """Sum of each named reward over the turns, undiscounted."""
        totals: dict[str, float] = {}
        for turn in self.turns:
            for name, value in turn.rewards.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def rollouts(self) -> list[TokenizedRollout]:
        """Concatenate the turns of each segment; each sampled token is in exactly one of the results.

        Raises:
            DataError: a turn has text and no token ids, so what the model saw is not known.
        """
        for i, turn in enumerate(self.turns):
            if turn.message.content and not turn.token_ids:
                where = f"Episode {self.row_id}/{self.sample}: turn {i} ({turn.message.role})"
                raise DataError(f"{where} has text and no token ids; record it through an engine, or encode it first")
        rollouts = []
        for segment in range(self.segments):
            inside = [(i, turn) for i, turn in enumerate(self.turns) if turn.segment == segment]
            rollouts.append(
                TokenizedRollout(
                    token_ids=tuple(token for _, turn in inside for token in turn.token_ids),
                    loss_mask=tuple(mask for _, turn in inside for mask in turn.loss_mask),
                    logprobs=tuple(logprob for _, turn in inside for logprob in turn.logprobs),
                    turn_index=tuple(i for i, turn in inside for _ in turn.token_ids),
                    segment=segment,
                )
            )
        return rollouts


@dataclass(frozen=True)
class Preference(Record):
    """Two answers to one prompt, in trl's columns: three texts, or three lists of messages."""

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = ("prompt", "chosen", "rejected")
        for name in columns:
            value = getattr(self, name)
            is_text = isinstance(value, str)
            self._need((is_text or _is_list(value)) and len(value) > 0, name, "text or a list of messages, not empty")
            if not is_text:
                self._set(**{name: tuple(_as(Message, m) for m in value)})
        if len({isinstance(getattr(self, name), str) for name in columns}) > 1:
            got = ", ".join(f"{name}: {type(getattr(self, name)).__name__}" for name in columns)
            raise DataError(f"Preference: expected three texts or three lists of messages, got {got}")
        if self.chosen == self.rejected:
            raise DataError(f"Preference: chosen and rejected are the same: {self.chosen!r:.80}")
        self._set(metadata=_json_object(self.metadata, "metadata"))

    def to_trl(self) -> dict[str, Any]:
        """Return the three columns trl's preference trainers read, without the metadata."""
        return {k: v for k, v in self.to_json().items() if k != "metadata"}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _as(cls: type[_R], value: Any) -> _R:
    return value if isinstance(value, cls) else cls.from_json(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _json_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise DataError(f"{where}: expected an object with texts as keys, got {value!r:.60}")
    return {key: _json_value(v, f"{where}.{key}") for key, v in value.items()}


def _json_value(value: Any, where: str) -> Any:
    """Copy a JSON value with tuples as lists, so that it equals itself after a round trip."""
    if isinstance(value, Mapping):
        return _json_object(value, where)
    if isinstance(value, list | tuple):
        return [_json_value(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, str | bool | int) or _is_finite(value):
        return value
    hint = "JSON has no NaN or infinity, use null" if isinstance(value, float) else "use what JSON can hold"
    raise DataError(f"{where}: got {value!r:.60} ({type(value).__name__}); {hint}")


def _check_tokens(record: Turn | TokenizedRollout) -> None:
    """Make ids, mask and logprobs tuples of equal length; refuse what no engine can have recorded."""
    try:
        ids = tuple(operator.index(t) for t in record.token_ids)
    except TypeError:
        ids = (-1,)
    record._need(all(t >= 0 for t in ids), "token_ids", "a list of integers >= 0")
    what = type(record).__name__
    for name, nothing in (("loss_mask", 0), ("logprobs", None)):
        values = getattr(record, name)
        record._need(_is_list(values), name, "a list")
        if isinstance(record, Turn) and not values:
            record._set(**{name: (nothing,) * len(ids)})
        elif len(values) != len(ids):
            raise DataError(f"{what}.{name}: expected {len(ids)} values, one a token, got {len(values)}")
    record._need(all(m in (0, 1) for m in record.loss_mask), "loss_mask", "zeros and ones")
    for t, (mask, logprob) in enumerate(zip(record.loss_mask, record.logprobs, strict=True)):
        if logprob is not None and not mask:
            raise DataError(f"{what}.logprobs[{t}]: expected null where loss_mask is 0, got {logprob!r:.60}")
        if logprob is not None and (not _is_finite(logprob) or logprob > _MAX_LOGPROB):
            raise DataError(f"{what}.logprobs[{t}]: expected a finite number <= 0, got {logprob!r:.60}")
    record._set(
        token_ids=ids,
        loss_mask=tuple(int(m) for m in record.loss_mask),
        logprobs=tuple(None if p is None else float(p) for p in record.logprobs),
    )

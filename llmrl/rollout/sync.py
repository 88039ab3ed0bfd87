"""The sync canary: after every weight update, engine and trainer are shown to hold the same weights, or the run fails.

Two probes. Prompt logprobs of fixed ids say whether the weights arrived; vLLM answers such requests without its prefix
cache. Greedy tokens after prefixes that were cached before the update say whether the cache went with the old weights.
Beyond agreement, the engine must have changed exactly when the trainer has. Where an engine is several servers, each of
them is asked.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmrl.errors import ConfigError, ModelError, SyncError
from llmrl.rollout.engine import BaseEngine
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.weights import disk_weights, unwrap
from llmrl.types import PolicyVersion, SamplingConfig

# Nats a token that the arithmetic of two implementations explains: in float32 the largest difference of a probe. In 16 bits
# single tokens differ by far more (1.0 was seen in bfloat16 where the mean was 0.03), so there all but one token in fifty
# have to keep to it, and the mean to a tenth of it.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.8, "float16": 0.1}
_MEAN_SHARE = 0.1
_QUANTILE = 0.98
# In 16 bits the mean has to stay near that of engine and trainer on equal weights, which `check` measures.
_MEAN_GROWTH, _LEAST_MEAN = 5.0, 0.0125
_PROBE_TOKENS = 320  # more than two blocks of vLLM's prefix cache, of 128 tokens on a CPU and 16 on a GPU
_NEW_TOKENS = 16
_PREFIXES = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gap:
    """How far two probes are apart, in nats: at most, at which token, at the 98% quantile, on average."""

    largest: float
    at: int
    quantile: float
    mean: float


@dataclass(frozen=True)
class SyncReport:
    """What the canary saw after an update, in nats; of several servers the worst.

    The changes are against the probe before (None where none was taken). `difference_after_cached_prefix` is None where the
    engine cached nothing of the prefix, so that its cache was not checked.
    """

    version: PolicyVersion
    difference: float
    mean_difference: float
    difference_after_cached_prefix: float | None
    trainer_change: float | None
    engine_change: float | None


class WeightSync:
    """Puts a trainer's weights into an engine and proves that they arrived.

    Args:
        engine: Any engine of ours that takes updates.
        model: The trainer's model: a transformers model, or a PEFT model with a LoRA adapter. An engine opened for
            adapters gets the adapter, any other one the merged weights.
        tolerance: In nats a token; None takes `TOLERANCE` of the coarser dtype of the two.
        probe_ids: Token ids to compare on, at least two; None lets the engine write some.

    Raises:
        SyncError: From `check` and `update`. The engine then refuses requests until an update succeeds.
    """

    def __init__(
        self, engine: Any, model: Any, *, tolerance: float | None = None, probe_ids: Sequence[int] | None = None
    ) -> None:
        if tolerance is not None and not tolerance > 0:
            raise ConfigError(f"tolerance: expected nats above 0, got {tolerance}")
        if probe_ids is not None and len(probe_ids) < 2:
            raise ConfigError(f"probe_ids: expected at least 2 token ids, got {len(probe_ids)}")
        self.engine, self.model = engine, model
        dtypes = (engine.dtype, str(next(iter(unwrap(model).parameters())).dtype).removeprefix("torch."))
        self.tolerance = tolerance or max(TOLERANCE.get(dtype, TOLERANCE["float32"]) for dtype in dtypes)
        self.exact = all(dtype == "float32" for dtype in dtypes)
        self.mean_tolerance = self.tolerance if self.exact else _MEAN_SHARE * self.tolerance
        self.probe_ids = tuple(probe_ids) if probe_ids else write_probe(engine)
        self.reports: list[SyncReport] = []
        self._trainer: list[float] | None = None
        self._engine: dict[str, list[float]] = {}  # by server
        self._still: dict[str, list[float]] = {}  # the trainer's probe when that server last moved

    def check(self) -> float:
        """Compare engine and trainer as they are; return the largest difference in nats.

        Raises:
            SyncError: They disagree by more than the tolerance.
        """
        trainer, worst = self._trainer_probe(self.probe_ids), 0.0
        for view in self.engine.each():
            engine = view.score(self.probe_ids)
            gap = compare(trainer, engine)
            if not self._agree(gap):
                self._fail(
                    f"{_on(view)}engine and trainer disagree before any update: {self._shown(gap)}; "
                    "they must start from the same checkpoint, or call update() first"
                )
            self._engine[view.name], self._still[view.name] = engine, trainer
            worst = max(worst, gap.largest)
            if not self.exact:
                near = max(_LEAST_MEAN, _MEAN_GROWTH * gap.mean)
                self.mean_tolerance = min(self.mean_tolerance, near)
        self._trainer = trainer
        return worst

    def update(self) -> PolicyVersion:
        """Send the trainer's weights, then compare.

        Raises:
            SyncError: A tensor was lost or changed, the engine kept its old weights, or its prefix cache kept the old
                keys and values; the message says which, and on which server.
        """
        cached = self._warm_up() if self.engine.is_trusted else {}
        try:
            version = self._send()
        except SyncError as error:
            self._fail(str(error))
        trainer = self._trainer_probe(self.probe_ids)
        trainer_change = None if self._trainer is None else compare(trainer, self._trainer).largest
        reports = [self._judge(view, version, trainer, trainer_change, cached) for view in self.engine.each()]
        self._trainer = trainer
        self.reports.append(_worst(reports))
        return version

    def _judge(
        self, view: Any, version: PolicyVersion, trainer: list[float], moved: float | None, cached: dict[str, bool]
    ) -> SyncReport:
        """Compare one server with the trainer."""
        engine, before = view.score(self.probe_ids), self._engine.get(view.name)
        gap = compare(trainer, engine)
        change = None if before is None else compare(engine, before).largest
        self._judge_change(view, version, gap, change, trainer)
        if not self._agree(gap):
            self._fail(
                f"{_on(view)}engine and trainer disagree after update {version.number}: {self._shown(gap)}; "
                "the engine holds corrupted weights"
            )
        if moved is not None and moved <= self.tolerance and (change or 0.0) > 2 * self.tolerance + moved:
            self._fail(
                f"{_on(view)}update {version.number} changed the engine by {change:.2g} nats, and the trainer by "
                f"{moved:.2g}: the engine got other weights than the trainer's"
            )
        after_prefix = self._judge_cache(view) if cached.get(view.name, True) else None
        self._engine[view.name] = engine
        if change is None or change > 0:
            self._still[view.name] = trainer
        return SyncReport(version, gap.largest, gap.mean, after_prefix, moved, change)

    def _judge_change(
        self, view: Any, version: PolicyVersion, gap: Gap, change: float | None, trainer: list[float]
    ) -> None:
        """Fail when the engine stands still while the trainer moves on.

        Rounding hides a small difference, and does not hide that not one bit of the engine's probe has changed. What the
        trainer moved is summed up over the updates since the engine last moved.
        """
        if change is None:
            return
        still = self._still.get(view.name)
        due = max(0.0 if self._agree(gap) else gap.largest, compare(trainer, still).largest if still else 0.0)
        stands = change == 0 or change < 0.01 * due
        if stands and due > _MEAN_SHARE * self.mean_tolerance:
            self._fail(
                f"{_on(view)}update {version.number} did not reach the engine: it should have moved by {due:.2g} nats and "
                f"moved by {change:.2g}; it still samples with its old weights"
            )

    def _judge_cache(self, view: Any) -> float:
        """Compare tokens the engine generates after cached prefixes; fail when they come from old keys and values."""
        largest = 0.0
        ours, theirs = [], []
        for prefix in self._prefixes():
            sample = view.generate(prefix, _greedy(_NEW_TOKENS))
            theirs += sample.logprobs
            ours += self._trainer_probe([*prefix, *sample.token_ids])[len(prefix) - 1 :]
        gap = compare(ours, theirs)
        largest = max(largest, gap.largest)
        if not self._agree(gap):
            self._fail(
                f"{_on(view)}stale prefix cache: after prefixes that were cached before the update the engine's tokens are "
                f"{self._shown(gap)} away from the trainer, although its weights agree"
            )
        return largest

    def _warm_up(self) -> dict[str, bool]:
        """Put the prefixes into each cache, with the old weights; return which servers did cache them."""
        cached = {}
        for view in self.engine.each():
            for prefix in self._prefixes():
                view.generate(prefix, _greedy(1))
            ask = getattr(view, "cached_tokens", None)  # a server does not say
            cached[view.name] = ask is None or ask(self._prefixes()[-1]) != 0
            if not cached[view.name] and not self.reports:
                _log.warning(
                    "%sthe prefix cache is not checked after updates: it holds nothing of a prefix of %d tokens",
                    _on(view), len(self._prefixes()[-1]),
                )  # fmt: skip
            if view.name not in self._engine:
                self._engine[view.name] = view.score(self.probe_ids)
        return cached

    def _prefixes(self) -> list[tuple[int, ...]]:
        """Return beginnings of the probe of different lengths, the longest last."""
        lengths = {max(1, len(self.probe_ids) - 7 * i) for i in range(_PREFIXES)}
        return [self.probe_ids[:length] for length in sorted(lengths)]

    def _agree(self, gap: Gap) -> bool:
        largest = gap.largest if self.exact else gap.quantile
        return largest <= self.tolerance and gap.mean <= self.mean_tolerance

    def _shown(self, gap: Gap) -> str:
        mean = "" if self.exact else f", {gap.mean:.2g} on average"
        limit = "" if self.exact else f" and {self.mean_tolerance:.2g}"
        return (
            f"{gap.largest:.2g} nats at probe token {gap.at + 1}{mean} (tolerance {self.tolerance:g}{limit} "
            f"for {self.engine.dtype})"
        )

    def _trainer_probe(self, ids: Sequence[int]) -> list[float]:
        from llmrl.rollout.transformers_engine import prompt_logprobs

        model = unwrap(self.model)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # no dropout, hence no draw from the trainer's random state either
        try:
            with _without_autocast(model):
                return prompt_logprobs(model, [ids])[0]
        finally:
            for module, training in modes:  # train() would switch on the dropout of frozen parts too
                module.training = training

    def _send(self) -> PolicyVersion:
        model = unwrap(self.model)
        if not (hasattr(model, "peft_config") and self.engine.takes_adapters):
            return self.engine.update(disk_weights(model))
        active = model.active_adapters
        if len(active) != 1:
            raise ModelError(f"an engine takes one adapter, the trainer has {len(active)} active: {', '.join(active)}")
        name = active[0]
        with tempfile.TemporaryDirectory(prefix="llmrl-adapter-") as folder:
            # the embeddings are the base's: looking whether they changed would ask the hub at each update
            model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
            return self.engine.update(Path(folder) if name == "default" else Path(folder, name))

    def _fail(self, message: str) -> NoReturn:
        self.engine.distrust(message)
        raise SyncError(message)


def write_probe(engine: BaseEngine, tokens: int = _PROBE_TOKENS) -> tuple[int, ...]:
    """Let an engine write ids to compare on: text of its own kind, so that rounding errors are as in use."""
    wanted = max(2, min(tokens, engine.max_model_len - _NEW_TOKENS - 1))
    start = engine.tokenizer.bos_token_id
    ids = [start if start is not None else derive_seed("probe") % engine.vocab_size]
    for attempt in range(wanted):
        sampling = SamplingConfig(max_tokens=wanted - len(ids) + 1, seed=derive_seed("probe", attempt))
        written = engine.generate([ids], sampling)[0][0].token_ids
        ids += [token for token in written if token not in engine.end_ids]
        if len(ids) >= wanted:
            break
        ids.append(derive_seed("probe", attempt, "next") % engine.vocab_size)  # it wanted to end: say something else
    return tuple(ids[:wanted])


def compare(one: Sequence[float], other: Sequence[float]) -> Gap:
    """Compare two probes token by token; a NaN counts as infinite."""
    differences = [abs(a - b) if a == a and b == b else float("inf") for a, b in zip(one, other, strict=True)]
    largest, ordered = max(differences), sorted(differences)
    quantile = ordered[min(len(ordered) - 1, int(_QUANTILE * len(ordered)))]
    return Gap(largest, differences.index(largest), quantile, sum(differences) / len(differences))


def _worst(reports: Sequence[SyncReport]) -> SyncReport:
    cached = [r.difference_after_cached_prefix for r in reports if r.difference_after_cached_prefix is not None]
    changes = [r.engine_change for r in reports if r.engine_change is not None]
    return SyncReport(
        version=reports[0].version,
        difference=max(r.difference for r in reports),
        mean_difference=max(r.mean_difference for r in reports),
        difference_after_cached_prefix=max(cached) if len(cached) == len(reports) else None,
        trainer_change=reports[0].trainer_change,
        engine_change=min(changes) if changes else None,
    )


def _greedy(tokens: int) -> SamplingConfig:
    return SamplingConfig(temperature=0.0, max_tokens=tokens)


def _on(view: Any) -> str:
    return f"{view.name}: " if view.name else ""


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Run a model that accelerate prepared for mixed precision in the dtype of its weights, which is what engines hold."""
    wrapped, original = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped

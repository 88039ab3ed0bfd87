"""The sync canary: after every weight update, engine and trainer are shown to hold the same weights, or the run fails.

Two probes. Prompt logprobs of fixed ids say whether the weights arrived; vLLM answers such requests without its prefix
cache. One greedy token after a prefix that was cached before the update says whether the cache went with the old weights.
Beyond agreement, the engine must have changed exactly when the trainer has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llmrl.errors import ModelError, SyncError
from llmrl.rollout.engine import BaseEngine
from llmrl.rollout.seeds import derive_seed
from llmrl.rollout.weights import disk_weights, unwrap
from llmrl.types import PolicyVersion, SamplingConfig

# Largest difference of a token's logprob in nats that the arithmetic of two implementations explains. In 16 bits a rare
# token may be off by ten times the mean (seen with bfloat16 on four small models: at most 0.52, and 0.04 on average), so
# the mean has to keep to a tenth of it.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.8, "float16": 0.1}
_MEAN_SHARE = 0.1
_PROBE_TOKENS = 320  # more than two blocks of vLLM's prefix cache, of 128 tokens on a CPU and 16 on a GPU


@dataclass(frozen=True)
class _Gap:
    """How far two probes are apart: at most, at which token, on average."""

    largest: float
    at: int
    mean: float


@dataclass(frozen=True)
class SyncReport:
    """What the canary saw after an update, in nats; the changes are against the probe before (None where none was taken)."""

    version: PolicyVersion
    difference: float
    mean_difference: float
    difference_after_cached_prefix: float
    trainer_change: float | None
    engine_change: float | None


class WeightSync:
    """Puts a trainer's weights into an engine and proves that they arrived.

    Args:
        engine: Any engine of ours that takes updates.
        model: The trainer's model: a transformers model, or a PEFT model with a LoRA adapter. An engine opened for
            adapters gets the adapter, any other one the merged weights.
        tolerance: In nats a token, and a tenth of it on average; None takes that of the coarser dtype of the two.
        probe_ids: Token ids to compare on; None lets the engine write some.

    Raises:
        SyncError: From `check` and `update`. The engine then refuses requests until an update succeeds.
    """

    def __init__(
        self, engine: Any, model: Any, *, tolerance: float | None = None, probe_ids: Sequence[int] | None = None
    ) -> None:
        self.engine, self.model = engine, model
        trainer_dtype = str(next(iter(unwrap(model).parameters())).dtype).removeprefix("torch.")
        self.tolerance = tolerance or max(TOLERANCE.get(d, 1e-3) for d in (engine.dtype, trainer_dtype))
        self.probe_ids = tuple(probe_ids) if probe_ids else write_probe(engine)
        self.reports: list[SyncReport] = []
        self._trainer: list[float] | None = None
        self._engine: list[float] | None = None

    def check(self) -> float:
        """Compare engine and trainer as they are; return the largest difference in nats.

        Raises:
            SyncError: They disagree by more than the tolerance.
        """
        trainer, engine = self._trainer_probe(), self.engine.score(self.probe_ids)
        gap = _compare(trainer, engine)
        if not self._agree(gap):
            self._fail(
                f"engine and trainer disagree before any update: {self._shown(gap)}; they must start from the same checkpoint, or call update() first"
            )
        self._trainer, self._engine = trainer, engine
        return gap.largest

    def update(self) -> PolicyVersion:
        """Send the trainer's weights, then compare.

        Raises:
            SyncError: A tensor was lost or changed, the engine kept its old weights, or its prefix cache kept the old
                keys and values; the message says which.
        """
        if self.engine.is_trusted:
            self._after_prefix()  # the prefix is in the cache now, computed with the old weights
            self._engine = self.engine.score(self.probe_ids) if self._engine is None else self._engine
        try:
            version = self._send()
        except SyncError as error:
            self._fail(str(error))
        trainer, engine = self._trainer_probe(), self.engine.score(self.probe_ids)
        gap = _compare(trainer, engine)
        trainer_change = None if self._trainer is None else _compare(trainer, self._trainer).largest
        engine_change = None if self._engine is None else _compare(engine, self._engine).largest
        self._judge(version, gap, trainer_change, engine_change)
        cached_difference = self._cached_difference()
        self._trainer, self._engine = trainer, engine
        self.reports.append(
            SyncReport(version, gap.largest, gap.mean, cached_difference, trainer_change, engine_change)
        )
        return version

    def _judge(
        self, version: PolicyVersion, gap: _Gap, trainer_change: float | None, engine_change: float | None
    ) -> None:
        moved = trainer_change is not None and trainer_change > self.tolerance
        # what did not move at all did not get the weights, however coarse its dtype
        due = max(0.0 if self._agree(gap) else gap.largest, trainer_change or 0.0)
        if engine_change is not None and due > _MEAN_SHARE * self.tolerance and engine_change < 0.01 * due:
            self._fail(
                f"update {version.number} did not reach the engine: it should have moved by {due:.2g} nats and moved by "
                f"{engine_change:.2g}; it still samples with its old weights"
            )
        if not self._agree(gap):
            self._fail(
                f"engine and trainer disagree after update {version.number}: {self._shown(gap)}; "
                "the engine holds corrupted weights"
            )
        if trainer_change is not None and not moved and (engine_change or 0.0) > 2 * self.tolerance:
            self._fail(
                f"update {version.number} changed the engine by {engine_change:.2g} nats, and the trainer by "
                f"{trainer_change:.2g}: the engine got other weights than the trainer's"
            )

    def _agree(self, gap: _Gap) -> bool:
        return gap.largest <= self.tolerance and gap.mean <= _MEAN_SHARE * self.tolerance

    def _shown(self, gap: _Gap) -> str:
        return (
            f"{gap.largest:.2g} nats at probe token {gap.at + 1} and {gap.mean:.2g} on average "
            f"(tolerance {self.tolerance:g} and {_MEAN_SHARE * self.tolerance:g} for {self.engine.dtype})"
        )

    def _cached_difference(self) -> float:
        """Compare the token the engine generates after the prefix; fail when it comes from old keys and values."""
        token, logprob = self._after_prefix()
        expected = self._trainer_probe([*self.probe_ids, token])[-1]
        difference = abs(expected - logprob)
        if not difference <= self.tolerance:
            self._fail(
                f"stale prefix cache: after a prefix that was cached before the update, the engine gives a token "
                f"{difference:.2g} nats away from the trainer (tolerance {self.tolerance:g}), although its weights agree"
            )
        return difference

    def _after_prefix(self) -> tuple[int, float]:
        sample = self.engine.generate([self.probe_ids], SamplingConfig(temperature=0.0, max_tokens=1))[0][0]
        return sample.token_ids[0], sample.logprobs[0]

    def _trainer_probe(self, ids: Sequence[int] | None = None) -> list[float]:
        from llmrl.rollout.transformers_engine import prompt_logprobs

        model = unwrap(self.model)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # no dropout, hence no draw from the trainer's random state either
        try:
            return prompt_logprobs(model, [ids or self.probe_ids])[0]
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
    wanted = max(1, min(tokens, engine.max_model_len - 2))
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


def _compare(one: Sequence[float], other: Sequence[float]) -> _Gap:
    """Compare two probes; a NaN counts as infinite."""
    differences = [abs(a - b) if a == a and b == b else float("inf") for a, b in zip(one, other, strict=True)]
    largest = max(differences)
    return _Gap(largest, differences.index(largest), sum(differences) / len(differences))

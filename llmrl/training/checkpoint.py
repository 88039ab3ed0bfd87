"""Checkpoints that are whole or absent, hold no pickle, and resume exactly, for transformers' Trainer and trl's.

    class MyTrainer(SafeCheckpoints, SFTTrainer): ...      or      trainer = safe(SFTTrainer)(...)

A checkpoint is written to `.checkpoint-N.tmp` and renamed when every process has written its part. Inside:
    model.safetensors or adapter_model.safetensors, tokenizer, configs     as Trainer writes them
    optimizer.json + .safetensors, scheduler.json, scaler.json             state dicts (state_files.py)
    rank_R.json + .safetensors        of process R: random states, running sums of the log, trl's running metrics
    trainer_state.json, training_args.json, llmrl_checkpoint.json          the last one lists every file

What transformers does not restore, and is restored here: the loss summed since the last log, the whole run's mean loss,
trl's metrics between two logs and its token count. A finished run that is resumed takes no further step.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrl.errors import CheckpointError, ConfigError, VersionError
from llmrl.files import publish_folder, write_json
from llmrl.training.random_state import random_state, set_random_state
from llmrl.training.resume import (
    compare_runs,
    latest_checkpoint,
    list_checkpoints,
    refuse_pickles,
    remove_checkpoint,
    remove_leftovers,
    resolve_resume,
    seal_checkpoint,
    staging_folder,
)
from llmrl.training.state_files import load_state, save_state

__all__ = ["SafeCheckpoints", "latest_checkpoint", "resolve_resume", "safe"]

# The hooks are private to transformers: if one were renamed, its pickles would silently be back.
_HOOKS = (
    "_get_output_dir", "_save_checkpoint", "_save", "_save_optimizer_and_scheduler", "_save_scaler", "_save_rng_state",
    "_load_optimizer_and_scheduler", "_load_scaler", "_load_rng_state", "_load_best_model",
)  # fmt: skip
_missing = [hook for hook in _HOOKS if not hasattr(Trainer, hook)]
if _missing:
    raise VersionError(
        f"transformers {transformers.__version__} has no Trainer.{_missing[0]}: install transformers>=5.16.1,<5.20"
    )

_LOOP_NUMBERS = ("_total_loss_scalar", "_globalstep_last_logged")
_SPEEDS = ("train_samples_per_second", "train_steps_per_second", "train_tokens_per_second")


class SafeCheckpoints(Trainer):
    """Trainer whose checkpoints appear whole, hold safetensors and JSON only, and resume exactly.

    Mix it in before any subclass of Trainer. Resuming is exact on a CPU when data order and collator are functions of
    the row (no random collator), with the same max_steps, processes, threads and versions; `reproducible_arguments`
    holds the settings. The output folder must be on a file system that all processes share, or `save_on_each_node` set.

    With FSDP or DeepSpeed model and optimizer shards keep the format of Trainer, which is torch's and holds pickles;
    such checkpoints also appear only when whole, but must come from a trusted place.

    Attributes:
        checkpoint_attributes: names of attributes of the trainer that hold running state as dicts, lists, tensors and
            numbers, saved and restored on each process; extend it in a subclass with state of its own.
    """

    checkpoint_attributes: tuple[str, ...] = ("_metrics", "_total_train_tokens")
    _staging: Path | None = None
    _resumed_step: int = 0

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from step 0 or from a checkpoint: a path, or True or "latest" (see `resolve_resume`)."""
        if self.args.push_to_hub and str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy)) != "end":
            raise ConfigError(
                "uploading every checkpoint would write training_args.bin, a pickle: use hub_strategy=end"
            )
        if self.args.should_save:
            remove_leftovers(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = resolve_resume(self.args.output_dir, resume_from_checkpoint, sharded=self._sharded)
        self._resumed_step = 0
        restore = _RestoreLoop(self, checkpoint)
        self.add_callback(restore)
        try:
            return super().train(checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(restore)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; the closing speeds count the steps of this process only, the loss those of the run."""
        if "train_loss" in logs and self._resumed_step:
            share = 1 - self._resumed_step / max(self.state.global_step, 1)
            for key in _SPEEDS:
                if key in logs:
                    logs[key] *= share
        super().log(logs, start_time)

    # --- saving ---

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        staging = staging_folder(final)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self._point_best_to(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(staging, final)
        except BaseException:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _point_best_to(self, final: Path) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == self._staging:
            self.state.best_model_checkpoint = str(final.parent / Path(best).name)

    def _publish(self, staging: Path, final: Path) -> None:
        folder = staging / final.name
        path = folder / "trainer_state.json"
        state = json.loads(path.read_text(encoding="utf-8"))
        state["best_model_checkpoint"] = self.state.best_model_checkpoint
        write_json(path, state)
        if not self._sharded:
            refuse_pickles(folder)
        facts = {"step": self.state.global_step, **self._facts(), "sharded": self._sharded, "versions": _versions()}
        seal_checkpoint(folder, facts)
        publish_folder(folder, final)
        staging.rmdir()
        self._rotate(final)

    def _rotate(self, newest: Path) -> None:
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        best = self.state.best_model_checkpoint
        protected = {newest.name} | ({Path(best).name} if best is not None else set())
        others = [c for c in list_checkpoints(newest.parent) if c.name not in protected]
        # by time, as Trainer does: after a resume from an early checkpoint a higher step can be the older one
        others.sort(key=lambda c: (c.stat().st_mtime_ns, int(c.name.split("-")[1])))
        surplus = len(others) + len(protected) - max(limit, len(protected))
        for checkpoint in others[: max(surplus, 0)]:
            remove_checkpoint(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            (folder / "training_args.bin").unlink(missing_ok=True)
            write_json(folder / "training_args.json", json.loads(self.args.to_json_string()))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(output_dir, "optimizer", self.optimizer.state_dict())
            save_state(output_dir, "scheduler", self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(output_dir, "scaler", scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        os.makedirs(output_dir, exist_ok=True)
        loop = {name: getattr(self, name) for name in _LOOP_NUMBERS}
        loop["_tr_loss"] = self._tr_loss
        loop["attributes"] = {n: getattr(self, n) for n in self.checkpoint_attributes if hasattr(self, n)}
        save_state(output_dir, f"rank_{self.args.process_index}", {"rng": random_state(self.args.n_gpu), "loop": loop})

    # --- loading ---

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        compare_runs(checkpoint, self._facts())
        if self._sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not (Path(checkpoint) / "optimizer.json").is_file():
            raise CheckpointError(
                f"{checkpoint} holds weights only (save_only_model): start a new run by giving it as the model"
            )
        self.optimizer.load_state_dict(load_state(checkpoint, "optimizer"))
        self.lr_scheduler.load_state_dict(load_state(checkpoint, "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / "scaler.json").is_file():
            self.accelerator.scaler.load_state_dict(load_state(checkpoint, "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            set_random_state(load_state(checkpoint, f"rank_{self.args.process_index}")["rng"])

    def _restore_loop(self, checkpoint: str) -> None:
        loop = load_state(checkpoint, f"rank_{self.args.process_index}")["loop"]
        for name in _LOOP_NUMBERS:
            setattr(self, name, loop[name])
        self._tr_loss = loop["_tr_loss"].to(self.args.device)
        # the closing loss is then the mean over the whole run, as it is without an interruption
        self._resumed_step, self._initial_global_step = self.state.global_step, 0
        for name, value in loop["attributes"].items():
            setattr(self, name, _like(getattr(self, name, None), value))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # Trainer would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        if not self._sharded:
            refuse_pickles(self.state.best_model_checkpoint)
        super()._load_best_model()

    # --- facts ---

    @property
    def _sharded(self) -> bool:
        return bool(
            self.is_fsdp_enabled
            or self.is_deepspeed_enabled
            or getattr(self, "is_distributed_loading_by_transformers", False)
        )

    def _facts(self) -> dict[str, Any]:
        batch = self.args.per_device_train_batch_size * max(self.args.n_gpu, 1) * self.args.world_size
        return {
            "world_size": self.args.world_size,
            "max_steps": self.state.max_steps,
            "global_batch_size": batch * self.args.gradient_accumulation_steps,
            "seed": self.args.seed,
            "data_seed": self.args.data_seed,
        }


class _RestoreLoop(TrainerCallback):
    """Gives the trainer its running sums back once Trainer has set them to zero."""

    def __init__(self, trainer: SafeCheckpoints, checkpoint: str | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.checkpoint is not None:
            self.trainer._restore_loop(self.checkpoint)


@functools.cache
def safe(trainer_class: type[Trainer]) -> type[Trainer]:
    """Return `trainer_class` with SafeCheckpoints mixed in, under the same name: `safe(SFTTrainer)(model=..., ...)`."""
    if issubclass(trainer_class, SafeCheckpoints):
        return trainer_class
    bases = (SafeCheckpoints,) if trainer_class is Trainer else (SafeCheckpoints, trainer_class)
    return type(trainer_class.__name__, bases, {"__doc__": trainer_class.__doc__, "__module__": __name__})


def _like(old: Any, new: Any) -> Any:
    """Return `new`, poured into `old` where both are dicts: trl appends to defaultdicts, JSON gives plain ones."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    merged = {key: _like(old.get(key), value) for key, value in new.items()}
    old.clear()
    old.update(merged)
    return old


def _versions() -> dict[str, str]:
    found = {}
    for name in ("llmrl", "torch", "transformers", "accelerate", "trl", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

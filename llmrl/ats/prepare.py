"""From options to a loaded base and the windows it will read: an adapter is merged, answers are sampled, rows are cut."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.ats.data import Row, Window, Windows, level_of
from llmrl.ats.extract import extract_features
from llmrl.ats.features import TokenFeatures
from llmrl.ats.options import CalibrateConfig
from llmrl.ats.splits import duplicate_rows, limit_windows
from llmrl.ats.windows import make_windows
from llmrl.base_model import BaseModel, context_length, is_adapter, load_base, merge_adapter
from llmrl.errors import UsageError
from llmrl.files import publish_folder, staging_folder
from llmrl.training.distributed import barrier, is_main_process
from llmrl.training.tracking import progress_bar

ANSWERS, MERGED = "answers", "merged-base"  # in the folder of a run that is not finished


@dataclass(frozen=True)
class Prepared:
    """What is read: all windows that were found, those that are used, what a figure is about, the sampled answers."""

    found: Windows
    windows: list[Window]
    level: str
    answers: dict[str, float] | None = None


def printer(config: CalibrateConfig) -> Any:
    """Return a print that is silent when quiet or not the main process."""
    quiet = config.quiet or not is_main_process()
    return lambda text: None if quiet else print(text, flush=True)


def open_base(config: CalibrateConfig, partial: Path, say: Any) -> BaseModel:
    """Load the base; an adapter is merged into its own first, as a checkpoint in `partial`.

    Raises:
        UsageError: an adapter without --merge or --fold; the folder has to hold the weights that the head is for.
    """
    name = str(config.model)
    if is_adapter(name):
        if not (config.merge or config.fold):
            raise UsageError(
                f"{name} is an adapter, and its head is one for the merged model: add --merge, which writes that model too"
            )
        merged = partial / MERGED
        if is_main_process() and not merged.is_dir():
            say(f"merging the adapter {name} into its base")
            partial.mkdir(parents=True, exist_ok=True)
            with staging_folder(merged) as staging:
                merge_adapter(Path(name).expanduser(), staging, dtype=config.dtype)
                publish_folder(staging, merged)
        barrier()
        name = str(merged)
    return load_base(name, dtype=config.dtype, device=config.device)


def select_windows(
    config: CalibrateConfig, rows: list[Row], base: BaseModel, say: Any, answers_in: Path | None = None
) -> Prepared:
    """Encode the rows, or let the model answer them, and keep at most `max_tokens`; say what was found, left out and kept.

    Args:
        config: the options.
        rows: from `read_rows`.
        base: the loaded base.
        say: prints a line.
        answers_in: the folder where finished answers are kept; None where the model gives none.
    """
    longest = _longest(config, base)
    answers = None
    if answers_in is not None:
        found, answers = _answer(config, rows, base, longest, answers_in)
        # of this run: one that goes on where another stopped has the same report
        backend, cached = answers.pop("backend"), answers.pop("cached")
        say(
            f"answers: {answers['answers']:,} sampled by {backend} ({cached:,} of them before), "
            f"{answers['accuracy']:.1%} right, {answers['mean_tokens']:.1f} tokens on average"
        )
    else:
        found = make_windows(rows, base.tokenizer, longest)
    windows = limit_windows(found.windows, config.max_tokens, config.seed)
    say(f"data: {found.rows} rows, {len(found.windows)} windows of at most {longest} tokens, {found.tokens:,} scored")
    line = excluded_line(found)
    if line:
        say(line)
    repeated, what = duplicate_rows(windows), "text" if answers is None else "question"
    if repeated:
        say(f"{repeated} rows repeat the {what} of another; each {what} is in one part of the split only")
    if len(windows) < len(found.windows):
        used = sum(sum(window.scored) for window in windows)
        say(f"using {used:,} of {found.tokens:,} tokens, spread over all files; --max_tokens takes more")
    return Prepared(found, windows, level_of(rows) if answers is None else "answer", answers)


def read_features(
    config: CalibrateConfig, base: BaseModel, windows: list[Window], cache_dir: Path, *, sequences: bool
) -> TokenFeatures:
    """Read the windows' features, those in `cache_dir` from there; `sequences` keeps the states of whole windows too."""
    with progress_bar("features", len(windows), unit="window", quiet=config.quiet) as advance:
        return extract_features(
            base.model,
            windows,
            batch_size=config.batch_size,
            cache_dir=cache_dir,
            fingerprint=f"{base.reference.weights} {base.model.dtype}",
            sequences=sequences,
            progress=advance,
        )


def excluded_line(found: Windows) -> str | None:
    """Return the sentence about rows that were left out, or None."""
    if not found.excluded:
        return None
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.excluded.items()))
    return f"excluded of {found.rows} rows: {reasons}"


def _longest(config: CalibrateConfig, base: BaseModel) -> int:
    limit = getattr(base.model.config, "max_position_embeddings", None)
    if limit and config.max_length and config.max_length > limit:
        raise UsageError(f"--max_length {config.max_length} is longer than the model's context of {limit}")
    return config.max_length or context_length(base.model, base.tokenizer)


def _answer(
    config: CalibrateConfig, rows: list[Row], base: BaseModel, longest: int, cache: Path
) -> tuple[Windows, dict[str, Any]]:
    # an engine needs more than torch, transformers and safetensors
    from llmrl.ats.on_policy import sample_answers
    from llmrl.rollout.backends import choose_backend
    from llmrl.rollout.model_facts import read_facts

    backend = config.rollout_backend
    if backend == "auto":
        backend, _ = choose_backend(read_facts(str(base.folder)))
    with (
        _engine(backend, config, base, longest) as engine,
        progress_bar("answers", config.samples * len(rows), unit="answer", quiet=config.quiet) as advance,
    ):
        sampled = sample_answers(
            rows,
            engine,
            cache,
            n=config.samples,
            temperature=0.0 if config.samples == 1 else 1.0,
            seed=config.seed,
            progress=advance,
        )
    return sampled.windows, {**sampled.summary(), "cached": sampled.cached, "backend": backend}


def _engine(backend: str, config: CalibrateConfig, base: BaseModel, longest: int) -> Any:
    if backend == "transformers":
        from llmrl.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(
            str(base.folder), loaded=base.model, batch_size=config.batch_size, max_model_len=longest
        )
    from llmrl.rollout.backends import open_engine

    dtype = str(base.model.dtype).removeprefix("torch.")
    return open_engine(str(base.folder), rollout_backend=backend, dtype=dtype, max_model_len=longest)


def remove_unfinished(partial: Path) -> None:
    """Remove `partial` unless something finished lies in it that the next run can use."""
    if not any(partial.glob("features-*")) and not (partial / ANSWERS).is_dir() and not (partial / MERGED).is_dir():
        shutil.rmtree(partial, ignore_errors=True)

"""`llmrl hindsight eval|logs`: a policy in an environment whose best return is known, and logs to learn one from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from llmrl.config import to_flat
from llmrl.errors import OutputError, UsageError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.hindsight.compare import check_same, paired_difference, read_report
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import charity_users
from llmrl.hindsight.options import EvalConfig, LogsConfig
from llmrl.hindsight.playing import ENVIRONMENTS, Environment, play, report_of
from llmrl.hindsight.policy import load_policy, open_policy, steering_of, value_config
from llmrl.hindsight.policy_folder import read_reads
from llmrl.hindsight.rerank import RerankEngine
from llmrl.hindsight.small_model import make_small_model
from llmrl.hindsight.users import open_user, user_side
from llmrl.jsonl import write_objects
from llmrl.rollout.protocols import Engine
from llmrl.training.run import write_run_files
from llmrl.types import SamplingConfig

# what a report repeats
_ASKED = (
    "policy",
    "env",
    "variant",
    "greedy",
    "temperature",
    "rerank",
    "rollout_backend",
    "user",
    "user_model",
    "seed",
)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Play episodes, write report.json, and return the report.

    Raises:
        UsageError: options that do not fit the policy or the environment.
        OutputError: the folder holds something.
        DataError: episodes failed; the others are kept, and the same call plays these again.
        EngineError: an engine died; likewise.
    """
    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    environment = ENVIRONMENTS[config.env]
    other = None if config.against is None else check_same(read_report(config.against), to_flat(config))
    reads = read_reads(config.policy)
    window = reads.window if config.window is None else config.window
    playing = folder.with_name(f"{folder.name}.playing")
    if config.overwrite:
        shutil.rmtree(playing, ignore_errors=True)
    with _world(config, environment) as environment, _engine(config, reads.backup) as engine:
        episodes = play(
            engine,
            environment,
            environment.rows(config.variant),
            config.episodes,
            SamplingConfig(temperature=0.0 if config.greedy else config.temperature, max_tokens=environment.tokens),
            playing,
            seed=config.seed,
            window=window,
            fingerprint=_fingerprint(config),
            progress=not config.quiet,
        )
    steered = None if config.rollout_backend == "server" else steering_of(config.policy, config.beta, config.support)
    beta, support = steered or (None, None)
    asked = {name: getattr(config, name) for name in _ASKED} | {"beta": beta, "support": support, "window": window}
    report = {**report_of(episodes, environment, scripted=config.user is None), **asked}
    if other is not None:
        report["against"] = {"policy": other["policy"], **paired_difference(report["returns"], other["returns"])}
    with staging_folder(folder) as staging:
        os.rename(playing, staging / "episodes")
        write_json(staging / "report.json", report)
        write_run_files(staging, to_flat(config))
        publish_folder(staging, folder)
    if not config.quiet:
        print(f"{summary_of(report)}\n{folder}", flush=True)
    return report


def _fingerprint(config: EvalConfig) -> str:
    """Return what tells these episodes from those of another policy, or of the same folder trained anew."""
    files = sorted(Path(config.policy).expanduser().rglob("*.safetensors"))
    identity = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    free = ("output_dir", "overwrite", "quiet", "against")
    options = {name: value for name, value in to_flat(config).items() if name not in free}
    return "sha256:" + hashlib.sha256(json.dumps([options, identity], default=str).encode()).hexdigest()[:32]


def summary_of(report: Mapping[str, Any]) -> str:
    """Return what a person reads of a report."""
    found, best, other = report["return"], report["optimum"], report.get("against")
    gap = "" if best is None else f"the best is {best:.3f}, {best - found['value']:.3f} more; "
    lines = [
        f"{report['env']}: return {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] over {report['episodes']} "
        f"episodes; {gap}"
        f"{report['invalid_share']:.1%} of {report['turns']} texts were no action"
    ]
    if report["context_share"]:
        lines += [f"{report['context_share']:.1%} of the episodes ended because the model's context was full"]
    if report.get("unheard_share"):
        lines += [f"{report['unheard_share']:.1%} of what the user said meant nothing"]
    if other is not None:
        lines += [
            f"{other['value']:+.3f} [{other['low']:+.3f}, {other['high']:+.3f}] against {other['policy']} on the same "
            f"episodes, p = {other['p']:.2g}"
        ]
    return "\n".join(lines)


def write_logs(config: LogsConfig) -> list[Dialogue]:
    """Write dialogues of an environment's scripted, mediocre agent, and the small model that was asked for.

    Raises:
        OutputError: a file or folder holds something.
    """
    path = Path(config.output).expanduser()
    if path.exists() and not config.overwrite:
        raise OutputError(f"--output {path} is there; --overwrite replaces it")
    folder = None if config.model_dir is None else check_output_dir(config.model_dir, overwrite=config.overwrite)
    environment = ENVIRONMENTS[config.env]
    module = environment.module
    options = environment.variant_option(config.variant)
    dialogues: list[Dialogue] = module.logs(config.count, config.seed, **options)
    if config.side == "user":
        dialogues = [user_side(one, charity_users.persona(one.provenance["row"]["type"])) for one in dialogues]
    if folder is not None:
        longest = 4 * sum(len(m.content.split()) + 2 for m in max(dialogues, key=lambda d: len(d.messages)).messages)
        make_small_model(
            dialogues, folder, layers=config.layers, width=config.width, context=max(256, longest), seed=config.seed
        )
    write_objects(path, [dialogue.to_json() for dialogue in dialogues])
    if not config.quiet and config.side == "user":
        print(f"{len(dialogues)} dialogues from the user's side\n{path}", flush=True)
    elif not config.quiet:
        mean = sum(dialogue.total for dialogue in dialogues) / len(dialogues)
        print(
            f"{len(dialogues)} dialogues, mean return {mean:.3f}; the best is {module.optimum():.3f}\n{path}",
            flush=True,
        )
    return dialogues


@contextmanager
def _engine(config: EvalConfig, backup: str) -> Iterator[Engine]:
    """Open the policy, and let it choose among its samples where that was asked for."""
    if config.rerank is not None and value_config(config.policy) is None:
        raise UsageError(f"--rerank chooses by values, and {config.policy} has none: expected a folder of ilql or mc")
    options = {} if config.dtype == "auto" else {"dtype": config.dtype}
    with open_policy(
        config.policy,
        beta=config.beta,
        support=config.support,
        rollout_backend=config.rollout_backend,
        server_url=config.server_url,
        **options,
    ) as engine:
        if config.rerank is None:
            yield engine
        else:
            yield RerankEngine(engine, load_policy(config.policy, dtype=config.dtype), config.rerank, backup)


@contextmanager
def _world(config: EvalConfig, environment: Environment) -> Iterator[Environment]:
    """Give the environment the user that was asked for."""
    if config.user is None:
        yield environment
        return
    with open_user(config.user, config.user_model, config.user_key_env, environment.tokens) as chat:
        make = partial(charity_users.CharityTalk, chat=chat, told=config.user_model is not None)
        yield replace(environment, make=make)

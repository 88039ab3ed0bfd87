"""`llmrl hindsight eval|logs`: a policy in an environment whose best return is known, and logs to learn one from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llmrl.config import to_flat
from llmrl.errors import DataError, OutputError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.hindsight.compare import check_same, paired_difference, read_report
from llmrl.hindsight.dialogues import Dialogue
from llmrl.hindsight.envs import charity, charity_users, maze, twenty_questions
from llmrl.hindsight.options import EvalConfig, LogsConfig
from llmrl.hindsight.policy import load_policy, open_policy, value_config
from llmrl.hindsight.policy_folder import window_of
from llmrl.hindsight.rerank import RerankEngine
from llmrl.hindsight.small_model import make_small_model
from llmrl.hindsight.users import open_user, user_side
from llmrl.intervals import draw_means, interval
from llmrl.jsonl import write_objects
from llmrl.rollout.episodes import run_episodes
from llmrl.rollout.protocols import Engine
from llmrl.rollout.shards import read_shards
from llmrl.training.run import write_run_files
from llmrl.types import Episode, SamplingConfig


@dataclass(frozen=True)
class Environment:
    """An environment by name.

    Attributes:
        module: has `rows` and `optimum`.
        make: its class.
        turns: most turns of an episode, by its own rules.
        tokens: most tokens of an answer.
    """

    module: ModuleType
    make: Any
    turns: int
    tokens: int

    def rows(self, variant: str | None) -> list[dict[str, Any]]:
        """Return the rows that are played; `variant` is the choice of words or of observation."""
        return list(self.module.rows(variant) if variant else self.module.rows())


ENVIRONMENTS = {
    "maze": Environment(maze, maze.Maze, maze.CAP, 16),
    "charity": Environment(charity, charity.Charity, charity.TURNS, 48),
    "twenty-questions": Environment(twenty_questions, twenty_questions.TwentyQuestions, twenty_questions.CAP, 32),
}
BOOTSTRAP = 2000
_ASKED = ("policy", "env", "variant", "support", "greedy", "rerank", "user", "seed")  # what a report repeats


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Play episodes, write report.json, and return the report.

    Raises:
        UsageError: options that do not fit the policy or the environment.
        OutputError: the folder holds something.
        DataError: an episode failed.
    """
    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    environment = ENVIRONMENTS[config.env]
    rows = environment.rows(config.variant)
    sampling = SamplingConfig(temperature=0.0 if config.greedy else config.temperature, max_tokens=environment.tokens)
    other = None if config.against is None else check_same(read_report(config.against), to_flat(config))
    window = window_of(config.policy) if config.window is None else config.window
    with (
        _world(config, environment) as environment,
        _engine(config) as engine,
        staging_folder(folder) as staging,
    ):
        episodes = play(
            engine,
            environment,
            rows,
            config.episodes,
            sampling,
            staging / "episodes",
            seed=config.seed,
            window=window,
            progress=not config.quiet,
        )
        asked = {name: getattr(config, name) for name in _ASKED}
        report = {**report_of(episodes, environment), **asked, "beta": beta_of(config), "window": window}
        if other is not None:
            report["against"] = {"policy": other["policy"], **paired_difference(report["returns"], other["returns"])}
        write_json(staging / "report.json", report)
        write_run_files(staging, to_flat(config))
        publish_folder(staging, folder, stale=())
    if not config.quiet:
        print(f"{summary_of(report)}\n{folder}", flush=True)
    return report


def summary_of(report: Mapping[str, Any]) -> str:
    """Return what a person reads of a report."""
    found, best, other = report["return"], report["optimum"], report.get("against")
    lines = [
        f"{report['env']}: return {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}] over {report['episodes']} "
        f"episodes; the best is {best:.3f}, {best - found['value']:.3f} more; {report['invalid_share']:.1%} of "
        f"{report['turns']} texts were no action"
    ]
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
    module = ENVIRONMENTS[config.env].module
    options = {} if config.variant is None or config.env != "charity" else {"words": config.variant}
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
def _engine(config: EvalConfig) -> Iterator[Engine]:
    """Open the policy, and let it choose among its samples where that was asked for."""
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
            values = load_policy(config.policy, dtype=config.dtype)
            yield RerankEngine(engine, values, config.rerank, config.rerank_by)


@contextmanager
def _world(config: EvalConfig, environment: Environment) -> Iterator[Environment]:
    """Give the environment the user that was asked for."""
    if config.user is None:
        yield environment
        return
    with open_user(config.user, config.user_model, config.user_key_env, environment.tokens) as chat:
        make = partial(charity_users.CharityTalk, chat=chat, told=config.user_model is not None)
        yield replace(environment, make=make)


def play(
    engine: Engine,
    environment: Environment,
    rows: Sequence[Mapping[str, Any]],
    count: int,
    sampling: SamplingConfig,
    folder: Path,
    *,
    seed: int,
    window: int | None = None,
    progress: bool = False,
) -> list[Episode]:
    """Play `count` episodes, the rows in turn, and return them in order; the luck of an episode is that of (seed, row, number).

    `window`: exchanges that the policy reads, see `run_episodes`.

    Raises:
        DataError: an episode failed.
    """
    numbered = [{**rows[i % len(rows)], "id": f"{rows[i % len(rows)]['id']}-{i // len(rows)}"} for i in range(count)]
    run_episodes(
        engine,
        numbered,
        environment.make,
        sampling,
        output=folder,
        seed=seed,
        max_turns=environment.turns,
        window=window,
        progress=progress,
    )
    stored = read_shards(folder)
    episodes = [Episode.from_json(stored[(row["id"], 0)]) for row in numbered]
    failed = [episode for episode in episodes if episode.error]
    if failed:
        raise DataError(f"{len(failed)} of {count} episodes failed; the first, {failed[0].row_id}: {failed[0].error}")
    return episodes


def report_of(episodes: Sequence[Episode], environment: Environment) -> dict[str, Any]:
    """Return the mean return with its 95% interval over episodes, the best there is, and what was no action."""
    returns = np.array([episode.returns.get("reward", 0.0) for episode in episodes])
    steps = [step for episode in episodes for step in episode.metadata.get("steps", [])]
    means = draw_means(returns[:, None], BOOTSTRAP, 0)[:, 0]
    return {
        "return": interval(float(returns.mean()), means, None, basic=False),
        "optimum": float(environment.module.optimum()),
        "invalid_share": sum(bool(step.get("invalid")) for step in steps) / len(steps),
        "off_template_share": sum(bool(step.get("off_template")) for step in steps) / len(steps),
        "truncated_share": sum(episode.truncated for episode in episodes) / len(episodes),
        "episodes": len(episodes),
        "turns": len(steps),
        "returns": returns.tolist(),
    }


def beta_of(config: EvalConfig) -> float | None:
    """Return the beta that was played; None of a policy without values, or of a server."""
    if config.beta is not None:
        return config.beta
    head = value_config(config.policy)
    return None if head is None else next(iter(head.heads.values())).beta

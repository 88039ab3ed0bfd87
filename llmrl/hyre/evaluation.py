"""`llmrl hyre eval`: an ensemble on users it was not trained on, beside every other way to use their labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmrl.config import to_flat
from llmrl.errors import DataError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json, write_text
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.evaluate import UserPairs, keys_of, table
from llmrl.hyre.options import EvalConfig
from llmrl.hyre.pairs import Pair, read_pairs
from llmrl.hyre.plots import draw_plots
from llmrl.hyre.reliability import calibration
from llmrl.hyre.report import report_markdown
from llmrl.hyre.run import refuse_inputs
from llmrl.reward_heads import RewardHead, build_reward_head
from llmrl.training.run import write_run_files
from llmrl.training.tracking import progress_bar


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluate as the options say, write report.json, report.md and plots, and return the report.

    Raises:
        DataError: pairs without users, or users with too few pairs.
    """
    refuse_inputs(Path(config.output_dir).expanduser(), [config.model])
    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    pairs = read_pairs(config.pairs)
    ensemble = load_ensemble(config.model)
    cache = None if config.cache_dir is None else Path(config.cache_dir).expanduser()
    chosen, rejected = ensemble.features(pairs, cache_dir=cache, quiet=config.quiet)
    users = users_of(ensemble, pairs, chosen, rejected)
    with progress_bar("users", len(users), unit="user", quiet=config.quiet) as advance:
        report = table(
            users,
            sizes=config.sizes,
            draws=config.draws,
            bootstrap=config.bootstrap_draws,
            seed=config.seed,
            advance=advance,
        )
    report["model"] = {
        "fingerprint": ensemble.fingerprint,
        "heads": ensemble.heads,
        "warning": ensemble.facts.get("warning"),
    }
    users = [user for user in users if user.name not in report["users_left_out"]]
    report["calibration"] = calibration(users, report["sizes"], config.draws, config.seed)
    report["heat_map"] = heat_map(users)
    text = report_markdown(report)
    with staging_folder(folder) as staging:
        write_json(staging / "report.json", report)
        write_text(staging / "report.md", text)
        draw_plots(staging / "plots", report, users, ensemble.names)
        write_run_files(staging, to_flat(config))
        publish_folder(staging, folder, stale=())
    if not config.quiet:
        print(f"{text}\n{folder}", flush=True)
    return report


def users_of(ensemble: RewardEnsemble, pairs: Sequence[Pair], chosen: Tensor, rejected: Tensor) -> list[UserPairs]:
    """Return one user a group of the pairs; pairs without a group are one user's.

    Raises:
        DataError: a score that is not finite.
    """
    margins = ensemble.margins(chosen, rejected)
    if not np.isfinite(margins).all():
        raise DataError("a head gave a score that is not a number; check the base model and its dtype")
    scale = float(ensemble.facts.get("feature_scale", 1.0))
    features = (chosen - rejected).double().numpy() * scale
    starts = starts_of(ensemble, chosen, rejected, margins)
    groups = np.array([pair.group for pair in pairs])
    found = []
    for name in sorted(set(groups.tolist())):
        rows = np.flatnonzero(groups == name)
        keys = keys_of([pairs[i] for i in rows.tolist()])
        found.append(
            UserPairs(name, margins[rows], features[rows], {key: start[rows] for key, start in starts.items()}, keys)
        )
    return found


def starts_of(
    ensemble: RewardEnsemble, chosen: Tensor, rejected: Tensor, margins: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Return margins `[N]` of the heads that need no label: "mean" of the heads turned the right way, "single", "average"."""
    signs = np.array(ensemble.signs or (1,) * ensemble.heads, float)

    def of(head: RewardHead) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            return (head(chosen) - head(rejected)).double().numpy()[:, 0]

    found = {"mean": (margins * signs).mean(1), "average": of(averaged(ensemble.head))}
    return found if ensemble.single is None else {**found, "single": of(ensemble.single)}


def averaged(head: RewardHead) -> RewardHead:
    """Return one head whose parameters are the means of those of all K."""
    from dataclasses import replace

    made = build_reward_head(replace(head.spec, outputs=1))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            of = getattr(head, name)
            parameter.copy_(of if name == "shared_weight" else of.mean(0, keepdim=True))
    return made


def heat_map(users: Sequence[UserPairs]) -> dict[str, list[float]]:
    """Return the accuracy of each head, `[K]`, on all pairs of each user."""
    from llmrl.hyre.metrics import accuracy

    return {user.name: np.round(accuracy(user.margins), 4).tolist() for user in users}

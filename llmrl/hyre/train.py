"""`llmrl hyre train`: pairs in, a reward ensemble out, with what it is worth and how much its heads differ."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llmrl.config import to_flat
from llmrl.errors import DataError, UsageError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.hyre.diversity import HeadPlan, plan_heads
from llmrl.hyre.em import em_plan
from llmrl.hyre.ensemble import RewardEnsemble
from llmrl.hyre.features import CausalFeatures, Features, embed_pairs, open_features
from llmrl.hyre.fit import FitSettings, HeadShape, Pairs, feature_scale, fit_heads
from llmrl.hyre.metrics import accuracy, collapse_warning, disagreement
from llmrl.hyre.options import TrainConfig
from llmrl.hyre.pairs import PROBES, Pair, one_prompt, read_pairs
from llmrl.training.distributed import is_main_process
from llmrl.training.run import write_model_card, write_run_files
from llmrl.training.tracking import progress_bar

STALE = ("checkpoint-*", "metrics.jsonl", "timings.jsonl")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train an ensemble as the options say, write its folder, and return the report.

    Raises:
        DataError: pairs that cannot be used.
        UsageError: options that do not fit the pairs or the base.
        OutputError: the folder holds something.
    """
    started = time.monotonic()
    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    tuned = config.tuning != "frozen"
    if tuned:
        from llmrl.hyre.tune import check_start, work_folder
        from llmrl.hyre.tune_settings import settings_of
        from llmrl.hyre.tuned_folder import move_base

        check_start(work_folder(folder), settings_of(config), config.resume_from_checkpoint, overwrite=config.overwrite)
    pairs = read_pairs(config.pairs)
    base = open_features(
        config.base,
        max_length=config.max_length,
        batch_size=config.batch_size,
        dtype=weights_dtype(config.dtype, config.tuning),
        revision=config.revision,
    )
    if tuned and not isinstance(base, CausalFeatures):
        raise UsageError(
            f"--tuning {config.tuning} trains a causal LM, and {base.name} is a sentence encoder: use --tuning frozen"
        )
    reads = reads_of(config.reads, pairs)
    cache = _cache_of(config)
    chosen, rejected = embed_pairs(base, pairs, reads, cache_dir=cache, quiet=config.quiet)
    held = held_out_rows(pairs, config.held_out, config.seed)
    kept = torch.from_numpy(~held)
    rows = [pair for pair, out in zip(pairs, held.tolist(), strict=True) if not out]
    examples = Pairs(chosen[kept], rejected[kept], margins_of(rows))
    plan = plan_for(config, rows, examples)
    shape = HeadShape(config.kind, config.hidden, config.prior, config.prior_scale)
    settings = FitSettings(config.l2, config.steps, config.lr, center=config.center, seed=config.seed)
    name = base.name
    if tuned:
        trained = _train_base(config, base, rows, reads, examples, plan, shape, settings, folder)
        if trained is None:  # the first process writes
            return {}
        head, base = trained.head, trained.base
        chosen, rejected = embed_pairs(base, pairs, reads, quiet=config.quiet)
        examples = Pairs(chosen[kept], rejected[kept], examples.margin)
    else:
        with progress_bar("heads", config.steps, unit="step", quiet=config.quiet) as advance:
            head = fit_heads(examples, plan, shape, settings, advance=advance)
    ensemble = RewardEnsemble(
        head,
        "base" if tuned else name,
        base.kind,
        base.identity,
        reads,
        config.max_length,
        None if tuned else config.revision,
        plan.names,
        tuple(int(sign) for sign in plan.signs),
        fit_heads(examples, plan_heads("none", 1, len(rows)), HeadShape(), settings),
        dtype="auto" if tuned else config.dtype,
        _base=base,
    )
    report = report_of(ensemble, pairs, chosen, rejected, held, plan) | {"base": name}
    report["feature_scale"] = float(feature_scale(examples)[1][0])
    report["texts_cut"] = int(getattr(base, "cut", 0))
    report["groups_unused"] = len({p.group for p in rows} - {rows[i].group for i in np.flatnonzero(plan.rows.any(0))})
    if base.kind == "encoder":
        report["probes"] = _probes(ensemble, reads)
    ensemble.facts = {name: value for name, value in report.items() if name not in ("head_accuracy", "groups_unused")}
    with staging_folder(folder) as staging:
        if tuned:
            move_base(work_folder(folder), staging, folder)
        ensemble.save(staging)
        write_json(staging / "report.json", report)
        write_run_files(staging, to_flat(config))
        _card(staging, ensemble, report)
        publish_folder(staging, folder, stale=STALE)
    if tuned:
        shutil.rmtree(work_folder(folder))
    _say(config, ensemble, report, folder, time.monotonic() - started)
    return report


def _probes(ensemble: RewardEnsemble, reads: str) -> list[dict[str, Any]]:
    """Return texts and scores by which a client knows a server of the encoder."""
    texts = [ensemble.base.text(prompt if reads == "dialogue" else (), answer) for prompt, answer in PROBES]
    with torch.inference_mode():
        scores = ensemble.head(ensemble.base.embed(texts)).double().tolist()
    return [{"text": text, "scores": row} for text, row in zip(texts, scores, strict=True)]


def weights_dtype(dtype: str, tuning: str) -> str:
    """Return the type in which the base's weights are held, of `--dtype`.

    "auto" is the checkpoint's own; where the base is trained on a CPU, or as a whole, it is float32: a step of 1e-4 is lost in
    a bfloat16 weight.
    """
    if dtype != "auto" or tuning == "frozen" or (tuning == "lora" and torch.cuda.is_available()):
        return dtype
    return "float32"


def _cache_of(config: TrainConfig) -> Path | None:
    """Return where features are kept; one process keeps them."""
    return Path(config.cache_dir).expanduser() if config.cache_dir is not None and is_main_process() else None


def _train_base(
    config: TrainConfig,
    base: Features,
    rows: list[Pair],
    reads: str,
    examples: Pairs,
    plan: HeadPlan,
    shape: HeadShape,
    settings: FitSettings,
    folder: Path,
) -> RewardEnsemble | None:
    """Train base and heads in a folder beside `folder`; return what was saved there, None on all processes but the first."""
    from llmrl.hyre.tune import train_backbone, work_folder
    from llmrl.hyre.tune_settings import settings_of

    assert isinstance(base, CausalFeatures)
    return train_backbone(
        base,
        rows,
        reads,
        examples,
        plan,
        work_folder(folder),
        shape=shape,
        fit=settings,
        settings=settings_of(config),
        resume=config.resume_from_checkpoint,
        overwrite=config.overwrite,
    )


def reads_of(option: str, pairs: list[Pair]) -> str:
    """Return "answer" or "dialogue": by itself the prompt is read unless all pairs share one."""
    if option != "auto":
        return option
    return "answer" if one_prompt(pairs) else "dialogue"


def held_out_rows(pairs: list[Pair], share: float, seed: int) -> NDArray[np.bool_]:
    """Return which rows only measure, `[N]`: whole prompts where there are several, else rows (whose texts may recur)."""
    keys = [pair.where for pair in pairs] if one_prompt(pairs) else [str(pair.prompt) for pair in pairs]
    names = sorted(set(keys))
    rng = np.random.default_rng([seed, 1])
    count = round(share * len(names))
    out = {names[i] for i in rng.permutation(len(names))[:count]} if count < len(names) else set()
    left = {pair.group for pair, key in zip(pairs, keys, strict=True) if key not in out}
    out -= {
        key for pair, key in zip(pairs, keys, strict=True) if pair.group not in left
    }  # a group is never held out whole
    return np.array([key in out for key in keys])


def margins_of(pairs: list[Pair]) -> torch.Tensor | None:
    """Return `[N]` margins, or None when all are 0."""
    if not any(pair.margin for pair in pairs):
        return None
    return torch.tensor([pair.margin for pair in pairs], dtype=torch.float32)


def _recipe_of(groups: list[str], heads: int) -> str:
    """Return what suits: a group a head; where there are more groups, groups that agree share one."""
    counts = Counter(groups)
    if len(counts) < 2:
        return "cluster"
    return "em" if len(counts) > heads and min(counts.values()) > 1 else "group"


def plan_for(config: TrainConfig, pairs: list[Pair], examples: Pairs) -> HeadPlan:
    """Return the diversity plan that the options and the pairs ask for."""
    groups = [pair.group for pair in pairs]
    if config.diversity == "auto":
        recipe = "none" if config.heads == 1 else _recipe_of(groups, config.heads)
    else:
        recipe = config.diversity
    known = set(groups) - {""}
    if (recipe in ("group", "mixture") and len(known) < 2) or (
        recipe in ("group", "mixture", "em") and known and "" in groups
    ):
        nameless = next((pair.where for pair in pairs if not pair.group), "")
        what = f"{nameless} has none" if nameless else f"all rows say {groups[0]!r}"
        raise DataError(
            f"--diversity {recipe} needs two or more groups and one on every row: {what}; or use --diversity cluster"
        )
    if recipe == "em":
        settings = FitSettings(config.l2)
        return em_plan(
            examples, config.heads, groups=groups if len(known) > 1 else None, settings=settings, seed=config.seed
        )
    return plan_heads(
        recipe,
        config.heads,
        len(pairs),
        groups=groups if recipe in ("group", "mixture") else None,
        features=((examples.chosen + examples.rejected) / 2).numpy() if recipe == "cluster" else None,
        flip=config.flip,
        seed=config.seed,
    )


def report_of(
    ensemble: RewardEnsemble,
    pairs: list[Pair],
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    held: NDArray[np.bool_],
    plan: HeadPlan,
) -> dict[str, Any]:
    """Return accuracies and disagreement on the held-out pairs (on all where none are held out)."""
    rows = held if held.any() else np.ones(len(held), bool)
    margins = ensemble.margins(chosen[torch.from_numpy(rows)], rejected[torch.from_numpy(rows)])
    share = disagreement(margins)
    found = accuracy(margins)
    return {
        "pairs": len(pairs),
        "groups": len({pair.group for pair in pairs if pair.group}),
        "heads": ensemble.heads,
        "base": ensemble.base_name,
        "base_kind": ensemble.base_kind,
        "reads": ensemble.reads,
        "measured_on": {"pairs": int(rows.sum()), "held_out": bool(held.any())},
        "accuracy": {
            "uniform": float(accuracy(margins.mean(1))),
            "best_head": float(found.max()),
            "mean_head": float(found.mean()),
        },
        "disagreement": share,
        "warning": collapse_warning(share, ensemble.heads, "held-out" if held.any() else "training"),
        "turned_heads": int((plan.signs < 0).sum()),
        "head_accuracy": found.tolist(),
    }


def _card(folder: Path, ensemble: RewardEnsemble, report: dict[str, Any]) -> None:
    name = folder.name.strip(".").removesuffix(".tmp")
    summary = (
        f"{report['heads']} {ensemble.head.spec.architecture} heads on a {report['base_kind']}, trained on {report['pairs']} "
        f"pairs. Accuracy of the uniform ensemble on {report['measured_on']['pairs']} pairs: "
        f"{report['accuracy']['uniform']:.3f}; two heads disagree on {report['disagreement']:.1%} of them."
    )
    body = f"""
## Use

    llmrl hyre adapt --model {name} --pairs LABELS.jsonl --output user.json
    llmrl hyre score --model {name} --user user.json --pairs PAIRS.jsonl --output scores.jsonl
"""
    write_model_card(folder, title="Reward ensemble", base_model=report["base"], summary=summary, body=body)


def _say(config: TrainConfig, ensemble: RewardEnsemble, report: dict[str, Any], folder: Path, seconds: float) -> None:
    if report["warning"]:
        print(f"warning: {report['warning']}", file=sys.stderr, flush=True)
    if report["groups_unused"]:
        print(
            f"warning: {report['groups_unused']} of {report['groups']} groups have no head and are not learnt from: ask for "
            "more --heads, or use --diversity em, where groups share heads",
            file=sys.stderr,
            flush=True,
        )
    if config.quiet:
        return
    where = "held-out pairs" if report["measured_on"]["held_out"] else "the training pairs"
    print(
        f"{report['heads']} heads on {report['pairs']} pairs of {max(report['groups'], 1)} group(s), reading the "
        f"{report['reads']}, in {seconds:.0f} s\n{report['measured_on']['pairs']} {where}: uniform ensemble right on "
        f"{report['accuracy']['uniform']:.1%}, best head {report['accuracy']['best_head']:.1%}; two heads disagree on "
        f"{report['disagreement']:.1%}\n{folder}",
        flush=True,
    )

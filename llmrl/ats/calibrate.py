"""`llmrl calibrate`: features once, every method on them, the best one saved so that transformers and vLLM open it.

Order of work, so that a mistake costs seconds and not a run: options, data, output folder, model, windows (with
`--on_policy` the model's own answers), features (both cached, resumable), fits, scores, saving into a staging folder, a
reload from it that must agree with the base, and only then the rename to `--output_dir`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from llmrl._version import __version__
from llmrl.ats.answer_level import check_outcomes
from llmrl.ats.data import Window, read_rows
from llmrl.ats.evaluate import SELECTED_BY, SeedResult, fit_and_score
from llmrl.ats.features import TokenFeatures
from llmrl.ats.fold import check_foldable, is_folded
from llmrl.ats.metrics import MIN_CLUSTERS, clusters_of
from llmrl.ats.options import ALL, AUTO, PAPER, TRANSFORMER, CalibrateConfig
from llmrl.ats.output_layer import OutputLayer
from llmrl.ats.plots import reliability_diagram
from llmrl.ats.prepare import (
    ANSWERS,
    Prepared,
    open_base,
    printer,
    read_features,
    remove_unfinished,
    select_windows,
)
from llmrl.ats.report import markdown_table, scope, seeds_table, sentences
from llmrl.ats.save import greedy_prompts, save_and_check
from llmrl.ats.splits import Split, split_windows
from llmrl.base_model import BaseModel
from llmrl.errors import OutputError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json, write_text
from llmrl.heads import HEADS_FILE
from llmrl.logits_heads import TemperatureHead
from llmrl.training.distributed import barrier, check_processes, is_main_process, join_processes
from llmrl.training.run import write_model_card
from llmrl.training.tracking import TIMINGS_FILE, MetricsLog, check_tracker, progress_bar
from llmrl.vllm_compat import check_versions, vllm_architectures, vllm_build

# of an earlier run into the same folder: would be read as part of the new one
_STALE = ("*.safetensors", "*.safetensors.index.json", "modeling_llmrl.py", "verify.json")


def calibrate(config: CalibrateConfig) -> dict[str, Any]:
    """Calibrate a model and return the report that is also written to `output_dir/report.json`.

    Raises:
        LlmrlError: any refusal; nothing is left in `output_dir` then, finished features stay in `output_dir`.partial.
    """
    check_versions(("torch", "transformers", "safetensors"))
    check_tracker(config.report_to)
    say = printer(config)
    join_processes()
    check_processes(announce=not config.quiet)
    output_dir = _check_output(config)
    rows = read_rows(config.data)
    partial = output_dir.with_name(output_dir.name + ".partial")
    if config.overwrite and is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
    barrier()
    base = open_base(config, partial, say)
    if config.fold:
        check_foldable(base.model)
    timings: list[dict[str, Any]] = []
    start = perf_counter()
    prepared = select_windows(config, rows, base, say, partial / ANSWERS if config.on_policy else None)
    windows = prepared.windows
    if config.on_policy:
        timings.append({"phase": "answers", "seconds": perf_counter() - start})
    splits = _splits(config, windows, say)  # too little data is known before the long part
    start = perf_counter()
    try:
        features = read_features(config, base, windows, partial, sequences=config.needs_sequences)
    finally:
        if is_main_process():
            remove_unfinished(partial)
    timings.append({"phase": "features", "seconds": perf_counter() - start})
    if not is_main_process():  # the fits take seconds: one process does them
        return {}
    if prepared.level == "answer":
        for split in splits.values():
            check_outcomes(features.of_windows(split.fit).correct.tolist())
    with staging_folder(output_dir) as staging:
        (staging / "plots").mkdir()
        log = MetricsLog(staging / "metrics.jsonl", config.report_to, staging)
        seeds = _fit_seeds(config, features, splits, base, log, timings)
        log.close()
        write_text(staging / TIMINGS_FILE, "".join(json.dumps(row) + "\n" for row in timings))
        report = _report(config, base, prepared, seeds)
        head = seeds[0].heads[report["selected"]]
        prompts = greedy_prompts(windows, seeds[0].test_windows)
        save_and_check(staging, config, base, head, report, prompts)
        write_json(staging / "report.json", report)
        _write_extras(staging, config, report)
        publish_folder(staging, output_dir, stale=_STALE)
    shutil.rmtree(partial, ignore_errors=True)
    _show(config, report, say)
    return report


def _check_output(config: CalibrateConfig) -> Path:
    wanted = Path(str(config.output_dir)).expanduser()
    if config.resume_from_checkpoint and not config.overwrite and (wanted / "report.json").is_file():
        raise OutputError(f"{wanted} is complete, nothing to resume; --overwrite runs it again")
    output_dir = check_output_dir(wanted, overwrite=config.overwrite)
    model = Path(str(config.model)).expanduser()
    if model.exists():
        here, there = output_dir.resolve(), model.resolve()
        if here == there or here in there.parents:
            raise OutputError(f"--output_dir {output_dir} holds the base model {config.model}; name another folder")
    own = (output_dir / HEADS_FILE).is_file() or is_folded(output_dir)
    if any(output_dir.glob("*.safetensors")) and not own:
        raise OutputError(f"--output_dir {output_dir} holds a model that llmrl did not write; name another folder")
    return output_dir


def _splits(config: CalibrateConfig, windows: list[Window], say: Any) -> dict[int, Split]:
    """Return the split of each seed; say where there is little to test on, refuse answers that are all right or all wrong."""
    splits = {seed: split_windows(windows, seed) for seed in range(config.seed, config.seed + config.num_seeds)}
    test = [windows[i] for i in splits[config.seed].test]
    count, what = (len({w.prompt for w in test}), "questions") if config.on_policy else (len(test), "windows")
    if count < MIN_CLUSTERS:
        mend = "more data" if config.on_policy else "more data, or a smaller --max_length,"
        say(f"only {count} {what} to test on: intervals are rough; {mend} mends it")
    if config.on_policy:
        for split in splits.values():
            check_outcomes([bool(windows[i].grade) for i in split.fit])
    return splits


def _fit_seeds(
    config: CalibrateConfig,
    features: TokenFeatures,
    splits: dict[int, Split],
    base: BaseModel,
    log: MetricsLog,
    timings: list[dict[str, Any]],
) -> list[SeedResult]:
    layer, methods = OutputLayer.of(base.model), config.fitted_methods()
    results = []
    total = config.num_seeds * len(methods)
    with progress_bar("fits", total, unit="fit", quiet=config.quiet) as advance:
        for seed, split in splits.items():

            def on_epoch(method: str, record: Any, seed: int = seed) -> None:
                log.write({"seed": seed, "method": method, **asdict(record)}, step=record.epoch)

            def on_fit(method: str, seconds: float, seed: int = seed) -> None:
                timings.append({"phase": "fit", "seed": seed, "method": method, "seconds": seconds})

            results.append(
                fit_and_score(
                    features,
                    split,
                    layer,
                    methods=methods,
                    loss=config.fitted_loss,
                    seed=seed,
                    draws=config.bootstrap_draws,
                    config=base.model.config,
                    aggregate=config.answer_confidence,
                    on_epoch=on_epoch,
                    on_fit=on_fit,
                )
            )
            advance(len(results) * len(methods), total)
    return results


def _report(config: CalibrateConfig, base: BaseModel, prepared: Prepared, seeds: list[SeedResult]) -> dict[str, Any]:
    first, found, windows = seeds[0], prepared.found, prepared.windows
    named = config.method not in (AUTO, ALL)
    # a method that was asked for by name is the one that is saved; `best_on_validation` tells what auto would have taken
    selected = (TRANSFORMER if config.method == PAPER else config.method) if named else first.best
    return {
        "level": prepared.level,
        "methods": first.methods,
        "selected": selected,
        "selected_by": "--method" if named else SELECTED_BY,
        "best_on_validation": first.best,
        "greedy_identical": None,
        "excluded": dict(found.excluded),
        "tokens": first.tokens,
        "differences": first.differences,
        "validation": first.validation,
        "reliability": first.reliability,
        "temperatures": {
            name: round(1 / float(head.bias.exp()), 6)
            for name, head in first.heads.items()
            if isinstance(head, TemperatureHead) and head.weight is None
        },
        "seeds": {
            str(r.seed): {"methods": r.methods, "differences": r.differences, "tokens": r.tokens, "best": r.best}
            for r in seeds
        },
        "loss": config.fitted_loss,
        "fits": first.fits,
        "answers": prepared.answers,
        "answer_confidence": config.answer_confidence if config.on_policy else None,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "rows": found.rows,
        "windows": len(windows),
        "max_length": max(len(window.token_ids) for window in windows),
        "unused_tokens": found.tokens - sum(sum(window.scored) for window in windows),
        "bootstrap": {"draws": config.bootstrap_draws, "unit": _bootstrap_unit(first), "interval": 0.95},
        "serving": {"vllm": _vllm_status(base)},
        "base": asdict(replace(base.reference, model=Path(base.reference.model).name)),
        "llmrl_version": __version__,
    }


def _bootstrap_unit(result: SeedResult) -> str:
    scored = next(iter(result.predictions["test"].values()))
    return clusters_of(scored.window, questions=scored.questions)[1]


def _vllm_status(base: BaseModel) -> str:
    if vllm_build() is None:
        return "not installed"
    known = base.architecture in vllm_architectures()
    return "architecture known" if known else f"vLLM has no {base.architecture}: it will not serve this folder"


def _write_extras(staging: Path, config: CalibrateConfig, report: dict[str, Any]) -> None:
    name = report["base"]["model"]
    title = f"{name}: confidence on {report['tokens']['test']:,} held-out {report['level']}s"
    drawn = reliability_diagram(staging / "plots" / "reliability.png", report, title)
    picture = "\n\n![reliability diagram](plots/reliability.png)" if drawn else ""
    importing = "" if config.fold else "import llmrl\n"
    serving = "Any server takes it as it is." if config.fold else "`llmrl serve DIR` serves it with vLLM."
    if config.with_code:
        serving += " Without llmrl: `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`."
    text = "is the base model's" if report["greedy_identical"] else "can differ from the base model's"
    fitted_on = scope(report["level"], report["answer_confidence"])
    caution = f" It was {fitted_on}." if fitted_on else ""
    write_model_card(
        staging,
        title=f"{name}, calibrated",
        base_model=str(config.model),
        summary=(
            "The next-token probabilities of the base model, calibrated after training with "
            f"`{report['selected']}`. Greedy text {text}.{caution}"
        ),
        body=(
            f"## Use\n\n```python\n{importing}from transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("DIR")\n```\n\n{serving}\n\n'
            f"## Held-out calibration\n\n{report['tokens']['test']:,} {report['level']}s that nothing was fitted or chosen on; "
            "95% "
            f"bootstrap intervals; * marks the best of a column.\n\n{markdown_table(report['methods'])}{picture}\n"
        ),
        tags=["calibration"],
    )


def _show(config: CalibrateConfig, report: dict[str, Any], say: Any) -> None:
    tokens, unit, output_dir = report["tokens"], report["level"], Path(str(config.output_dir))
    say(f"\nheld-out test slice: {tokens['test']:,} {unit}s (fitted on {tokens['fit']:,}); 95% intervals\n")
    say(markdown_table(report["methods"]))
    if len(report["seeds"]) > 1:
        say(f"\nevery seed (another split each)\n\n{seeds_table(report['seeds'])}")
    say("")
    for line in sentences(report):
        say(f"- {line}")
    if report["best_on_validation"] != report["selected"]:
        say(f"- on validation {report['best_on_validation']} had the lower Brier score than {report['selected']}")
    plot = output_dir / "plots" / "reliability.png"
    same = "yes" if report["greedy_identical"] else "no"
    say(f"\nselected: {report['selected']} (by {report['selected_by']}); greedy text identical to the base: {same}")
    fitted_on = scope(report["level"], report["answer_confidence"])
    if fitted_on:
        say(fitted_on)
    say(f"saved: {output_dir}" + (f"; plot: {plot}" if plot.exists() else "; no plot: pip install matplotlib"))
    if config.fold:
        say(
            f"a plain checkpoint, largest relative error of its logits {report['fold_error']:.1e}: vllm serve {output_dir}"
        )
    else:
        say(f"serve: llmrl serve {output_dir} (vLLM: {report['serving']['vllm']})")

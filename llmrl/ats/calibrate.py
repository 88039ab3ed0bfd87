"""`llmrl calibrate`: features once, every method on them, the best one saved so that transformers and vLLM open it.

Order of work, so that a mistake costs seconds and not a run: options, data, output folder, model, windows, features
(cached, resumable), fits, scores, saving into a staging folder, a reload from it that must agree with the base, and only
then the rename to `--output_dir`.
"""

from __future__ import annotations

import gc
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrl._version import __version__
from llmrl.ats.data import Window, Windows, make_windows, read_rows
from llmrl.ats.evaluate import SELECTED_BY, SeedResult, fit_and_score
from llmrl.ats.features import OutputLayer, TokenFeatures, extract_features
from llmrl.ats.metrics import MIN_CLUSTERS
from llmrl.ats.options import CalibrateConfig
from llmrl.ats.plots import reliability_diagram
from llmrl.ats.report import excluded_line, markdown_table, seeds_table, sentences
from llmrl.ats.splits import duplicate_rows, limit_windows, split_windows
from llmrl.base_model import BaseModel, context_length, generate_greedy, load_base
from llmrl.config import to_flat
from llmrl.errors import ModelError, OutputError, UsageError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.heads import HEADS_FILE, HeadsConfig
from llmrl.modeling import save_heads_folder
from llmrl.training.distributed import barrier, check_processes, is_main_process, join_processes
from llmrl.training.run import write_model_card, write_run_files
from llmrl.training.tracking import MetricsLog, check_tracker, progress_bar
from llmrl.vllm_compat import check_versions, vllm_architectures, vllm_build

GREEDY_PROMPTS, GREEDY_TOKENS = 8, 32
# of an earlier run into the same folder: would be read as part of the new one
_STALE = ("*.safetensors", "*.safetensors.index.json", "verify.json")


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
    base = load_base(str(config.model), dtype=config.dtype, device=config.device)
    found, windows = select_windows(config, rows, base, say)
    test = split_windows(windows, config.seed).test  # too little data is known before the long part
    if len(test) < MIN_CLUSTERS:
        say(f"only {len(test)} windows to test on: intervals are rough; more data, or a smaller --max_length, mends it")
    partial = output_dir.with_name(output_dir.name + ".partial")
    if config.overwrite and is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
    barrier()
    try:
        features = _features(config, base, windows, partial)
    finally:
        if is_main_process() and not any(partial.glob("features-*")):
            shutil.rmtree(partial, ignore_errors=True)  # nothing finished in it that would be worth keeping
    if not is_main_process():  # the fits take seconds: one process does them
        return {}
    with staging_folder(output_dir) as staging:
        (staging / "plots").mkdir()
        log = MetricsLog(staging / "metrics.jsonl", config.report_to, staging)
        seeds = _fit_seeds(config, features, windows, base, log, say)
        log.close()
        report = _report(config, base, found, windows, seeds)
        head = nn.ModuleDict({"temperature": seeds[0].heads[report["selected"]]})
        prompts = _greedy_prompts(windows, seeds[0].test_windows)
        texts = greedy_ids(base.model, prompts)
        _save(staging, config, base, head, report)
        base = _without_model(base)
        report["greedy_identical"] = texts == _reload_and_generate(staging, prompts, config)
        if not report["greedy_identical"]:
            raise ModelError(
                "greedy text of the calibrated model differs from the base's: nothing was saved, please report"
            )
        write_json(staging / "report.json", report)
        _write_extras(staging, config, report)
        publish_folder(staging, output_dir, stale=_STALE)
    shutil.rmtree(partial, ignore_errors=True)
    _show(report, Path(str(config.output_dir)), say)
    return report


def printer(config: CalibrateConfig) -> Any:
    """Return a print that is silent when quiet or not the main process."""
    quiet = config.quiet or not is_main_process()
    return lambda text: None if quiet else print(text, flush=True)


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
    if any(output_dir.glob("*.safetensors")) and not (output_dir / HEADS_FILE).is_file():
        raise OutputError(f"--output_dir {output_dir} holds a model that llmrl did not write; name another folder")
    return output_dir


def select_windows(config: CalibrateConfig, rows: list[Any], base: BaseModel, say: Any) -> tuple[Windows, list[Window]]:
    """Encode the rows and keep at most `max_tokens`; say what was found, left out and kept."""
    context = context_length(base.model, base.tokenizer)
    longest = config.max_length or context
    limit = getattr(base.model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise UsageError(f"--max_length {longest} is longer than the model's context of {limit}")
    found = make_windows(rows, base.tokenizer, longest)
    windows = limit_windows(found.windows, config.max_tokens, config.seed)
    say(f"data: {found.rows} rows, {len(found.windows)} windows of at most {longest} tokens, {found.tokens:,} scored")
    line = excluded_line(found.excluded, found.rows)
    if line:
        say(line)
    repeated = duplicate_rows(windows)
    if repeated:
        say(f"{repeated} rows repeat the text of another; each text is in one part of the split only")
    if len(windows) < len(found.windows):
        used = sum(sum(window.scored) for window in windows)
        say(f"using {used:,} of {found.tokens:,} tokens, spread over all files; --max_tokens takes more")
    return found, windows


def _features(config: CalibrateConfig, base: BaseModel, windows: list[Window], partial: Path) -> TokenFeatures:
    with progress_bar("features", len(windows), unit="window", quiet=config.quiet) as advance:
        return extract_features(
            base.model,
            windows,
            batch_size=config.batch_size,
            cache_dir=partial,
            fingerprint=f"{base.reference.weights} {base.model.dtype}",
            progress=advance,
        )


def _fit_seeds(
    config: CalibrateConfig,
    features: TokenFeatures,
    windows: list[Window],
    base: BaseModel,
    log: MetricsLog,
    say: Any,
) -> list[SeedResult]:
    layer, methods = OutputLayer.of(base.model), config.fitted_methods()
    results = []
    total = config.num_seeds * len(methods)
    with progress_bar("fits", total, unit="fit", quiet=config.quiet) as advance:
        for i in range(config.num_seeds):
            seed = config.seed + i

            def on_epoch(method: str, record: Any, seed: int = seed) -> None:
                log.write({"seed": seed, "method": method, **asdict(record)}, step=record.epoch)

            results.append(
                fit_and_score(
                    features,
                    split_windows(windows, seed),
                    layer,
                    methods=methods,
                    loss=config.loss,
                    seed=seed,
                    draws=config.bootstrap_draws,
                    on_epoch=on_epoch,
                )
            )
            advance((i + 1) * len(methods), total)
    return results


def _report(
    config: CalibrateConfig, base: BaseModel, found: Windows, windows: list[Window], seeds: list[SeedResult]
) -> dict[str, Any]:
    first = seeds[0]
    # a method that was asked for by name is the one that is saved; `best_on_validation` tells what auto would have taken
    selected = first.best if config.method == "auto" else config.method
    return {
        "level": "token",
        "methods": first.methods,
        "selected": selected,
        "selected_by": SELECTED_BY if config.method == "auto" else "--method",
        "best_on_validation": first.best,
        "greedy_identical": None,
        "excluded": dict(found.excluded),
        "tokens": first.tokens,
        "differences": first.differences,
        "validation": first.validation,
        "reliability": first.reliability,
        "temperatures": {
            name: round(1 / float(head.bias.exp()), 6) for name, head in first.heads.items() if head.weight is None
        },
        "seeds": {
            str(r.seed): {"methods": r.methods, "differences": r.differences, "tokens": r.tokens, "best": r.best}
            for r in seeds
        },
        "loss": config.loss,
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
    enough = len(result.test_windows) >= MIN_CLUSTERS
    return "window" if enough else f"block of {max(1, result.tokens['test'] // (2 * MIN_CLUSTERS))} tokens"


def _vllm_status(base: BaseModel) -> str:
    if vllm_build() is None:
        return "not installed"
    known = base.architecture in vllm_architectures()
    return "architecture known" if known else f"vLLM has no {base.architecture}: it will not serve this folder"


def _save(staging: Path, config: CalibrateConfig, base: BaseModel, head: nn.ModuleDict, report: dict[str, Any]) -> None:
    spec = HeadsConfig(
        heads={name: module.spec for name, module in head.items()},  # type: ignore[misc]
        base=base.reference,
        base_model_type=base.model.config.model_type,
        base_architecture=base.architecture,
        merged=config.merge,
        method=report["selected"],
    )
    dtype = None if config.dtype == "auto" else config.dtype
    save_heads_folder(staging, head, spec, base.tokenizer, base.folder, dtype)
    write_run_files(staging, to_flat(config))


def _without_model(base: BaseModel) -> BaseModel:
    # the reload below would otherwise hold the weights twice
    base = replace(base, model=None)
    gc.collect()
    return base


def _greedy_prompts(windows: list[Window], test: list[int]) -> list[list[int]]:
    step = max(1, len(test) // GREEDY_PROMPTS)
    return [windows[i].token_ids[:GREEDY_TOKENS] for i in test[::step][:GREEDY_PROMPTS]]


def greedy_ids(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Return greedy continuations of GREEDY_TOKENS ids, one prompt at a time, so that padding cannot play a part."""
    results = []
    device = model.get_input_embeddings().weight.device
    limit = getattr(model.config, "max_position_embeddings", None) or GREEDY_TOKENS * 3
    for prompt in prompts:
        ids = torch.tensor([prompt[: max(1, limit - GREEDY_TOKENS)]], device=device)
        results.append(generate_greedy(model, ids, min(GREEDY_TOKENS, limit - ids.shape[1])))
    return results


def _reload_and_generate(folder: Path, prompts: list[list[int]], config: CalibrateConfig) -> list[list[int]]:
    """Open the saved folder as a user would and generate; what does not load is not saved."""
    from transformers import AutoModelForCausalLM

    from llmrl.base_model import default_device

    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False)
    return greedy_ids(model.to(config.device or default_device()).eval(), prompts)


def _write_extras(staging: Path, config: CalibrateConfig, report: dict[str, Any]) -> None:
    name = report["base"]["model"]
    title = f"{name}: top-1 confidence on {report['tokens']['test']:,} held-out tokens"
    drawn = reliability_diagram(staging / "plots" / "reliability.png", report, title)
    picture = "\n\n![reliability diagram](plots/reliability.png)" if drawn else ""
    write_model_card(
        staging,
        title=f"{name}, calibrated",
        base_model=str(config.model),
        summary=(
            f"The next-token probabilities of the base model, calibrated after training with `{report['selected']}`. Greedy "
            "text is the base model's."
        ),
        body=(
            "## Use\n\n```python\nimport llmrl\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("DIR")\n```\n\n`llmrl serve DIR` serves it with vLLM.\n\n'
            f"## Held-out calibration\n\n{report['tokens']['test']:,} tokens that nothing was fitted or chosen on; 95% "
            f"bootstrap intervals; * marks the best of a column.\n\n{markdown_table(report['methods'])}{picture}\n"
        ),
        tags=["calibration"],
    )


def _show(report: dict[str, Any], output_dir: Path, say: Any) -> None:
    tokens = report["tokens"]
    say(f"\nheld-out test slice: {tokens['test']:,} tokens (fitted on {tokens['fit']:,}); 95% intervals\n")
    say(markdown_table(report["methods"]))
    if len(report["seeds"]) > 1:
        say(f"\nevery seed (another split each)\n\n{seeds_table(report['seeds'])}")
    say("")
    for line in sentences(report):
        say(f"- {line}")
    if report["best_on_validation"] != report["selected"]:
        say(f"- on validation {report['best_on_validation']} had the lower Brier score than {report['selected']}")
    plot = output_dir / "plots" / "reliability.png"
    say(f"\nselected: {report['selected']} (by {report['selected_by']}); greedy text identical to the base: yes")
    say(f"saved: {output_dir}" + (f"; plot: {plot}" if plot.exists() else "; no plot: pip install matplotlib"))
    say(f"serve: llmrl serve {output_dir} (vLLM: {report['serving']['vllm']})")

"""`llmrl calibrate --verify DIR`: refit nothing, score a calibrated folder on new data, refuse a changed base."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmrl.ats.data import read_rows
from llmrl.ats.evaluate import predict
from llmrl.ats.extract import extract_features
from llmrl.ats.fit_vector import predict_vector
from llmrl.ats.metrics import compare_methods
from llmrl.ats.options import NONE, CalibrateConfig
from llmrl.ats.output_layer import OutputLayer
from llmrl.ats.prepare import printer, select_windows
from llmrl.ats.report import markdown_table
from llmrl.ats.run_heads import head_log_scales
from llmrl.base_model import BaseModel, load_base, load_tokenizer, reference_for
from llmrl.errors import ModelError, UsageError
from llmrl.files import looks_like_file, write_json
from llmrl.fingerprints import check_same_base
from llmrl.heads import HEADS_FILE, HeadsConfig, build_heads, load_head_tensors
from llmrl.logits_heads import TemperatureHead, VectorHead
from llmrl.modeling import read_heads_config, read_tensors
from llmrl.training.distributed import check_processes
from llmrl.training.tracking import progress_bar


def verify(config: CalibrateConfig) -> dict[str, Any]:
    """Score `none` and the saved method on all of `config.data`; write `verify.json` into the folder (or `output_dir`).

    Raises:
        HeadMismatchError: base weights, tokenizer or chat template are not those the head was fitted on.
    """
    folder = Path(str(config.verify)).expanduser()
    if not folder.is_dir():
        raise UsageError(f"not found: {folder} (--verify)")
    check_processes(1, announce=False)  # one pass over new data; several processes would each do all of it
    say = printer(config)
    spec = read_heads_config(folder)
    rows = read_rows(config.data)
    base = _load_and_check(config, folder, spec)
    heads = build_heads(spec)
    load_head_tensors(heads, read_tensors(folder / HEADS_FILE))
    head = next((head for head in heads.values() if isinstance(head, TemperatureHead | VectorHead)), None)
    if head is None:
        raise ModelError(f"{folder} has a reward head, and no head that changes probabilities: nothing to verify")
    prepared = select_windows(config, rows, base, say)
    found, windows = prepared.found, prepared.windows
    with (
        tempfile.TemporaryDirectory() as cache,
        progress_bar("features", len(windows), unit="window", quiet=config.quiet) as advance,
    ):
        features = extract_features(
            base.model,
            windows,
            batch_size=config.batch_size,
            cache_dir=Path(cache),
            fingerprint=base.reference.weights,
            sequences=head.reads_sequence,
            progress=advance,
        )
    method = spec.method or "saved"
    layer, scales = OutputLayer.of(base.model), {NONE: torch.zeros(len(features))}
    if isinstance(head, TemperatureHead):
        scales[method] = head_log_scales(head, features)
    predictions = predict(features, layer, scales)
    if isinstance(head, VectorHead):
        predictions[method] = predict_vector(head, layer, features)
    methods, differences = compare_methods(
        predictions, seed=config.seed, draws=config.bootstrap_draws, pairs=[(method, NONE)] if method != NONE else []
    )
    result = {
        "level": prepared.level,
        "methods": methods,
        "differences": differences,
        "selected": method,
        "excluded": dict(found.excluded),
        "tokens": {"test": len(features)},
        "rows": found.rows,
    }
    target = Path(config.output_dir).expanduser() if config.output_dir else folder
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "verify.json", result)
    say(
        f"\n{len(features):,} {prepared.level}s; 95% intervals\n\n{markdown_table(methods)}\n\nsaved: {target / 'verify.json'}"
    )
    return result


def _load_and_check(config: CalibrateConfig, folder: Path, spec: HeadsConfig) -> BaseModel:
    own_tokenizer = load_tokenizer(folder)
    name = config.model or (str(folder) if spec.merged else spec.base.model)
    if config.model is None and looks_like_file(name) and not Path(name).exists():
        raise ModelError(
            f"the base model of {folder} is not at {name}\n"
            "put it there, or name where it is: llmrl calibrate BASE --verify DIR --data FILE"
        )
    base = load_base(
        name,
        dtype=config.dtype,
        device=config.device,
        revision=None if config.model else spec.base.revision,
        without_heads=name == str(folder),
    )
    check_same_base(base.reference, spec.base, folder)
    # the folder's own tokenizer is the one vLLM encodes with
    own = replace(reference_for(str(folder), base.folder, own_tokenizer), weights=spec.base.weights)
    check_same_base(own, spec.base, folder)
    return base

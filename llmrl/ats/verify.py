"""`llmrl calibrate --verify DIR`: refit nothing, score a calibrated folder on new data, refuse a changed base.

A folder that was fitted on graded answers is scored on graded answers: its base answers the new questions, and what is scored
is the confidence of whole answers, made of their tokens' probabilities as when it was fitted.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmrl.ats.answer_level import answers_of
from llmrl.ats.data import Row, read_rows
from llmrl.ats.evaluate import predict
from llmrl.ats.features import TokenFeatures
from llmrl.ats.fit_vector import predict_vector
from llmrl.ats.fold import is_folded
from llmrl.ats.metrics import Predictions, compare_methods
from llmrl.ats.options import NONE, CalibrateConfig
from llmrl.ats.output_layer import OutputLayer
from llmrl.ats.prepare import ANSWERS, printer, read_features, select_windows
from llmrl.ats.report import markdown_table, scope
from llmrl.ats.run_heads import head_log_scales
from llmrl.base_model import BaseModel, load_base, load_tokenizer, reference_for
from llmrl.errors import DataError, ModelError, UsageError
from llmrl.files import looks_like_file, write_json
from llmrl.fingerprints import check_same_base
from llmrl.heads import HEADS_FILE, HeadsConfig, build_heads, load_head_tensors
from llmrl.logits_heads import TemperatureHead, VectorHead
from llmrl.modeling import read_heads_config, read_tensors
from llmrl.training.distributed import check_processes


def verify(config: CalibrateConfig) -> dict[str, Any]:
    """Score `none` and the saved method on all of `config.data`; write `verify.json` into the folder (or `output_dir`).

    Raises:
        HeadMismatchError: base weights, tokenizer or chat template are not those the head was fitted on.
        ModelError: a folder without such a head, for one made with --fold.
        DataError: the folder was fitted on graded answers and the rows are no questions with references.
    """
    folder = Path(str(config.verify)).expanduser()
    if not folder.is_dir():
        raise UsageError(f"not found: {folder} (--verify)")
    check_processes(1, announce=False)  # one pass over new data; several processes would each do all of it
    say = printer(config)
    if is_folded(folder):
        raise ModelError(
            f"{folder} was made with --fold: the temperature is in its weights, and there is no head to score against the "
            "base\ncalibrate without --fold into another folder and verify that one; its probabilities are the same"
        )
    spec = read_heads_config(folder)
    rows = read_rows(config.data)
    config = _for_folder(config, folder, spec, rows)
    base = _load_and_check(config, folder, spec)
    heads = build_heads(spec)
    load_head_tensors(heads, read_tensors(folder / HEADS_FILE))
    head = next((head for head in heads.values() if isinstance(head, TemperatureHead | VectorHead)), None)
    if head is None:
        raise ModelError(f"{folder} has a reward head, and no head that changes probabilities: nothing to verify")
    with tempfile.TemporaryDirectory() as cache:
        answers_in = Path(cache) / ANSWERS if spec.answer_confidence else None
        prepared = select_windows(config, rows, base, say, answers_in)
        features = read_features(config, base, prepared.windows, Path(cache), sequences=head.reads_sequence)
    found, method = prepared.found, spec.method or "saved"
    predictions = _predictions(base, head, method, features)
    if spec.answer_confidence:
        predictions = {
            name: answers_of(p, spec.answer_confidence, features.question) for name, p in predictions.items()
        }
    methods, differences = compare_methods(
        predictions, seed=config.seed, draws=config.bootstrap_draws, pairs=[(method, NONE)] if method != NONE else []
    )
    count = len(predictions[NONE].confidence)
    result = {
        "level": prepared.level,
        "methods": methods,
        "differences": differences,
        "selected": method,
        "excluded": dict(found.excluded),
        "tokens": {"test": count},
        "rows": found.rows,
        "answers": prepared.answers,
        "answer_confidence": spec.answer_confidence,
    }
    target = Path(config.output_dir).expanduser() if config.output_dir else folder
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / "verify.json", result)
    say(f"\n{count:,} {prepared.level}s; 95% intervals\n\n{markdown_table(methods)}\n")
    fitted_on = scope(spec.level, spec.answer_confidence)
    if fitted_on and spec.level != prepared.level:
        say(fitted_on)
    say(f"saved: {target / 'verify.json'}")
    return result


def _for_folder(config: CalibrateConfig, folder: Path, spec: HeadsConfig, rows: list[Row]) -> CalibrateConfig:
    """Check options and rows against what the folder was fitted on; return the options to go on with."""
    if spec.answer_confidence is None:
        for name, default in (("samples", 1), ("rollout_backend", "auto")):
            if getattr(config, name) != default:
                raise UsageError(f"--{name} has no meaning here: {folder} was not fitted on answers (--on_policy)")
        return config
    if not any("answers" in row.fields for row in rows) or any("choices" in row.fields for row in rows):
        other = next((row for row in rows if "answers" not in row.fields or "choices" in row.fields), rows[0])
        raise DataError(
            f"{folder} was fitted on the model's own graded answers (--on_policy), and {other.where} is no question it can "
            "answer: give rows with 'question' and 'answers'"
        )
    if not spec.merged or config.model is not None:
        return config
    if config.rollout_backend == "vllm":
        raise UsageError(
            f"--rollout_backend vllm: {folder} holds its own base, and vLLM would answer with the head in effect; leave it "
            "out, or name the base: llmrl calibrate BASE --verify DIR --data FILE"
        )
    return replace(config, rollout_backend="transformers")


def _predictions(
    base: BaseModel, head: TemperatureHead | VectorHead, method: str, features: TokenFeatures
) -> dict[str, Predictions]:
    """Return the tokens' predictions of the base and of the saved head."""
    layer, scales = OutputLayer.of(base.model), {NONE: torch.zeros(len(features))}
    if isinstance(head, TemperatureHead):
        scales[method] = head_log_scales(head, features)
    predictions = predict(features, layer, scales)
    if isinstance(head, VectorHead):
        predictions[method] = predict_vector(head, layer, features)
    return predictions


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

"""Saving a calibrated model, and opening it again as a user would: what does not load, or speaks otherwise, is not saved."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmrl.ats.data import Window
from llmrl.ats.fold import fold_temperature
from llmrl.ats.options import VECTOR, CalibrateConfig
from llmrl.base_model import BaseModel, default_device, generate_greedy
from llmrl.config import to_flat
from llmrl.errors import ModelError
from llmrl.heads import HeadsConfig
from llmrl.logits_heads import TemperatureHead
from llmrl.modeling import save_heads_folder
from llmrl.portable import write_modeling_file
from llmrl.training.run import write_run_files

GREEDY_PROMPTS, GREEDY_TOKENS = 8, 32


def save_and_check(
    staging: Path, config: CalibrateConfig, base: BaseModel, head: nn.Module, report: dict[str, Any], prompts: Any
) -> None:
    """Write the folder, open it, and compare its greedy text with the base's; fills `greedy_identical` of the report.

    Raises:
        ModelError: the text differs although the method cannot change it.
    """
    texts = greedy_ids(base.model, prompts)
    if config.fold:
        assert isinstance(head, TemperatureHead)
        report["fold_error"] = fold_temperature(base, float(head.bias), staging)
    else:
        _save_head(staging, config, base, head, report)
    write_run_files(staging, to_flat(config))
    base = replace(base, model=None)  # the weights would be in memory twice
    gc.collect()
    report["greedy_identical"] = texts == _reload_and_generate(staging, prompts, config)
    # rounding of folded weights can turn a tie, and a vector says other things on purpose
    if not report["greedy_identical"] and not config.fold and report["selected"] != VECTOR:
        raise ModelError(
            "greedy text of the calibrated model differs from the base's: nothing was saved, please report"
        )


def _save_head(staging: Path, config: CalibrateConfig, base: BaseModel, head: Any, report: dict[str, Any]) -> None:
    heads = nn.ModuleDict({head.spec.kind: head})
    spec = HeadsConfig(
        heads={name: module.spec for name, module in heads.items()},  # type: ignore[misc]
        base=base.reference,
        base_model_type=base.model.config.model_type,
        base_architecture=base.architecture,
        merged=config.merge,
        method=report["selected"],
        level=report["level"],
        answer_confidence=report["answer_confidence"],
    )
    dtype = None if config.dtype == "auto" else config.dtype
    save_heads_folder(staging, heads, spec, base.tokenizer, base.folder, dtype)
    if config.with_code:
        write_modeling_file(staging)


def greedy_prompts(windows: list[Window], test: list[int]) -> list[list[int]]:
    """Return beginnings of test windows, spread evenly."""
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
    from transformers import AutoModelForCausalLM

    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False)
    return greedy_ids(model.to(config.device or default_device()).eval(), prompts)

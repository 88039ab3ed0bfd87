"""One pass of the base model over all windows, into features on disk.

Logits exist for one chunk of tokens at a time. Finished shards lie on disk, so a run that was cut off goes on where it
stopped; with several processes each computes its share of the shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.ats.data import Window
from llmrl.ats.features import PER_TOKEN, TokenFeatures
from llmrl.ats.losses import TOP_K
from llmrl.ats.output_layer import (
    MASKED,
    LogitsChunk,
    OutputLayer,
    check_output_layer,
    check_sequence_states,
    hidden_states,
    logits_chunks,
)
from llmrl.errors import DataError, ModelError, OutputError
from llmrl.files import write_json
from llmrl.training.distributed import barrier, rank, world_size
from llmrl_kernels import curve_knots, lse_curve

WINDOWS_PER_SHARD = 64
_FORMAT = 2


def extract_features(
    model: Any,
    windows: list[Window],
    *,
    batch_size: int,
    cache_dir: Path,
    fingerprint: str,
    sequences: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenFeatures:
    """Run the base over all windows, a shard at a time; shards already in `cache_dir` are read instead.

    With several processes each computes its share of the shards; all wait for each other and read all of them.

    Args:
        model: a transformers causal LM.
        windows: what it reads; of a window with `choices` the logits of these tokens alone count, of one with a `grade` all
            scored tokens are right or wrong as the grade says.
        batch_size: windows read at once.
        cache_dir: where the shards lie.
        fingerprint: of the model; shards of another are refused.
        sequences: keep the states of every position that a scored token can see, for heads that read sequences.
        progress: called with the windows done and all of them.

    Raises:
        ModelError: a logit is NaN, or a target's is -inf; the row is named. Or the architecture is one that llmrl does not
            know, or, with `sequences`, one in which such heads cannot run.
        DataError: a target is not among its window's choices.
        OutputError: `cache_dir` holds shards of another model, data set or setting.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    size = max(WINDOWS_PER_SHARD, batch_size)
    _check_manifest(cache_dir, _manifest(windows, fingerprint, size, sequences))
    layer = OutputLayer.of(model)
    numbers = _choice_numbers(windows)
    choices = _choice_table(numbers)
    check_output_layer(model, layer, windows[0].token_ids)
    if sequences:
        check_sequence_states(model, windows[0].token_ids)
    starts = range(0, len(windows), size)
    paths = [cache_dir / f"features-{number:05d}.safetensors" for number in range(len(starts))]
    for number, (path, start) in enumerate(zip(paths, starts, strict=True)):
        part = windows[start : start + size]
        if number % world_size() == rank() and not path.exists():
            _write_shard(path, _shard(model, layer, part, start, numbers, choices, batch_size, sequences))
        progress(start + len(part), len(windows))
    barrier()
    return replace(_read_shards(paths, choices), question=_questions(windows), unscored=_unscored(windows))


def _questions(windows: list[Window]) -> Tensor:
    """Return a number for each window, the same for graded answers to one question."""
    numbers: dict[Any, int] = {}
    keys = [index if window.grade is None else window.prompt for index, window in enumerate(windows)]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _unscored(windows: list[Window]) -> Tensor:
    """Return how many tokens of each window are predicted (all but the first) and do not count."""
    return torch.tensor([len(window.token_ids) - 1 - sum(window.scored) for window in windows])


def _choice_numbers(windows: list[Window]) -> dict[tuple[int, ...] | None, int]:
    """Return a number for each different tuple of choices, -1 for none."""
    found = dict.fromkeys(w.choices for w in windows if w.choices is not None)
    return {None: -1} | {ids: number for number, ids in enumerate(found)}


def _choice_table(numbers: dict[tuple[int, ...] | None, int]) -> Tensor:
    """Return `[C, K]` token ids by number, filled up with -1."""
    rows = [torch.tensor(ids) for ids in numbers if ids is not None]
    if not rows:
        return torch.empty(0, 0, dtype=torch.long)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


# --- one shard --------------------------------------------------------------------------------------------------------


def _shard(
    model: Any,
    layer: OutputLayer,
    windows: list[Window],
    first: int,
    choice_numbers: dict[tuple[int, ...] | None, int],
    choices: Tensor,
    batch_size: int,
    sequences: bool,
) -> dict[str, Tensor]:
    """Return the fields of TokenFeatures (without `choices`) for the windows `first`, `first + 1`, ..."""
    scored = [torch.tensor([i for i, counts in enumerate(w.scored) if counts]) for w in windows]
    # a state after the one that predicts the last scored token is seen by none of them
    kept = [torch.arange(int(p[-1])) if sequences else p - 1 for p in scored]
    offsets = torch.tensor([0, *accumulate(map(len, kept))])
    states = torch.empty(0)
    for indices, hidden in _hidden_states(model, windows, batch_size):
        if not len(states):
            states = torch.empty(int(offsets[-1]), hidden.shape[-1], dtype=hidden.dtype)
        for place, i in enumerate(indices):
            states[offsets[i] : offsets[i + 1]] = hidden[place, kept[i].to(hidden.device)].cpu()
    counts = torch.tensor([len(p) for p in scored])
    position = torch.cat(scored)
    grades = torch.tensor([-1 if w.grade is None else int(w.grade) for w in windows])
    shard = {
        "states": states,
        "offsets": offsets if sequences else torch.empty(0, dtype=torch.long),
        "row": offsets[:-1].repeat_interleave(counts) + position - 1 if sequences else torch.arange(len(position)),
        "window": torch.arange(first, first + len(windows)).repeat_interleave(counts),
        "target": torch.cat([torch.tensor(w.token_ids)[p] for w, p in zip(windows, scored, strict=True)]),
        "choice": torch.tensor([choice_numbers[w.choices] for w in windows]).repeat_interleave(counts),
    }
    grade = grades.repeat_interleave(counts)
    numbers = _numbers(layer, shard, choices, windows)
    numbers["correct"] = torch.where(grade < 0, numbers["correct"], grade == 1)
    return shard | numbers | {"graded": grade >= 0}


def _hidden_states(model: Any, windows: list[Window], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    device = model.get_input_embeddings().weight.device
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].token_ids))  # little padding
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        width = max(len(windows[i].token_ids) for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            length = len(windows[index].token_ids)
            ids[row, :length] = torch.tensor(windows[index].token_ids)
            mask[row, :length] = 1
        with torch.inference_mode():
            states = hidden_states(model, ids.to(device), mask.to(device))
        yield indices, states


def _numbers(layer: OutputLayer, shard: dict[str, Tensor], choices: Tensor, windows: list[Window]) -> dict[str, Tensor]:
    """Return what is read off the logits: gap, mean_gap, top_gap, correct, curve and slope."""
    count, knots = len(shard["target"]), curve_knots()
    found = {name: torch.empty(count) for name in ("gap", "mean_gap", "top_gap")}
    found |= {name: torch.empty(count, len(knots)) for name in ("curve", "slope")}
    found["correct"] = torch.empty(count, dtype=torch.bool)
    chunks = logits_chunks(layer, shard["states"], shard["row"], shard["target"], shard["choice"], choices)
    with torch.inference_mode():
        for chunk in chunks:
            z = chunk.logits
            top, argmax = z.max(-1)
            gap = top - z.gather(1, chunk.target[:, None])[:, 0]
            _check_chunk(chunk, top, gap, shard, windows)
            numbers = {"gap": gap, "mean_gap": top - _mean(z), "correct": argmax == chunk.target}
            numbers["top_gap"] = top - _mean(z.topk(min(TOP_K, z.shape[1])).values)
            numbers["curve"], numbers["slope"] = lse_curve(z, knots)
            for name, values in numbers.items():
                found[name][chunk.tokens] = values.cpu()
    return found


def _mean(logits: Tensor) -> Tensor:
    """Return the mean over the output layer's rows, `[N]`, without those that are masked.

    Rows that no token of the tokenizer has (a padded vocabulary) count, as in the code of the paper: the model can say them.
    """
    mean = logits.mean(-1)
    if torch.isfinite(mean).all():
        return mean
    valid = logits > MASKED
    return torch.where(valid, logits, 0.0).sum(-1) / valid.sum(-1)


def _check_chunk(chunk: LogitsChunk, top: Tensor, gap: Tensor, shard: dict[str, Tensor], windows: list[Window]) -> None:
    def where(bad: Tensor) -> str:
        token = chunk.tokens[int(bad.nonzero()[0, 0])]
        return windows[int(shard["window"][token] - shard["window"][0])].where

    if not torch.isfinite(top).all():
        raise ModelError(
            f"the model's logits are NaN or infinite on {where(~torch.isfinite(top))}: its weights are damaged, "
            "or it overflows in this dtype"
        )
    if chunk.ids is not None:
        absent = chunk.ids[chunk.target] != shard["target"][chunk.tokens].to(chunk.ids.device)
        if absent.any():
            raise DataError(f"{where(absent)}: the answer is not one of the choices")
    if not torch.isfinite(gap).all():
        raise ModelError(f"the model cannot say a token of {where(~torch.isfinite(gap))}: its logit is -inf")


# --- shards on disk ---------------------------------------------------------------------------------------------------


def _manifest(windows: list[Window], fingerprint: str, shard: int, sequences: bool) -> dict[str, Any]:
    digest = hashlib.sha256()
    for window in windows:
        fields = [window.token_ids, window.scored, window.choices, window.grade]
        digest.update(json.dumps(fields).encode())
    return {
        "base": fingerprint,
        "windows": len(windows),
        "data": digest.hexdigest(),
        "shard": shard,
        "sequences": sequences,
        "format": _FORMAT,
    }


def _check_manifest(cache_dir: Path, manifest: dict[str, Any]) -> None:
    path = cache_dir / "manifest.json"
    if not path.exists():
        write_json(path, manifest)
    elif json.loads(path.read_text(encoding="utf-8")) != manifest:
        raise OutputError(
            f"{cache_dir} holds the unfinished run of another model, data set or setting\n"
            "--overwrite discards it; another --output_dir keeps it"
        )


def _write_shard(path: Path, shard: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, str(temporary))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_shards(paths: list[Path], choices: Tensor) -> TokenFeatures:
    """Join the shards in tensors that are made at full size at once: what is read is not held twice."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    sizes = []
    for path in paths:
        with safe_open(str(path), framework="pt") as file:
            sizes.append({name: file.get_slice(name).get_shape()[0] for name in ("states", "row")})
    total = {name: sum(size[name] for size in sizes) for name in ("states", "row")}
    joined: dict[str, Tensor] = {}
    states, tokens, offsets = 0, 0, []
    for path, size in zip(paths, sizes, strict=True):
        shard = load_file(str(path))
        shard["row"] += states
        offsets.append(shard["offsets"] + states)
        for name in ("states", *PER_TOKEN):
            length, start = ("states", states) if name == "states" else ("row", tokens)
            if name not in joined:
                joined[name] = shard[name].new_empty(total[length], *shard[name].shape[1:])
            joined[name][start : start + size[length]] = shard[name]
        states, tokens = states + size["states"], tokens + size["row"]
    ends = [part if number == 0 else part[1:] for number, part in enumerate(offsets)]
    return TokenFeatures(**joined, offsets=torch.cat(ends), choices=choices)

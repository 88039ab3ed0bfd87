"""Log-probabilities of all pairs under the reference, computed once before the first step and kept beside the run.

    "sft"     the model as it stands before the first step, whole model and adapter alike (the paper)
    "base"    the base of a LoRA adapter, with the adapter switched off

So no second model is in memory, and a resumed run compares with the same numbers. reference.safetensors holds them, with hashes
of the pairs and of the weights they belong to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmrl.errors import CheckpointError, UsageError
from llmrl.leret.collate import PairCollator
from llmrl.leret.preference_data import PairRow, fingerprint_rows
from llmrl.training.distributed import barrier, is_main_process, rank, world_size
from llmrl.training.tracking import progress_bar

REFERENCE_FILE = "reference.safetensors"
REFERENCES = ("sft", "base")
# pairs a forward: fixed, so that the numbers do not depend on the batch size or the number of processes
_BATCH = 8
_WHOLE_BYTES, _ROWS = 4 << 20, 256


class ReferenceLogps(NamedTuple):
    """Summed log-probabilities `[N]` of the chosen and the rejected of every pair, float32, in nats."""

    chosen: Tensor
    rejected: Tensor


def reference_logps(
    model: Any,
    rows: Sequence[PairRow],
    output_dir: Path | str,
    *,
    reference: str,
    score: Callable[[Any, dict[str, Tensor]], Tensor],
    device: torch.device,
    collator: PairCollator,
    resumed: bool = False,
    quiet: bool = False,
) -> ReferenceLogps:
    """Read the reference's log-probabilities from `output_dir`, or compute and store them; call it on every process.

    Args:
        model: as it stands before step 1.
        rows: all pairs.
        output_dir: of the run.
        reference: one of REFERENCES.
        score: gives `[2B]` summed log-probabilities of a collated batch, chosen first.
        device: of the model.
        collator: of the batches.
        resumed: the run goes on from an earlier one: numbers of other pairs or weights are an error, not replaced.
        quiet: no bar.

    Raises:
        UsageError: reference "base" without an adapter.
        CheckpointError: `resumed`, and the stored numbers belong to other pairs or to another model.
    """
    if reference == "base" and not hasattr(model, "peft_config"):
        raise UsageError(
            "reference=base switches the adapter off, and there is none: use reference=sft, or tuning=lora"
        )
    path = Path(output_dir) / REFERENCE_FILE
    belongs = {"reference": reference, "pairs": fingerprint_rows(rows), "model": fingerprint_live(model)}
    stored = _read(path, belongs, resumed)
    if stored is not None:
        return stored
    barrier()  # nobody looks for the file any more when it is written
    context = model.disable_adapter() if reference == "base" else nullcontext()
    training = model.training
    with torch.no_grad(), context, progress_bar("reference", len(rows), unit="pair", quiet=quiet) as advance:
        model.eval()
        found = _score_all(model, rows, score, device, collator, advance)
    model.train(training)
    if is_main_process():
        _write(path, found, belongs)
    barrier()
    return found


def fingerprint_live(model: Any) -> str:
    """Return a hash of a model's parameters in memory: small ones whole, of larger ones 256 evenly spaced rows."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach()
        if tensor.numel() * tensor.element_size() > _WHOLE_BYTES and tensor.shape[0] > _ROWS:
            tensor = tensor[torch.linspace(0, tensor.shape[0] - 1, _ROWS, device=tensor.device).long()]
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return "sha256:" + digest.hexdigest()[:32]


def _score_all(
    model: Any,
    rows: Sequence[PairRow],
    score: Callable[[Any, dict[str, Tensor]], Tensor],
    device: torch.device,
    collator: PairCollator,
    advance: Callable[[int, int], None],
) -> ReferenceLogps:
    """Score batch j on process j % N; every process returns all of them."""
    table = torch.zeros(2, len(rows), dtype=torch.float32, device=device)
    for j, start in enumerate(range(0, len(rows), _BATCH)):
        if j % world_size() == rank():
            batch = collator([{"row": row} for row in rows[start : start + _BATCH]])
            logps = score(model, {name: tensor.to(device) for name, tensor in batch.items()})
            table[:, start : start + _BATCH] = logps.float().view(2, -1)
        advance(min(start + _BATCH, len(rows)), len(rows))
    if world_size() > 1:
        torch.distributed.all_reduce(table)  # zeros everywhere but on the process that scored: the sum is exact
    chosen, rejected = table.cpu()
    return ReferenceLogps(chosen.contiguous(), rejected.contiguous())


def _read(path: Path, belongs: dict[str, str], resumed: bool) -> ReferenceLogps | None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            found = file.metadata() or {}
            differing = [name for name, value in belongs.items() if found.get(name) != value]
            if not differing:
                return ReferenceLogps(file.get_tensor("chosen"), file.get_tensor("rejected"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it and start the stage anew") from error
    if not resumed:
        return None
    words = {"reference": "another kind of reference", "pairs": "other pairs", "model": "another model"}
    raise CheckpointError(
        f"{path} was computed for {' and '.join(words[name] for name in differing)}: the run cannot go on with what changed\n"
        "give it what it began with, or start anew in another folder"
    )


def _write(path: Path, found: ReferenceLogps, belongs: dict[str, str]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.tmp")
    save_file(found._asdict(), temporary, metadata=belongs)
    os.replace(temporary, path)

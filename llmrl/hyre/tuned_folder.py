"""The folder of an ensemble whose base was trained with it, written, read back and compared.

It is what `load_ensemble` reads, with `base/`, the trained LM as a plain checkpoint with its tokenizer (an adapter is merged
into it), and beside it `adapter/`, the adapter by itself in peft's format.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmrl.errors import ModelError
from llmrl.files import publish_folder, staging_folder
from llmrl.hyre.backbone import EnsembleRewardModel
from llmrl.hyre.diversity import HeadPlan
from llmrl.hyre.ensemble import ENSEMBLE_FILE, RewardEnsemble, load_ensemble
from llmrl.hyre.features import CausalFeatures
from llmrl.hyre.pairs import Pair

BASE, ADAPTER, FINAL = "base", "adapter", "final"
_UNWANTED = ("checkpoint-*", ".*", FINAL, "config.resolved.yaml", "env.json")
_PROBES = 8  # pairs whose scores are compared
# norm of the difference of scores, in units of theirs. In 16 bits a merged adapter is rounded, and so is every sum, by the
# batch it is in: a few hundredths were seen
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


def save_trained(
    model: EnsembleRewardModel,
    base: CausalFeatures,
    rows: Sequence[dict[str, Any]],
    pairs: Sequence[Pair],
    reads: str,
    plan: HeadPlan,
    folder: Path,
) -> RewardEnsemble:
    """Write the ensemble's folder, read it back, compare its scores with the model's, and return it as it was read.

    The model is taken apart: an adapter is merged, and the weights leave the GPU.

    Raises:
        ModelError: the scores differ.
    """
    probes = range(0, len(rows), max(1, len(rows) // _PROBES))
    live = live_scores(model, [rows[i][side] for i in probes for side in ("chosen", "rejected")])
    with staging_folder(folder) as staging:
        _write_base(model.cpu(), base.base.tokenizer, staging)
        saved = CausalFeatures(str(staging / BASE), max_length=base.max_length, batch_size=base.batch_size)
        ensemble = RewardEnsemble(
            head=model.heads.fold(),
            base_name=BASE,
            base_kind=base.kind,
            base_identity=saved.identity,
            reads=reads,
            max_length=base.max_length,
            names=plan.names,
            signs=tuple(int(sign) for sign in plan.signs),
        )
        ensemble.save(staging)
        del saved
        loaded = load_ensemble(staging)
        check_scores(live, loaded, [pairs[i] for i in probes])
        publish_folder(staging, folder)
    return loaded


def move_base(work_dir: Path, staging: Path, folder: Path) -> None:
    """Move the trained base, the adapter, metrics and what a tracker wrote from a work folder into a folder in the making.

    Args:
        work_dir: of `llmrl.hyre.tune.train_backbone`.
        staging: what `folder` is going to be.
        folder: of an ensemble there, which `staging` replaces, the base is removed: files of two must not end up in one.
    """
    if (folder / ENSEMBLE_FILE).is_file():
        for name in (BASE, ADAPTER):
            shutil.rmtree(folder / name, ignore_errors=True)
    entries = [work_dir / FINAL / name for name in (BASE, ADAPTER)]
    entries += [e for e in sorted(work_dir.iterdir()) if not any(fnmatch.fnmatch(e.name, p) for p in _UNWANTED)]
    for entry in entries:
        if entry.exists():
            entry.rename(staging / entry.name)


def live_scores(model: EnsembleRewardModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return the scores `[N, K]` of the model as it was trained, of one text after the other."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        found = [model.scores(ids, torch.ones_like(ids)) for ids in (torch.tensor([t], device=device) for t in texts)]
    return torch.cat(found).cpu()


def check_scores(live: Tensor, ensemble: RewardEnsemble, pairs: Sequence[Pair]) -> float:
    """Compare scores of chosen and rejected, in turn `[2N, K]`, with those of an ensemble; return |difference| / |scores|.

    Raises:
        ModelError: it is larger than the rounding of the base's type.
    """
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    again = torch.from_numpy(ensemble.scores(prompts, answers)).float()
    difference = ((again - live).norm() / live.norm().clamp_min(1e-6)).item()
    dtype = ensemble.base.base.model.dtype  # type: ignore[attr-defined]
    if not difference <= _TOLERANCE.get(dtype, 1e-4):
        raise ModelError(
            f"what was saved scores differently from what was trained: the difference is {difference:.2g} of the scores"
        )
    return difference


def _write_base(model: EnsembleRewardModel, tokenizer: Any, folder: Path) -> None:
    backbone = model.backbone
    if hasattr(backbone, "peft_config"):
        from llmrl.rollout.adapters import check_adapter

        backbone.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
        (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # peft's: a form to fill in, with the base's path
        check_adapter(folder / ADAPTER)  # what vLLM would refuse
        backbone = backbone.merge_and_unload()
    backbone.save_pretrained(str(folder / BASE))
    tokenizer.save_pretrained(str(folder / BASE))

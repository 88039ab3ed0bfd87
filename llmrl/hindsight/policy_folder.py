"""What training leaves: a policy that transformers and vLLM open, with its value head where the method has one.

    bc, filtered-bc, awr, dpo    a plain checkpoint
    ilql, mc, shared trunk       a folder of llmrl: the trained model and its value head, whose Q moves the logits by beta
    ilql, mc, separate trunk     a plain checkpoint of the policy, and in `values/` such a folder of the other trunk

`dialogue.json` says how much of a dialogue the policy reads, and by which backup its values were learnt.

Q and V are stored in the units of the rewards, whatever they were scaled by in training. A folder gets its name after it was
opened again and gave the logits that the model gave before it was written.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmrl.base_model import load_tokenizer, reference_for
from llmrl.errors import ModelError
from llmrl.files import write_json
from llmrl.heads import VALUES, HeadsConfig, HeadSpec
from llmrl.hindsight.model import DialogueModel
from llmrl.hindsight.targets import BACKUPS
from llmrl.modeling import save_heads_folder
from llmrl.value_heads import ValueHead, steer

HEAD_NAME, METHOD = "value", "hindsight"
READS, ASIDE = "dialogue.json", "kept_aside.jsonl"
# what another run may have left in a folder, and this one would be opened with
STALE = (
    "checkpoint-*", "metrics.jsonl", "timings.jsonl", "*.safetensors*", "adapter_*", "llmrl_*", "configuration_*", "modeling_*",
    VALUES, READS, ASIDE,
)  # fmt: skip
# largest difference of a logit, in units of the spread of logits; in 16 bits a merged adapter is rounded
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}


@dataclass(frozen=True)
class Saved:
    """What was written: the folder, and the largest difference of a logit when it was opened again."""

    folder: Path
    difference: float


def save_policy(
    model: DialogueModel,
    tokenizer: Any,
    folder: Path,
    *,
    steered: bool,
    scale: float,
    beta: float,
    support: float,
    probe: list[int],
    window: int | None = None,
    backup: str = "turn",
) -> Saved:
    """Write a policy into an existing folder, open it again and compare.

    Args:
        model: in training form; it is taken apart.
        tokenizer: of the base.
        folder: to fill.
        steered: whether Q moves the policy; of AWR it does not.
        scale: what rewards were multiplied by in training.
        beta, support: of the value head where nothing else is said.
        probe: ids of a dialogue, by which both are compared.
        window: exchanges that the policy reads; None is all.
        backup: of the values.

    Raises:
        ModelError: what was written does not give the same logits.
    """
    model = model.cpu().eval()
    head = None if model.head is None or not steered else in_units_of_rewards(model.head, scale, beta, support)
    wanted = _logits(model, head, probe)
    # adapters of two trunks stand on one frozen base, which merging the first would change under the second
    values = None if model.values is None or head is None else _merged(copy.deepcopy(model.values))
    policy = _merged(model.policy)
    if head is not None and values is None:
        _save_with_head(policy, tokenizer, head, folder)
    else:
        policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if head is not None:
            (folder / VALUES).mkdir()
            _save_with_head(values, tokenizer, head, folder / VALUES)
    write_json(folder / READS, {"window": window, "backup": backup})
    dtype = next(policy.parameters()).dtype
    del model, policy, values
    gc.collect()
    difference = float((_reopened(folder, probe, dtype) - wanted).abs().max())
    limit = _TOLERANCE[dtype] * max(1.0, float(wanted[wanted.isfinite()].std()))
    if not difference <= limit:
        raise ModelError(
            f"the saved policy does not give the logits of the trained one: they differ by {difference:.2g}"
        )
    return Saved(folder, difference)


@dataclass(frozen=True)
class Reads:
    """What `dialogue.json` says: the exchanges that a policy reads, None for all, and the backup of its values."""

    window: int | None = None
    backup: str = "turn"


def read_reads(policy: Path | str) -> Reads:
    """Return what a policy's folder says of how it is to be played; the defaults where it is no folder of ours.

    Raises:
        ModelError: `dialogue.json` says something else.
    """
    path = Path(policy).expanduser() / READS
    if not path.is_file():
        return Reads()
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        window, backup = fields["window"], fields.get("backup", "turn")
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path}: expected an object with a window and a backup ({error!r:.80})") from None
    whole = window is None or (isinstance(window, int) and not isinstance(window, bool) and window >= 1)
    if not whole or backup not in BACKUPS:
        raise ModelError(f"{path}: expected a window of 1 exchange or more or null, and a backup, got {fields!r:.80}")
    return Reads(window, backup)


def in_units_of_rewards(head: ValueHead, scale: float, beta: float, support: float) -> ValueHead:
    """Return a copy of a head whose Q and V are of unscaled rewards, for serving."""
    made = ValueHead(replace(head.spec, beta=beta, support=support))
    made.load_state_dict(head.state_dict())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in ("q_weight", "q_bias", "v_weight", "v_bias"):  # the last layers
                parameter.div_(scale)
    return made.requires_grad_(False)


def value_spec(model: Any, kind: str, size: int) -> HeadSpec:
    """Return the shape of a value head for a model.

    Args:
        model: a causal LM.
        kind: "linear", "low_rank", "mlp", or "auto": linear where that is not larger than a low rank, or small.
        size: rank, or hidden units.
    """
    width = int(model.config.get_text_config().hidden_size)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    if kind == "auto":
        kind = "linear" if width <= size or width * vocabulary <= 1 << 20 else "low_rank"
    return HeadSpec("value", kind, width, vocabulary, 0 if kind == "linear" else size)


def _merged(model: Any) -> Any:
    return model.merge_and_unload() if hasattr(model, "peft_config") else model


def _save_with_head(base: Any, tokenizer: Any, head: ValueHead, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".base-") as made:
        plain = Path(made)
        base.save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        config = HeadsConfig(
            heads={HEAD_NAME: head.spec},
            base=reference_for(str(plain), plain, load_tokenizer(plain)),
            base_model_type=base.config.model_type,
            base_architecture=type(base).__name__,
            merged=True,
            method=METHOD,
        )
        config = replace(config, base=replace(config.base, model=folder.name))
        save_heads_folder(folder, nn.ModuleDict({HEAD_NAME: head}), config, tokenizer, plain)


@torch.inference_mode()
def _logits(model: DialogueModel, head: ValueHead | None, probe: list[int]) -> Tensor:
    """Return the steered logits `[T, V]` of a row, without the support filter: infinities compare badly."""
    batch = {"input_ids": torch.tensor([probe]), "attention_mask": torch.ones(1, len(probe), dtype=torch.long)}
    batch |= {
        "position": torch.arange(len(probe)),
        "next_position": torch.arange(len(probe)),
        "value_position": torch.arange(1),
    }
    states = model(**batch)
    logits = model.logits(states.policy)
    return logits if head is None else steer(logits, head.q(states.action).amin(0), head.beta, 0.0)


@torch.inference_mode()
def _reopened(folder: Path, probe: list[int], dtype: torch.dtype) -> Tensor:
    from llmrl.hindsight.policy import load_policy  # it imports the names above

    opened = load_policy(folder, dtype=str(dtype).removeprefix("torch."), device="cpu", support=0.0)
    logits: Tensor = opened(torch.tensor([probe])).logits[0]
    return logits.float()

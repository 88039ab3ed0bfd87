"""Encoded dialogues as tensors: padded rows, or several dialogues packed into one row, with the same actions either way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llmrl.errors import UsageError
from llmrl.hindsight.encode import Encoded
from llmrl.hindsight.targets import NO_STATE, Backup

COLUMNS = {
    "position": torch.long,
    "token": torch.long,
    "reward": torch.float32,
    "next_position": torch.long,
    "discount": torch.float32,
    "to_go": torch.float32,
    "value_position": torch.long,
    "value_action": torch.long,
    "value_discount": torch.float32,
}


class DialogueCollator:
    """Collates examples of `examples_of`.

    Args:
        packing: put all dialogues of the batch into one row, told apart by positions that begin again; else one row each (two,
            where a window gives the next state a context of its own), padded on the right. The backbone must know packed
            rows (`flash_attention_2`, `sdpa` and `eager` of transformers do, where the model builds its mask by
            `create_causal_mask`).
    """

    def __init__(self, *, packing: bool = False) -> None:
        self.packing = packing

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids `[B, T]`, what the backbone needs beside, and the actions of all dialogues, flat.

        Positions count through the flattened `[B * T]`; `next_position` is -1 where nothing comes after.
        """
        ids = [t for example in examples for t in example["input_ids"]]
        lengths = [n for example in examples for n in example["lengths"]]
        if self.packing:
            place = list(range(len(ids)))
            batch = {
                "input_ids": torch.tensor([ids]),
                "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            }
        else:
            longest = max(lengths)
            place = [i * longest + t for i, n in enumerate(lengths) for t in range(n)]
            rows = torch.zeros(2, len(lengths) * longest, dtype=torch.long)  # the mask hides what pads
            rows[:, place] = torch.stack([torch.tensor(ids), torch.ones(len(ids), dtype=torch.long)])
            batch = dict(zip(("input_ids", "attention_mask"), rows.unflatten(1, (len(lengths), longest)), strict=True))
        return batch | _actions(examples, place)


def _actions(examples: Sequence[dict[str, Any]], place: Sequence[int]) -> dict[str, Tensor]:
    """Return the columns; `place` says where a token of the examples, one after another, stands in the batch."""
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    start = 0
    for example in examples:
        back: Backup = example["backup"]
        before = len(columns["position"])
        columns["position"] += [place[start + p] for p in back.position]
        columns["token"] += [example["input_ids"][p + 1] for p in back.position]
        columns["next_position"] += [NO_STATE if p == NO_STATE else place[start + p] for p in back.next_position]
        columns["value_position"] += [place[start + p] for p in back.value_position]
        columns["value_action"] += [before + i for i in back.value_action]
        for name in ("reward", "discount", "to_go", "value_discount"):
            columns[name] += getattr(back, name)
        start += len(example["input_ids"])
    return {name: torch.tensor(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}


@torch.no_grad()
def check_packing(model: Any, examples: Sequence[dict[str, Any]]) -> None:
    """Compare the states of a dialogue that stands behind another in one row with those of the dialogue alone.

    Args:
        model: has `states` of a batch, such as `DialogueModel`.
        examples: of `examples_of`.

    Raises:
        UsageError: they differ: the model's attention reads from one dialogue into the next.
    """
    two, training = list(examples[:2]), model.training
    device = next(model.parameters()).device
    model.eval()
    packed, alone = (
        model.states(
            {key: value.to(device) for key, value in DialogueCollator(packing=packing)(two).items()}
        ).policy.float()
        for packing in (True, False)
    )
    model.train(training)
    error = float((packed - alone).abs().max() / alone.abs().max())
    if not error < (1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2):
        raise UsageError(
            "--packing: this model reads from one dialogue into the next one in a row; leave the option out"
        )


def examples_of(
    rows: Sequence[Encoded], kind: str, discount: float, unit: str, scale: float = 1.0
) -> list[dict[str, Any]]:
    """Return the data set that a trainer deals out: ids, the lengths of what is read apart, and the backup of each row.

    `scale` is what rewards are multiplied by.
    """
    backups = [row.backup(kind, discount, unit).scaled(scale) for row in rows]
    return [
        {"input_ids": row.input_ids, "lengths": row.lengths, "backup": back}
        for row, back in zip(rows, backups, strict=True)
    ]

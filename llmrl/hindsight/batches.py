"""Encoded dialogues as tensors: padded rows, or several dialogues packed into one row, with the same actions either way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
}


class DialogueCollator:
    """Collates examples of `examples_of`.

    Args:
        packing: put all dialogues of the batch into one row, told apart by positions that begin again; else one row each,
            padded on the right. The backbone must know packed rows (`flash_attention_2`, `sdpa` and `eager` of transformers
            do, where the model builds its mask by `create_causal_mask`).
    """

    def __init__(self, *, packing: bool = False) -> None:
        self.packing = packing

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids `[B, T]`, what the backbone needs beside, and the actions of all dialogues, flat.

        Positions count through the flattened `[B * T]`; `next_position` is -1 where nothing comes after.
        """
        lengths = [len(example["input_ids"]) for example in examples]
        if self.packing:
            starts = [sum(lengths[:i]) for i in range(len(lengths))]
            batch = {
                "input_ids": torch.tensor([[t for example in examples for t in example["input_ids"]]]),
                "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            }
        else:
            longest = max(lengths)
            starts = [i * longest for i in range(len(lengths))]
            batch = {
                "input_ids": torch.zeros(len(examples), longest, dtype=torch.long),  # the mask hides what pads
                "attention_mask": torch.zeros(len(examples), longest, dtype=torch.long),
            }
            for i, example in enumerate(examples):
                batch["input_ids"][i, : lengths[i]] = torch.tensor(example["input_ids"])
                batch["attention_mask"][i, : lengths[i]] = 1
        return batch | _actions(examples, starts)


def _actions(examples: Sequence[dict[str, Any]], starts: Sequence[int]) -> dict[str, Tensor]:
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for example, start in zip(examples, starts, strict=True):
        back: Backup = example["backup"]
        before = len(columns["position"])
        columns["position"] += [start + p for p in back.position]
        columns["token"] += [example["input_ids"][p + 1] for p in back.position]
        columns["next_position"] += [NO_STATE if p == NO_STATE else start + p for p in back.next_position]
        columns["value_position"] += [start + p for p in back.value_position]
        columns["value_action"] += [before + i for i in back.value_action]
        for name in ("reward", "discount", "to_go"):
            columns[name] += getattr(back, name)
    return {name: torch.tensor(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()}


def examples_of(rows: Sequence[Encoded], kind: str, discount: float, unit: str) -> list[dict[str, Any]]:
    """Return the data set that a trainer deals out: ids and backup of each dialogue."""
    return [{"input_ids": row.input_ids, "backup": row.backup(kind, discount, unit)} for row in rows]

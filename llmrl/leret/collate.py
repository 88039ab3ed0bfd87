"""Preference pairs as one batch: chosen and rejected in one forward, completions lined up at one column.

Prompts are padded on the left and completions on the right, so that with P and C the longest of the batch

    input_ids          [2B, P + C]    rows 0..B-1 the chosen, B..2B-1 the rejected
    completion_labels  [2B, C + 1]    of the last C + 1 positions: -100, the completion ids, -100 after their end

`logits_to_keep=C + 1` then computes [2B, C + 1, V] logits, and those of the prompts are never made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmrl.leret.losses import IGNORED
from llmrl.leret.preference_data import PairRow


@dataclass
class PairCollator:
    """Collates {"row": PairRow, "ref_chosen": float, "ref_rejected": float}; the last two may be absent.

    Args:
        pad_id: any id of the vocabulary; the attention mask hides it.
    """

    pad_id: int = 0

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return input_ids, attention_mask, completion_labels and, where given, ref_chosen and ref_rejected [B]."""
        rows: list[PairRow] = [example["row"] for example in examples]
        prompts = [row.prompt_ids for row in rows] * 2
        completions = [row.chosen_ids for row in rows] + [row.rejected_ids for row in rows]
        P, C = max(map(len, prompts)), max(map(len, completions))
        input_ids = torch.full((len(prompts), P + C), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full((len(prompts), C + 1), IGNORED)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            start, end = P - len(prompt), P + len(completion)
            input_ids[i, start:end] = torch.tensor([*prompt, *completion])
            attention_mask[i, start:end] = 1
            labels[i, 1 : len(completion) + 1] = torch.tensor(completion)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_labels": labels}
        for name in ("ref_chosen", "ref_rejected"):
            if name in examples[0]:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        return batch

"""Started by torchrun: extract features of `windows()` with as many processes as there are; the first one saves them."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch


def windows(count=140):
    from llmrl.ats.data import Window

    ids = torch.randint(3, 512, (count, 12), generator=torch.Generator().manual_seed(5)).tolist()
    return [
        Window([1, *row[: 3 + i % 9]], [False] + [True] * (3 + i % 9), i, "w.txt", f"w.txt:{i}")
        for i, row in enumerate(ids)
    ]


def features(model_dir, cache_dir):
    from transformers import AutoModelForCausalLM

    from llmrl.ats.extract import extract_features

    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    return extract_features(
        model, windows(), batch_size=8, cache_dir=Path(cache_dir), fingerprint="base", sequences=True
    )


if __name__ == "__main__":
    from safetensors.torch import save_file

    from llmrl.training.distributed import is_main_process, join_processes, world_size

    join_processes()
    assert world_size() == 2
    found = features(sys.argv[1], sys.argv[2])
    if is_main_process():
        save_file(asdict(found), sys.argv[3])
    torch.distributed.destroy_process_group()

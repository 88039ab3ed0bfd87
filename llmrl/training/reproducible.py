"""The settings of TrainingArguments under which a run is a function of its data, its seed and its global batch size."""

from __future__ import annotations

from typing import Any


def reproducible_arguments(**overrides: Any) -> dict[str, Any]:
    """Return keyword arguments for TrainingArguments, SFTConfig or DPOConfig; `overrides` are added and win.

    seed, data_seed: the order of rows has a seed of its own, so drawing numbers elsewhere (a new head, dropout) does
        not change it. `seed=` alone sets both.
    accelerator_config: the seedable sampler draws each epoch's order from (data_seed, epoch) alone, so a resumed run
        finds its place and 1 and N processes draw the same order; whole batches are dealt out in turn
        (`split_batches=False`) by each process for itself (`dispatch_batches=False`), so that the N batches of a step
        are the one batch, in order, of a single process with N times the batch size.
    average_tokens_across_devices: a token weighs the same wherever it lies: the loss is divided by the tokens of the
        global batch. Without it each process divides by its own count, and short rows weigh more.
    dataloader_drop_last: a rest smaller than the global batch is left out of the epoch. Otherwise one process takes a
        small step with it while N processes fill it up with rows from the epoch's start. The data must therefore hold
        at least one global batch.
    ignore_data_skip: a resumed run goes on in the middle of the epoch.
    restore_callback_states_from_checkpoint: early stopping goes on counting where it was.
    report_to: nothing is sent anywhere unless asked for.

    `full_determinism` is left alone: a CPU needs it not, on a GPU it costs speed; add it there for equal bits. The two
    sides of a comparison must use the same number of threads (OMP_NUM_THREADS) and the same dtype.
    """
    settings: dict[str, Any] = {
        "seed": 0,
        "accelerator_config": {
            "use_seedable_sampler": True,
            "split_batches": False,
            "dispatch_batches": False,
            "even_batches": True,
        },
        "average_tokens_across_devices": True,
        "dataloader_drop_last": True,
        "ignore_data_skip": False,
        "restore_callback_states_from_checkpoint": True,
        "report_to": "none",
        **overrides,
    }
    settings.setdefault("data_seed", settings["seed"])
    return settings


def command_arguments(**overrides: Any) -> dict[str, Any]:
    """Return `reproducible_arguments` with what trainings of our commands have in common; `overrides` are added and win.

    Two checkpoints are kept, columns are the collator's, every trained parameter is used in each pass, and a machine without
    an accelerator is said to be one: without that accelerate starts no process group on a CPU.
    """
    import torch

    common = {
        "save_total_limit": 2,
        "max_grad_norm": 1.0,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    return reproducible_arguments(**{**common, **overrides})

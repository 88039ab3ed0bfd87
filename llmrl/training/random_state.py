"""The states of Python's, numpy's, torch's and CUDA's random generators as tensors and numbers, without a pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(n_gpu: int = 1) -> dict[str, Any]:
    """Return the states of all generators; with `n_gpu` above 1 one process drives all GPUs, else its current one."""
    python_version, python_words, python_gauss = random.getstate()
    kind, numpy_words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": (python_version, torch.tensor(python_words, dtype=torch.int64), python_gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(numpy_words).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all() if n_gpu > 1 else [torch.cuda.get_rng_state()]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back where `random_state` found them."""
    python_version, python_words, python_gauss = state["python"]
    random.setstate((python_version, tuple(python_words.tolist()), python_gauss))
    kind, numpy_words, *rest = state["numpy"]
    np.random.set_state((kind, numpy_words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        if len(state["cuda"]) == 1:
            torch.cuda.set_rng_state(state["cuda"][0])
        else:
            torch.cuda.set_rng_state_all(state["cuda"])

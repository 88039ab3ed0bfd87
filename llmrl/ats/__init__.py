"""ATS: adaptive temperature scaling, a post-hoc calibration of a frozen causal LM (arXiv 2409.19817).

The head reads the hidden state that enters the output embedding and multiplies the logits of that token by exp(tau) > 0:
the most likely token, hence greedy text and accuracy, stay those of the base, while probabilities move to where they agree
with how often the model is right. Read in this order: `data`, `splits`, `features`, `losses`, `fit`, `metrics`, `calibrate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.ats.calibrate import calibrate
    from llmrl.ats.options import CalibrateConfig
    from llmrl.ats.verify import verify

__all__ = ["CalibrateConfig", "calibrate", "verify"]

_MODULES = {"CalibrateConfig": "options", "calibrate": "calibrate", "verify": "verify"}


def __getattr__(name: str) -> Any:
    """Import on first use: `llmrl calibrate --help` reads the options and needs no torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llmrl.ats.{_MODULES[name]}"), name)

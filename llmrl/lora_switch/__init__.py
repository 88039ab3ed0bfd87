"""LoRA-Switch: low-rank experts on a frozen model, chosen per token by one router for all layers.

Following LoRA-Switch (Kong et al. 2024, arXiv 2405.17741) and AdaFuse (arXiv 2603.11873); see docs/lora_switch.md for what
is theirs and what is not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrl.lora_switch.config import SwitchConfig
    from llmrl.lora_switch.experts import export_mixture, import_experts
    from llmrl.lora_switch.folder import load_switch_model
    from llmrl.lora_switch.model import get_switch_model
    from llmrl.lora_switch.modes import fix_route, set_switch_mode

_HOME = {
    "SwitchConfig": "config",
    "export_mixture": "experts",
    "fix_route": "modes",
    "get_switch_model": "model",
    "import_experts": "experts",
    "load_switch_model": "folder",
    "set_switch_mode": "modes",
}

__all__ = [
    "SwitchConfig",
    "export_mixture",
    "fix_route",
    "get_switch_model",
    "import_experts",
    "load_switch_model",
    "set_switch_mode",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

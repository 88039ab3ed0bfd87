"""Registers llmrl's model types with transformers at the moment transformers' auto classes are imported.

Importing transformers' auto classes takes seconds, so `import llmrl` must not do it; a finder that waits for that import
keeps `llmrl --help` fast and spares the user a registration call.
"""

from __future__ import annotations

import importlib

from llmrl._after_import import after_import

_TARGET = "transformers.models.auto.configuration_auto"  # every auto class imports it


# each has a `register_auto_classes`
_MODULES = ("llmrl.modeling", "llmrl.lora_switch.modeling")


def _register() -> None:
    for module in _MODULES:
        importlib.import_module(module).register_auto_classes()


def install() -> None:
    """Register now if transformers' auto classes are loaded, else when they are."""
    after_import(_TARGET, _register)

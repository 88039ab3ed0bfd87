"""LoRA experts: `accelerate launch recipes/lora_switch.py --config recipes/lora_switch/NAME.yaml [--option VALUE ...]`.

The same code path as `llmrl switch train`; with eval or export in front of the options, as that command.
"""

import sys

from llmrl.commands import run_switch
from llmrl.errors import run_command

ACTIONS = ("train", "eval", "export")


def main(argv: list[str]) -> int:
    """Run the action that is named first, or train."""
    action, options = (argv[0], argv[1:]) if argv and argv[0] in ACTIONS else ("train", argv)
    return run_switch(options, prog="recipes/lora_switch.py", action=action)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

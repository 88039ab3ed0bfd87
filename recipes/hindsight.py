"""Offline RL for dialogues: `accelerate launch recipes/hindsight.py --config recipes/hindsight/NAME.yaml [--option VALUE ...]`.

The same code path as `llmrl hindsight train`; with another action in front of the options, as that command.
"""

import sys

from llmrl.commands import run_hindsight
from llmrl.errors import run_command

ACTIONS = ("train", "eval", "fold", "logs", "regenerate", "forward")


def main(argv: list[str]) -> int:
    """Run the action that is named first, or train."""
    action, options = (argv[0], argv[1:]) if argv and argv[0] in ACTIONS else ("train", argv)
    return run_hindsight(options, prog="recipes/hindsight.py", action=action)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Teach a model to search: `accelerate launch recipes/leret.py --config recipes/leret/NAME.yaml [--option VALUE ...]`.

The same code path as `llmrl leret train`; with the word explore, train or eval in front of the options, as that command.
With several processes the questions are shared among them, and so is every batch (on a CPU start them with torchrun).
"""

import sys

from llmrl.commands import run_leret
from llmrl.errors import run_command

ACTIONS = ("explore", "train", "eval")


def main(argv: list[str]) -> int:
    """Run the action that is named first, or train."""
    action, options = (argv[0], argv[1:]) if argv and argv[0] in ACTIONS else ("train", argv)
    return run_leret(options, prog="recipes/leret.py", action=action)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

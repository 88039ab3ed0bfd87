"""Reward ensembles: `accelerate launch recipes/hyre.py --config recipes/hyre/NAME.yaml [--option VALUE ...]`.

The same code path as `llmrl hyre train`; with adapt, query, score, eval or export in front of the options, as that command.
"""

import sys

from llmrl.commands import run_hyre
from llmrl.errors import run_command

ACTIONS = ("train", "adapt", "query", "score", "eval", "export")


def main(argv: list[str]) -> int:
    """Run the action that is named first, or train."""
    action, options = (argv[0], argv[1:]) if argv and argv[0] in ACTIONS else ("train", argv)
    return run_hyre(options, prog="recipes/hyre.py", action=action)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Calibrate a model: `accelerate launch recipes/calibrate.py --config recipes/calibrate/NAME.yaml [--option VALUE ...]`.

The same code path as `llmrl calibrate`. With several processes the base model's pass over the data is shared among them
(on a CPU start them with torchrun); the fits take seconds and run in one.
"""

import sys

from llmrl.commands import run_calibrate
from llmrl.errors import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_calibrate(sys.argv[1:], prog="recipes/calibrate.py")))

"""Run the GRPO recipe and write what this process's model holds at the end: `grpo_processes.py FOLDER ARGUMENT...`."""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

from llmrl.errors import run_command

ROOT = Path(__file__).resolve().parents[2]


def load_recipe():
    spec = importlib.util.spec_from_file_location("grpo_tiny", ROOT / "recipes" / "grpo_tiny.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    return recipe


def main():
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    recipe = load_recipe()
    trainers, make = [], recipe._trainer
    recipe._trainer = lambda *words: trainers.append(make(*words)) or trainers[-1]
    code = run_command(lambda: recipe.main(arguments))
    (trainer,) = trainers
    digest = hashlib.sha256()
    for _, parameter in sorted(trainer.accelerator.unwrap_model(trainer.model).named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    (folder / f"rank{os.environ['RANK']}").write_text(digest.hexdigest())
    return code


if __name__ == "__main__":
    sys.exit(main())

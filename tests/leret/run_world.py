"""Runs of LeReT with a scripted model in the place of the one that the options name, and training that only says so."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from explore_world import engine, say, write_files
from safetensors.torch import save_file

from llmrl.leret import evaluation, rounds
from llmrl.leret.ask import EngineAsker, RuleAsker
from llmrl.leret.opening import open_data
from llmrl.leret.options import LeretConfig
from llmrl.leret.prompts import PROMPT_FILE, PromptFormat, SearchSetup
from llmrl.leret.rules import RULES

SETUP = SearchSetup(PromptFormat(instruction="name"))


def write_weights(folder, value, name="model.safetensors"):
    """Give a folder weights of its own; return it as a text."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((2, 2), float(value))}, folder / name)
    return str(folder)


def write_adapter(folder, base, value=0.0):
    """Make a folder an adapter that was trained on `base`; return it as a text."""
    write_weights(folder, value, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "peft_type": "LORA"}))
    return str(folder)


def opened(folder, said=None, **options):
    """What a run with these options works with; a model is a folder with a search prompt and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    passages, questions = write_files(folder)
    base = folder / "base"
    base.mkdir(exist_ok=True)
    if not (base / PROMPT_FILE).exists():
        SETUP.save(base)
    options = {
        "questions": [str(questions)],
        "passages": [str(passages)],
        "output_dir": str(folder / "out"),
        "model": str(base),
        "few_shot_prompts": 0,
        "temperature": [0.0],
        "quiet": True,
        **options,
    }
    return open_data(LeretConfig(**options), (said if said is not None else []).append)


class Models:
    """Stands in for `open_asker`: each model answers by its own script, and what was opened is kept.

    `scripts` gives by the name of a folder what the model in it answers.
    """

    def __init__(self, monkeypatch, **scripts):
        self.scripts, self.opened, self.asked = scripts, [], []
        monkeypatch.setattr(rounds, "open_asker", self.open)
        monkeypatch.setattr(evaluation, "open_asker", self.open)

    @contextmanager
    def open(self, opened, model=None, adapter=None):
        if opened.config.policy == "rules" and model is None:
            yield RuleAsker(RULES)
            return
        name = Path(adapter or model).name
        self.opened.append(name)
        script = self.scripts.get(name, say)

        def answer(request):
            self.asked.append(name)
            return script(request)

        with engine(answer) as scripted:
            yield EngineAsker(scripted, opened.setup.format, name, quiet=True)

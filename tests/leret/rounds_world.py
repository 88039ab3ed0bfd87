"""What the tests of rounds share."""

import json
from pathlib import Path
from types import SimpleNamespace

from llmrl.leret import preference, sft

STYLES = [{"name": "person", "instruction": "person"}, {"name": "junk", "instruction": "junk"}]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Trainers:
    """Stands in for both stages: writes `final/` and keeps what each was called with."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(sft, "train_sft", lambda *args, **named: self.train("sft", *args, **named))
        monkeypatch.setattr(
            preference, "train_preference", lambda *args, **named: self.train("preference", *args, **named)
        )

    def train(self, stage, model, rows, output_dir, **named):
        self.calls.append(
            (stage, Path(model).parent.name if "final" in str(model) else Path(model).name, len(rows), named)
        )
        final = Path(output_dir) / "final"
        final.mkdir(parents=True)
        (final / "weights").write_text(f"{stage} of {Path(output_dir).parent.name}")
        return SimpleNamespace(folder=final)

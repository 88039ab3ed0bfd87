"""A tiny ensemble whose base is a hash of the text, and a folder with a labelling session; as a script the command itself."""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

from llmrl.errors import run_command
from llmrl.heads import HeadSpec
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.pairs import plain_text
from llmrl.hyre.query import query
from llmrl.hyre.query_options import QueryConfig
from llmrl.reward_heads import build_reward_head

WIDTH, HEADS, PAIRS = 6, 12, 24


class HashedBase:
    """Features that are a function of the text and of nothing else."""

    kind, width, name = "encoder", WIDTH, "hashed"
    identity = ("hash",)
    before_embed = None

    def text(self, prompt, answer):
        return plain_text(prompt, answer)

    def embed(self, texts, *, quiet=True):
        if self.before_embed is not None:
            self.before_embed()
        rows = [np.frombuffer(hashlib.sha256(text.encode()).digest()[:WIDTH], np.uint8) for text in texts]
        return torch.from_numpy(np.stack(rows).astype(np.float32) / 64 - 2)


def make_ensemble(seed=0, scale=1.0):
    head = build_reward_head(HeadSpec("reward", "linear", WIDTH, HEADS))
    with torch.no_grad():
        head.weight.copy_(scale * torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return RewardEnsemble(head.requires_grad_(False), "hashed", "encoder", ["hash"], "answer", _base=HashedBase())


def with_base(folder):
    made = load_ensemble(folder)
    made._base = HashedBase()
    return made


def write_pool(path, count=PAIRS, begin=0):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(begin, begin + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Place:
    """A folder with a pool and a session in it."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        self.ensemble = make_ensemble()
        self.pool = write_pool(folder / "pool.jsonl")
        self.user = folder / "anna.json"
        self.labels, self.session = folder / "anna.labels.jsonl", folder / "anna.labels.session.json"

    def config(self, **changes):
        return QueryConfig(
            **{"model": "-", "pairs": [str(self.pool)], "output": str(self.user), "stop": False, **changes}
        )

    def run(self, answers, **changes):
        """Answer with the letters of `answers`, then end the input; return the transcript."""
        self.patch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in answers)))
        self.made = query(self.config(**changes), self.ensemble)
        return self.capsys.readouterr().out

    def files(self):
        return self.user.read_bytes(), self.labels.read_bytes()


def questions(transcript):
    """Each question as (A, B), in the order shown."""
    lines = transcript.splitlines()
    return [(lines[i + 1].strip(), lines[i + 3].strip()) for i, line in enumerate(lines) if line == "A:"]


def main(model, pool, user):
    config = QueryConfig(model=model, pairs=[pool], output=user, stop=False)
    query(config, with_base(Path(model)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(*sys.argv[1:])))

"""A reward model for everybody, fitted to one person by five labels, in this process and behind vLLM.

    python examples/reward_for_a_person.py

1. 100 heads are trained on 40 personas (recipes/hyre/persona.yaml; about a minute on a CPU core).
2. A persona that none of them saw labels five pairs; the rest of its pairs, which share no text with those, are ranked.
3. The base is served once, for all users, by vLLM; the heads and this person's weights are applied by the client.

It writes runs/reward-for-a-person and may be run again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llmrl.commands import quiet_libraries, run_hyre
from llmrl.encoder import default_encoder
from llmrl.errors import EXIT_DONE, run_command
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.evaluate import keys_of, split
from llmrl.hyre.pairs import Pair, read_pairs
from llmrl.hyre.query_files import label_row
from llmrl.hyre.reward import hyre_reward
from llmrl.hyre.served import EmbeddingRewardClient, ServedEnsemble
from llmrl.hyre.user import User, load_user
from llmrl.jsonl import write_objects
from llmrl.vllm_compat import vllm_build, why_no_vllm

FOLDER = Path("runs/reward-for-a-person")
USERS = "recipes/hyre/data/persona/users.jsonl.gz"
PERSON, LABELS = "politically-conservative", 5


def heading(text: str) -> None:
    print(f"\n=== {text} ===\n", flush=True)


def fit_to_a_person(ensemble: RewardEnsemble) -> tuple[User, list[Pair]]:
    """Let `llmrl hyre adapt` read five pairs of a persona; return the user and the pairs to rank."""
    pairs = read_pairs(USERS)
    own = [pair for pair in pairs if pair.group == PERSON]
    labelled, rest = split(keys_of(own), np.random.default_rng(0))
    print(f"the person: {PERSON}")
    for i in labelled[:LABELS]:
        print(f"  prefers {own[i].chosen!r:.56}\n     over {own[i].rejected!r:.56}")
    write_objects(FOLDER / "labels.jsonl.gz", [label_row(own[i]) for i in labelled[:LABELS]])
    options = ["--model", str(FOLDER / "model"), "--pairs", str(FOLDER / "labels.jsonl.gz"), "--overwrite"]
    run_hyre([*options, "--output", str(FOLDER / "user.json")], action="adapt")
    return load_user(FOLDER / "user.json", ensemble), [own[i] for i in rest]


def ranked_right(margins: np.ndarray) -> str:
    return f"{np.mean(margins > 0):.1%} of {len(margins)} other pairs ranked right"


def rewards(scorer: RewardEnsemble | ServedEnsemble, user: User, pairs: list[Pair]) -> np.ndarray:
    """Return the reward of the chosen less that of the rejected, as a trainer would ask for them."""
    reward = hyre_reward(scorer, user)
    prompts = [[{"role": role, "content": content} for role, content in pair.prompt] for pair in pairs]
    chosen, rejected = (
        reward(prompts=prompts, completions=[getattr(pair, side) for pair in pairs]) for side in ("chosen", "rejected")
    )
    return np.array(chosen) - np.array(rejected)


@contextlib.contextmanager
def served(model: str) -> Iterator[str]:
    """Serve a sentence encoder on loopback; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "llmrl.cli",
        "serve",
        model,
        "--runner=pooling",
        "--dtype=float32",
        f"--port={port}",
    ]
    with (FOLDER / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            with (
                contextlib.suppress(urllib.error.URLError, OSError),
                urllib.request.urlopen(f"{url}/health", timeout=2),
            ):
                break
            time.sleep(1)
        else:
            raise SystemExit(f"the server did not start: see {FOLDER / 'server.log'}")
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is in the repository and in packages
    os.chdir(Path(__file__).resolve().parent.parent)
    quiet_libraries(quiet=False)
    heading("1. train 100 heads on 40 personas")
    train = ["--config", "recipes/hyre/persona.yaml", "--output_dir", str(FOLDER / "model"), "--overwrite"]
    run_hyre(train, action="train")
    ensemble = load_ensemble(FOLDER / "model")
    heading("2. five labels of somebody new")
    user, rest = fit_to_a_person(ensemble)
    everybody = User(type(user.posterior)(ensemble.heads, ensemble=ensemble.fingerprint))
    print(f"\nall heads alike: {ranked_right(rewards(ensemble, everybody, rest))}")
    here = rewards(ensemble, user, rest)
    print(f"fitted:          {ranked_right(here)}")
    heading("3. the same from a server of the base, which knows no user")
    if vllm_build() is None:
        print(f"left out: {why_no_vllm()}")
        return EXIT_DONE
    with (
        served(default_encoder()) as url,
        contextlib.closing(EmbeddingRewardClient(url, ensemble, max_length=256)) as client,
    ):
        there = rewards(ServedEnsemble(client, FOLDER / "model"), user, rest)
    print(f"fitted:          {ranked_right(there)}; the rewards differ by {np.abs(here - there).max():.1e} at most")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(main))

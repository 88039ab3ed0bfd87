"""Regeneration by a real model behind a running vLLM server: what is refused, what it costs, what a kill and a budget leave.

    python evals/hindsight_llm.py --output_dir evals/results [--data FILE]      # FILE: dialogues of PersuasionForGood

The small model of this repository is controller, user, agent and judge, under constrained decoding. It has never seen a
dialogue and what it says is poor; the machinery around it is what is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, EngineError, UsageError, run_command

COMPACT = '{"backend": "xgrammar", "disable_any_whitespace": true}'


@dataclass
class RunConfig:
    """Options of the run."""

    output_dir: str | None = option(None, help="where hindsight-llm.json goes")
    data: str | None = option(None, help="PersuasionForGood, for one more run")
    model: str = option("examples/tiny_lm", help="what the server serves")
    limit: int = option(40, help="dialogues")
    port: int = option(8177, help="of the server, on 127.0.0.1")
    work_dir: str = option("runs/hindsight-llm", help="emptied first")


def main(argv: list[str]) -> int:
    """Start a server, regenerate in several ways, and write what came of each."""
    config = parse_config(RunConfig, argv, prog="evals/hindsight_llm.py", description=str(__doc__).splitlines()[0])
    if config.output_dir is None:
        raise UsageError("missing --output_dir")
    from llmrl.files import write_json
    from llmrl.training.run import environment

    folder = Path(config.work_dir)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    logs = folder / "logs.jsonl"
    command("logs", "--env", "charity", "--output", logs, "--count", "200", "--quiet")
    found: dict[str, Any] = {"environment": environment(), "model": config.model, "server": f"llmrl serve, {COMPACT}"}
    with server(config, folder) as url:
        parts = [
            "--controller",
            url,
            "--forward",
            url,
            "--reward",
            f"judge={url}",
            "--concurrency",
            "8",
            "--max_tokens",
            "384",
        ]
        sizes = ["--limit", config.limit, "--rounds", "2", "--calibration", "20"]
        charity = ["--data", logs, *parts, *sizes]
        found["dry_run"] = command("regenerate", *charity, "--output", folder / "dry.jsonl", "--dry_run").splitlines()
        found["charity"] = regenerated(folder / "whole.jsonl", *charity)
        # without a grammar nothing of it is JSON, so that its scores could not be read either
        free = [*charity, "--constrained", "false", "--reward", "rule"]
        found["charity, not constrained"] = regenerated(folder / "free.jsonl", *free)
        found["killed"] = killed(folder, found["charity"]["cost"]["requests"], charity)
        most = found["charity"]["cost"]["tokens"] // 2
        found["budget"] = regenerated(folder / "budget.jsonl", *charity, "--budget_tokens", most)
        if config.data:
            real = ["--data", config.data, "--data_format", "persuasion_for_good", *parts, *sizes]
            found["persuasion_for_good"] = regenerated(folder / "p4g.jsonl", *real)
    write_json(Path(config.output_dir) / "hindsight-llm.json", found)
    return EXIT_DONE


def command(action: str, *options: Any) -> str:
    """Run `llmrl hindsight ACTION` and return what it printed."""
    words = [sys.executable, "-m", "llmrl.cli", "hindsight", action, *map(str, options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1, 3):
        raise EngineError(f"{action} ended with {done.returncode}: {done.stderr[-500:]}")
    print(done.stdout, flush=True)
    return done.stdout


def regenerated(output: Path, *options: Any) -> dict[str, Any]:
    """Regenerate, and return the report without what is long."""
    begun = time.monotonic()
    command("regenerate", *options, "--output", output, "--overwrite")
    report = json.loads(output.with_name(f"{output.stem}.report.json").read_text(encoding="utf-8"))
    kept = ("rounds", "made", "refused", "unfinished", "attempts", "cost", "realism")
    agreement = report["reward"]["agreement"]
    return {key: report[key] for key in kept} | {"judge": agreement, "wall_seconds": time.monotonic() - begun}


def killed(folder: Path, requests: int, options: list[Any]) -> dict[str, Any]:
    """Kill a run with SIGKILL when half of its answers are there, run the same command again, and compare."""
    output, answers = folder / "killed.jsonl", folder / "killed.answers" / "shards"
    words = [sys.executable, "-m", "llmrl.cli", "hindsight", "regenerate", *map(str, options), "--output", str(output)]
    child = subprocess.Popen([*words, "--quiet"], stderr=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and lines(answers) < requests // 2:
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    before = lines(answers)
    again = regenerated(output, *options)
    whole, second = (hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "whole.jsonl", output))
    return {
        "answers_at_the_kill": before,
        "answers_known_afterwards": again["cost"]["answers_known"],
        "requests_afterwards": again["cost"]["requests"],
        "same_bytes_as_uninterrupted": whole == second,
    }


def lines(folder: Path) -> int:
    """Return how many answers are kept."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


@contextmanager
def server(config: RunConfig, folder: Path) -> Iterator[str]:
    """Start `llmrl serve`, yield its URL, and stop it."""
    words = [sys.executable, "-m", "llmrl.cli", "serve", config.model, "--port", str(config.port)]
    words += ["--structured-outputs-config", COMPACT, "--enforce-eager"]
    with (folder / "server.log").open("w") as log:
        child = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        try:
            url, given_up = f"http://127.0.0.1:{config.port}/v1", time.monotonic() + 600
            while True:
                try:
                    httpx.get(f"{url}/models", timeout=5.0).raise_for_status()
                    break
                except httpx.HTTPError:
                    if child.poll() is not None or time.monotonic() > given_up:
                        raise EngineError(f"the server did not start; see {folder / 'server.log'}") from None
                    time.sleep(1.0)
            yield url
        finally:
            os.killpg(child.pid, signal.SIGTERM)
            child.wait(60)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

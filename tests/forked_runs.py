"""Runs in processes of their own, forked by a script that goes on (training/sft_run.py): importing takes longer than a run."""

import functools
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


@functools.cache
def server(script):
    """Start the script that forks the runs."""
    variables = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    variables |= QUIET | {"PYTHONPATH": str(REPO / "tests")}
    return subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
    )


def call(script, output_dir, **options):
    """Have one run made; return its exit code. What it printed is in output_dir/log.txt."""
    process = server(script)
    process.stdin.write(json.dumps({"output_dir": str(output_dir), **options}) + "\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def forwards(folder, processes):
    """Return for each step the rows of its forwards, in the order in which a single process would see them."""
    ranks = []
    for rank in range(processes):
        records = [json.loads(line) for line in (folder / f"batches-{rank}.jsonl").read_text().splitlines()]
        groups = groupby(records, key=lambda record: record["step"])
        ranks.append([[record["rows"] for record in group] for _, group in groups])
    return [[rows for same in zip(*parts, strict=True) for rows in same] for parts in zip(*ranks, strict=True)]


def training_script():
    """Return training/sft_run.py as a module: its `main` calls its `run(options)` in a forked process for every call."""
    sys.path[:0] = [str(REPO), str(REPO / "tests" / "training")]
    import sft_run

    return sft_run

"""The four tasks of recipes/lora_switch: `python recipes/lora_switch_data.py --data_dir DIR`, DIR as for recipes/tiny_lm.py.

    queries      HotpotQA and 2WikiMultihopQA: a question; the titles of the pages that answer it
    dialogues    CaSiNo: what two campers said so far; what the next one says
    arithmetic   GSM8K: a word problem; the solution
    stories      children's novels (The Wonderful Wizard of Oz, Alice in Wonderland): a passage; how it goes on

Held-out rows come from other questions, dialogues, problems and passages than training ones.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, run_command
from llmrl.jsonl import read_objects

Pair = tuple[str, str]


@dataclass
class DataConfig:
    """Options of this script."""

    data_dir: str = option(help="the folder with hotpotqa, twowiki, casino, gsm8k and text")
    output_dir: str = option("recipes/lora_switch/data", help="where train.jsonl.gz and test.jsonl.gz go")
    train: int = option(500, help="rows a task to train on")
    test: int = option(100, help="rows a task that are held out")
    words: int = option(70, help="most words of prompt and completion together")
    seed: int = option(0, help="which rows")
    quiet: bool = option(False, help="print errors only")


def queries(folder: Path) -> Iterator[tuple[str, Pair]]:
    """Yield (group, pair) of questions."""
    for name in ("hotpotqa", "twowiki"):
        for _, row in read_objects(folder / name / "questions_train.jsonl.gz"):
            yield row["question"], (f"Name the pages that answer: {row['question']}", "; ".join(row["gold_titles"]))


def dialogues(folder: Path) -> Iterator[tuple[str, Pair]]:
    """Yield (group, pair) of negotiations: three turns, and the one that follows."""
    for i, (_, row) in enumerate(read_objects(folder / "casino" / "train.jsonl.gz")):
        said = [(turn["role"][-1], " ".join(turn["text"].split())) for turn in row["turns"] if turn["text"].strip()]
        for end in range(3, len(said), 4):
            before = "\n".join(f"Camper {who}: {text}" for who, text in said[end - 3 : end])
            yield str(i), (f"{before}\nCamper {said[end][0]}:", said[end][1])


def arithmetic(folder: Path) -> Iterator[tuple[str, Pair]]:
    """Yield (group, pair) of word problems; the marks of a calculator are taken out."""
    for _, row in read_objects(folder / "gsm8k" / "train.jsonl.gz"):
        yield row["question"], (row["question"], re.sub(r"<<[^>]*>>", "", row["solution"]))


def stories(folder: Path) -> Iterator[tuple[str, Pair]]:
    """Yield (group, pair) of passages of a novel; a group is a stretch of ten, so that neighbours are not split."""
    text = gzip.decompress((folder / "text" / "wizard_of_oz.txt.gz").read_bytes()).decode()
    lines = [line.strip().strip('",') for line in text.split("\n")]  # passages stand there as strings of a list
    words = " ".join(line for line in lines if line != "...").split()
    for i, start in enumerate(range(0, len(words) - 60, 60)):
        yield str(i // 10), (" ".join(words[start : start + 20]), " ".join(words[start + 20 : start + 60]))


TASKS = {"queries": queries, "dialogues": dialogues, "arithmetic": arithmetic, "stories": stories}


def split(found: list[tuple[str, Pair]], config: DataConfig, rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Return training and held-out pairs that share no group, none longer than allowed."""
    short = [(g, p) for g, p in found if len(" ".join(p).split()) <= config.words]
    groups = sorted({g for g, _ in short})
    rng.shuffle(groups)
    order = {g: i for i, g in enumerate(groups)}
    short.sort(key=lambda one: order[one[0]])
    test = [p for _, p in short[: config.test]]
    last = short[min(config.test, len(short)) - 1][0]
    rest = [p for g, p in short[config.test :] if g != last]
    rng.shuffle(rest)
    return rest[: config.train], test


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows, the same bytes for the same rows."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def main(argv: list[str]) -> int:
    """Build both files."""
    config = parse_config(DataConfig, argv, prog="recipes/lora_switch_data.py", description="Build the four tasks.")
    rng, train, test = random.Random(config.seed), [], []
    for task, read in TASKS.items():
        parts = split(list(read(Path(config.data_dir))), config, rng)
        for rows, pairs in zip((train, test), parts, strict=True):
            rows += [{"task": task, "prompt": prompt, "completion": completion} for prompt, completion in pairs]
        if not config.quiet:
            print(f"{task}: {len(parts[0])} rows to train on, {len(parts[1])} held out", flush=True)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl.gz", train)
    write(folder / "test.jsonl.gz", test)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

"""Answer only when sure: calibrate a chat model on its own answers, then let a threshold decide which answers to give.

    python examples/when_to_answer.py

The model of this repository answers made-up questions, easy and hard ones, and each answer is graded. A head is fitted so that
the confidence of an answer is how often such answers are right. On new questions the threshold for at most 15% wrong answers is
found on one half and tried on the other. It writes runs/when_to_answer and may be run again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from llmrl.commands import run_calibrate
from llmrl.errors import run_command

MODEL = "examples/tiny_lm"
FOLDER = Path("runs/when_to_answer")
ASKED, NEW = 2400, 1600  # questions to calibrate on, and to try the result on
TARGET_ERROR = 0.15
WORDS = ("apple", "bread", "chair", "dance", "eagle", "flame", "grass", "horse", "island", "jacket", "kitten", "lemon")


def question(numbers: random.Random) -> tuple[str, str]:
    """Return a question and its answer."""
    kind = numbers.choice(("sum", "difference", "repeat", "spell", "count"))
    size = numbers.choice((10, 100))
    a, b = numbers.randrange(size), numbers.randrange(size)
    if kind == "sum":
        return f"What is {a} plus {b}?", str(a + b)
    if kind == "difference":
        return f"What is {max(a, b)} minus {min(a, b)}?", str(abs(a - b))
    if kind == "repeat":
        words = " ".join(numbers.choice(WORDS) for _ in range(numbers.randint(2, 5)))
        return f"Repeat: {words}", words
    if kind == "spell":
        word = numbers.choice(WORDS)
        return f"Spell {word}.", "-".join(word)
    start, more = numbers.randint(1, 30), numbers.randint(1, 6)
    return f"Count from {start} to {start + more}.", ", ".join(map(str, range(start, start + more + 1)))


def questions(count: int, numbers: random.Random) -> list[dict[str, Any]]:
    """Return rows of different questions."""
    found: dict[str, str] = {}
    while len(found) < count:
        text, answer = question(numbers)
        found[text] = answer
    return [{"question": text, "answers": [answer]} for text, answer in found.items()]


def write_questions() -> tuple[Path, Path]:
    """Write two files of questions; none stands in both."""
    numbers = random.Random(0)
    rows = [json.dumps(row) + "\n" for row in questions(ASKED + NEW, numbers)]
    numbers.shuffle(rows)  # there are few questions of some kinds, and all of them come early
    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = FOLDER / "questions.jsonl", FOLDER / "new.jsonl"
    for path, part in zip(paths, (rows[:ASKED], rows[ASKED:]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return paths


def answers_to(model: str, questions: Path) -> tuple[list[float], list[bool]]:
    """Return the confidence and the grade of each greedy answer of `model`."""
    from llmrl.ats.answers import answer_confidence
    from llmrl.ats.data import read_rows
    from llmrl.ats.on_policy import sample_answers
    from llmrl.rollout.backends import open_engine

    cache = FOLDER / "answers"
    shutil.rmtree(cache, ignore_errors=True)
    with open_engine(model, rollout_backend="transformers") as engine:
        given = sample_answers(read_rows([str(questions)]), engine, cache).answers
    return [answer_confidence(answer.logprobs, "mean") for answer in given], [answer.correct for answer in given]


def report(name: str, confidence: list[float], correct: list[bool]) -> None:
    """Print how often the model is right when it is so and so sure, and what a threshold is worth."""
    import numpy as np

    from llmrl.ats.metrics import expected_calibration_error
    from llmrl.ats.selective import threshold_for_error

    sure, right = np.array(confidence), np.array(correct)
    ece = expected_calibration_error(sure, right)
    print(f"\n{name}: on average {sure.mean():.0%} sure and {right.mean():.0%} right, ECE {ece:.3f}")
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (sure >= low) & (sure < low + 0.2 if low < 0.8 else sure <= 1)
        share = f"{right[inside].mean():.0%} right" if inside.any() else "-"
        print(f"  {low:.0%} to {low + 0.2:.0%} sure: {inside.sum():>4} answers, {share}")
    half = len(sure) // 2
    found = threshold_for_error(sure[:half], right[:half], TARGET_ERROR)
    if found.threshold is None:
        print(f"  no threshold keeps wrong answers at {TARGET_ERROR:.0%}")
        return
    given = sure[half:] >= found.threshold
    wrong = (~right[half:][given]).mean()
    print(f"  from {found.threshold:.2f} up: {given.mean():.0%} of the other half answered, {wrong:.1%} of them wrong")


def main() -> int:
    """Calibrate, then compare; return the exit code."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything lies in the repository
    os.chdir(Path(__file__).resolve().parent.parent)
    asked, new = write_questions()
    calibrated = FOLDER / "calibrated"
    code = run_calibrate([MODEL, "--data", str(asked), "--on_policy", "--output_dir", str(calibrated), "--overwrite"])
    if code:
        return code
    print(
        f"\n{NEW} new questions; a threshold for at most {TARGET_ERROR:.0%} wrong answers from one half, tried on the other"
    )
    for name, model in (("base", MODEL), ("calibrated", str(calibrated))):
        report(name, *answers_to(model, new))
    print(f"\nserve it: .venv/bin/llmrl serve {calibrated}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

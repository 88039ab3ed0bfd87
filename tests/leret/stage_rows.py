"""Small rows for the training stages: a line of the example book as the prompt, beginnings of others as completions."""

import functools
import gzip
import json
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MODEL = REPO / "examples" / "stories260k"
END = 2  # </s>


@functools.cache
def sequences(count):
    """Return `count` id sequences of 2 to 40 tokens, as an engine would have given them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with gzip.open(REPO / "examples" / "text" / "wizard_of_oz.txt.gz", "rt", encoding="utf-8") as book:
        lines = [line.strip() for line in book if len(line.strip()) > 40][:count]
    return [tokenizer(line, add_special_tokens=False)["input_ids"][: 2 + (7 * i) % 39] for i, line in enumerate(lines)]


def write_pairs(path, count=40):
    """Write pairs.jsonl: completions of 2 to 10 tokens that end in </s> where sampling ended by itself."""
    ids = sequences(3 * count)
    rows = []
    for i in range(count):
        chosen, rejected = ids[3 * i + 1][: 2 + i % 8], [*ids[3 * i + 2][: 2 + (i + 3) % 8], END]
        rows.append(
            {"prompt_ids": [1, *ids[3 * i]], "chosen_ids": chosen, "rejected_ids": rejected, "question_id": f"q{i}"}
        )
    return _write(path, rows)


def write_sft(path, count=40):
    """Write sft.jsonl."""
    ids = sequences(3 * count)
    return _write(
        path,
        [
            {"prompt_ids": [1, *ids[3 * i]], "completion_ids": [*ids[3 * i + 1], END], "question_id": f"q{i}"}
            for i in range(count)
        ],
    )


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

"""Files of published dialogues in small, and what the tests of their loaders look at."""

import gzip
import json


def write_rows(path, rows):
    """Write these rows as the end of the path says: one array or one a line, compressed or not."""
    array = path.name.removesuffix(".gz").endswith(".json")
    data = (json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def said(dialogue):
    return [(message.role, message.content) for message in dialogue.messages]


def reasons(read):
    return [reason for _, reason, _, _ in read.refused]


def turns(*pairs):
    return [{"role": role, "text": text} for role, text in pairs]


# a game of Guess My City, a trajectory of LMRL-Gym
GAME = {
    "id": "gmc0",
    "word": "madrid,spain",
    "done": True,
    "turns": [
        'I ask: "Is it www.old?q=town, or new? Which one?" It is old. Is that all?',
        "Is it hot? Yes, it is.",
        "Are you from Madrid? Yes.",
    ],
}
TRAJECTORY = {
    "text_history": [
        ["Questions:\n", False],
        ["Is it hot?\n", True],
        ["Yes.\n", False],
        ["Sun?\n", True],
        ["No.\n", False],
    ],
    "reward": [0.0, -1.0, 0.0, -1.0, 0.0],
    "done": False,
}

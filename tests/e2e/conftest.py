"""The real command on small slices of the example texts; in this process where a process is not the point."""

import contextlib
import gzip
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import search_world
from hindsight_cli import make_world

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ("--max_length", "129", "--bootstrap_draws", "200")


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refusal(self):
        """Check the form of a refusal and return its text."""
        assert self.code not in (0, None), self.out
        lines = [line for line in self.err.split("\n") if line and "\r" not in line]  # bars redraw themselves
        assert 1 <= len(lines) <= 3, self.err
        assert lines[0].startswith("llmrl: "), self.err
        assert "Traceback" not in self.err
        return "\n".join(lines)


@pytest.fixture(scope="session")
def llmrl():
    """`llmrl("calibrate", ...)` runs the command in this process."""
    from llmrl.cli import main

    def run(*argv):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(word) for word in argv])
        return Ended(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def calibrate(llmrl, stories_dir):
    """`calibrate(data, output_dir, *options, model=...)` with small windows and few draws."""

    def run(data, output_dir, *options, model=stories_dir):
        return llmrl("calibrate", model, "--data", data, "--output_dir", output_dir, *SMALL, *options)

    return run


@pytest.fixture(scope="session")
def process():
    """`process(argv)` runs `python ...` to its end in a process of its own."""

    def run(*argv, **environment):
        done = subprocess.run(
            [sys.executable, *map(str, argv)],
            env=ENVIRONMENT | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def rollout(llmrl, stories_dir):
    """`rollout(prompts, output, *options, model=..., backend=...)` in this process, one request at a time."""

    def run(prompts, output, *options, model=stories_dir, backend="transformers"):
        words = ["--model", model, "--prompts", prompts, "--output", output, "--rollout_backend", backend]
        return llmrl("rollout", *words, "--batch_size", "1", "--max_tokens", "8", *options)

    return run


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory, stories_dir):
    """The example model with a chat template, which refuses a system role as Gemma's does, and a pad token."""
    folder = shutil.copytree(stories_dir, tmp_path_factory.mktemp("models") / "chat")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["pad_token"] = "<unk>"
    settings["chat_template"] = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Once upon a time, ' }}{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _text(name):
    return gzip.decompress((ROOT / "examples" / "text" / f"{name}.txt.gz").read_bytes()).decode()


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """The beginning of a book: some 6,000 tokens."""
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text(_text("wizard_of_oz")[2000:14000])
    return path


@pytest.fixture(scope="session")
def sentences():
    return [s.strip() for s in _text("wizard_of_oz")[2000:20000].replace("\n", " ").split(". ") if len(s) > 30]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, sentences):
    """Rows of `prompt` and `completion`."""
    rows = [{"prompt": a + ".", "completion": f" {b}."} for a, b in itertools.pairwise(sentences[:60])]
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def calibrated(calibrate, book, tmp_path_factory):
    """What `--method auto` with the default seed gives: (folder, how the command ended). Not to be changed."""
    folder = tmp_path_factory.mktemp("calibrated") / "auto"
    ended = calibrate(book, folder)
    assert ended.code == 0, ended.err
    return folder, ended


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def jsonl():
    return write_jsonl


def _no_nan(word):
    raise ValueError(f"{word} is no JSON")


def _strict(text):
    return json.loads(text, parse_constant=_no_nan)


@pytest.fixture(scope="session")
def read_json():
    """Read strict JSON: NaN and infinities are errors."""
    return lambda path: _strict(Path(path).read_text())


@pytest.fixture(scope="session")
def contents():
    """`contents(folder)` -> relative path -> bytes, hidden files included."""

    def read(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}

    return read


@pytest.fixture(scope="session")
def search_files(tmp_path_factory):
    """Folder with passages.jsonl.gz, train.jsonl.gz, dev.jsonl and test.jsonl."""
    return search_world.write_files(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="session")
def search_model(tmp_path_factory):
    """A tiny model that writes queries."""
    return search_world.write_model(tmp_path_factory.mktemp("search") / "model")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with `logs.jsonl` of the charity talk, a `small` model that knows its words, and policies `ilql` and `bc`."""
    return make_world(tmp_path_factory.mktemp("hindsight"))

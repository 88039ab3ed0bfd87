"""What bad input gets: one clear line, the right exit code, no traceback, and nothing written."""

import json
import shutil

import pytest


@pytest.fixture
def attempt(llmrl, stories_dir, book, tmp_path, contents):
    """`attempt(argv)`: run `llmrl calibrate`, which must refuse and leave every file around it as it was."""

    def run(*argv, model=stories_dir, data=book, output_dir=tmp_path / "out"):
        words = ["calibrate"]
        words += [] if model is None else [model]
        words += [] if data is None else ["--data", data]
        words += [] if output_dir is None else ["--output_dir", output_dir]
        before, folders = contents(tmp_path), sorted(p for p in tmp_path.rglob("*") if p.is_dir())
        ended = llmrl(*words, "--max_length", "129", "--bootstrap_draws", "50", *argv)
        assert contents(tmp_path) == before
        assert sorted(p for p in tmp_path.rglob("*") if p.is_dir()) == folders
        return ended.code, ended.refusal()

    return run


GOOD_LINE = '{"text": "Once upon a time there was a little girl named Lily."}\n'


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("empty.txt", "", 1, "empty.txt is empty: expected rows with"),
        ("blank.txt", " \n\n", 1, "blank.txt is empty"),
        ("empty.jsonl", "", 1, "empty.jsonl is empty"),
        ("broken.jsonl", GOOD_LINE * 2 + '{"text": "un\n', 1, "broken.jsonl:3: not JSON"),
        ("list.jsonl", GOOD_LINE + "[1]\n", 1, "list.jsonl:2: expected an object"),
        ("field.jsonl", GOOD_LINE * 4 + '{"txt": "a"}\n', 1, "field.jsonl:5: needs 'messages', 'prompt' with"),
        ("field.jsonl", '{"txt": "a"}\n', 1, "did you mean 'text'?"),
        ("null.jsonl", GOOD_LINE + '{"text": null}\n', 1, "null.jsonl:2: needs"),
        ("lone.jsonl", GOOD_LINE + '{"text": "\\ud800"}\n', 1, "lone.jsonl:2: half of a surrogate pair in the text"),
        ("digits.jsonl", GOOD_LINE + '{"text": ' + "1" * 5000 + "}\n", 1, "digits.jsonl:2: not JSON that can be read"),
        ("deep.jsonl", GOOD_LINE + "[" * 100_000 + "\n", 1, "deep.jsonl:2: not JSON"),
        ("type.jsonl", GOOD_LINE + '{"text": 7}\n', 1, "type.jsonl:2: 'text' must be a string, got int"),
        ("half.jsonl", '{"prompt": "a"}\n', 1, "half.jsonl:1: 'completion' must be a string"),
        ("table.csv", "text\na\n", 1, "table.csv: unknown kind of file; expected one of .jsonl"),
        ("latin.txt", b"one\ntwo \xe9\n", 1, "latin.txt:2: not UTF-8"),
        ("cut.txt.gz", b"\x1f\x8b\x08\x00", 1, "cut.txt.gz is not a whole gzip file"),
        ("bad.parquet", b"PAR1", 1, "bad.parquet is not a parquet file"),
        ("short.txt", "Once upon a time.", 1, "short.txt"),
        (None, None, 2, "not found: "),
    ],
)
def test_calibrate_refuses_data(name, content, code, words, attempt, tmp_path):
    path = tmp_path / (name or "absent.jsonl")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found, text = attempt(data=path)
    assert found == code
    if name == "short.txt":
        words = "too"  # too little data; the sentence is splits.py's own
    assert words in text


def test_calibrate_refuses_a_folder_as_data(attempt, tmp_path):
    (tmp_path / "texts").mkdir()
    code, text = attempt(data=tmp_path / "texts")
    assert code == 1
    assert "is a folder: name the files in it" in text


@pytest.fixture
def spoilt(stories_dir, tmp_path):
    return shutil.copytree(stories_dir, tmp_path / "model")


def test_calibrate_refuses_nan_weights(attempt, spoilt, book):
    from safetensors.torch import load_file, save_file

    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    code, text = attempt(model=spoilt)
    assert code == 1
    assert f"the model's logits are NaN or infinite on {book}" in text


def test_calibrate_refuses_model_without_weights(attempt, spoilt):
    (spoilt / "model.safetensors").unlink()
    code, text = attempt(model=spoilt)
    assert code == 1
    assert "has no weights: expected *.safetensors" in text


def test_calibrate_refuses_pickled_weights(attempt, spoilt):
    (spoilt / "model.safetensors").rename(spoilt / "pytorch_model.bin")
    code, text = attempt(model=spoilt)
    assert code == 1
    assert "holds its weights as a pickle (pytorch_model.bin)" in text
    assert "convert it to safetensors" in text


def test_calibrate_refuses_damaged_weights(attempt, spoilt):
    (spoilt / "model.safetensors").write_bytes((spoilt / "model.safetensors").read_bytes()[:5000])
    code, text = attempt(model=spoilt)
    assert code == 1
    assert f"cannot load {spoilt}" in text


@pytest.mark.parametrize(
    ("missing", "words"), [("config.json", "has no config.json"), ("tokenizer.json", "cannot load the tokenizer of")]
)
def test_calibrate_refuses_incomplete_model_folder(attempt, spoilt, missing, words):
    (spoilt / missing).unlink()
    if missing == "tokenizer.json":
        (spoilt / "tokenizer_config.json").unlink()
    code, text = attempt(model=spoilt)
    assert code == 1
    assert words in text


def test_calibrate_refuses_missing_model(attempt, tmp_path):
    code, text = attempt(model=tmp_path / "nowhere")
    assert code == 2
    assert f"not found: {tmp_path / 'nowhere'} (model)" in text


@pytest.mark.parametrize("merged", [False, True])
def test_calibrate_refuses_a_head_folder_as_model(attempt, save_head, stories_dir, tmp_path, merged):
    save_head(stories_dir, tmp_path / "headed", merged=merged)
    code, text = attempt(model=tmp_path / "headed")
    assert code == 1
    assert "llmrl heads" in text or "no weights" in text
    assert "base model" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--metod", "auto"], "unknown option --metod; did you mean --method?"),
        (["--method", "ats-linaer"], "--method ats-linaer: not a choice; did you mean 'ats-linear'?"),
        (["--seed", "one"], "--seed must be a whole number, got 'one'"),
        (["--seed", "-1"], "--seed"),
        (["--merge", "perhaps"], "unexpected argument 'perhaps'"),
        (["--merge=perhaps"], "--merge must be true or false"),
        (["--max_tokens", "0"], "--max_tokens must be at least 1, got 0"),
        (["--max_length", "1"], "--max_length must be at least 2, got 1"),
        (["--max_length", "4096"], "--max_length 4096 is longer than the model's context of 512"),
        (["--dtype", "float31"], "--dtype float31: not a choice; did you mean 'float32'?"),
        (["--dtype", "flot32"], "--dtype flot32: not a choice; did you mean 'float32'?"),
        (["--device", "foo"], "--device foo cannot be used here: "),
        (
            ["--resume_from_checkpoint", "out/checkpoint-3"],
            "--resume_from_checkpoint out/checkpoint-3: write it without",
        ),
        (["--report_to", "tensorbord"], "did you mean 'tensorboard'?"),
        (["--seed"], "--seed"),
    ],
)
def test_calibrate_refuses_options(argv, words, attempt):
    code, text = attempt(*argv)
    assert code == 2
    assert words in text


@pytest.mark.parametrize(
    ("left_out", "words"),
    [("model", "missing MODEL"), ("data", "missing --data"), ("output_dir", "missing --output_dir")],
)
def test_calibrate_names_what_is_missing(left_out, words, attempt):
    code, text = attempt(**{left_out: None})
    assert code == 2
    assert words in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("metod: auto\n", "unknown key 'metod'; did you mean 'method'?"),
        ("max:\n  length: 5\n", "unknown key 'max'"),
        ("max_length:\n  tokens: 5\n", "'max_length' is a nested mapping; keys are flat"),
        ("seed: one\n", "'seed' must be a whole number, got 'one'"),
        ("seed: true\n", "'seed' must be a whole number, got True"),
        ("merge: 1\n", "'merge' must be true or false, got 1"),
        ("method: nothing\n", "--method nothing: not a choice"),
        ("seed: 1\nmethod: auto\nseed: 2\n", "run.yaml: key 'seed' stands there twice; remove one"),
        ("- seed\n", "expected 'key: value' lines, got a list"),
        ("seed: [\n", "run.yaml:2: not YAML"),
        (None, "not found: "),
    ],
)
def test_calibrate_refuses_config_files(content, words, attempt, tmp_path):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    code, text = attempt("--config", path)
    assert code == 2
    assert words in text
    assert "run.yaml" in text or "--method" in text


def test_calibrate_refuses_a_used_output_folder(attempt, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, text = attempt()
    assert code == 1
    assert "is not empty; --overwrite replaces what llmrl writes in it" in text


def test_calibrate_overwrite_keeps_files_of_others(calibrate, book, tmp_path, contents):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / "sub" / "more.txt").write_text("mine too")
    (out / "report.json").write_text("{}")
    ended = calibrate(book, out, "--method", "temperature", "--overwrite")
    assert ended.code == 0, ended.err
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "sub" / "more.txt").read_text() == "mine too"
    assert json.loads((out / "report.json").read_text())["selected"] == "temperature"
    # over its own folder: replaced, not mixed
    (out / "llmrl_heads.safetensors").write_bytes(b"old")
    assert calibrate(book, out, "--method", "ats-linear", "--overwrite").code == 0
    assert json.loads((out / "report.json").read_text())["selected"] == "ats-linear"
    assert contents(out)["llmrl_heads.safetensors"] != b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_calibrate_overwrite_that_fails_changes_nothing(attempt, spoilt, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    (spoilt / "model.safetensors").unlink()
    assert attempt("--overwrite", model=spoilt)[0] == 1


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("place", ["model", ".", "link"])
def test_calibrate_refuses_the_base_as_output(attempt, spoilt, tmp_path, place, options):
    (tmp_path / "link").symlink_to(spoilt)
    code, text = attempt(*options, model=spoilt, output_dir=tmp_path / place)
    assert code == 1
    assert ("holds the base model" if options else "is not empty") in text


def test_calibrate_refuses_a_file_as_output(attempt, book, tmp_path):
    (tmp_path / "file").write_text("")
    code, text = attempt(output_dir=tmp_path / "file")
    assert code == 1
    assert "is a file; name a folder" in text


def test_debug_shows_the_traceback(llmrl, tmp_path, stories_dir, monkeypatch):
    argv = ["calibrate", stories_dir, "--data", tmp_path / "absent.txt", "--output_dir", tmp_path / "out"]
    assert "Traceback" not in llmrl(*argv).err
    monkeypatch.setenv("LLMRL_DEBUG", "1")
    ended = llmrl(*argv)
    assert ended.code == 2
    assert "Traceback (most recent call last)" in ended.err
    assert "llmrl: not found: " in ended.err.splitlines()[-1]


def test_unforeseen_error_takes_two_lines(llmrl, attempt, monkeypatch):
    from llmrl.ats import calibrate

    def fail(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(calibrate, "split_windows", fail)
    code, text = attempt()
    assert code == 1
    assert text.splitlines()[0] == "llmrl: RuntimeError: first line"
    assert "LLMRL_DEBUG=1" in text

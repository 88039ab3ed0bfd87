import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrl.errors import OutputError, UsageError
from llmrl.files import (
    check_output_dir,
    looks_like_file,
    publish_folder,
    resolve_reference,
    staging_folder,
    to_json,
    write_json,
    write_text,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# --- JSON and text ----------------------------------------------------------------------------------------------------


def test_write_json_holds_null_and_never_nan(tmp_path):
    value = {
        "nan": math.nan,
        "list": [math.inf, 1.5, (-math.inf, 2)],
        "tensor": torch.tensor([1.0, math.nan]),
        "scalar": np.float64("nan"),
        "array": np.array([[1, 2]]),
        "path": Path("a/b"),
        "text": "naïve",
        7: True,
    }
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text("utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert "naïve" in text
    assert json.loads(text) == {
        "nan": None, "list": [None, 1.5, [None, 2]], "tensor": [1.0, None], "scalar": None, "array": [[1, 2]],
        "path": "a/b", "text": "naïve", "7": True,
    }  # fmt: skip


def test_to_json_leaves_its_input_alone():
    value = {"a": [math.nan]}
    to_json(value)
    assert math.isnan(value["a"][0])


def test_write_text_replaces_and_is_readable_by_everyone(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(str(path), "new ∑")
    assert path.read_text("utf-8") == "new ∑"
    assert path.stat().st_mode & 0o777 == 0o644
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_write_text_keeps_the_old_file_when_it_fails(call, error, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_write_json_that_cannot_be_json_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


# --- folders ----------------------------------------------------------------------------------------------------------


def make(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_staging_folder_is_published_whole_with_its_parents(tmp_path):
    path = tmp_path / "a" / "b"
    with staging_folder(path) as staging:
        (staging / "x").write_text("1")
        assert staging.parent == path.parent
        assert staging.name == ".b.tmp"
        assert not path.exists()
        publish_folder(staging, path)
    assert names(path) == ["x"]
    assert path.stat().st_mode & 0o777 == 0o755
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_staging_folder_error_leaves_the_old_one_and_nothing_else(error, tmp_path):
    path = make(tmp_path / "out", a="old")

    def replace():
        with staging_folder(path) as staging:
            (staging / "a").write_text("new")
            raise error

    with pytest.raises(type(error)):
        replace()
    assert (path / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_publish_folder_replaces_everything(tmp_path):
    path = make(tmp_path / "out", a="old", b="old")
    with staging_folder(path) as staging:
        make(staging, a="new")
        publish_folder(staging, path)
    assert names(path) == ["a"]
    assert (path / "a").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_publish_folder_keeps_files_of_others_and_drops_stale_ones(tmp_path):
    path = make(tmp_path / "out", a="old", notes__md="mine", old__bin="stale", config__resolved__yaml="")
    make(path / "plots", a="old", mine__png="mine", second__bin="stale")
    make(path / "theirs", deep__bin="mine")
    with staging_folder(path) as staging:
        make(staging, a="new")
        make(staging / "plots", a="new")
        publish_folder(staging, path, stale=("*.bin",))
    assert names(path) == ["a", "config.resolved.yaml", "notes.md", "plots", "theirs"]
    assert names(path / "plots") == ["a", "mine.png"]
    assert [(path / name).read_text() for name in ("a", "plots/a", "notes.md", "plots/mine.png")] == [
        "new", "new", "mine", "mine",
    ]  # fmt: skip
    assert (path / "theirs" / "deep.bin").read_text() == "mine"  # a folder of others is taken as a whole
    assert names(tmp_path) == ["out"]


def test_publish_folder_fills_an_empty_folder_that_stays_the_same_one(tmp_path):
    path = make(tmp_path / "out")
    number = path.stat().st_ino
    with staging_folder(path) as staging:
        make(staging, a="new", report__json="{}")
        make(staging / "plots", b="new")
        publish_folder(staging, path, stale=())
    assert path.stat().st_ino == number
    assert names(path) == ["a", "plots", "report.json"]
    assert names(tmp_path) == ["out"]


def test_publish_folder_into_an_empty_folder_moves_the_report_last(tmp_path, monkeypatch):
    path, moved = make(tmp_path / "out"), []
    real = shutil.move
    monkeypatch.setattr(shutil, "move", lambda source, target: moved.append(source.name) or real(source, target))
    with staging_folder(path) as staging:
        make(staging, zz="", report__json="{}", a="")
        publish_folder(staging, path)
    assert len(moved) == 3
    assert moved[-1] == "report.json"


def test_staging_folder_removes_what_a_killed_run_left(tmp_path):
    left = make(tmp_path / ".out.tmp", half="x")
    make(left / "plots", half="x")
    other = make(tmp_path / ".other.tmp", half="x")
    with staging_folder(tmp_path / "out") as staging:
        assert staging == left
        assert names(staging) == []
    assert names(tmp_path) == [other.name]


@pytest.mark.parametrize("failing", [1, 2, 3])  # the old folder away, the new one in place, the notes back
def test_publish_folder_interrupted_at_any_rename_loses_no_foreign_file(failing, tmp_path, monkeypatch):
    path = make(tmp_path / "out", a="old", notes__md="mine")
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise KeyboardInterrupt
        real(source, target)

    def publish():
        with staging_folder(path) as staging:
            make(staging, a="new")
            publish_folder(staging, path, stale=())

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            publish()
    assert len(calls) >= failing
    assert [file.read_text() for file in tmp_path.rglob("notes.md")] == ["mine"]
    assert (path / "a").read_text() == ("new" if failing == 3 else "old")
    if failing < 3:
        assert names(tmp_path) == ["out"]


def test_check_output_dir_cases(tmp_path):
    empty, full = make(tmp_path / "empty"), make(tmp_path / "full", a="x")
    (tmp_path / "file").write_text("x")
    for fine in (tmp_path / "new", tmp_path / "new" / "deeper", empty):
        assert check_output_dir(fine, overwrite=False) == fine
        assert fine.exists() == (fine == empty)  # nothing is made yet
    assert check_output_dir(full, overwrite=True) == full
    assert check_output_dir(str(full), overwrite=True) == full
    with pytest.raises(OutputError, match=r"full is not empty; --overwrite replaces what llmrl writes in it"):
        check_output_dir(full, overwrite=False)
    with pytest.raises(OutputError, match="file is a file; name a folder"):
        check_output_dir(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match=r"deeper lies in .*file, which is a file; name a folder"):
        check_output_dir(tmp_path / "file" / "deeper", overwrite=True)


def test_check_output_dir_returns_the_real_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output_dir("~/out", overwrite=False) == tmp_path / "out"
    empty = make(tmp_path / "empty")
    (tmp_path / "link").symlink_to(empty)
    assert check_output_dir(tmp_path / "link", overwrite=False) == empty
    monkeypatch.chdir(empty)
    for here in (".", "", "../empty", "new/.."):
        assert check_output_dir(here, overwrite=False) == empty
    make(empty, a="x")
    with pytest.raises(OutputError, match="empty is not empty"):
        check_output_dir(tmp_path / "link", overwrite=False)


def test_check_output_dir_refuses_a_mount_point_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    assert check_output_dir(make(tmp_path / "in"), overwrite=True) == tmp_path / "in"
    with pytest.raises(OutputError, match="is a mount point that is not empty; name a folder in it"):
        check_output_dir(tmp_path, overwrite=True)


def test_check_output_dir_not_writable(tmp_path, monkeypatch):
    # root may write anywhere, so the answer of the system is replaced
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match=r"cannot write to .*: choose another --output_dir"):
        check_output_dir(tmp_path / "new", overwrite=False)


# --- paths and hub names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "is_file"),
    [
        ("gpt2", False),
        ("org/name", False),
        ("org/name-1.5", False),
        ("name:train", False),
        ("data.jsonl", True),
        ("data.JSONL", True),
        ("data.jsonl.gz", True),
        ("book.txt", True),
        ("org/weights.safetensors", True),
        ("./name", True),
        ("../name", True),
        ("/name", True),
        ("~/name", True),
        ("a/b/c", True),
        ("name/", True),
        ("C:\\name", True),
        ("here/name", True),  # a folder `here` lies in the working directory
    ],
)
def test_looks_like_file(value, is_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert looks_like_file(value) is is_file


def test_resolve_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make(tmp_path / "model")
    assert resolve_reference("model", "model") == ("model", True)
    assert resolve_reference("~/model", "model") == (str(tmp_path / "model"), True)
    assert resolve_reference("org/name", "model") == ("org/name", False)
    for missing in ("data.jsonl", "./model2", "model/inner"):
        with pytest.raises(UsageError) as error:
            resolve_reference(missing, "--data")
        assert str(error.value) == f"not found: {missing} (--data)"


def test_check_output_dir_refuses_to_replace_the_working_directory(tmp_path, monkeypatch):
    make(tmp_path / "out", a="mine")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputError, match="holds the working directory"):
        check_output_dir(".", overwrite=True)
    with pytest.raises(OutputError, match="holds the working directory"):
        check_output_dir(tmp_path, overwrite=True)
    assert check_output_dir(tmp_path / "out" / "new", overwrite=True) == tmp_path / "out" / "new"

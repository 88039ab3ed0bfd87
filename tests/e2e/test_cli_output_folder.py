"""Where the result goes: what is kept, what is replaced, what is refused, and that nothing is left beside it."""

import os
import shutil

import pytest


@pytest.fixture
def run(llmrl, stories_dir, tmp_path, book):
    """`run(output_dir, ...)`: the quickest calibration there is."""
    data = tmp_path / "data" / "short.txt"
    data.parent.mkdir()
    data.write_text(book.read_text()[:4000])

    def start(output_dir, *options, data=data):
        words = ["calibrate", stories_dir, "--data", data, "--output_dir", output_dir, "--method", "temperature"]
        return llmrl(*words, "--max_length", "33", "--bootstrap_draws", "20", "--quiet", *options)

    return start


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def check_whole(folder):
    assert {"report.json", "config.json", "llmrl_heads.safetensors", "plots"} <= set(names(folder))
    assert not [name for name in names(folder) if name.startswith(".")]


def test_calibrate_into_the_working_directory(run, tmp_path, monkeypatch):
    here = tmp_path / "work" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    ended = run(".")
    assert ended.code == 0, ended.err
    check_whole(here)
    assert os.path.samefile(".", here)
    assert names(here.parent) == ["here"]


def test_calibrate_through_a_symlink_into_an_empty_folder(run, tmp_path):
    real = tmp_path / "real" / "empty"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    # what a killed run left behind
    left = real.parent / ".empty.tmp"
    (left / "plots").mkdir(parents=True)
    (left / "report.json").write_text("{}")
    ended = run(tmp_path / "link")
    assert ended.code == 0, ended.err
    check_whole(real)
    assert (tmp_path / "link").is_symlink()
    assert names(real.parent) == ["empty"]
    assert names(tmp_path) == ["data", "link", "real"]


def test_calibrate_overwrite_replaces_its_own_files_only(run, tmp_path):
    out = tmp_path / "out"
    assert run(out, "--merge").code == 0
    check_whole(out)
    assert (out / "model.safetensors").is_file()
    data = out / "rows.txt"
    shutil.move(tmp_path / "data" / "short.txt", data)
    (out / "verify.json").write_text("{}")
    (out / "plots" / "mine.png").write_text("mine")
    (out / "notes").mkdir()
    (out / "notes" / "verify.json").write_text("mine")
    picture = (out / "plots" / "reliability.png").stat().st_ino
    ended = run(out, "--overwrite", data=data)
    assert ended.code == 0, ended.err
    check_whole(out)
    assert not (out / "model.safetensors").exists()
    assert not (out / "verify.json").exists()
    assert data.stat().st_size == 4000
    assert (out / "plots" / "mine.png").read_text() == "mine"
    assert (out / "notes" / "verify.json").read_text() == "mine"
    assert (out / "plots" / "reliability.png").stat().st_ino != picture
    assert names(tmp_path) == ["data", "out"]


@pytest.mark.parametrize("options", [["--resume_from_checkpoint"], []])
def test_calibrate_resume_into_a_folder_of_others_deletes_nothing(options, run, tmp_path, contents):
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    ended = run(out, *options)
    assert ended.code == 1
    assert "out is not empty; --overwrite replaces what llmrl writes in it" in ended.refusal()
    assert contents(tmp_path) == before


def test_calibrate_resume_with_a_path_is_a_usage_error(run, tmp_path, contents):
    before = contents(tmp_path)
    ended = run(tmp_path / "out", "--resume_from_checkpoint", tmp_path / "elsewhere")
    assert ended.code == 2
    assert "write it without a value" in ended.refusal()
    assert contents(tmp_path) == before


def test_calibrate_refuses_a_folder_that_holds_another_model(run, stories_dir, tmp_path, contents):
    model = shutil.copytree(stories_dir, tmp_path / "another")
    before = contents(tmp_path)
    ended = run(model, "--overwrite")
    assert ended.code == 1
    assert "holds a model that llmrl did not write; name another folder" in ended.refusal()
    assert contents(tmp_path) == before

"""The folder of a run: gone on with as the same run, by one process at a time, never emptied of what is not its own."""

import json
import shutil

import pytest
from explore_world import CORPUS, QUESTIONS, write_files
from run_world import SETUP, opened, write_adapter, write_weights

from llmrl.errors import ModelError, OutputError
from llmrl.leret.prompts import SearchSetup
from llmrl.leret.run_folder import RUN_FILE, claimed_folder, identity, systems_identity


def claim(folder, what, **options):
    with claimed_folder(folder, what, **{"overwrite": False, **options}) as claimed:
        return claimed


def test_a_folder_is_made_with_its_parents_and_gone_on_with(tmp_path):
    folder = tmp_path / "runs" / "a" / "out"
    assert claim(folder, {"seed": 1}) == folder
    (folder / "round-0").mkdir()
    assert claim(folder, {"seed": 1}) == folder
    assert json.loads((folder / RUN_FILE).read_text()) == {"seed": 1}


def test_the_cache_of_a_retriever_may_lie_there_before(tmp_path):
    """It is opened before the folder is claimed, and outlives the run."""
    (tmp_path / "out" / "cache").mkdir(parents=True)
    (tmp_path / "out" / "cache" / "searches.sqlite").write_text("kept")
    claim(tmp_path / "out", {"seed": 1})
    claim(tmp_path / "out", {"seed": 2}, overwrite=True)
    assert (tmp_path / "out" / "cache" / "searches.sqlite").read_text() == "kept"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(OutputError, match=r"holds thesis.tex and no leret.json: it is not the folder of such a run"):
        claim(tmp_path, {"seed": 1}, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        claim(tmp_path / "out", {})


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    claim(tmp_path, {"seed": 1})
    for name in ("round-0", "round-11", "policy", "test", "plots"):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / "dev-start.json").write_text("{}")
    claim(tmp_path, {"seed": 2}, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [RUN_FILE]
    (tmp_path / "round-0").mkdir()
    (tmp_path / "questions.jsonl").write_text("mine")
    with pytest.raises(OutputError, match=r"holds questions.jsonl, which no run wrote"):
        claim(tmp_path, {"seed": 3}, overwrite=True)
    assert (tmp_path / "questions.jsonl").read_text() == "mine"


def test_a_damaged_identity_is_named(tmp_path):
    claim(tmp_path, {"seed": 1})
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(OutputError, match=r"leret.json is damaged .*--overwrite starts anew"):
        claim(tmp_path, {"seed": 1})


def test_one_run_at_a_time(tmp_path):
    with (
        claimed_folder(tmp_path / "out", {"seed": 1}, overwrite=False),
        pytest.raises(OutputError, match="is being written by another process"),
    ):
        claim(tmp_path / "out", {"seed": 1})
    claim(tmp_path / "out", {"seed": 1})


# --- what a run may not change ----------------------------------------------------------------------------------------


def edit(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


@pytest.mark.parametrize(
    ("options", "file", "change", "named"),
    [
        ({"beta": 0.2}, None, None, "options.beta: 0.05, now 0.2"),
        ({"seed": 7}, None, None, "options.seed: 0, now 7"),
        ({"temperature": [0.0, 0.9]}, None, None, "options.temperature"),
        ({"k": 2}, None, None, r"options.k: None, now 2 \(2 differences\)"),
        ({}, "passages", lambda rows: [*rows[:-1], {**rows[-1], "text": "else"}], "corpus: 'sha256:"),
        ({}, "questions", lambda rows: rows[1:], "questions: 'sha256:"),
        ({}, "questions", lambda rows: [{**rows[0], "question": "who"}, *rows[1:]], "questions: 'sha256:"),
        ({}, "questions", lambda rows: [{**rows[0], "gold_ids": ["d1"]}, *rows[1:]], "questions: 'sha256:"),
        ({"prompts": "styles.json"}, None, None, "prompts: 'sha256:"),
    ],
)
def test_a_run_that_goes_on_as_another_is_refused_by_the_name_of_what_changed(
    tmp_path, monkeypatch, options, file, change, named
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "styles.json").write_text('[{"name": "a", "instruction": "x"}]')
    (tmp_path / "dev.jsonl").write_text('{"id": "x", "question": "another", "gold_ids": ["d0"]}\n')
    claim(tmp_path / "out", identity(opened(tmp_path / "in")))
    if file is not None:
        passages, questions = write_files(tmp_path / "in")
        edit({"passages": passages, "questions": questions}[file], change)
        monkeypatch.setattr("run_world.write_files", lambda folder: (passages, questions))
    with pytest.raises(OutputError, match=f"holds a run with another {named}.*: go on with the same options and files"):
        claim(tmp_path / "out", identity(opened(tmp_path / "in", **options)))


def test_weights_that_changed_under_the_same_path_are_another_run(tmp_path):
    write_weights(tmp_path / "in" / "base", 1)
    claim(tmp_path / "out", identity(opened(tmp_path / "in")))
    write_weights(tmp_path / "in" / "base", 2)
    with pytest.raises(OutputError, match=r"another options.model: 'sha256:.*', now 'sha256:"):
        claim(tmp_path / "out", identity(opened(tmp_path / "in")))


def test_the_same_model_by_another_path_is_the_same_run(tmp_path):
    base = tmp_path / "in" / "base"
    adapter = write_adapter(tmp_path / "lora", base)
    SETUP.save(adapter)
    for given in ({}, {"adapter": adapter}):
        write_weights(base, 1)
        out = tmp_path / f"out-{len(given)}"
        claim(out, identity(opened(tmp_path / "in", **given)))
        copied = {name: str(shutil.copytree(path, out / name)) for name, path in given.items()}
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(base)
        assert claim(out, identity(opened(tmp_path / "in", **{**copied, "model": str(tmp_path / "link")})))
    # an adapter in the place of the model is the adapter on the base that it names
    assert claim(out, identity(opened(tmp_path / "in", model=adapter)))
    other = write_adapter(tmp_path / "other", base, value=1)
    SETUP.save(other)
    with pytest.raises(OutputError, match=r"another options.adapter: 'sha256:"):
        claim(out, identity(opened(tmp_path / "in", adapter=other)))


def earlier(run, **options):
    """The identity of a folder from before models were known by their weights."""
    what = identity(run)
    kept = {key: value for key, value in what["options"].items() if key not in ("model", "adapter")}
    paths = {"model": run.config.model, "adapter": run.config.adapter, "encoder": None, "retriever_url": None}
    return {**what, "options": {**kept, **paths, **options}}


def test_a_folder_from_before_weights_were_compared_is_gone_on_with(tmp_path):
    write_weights(tmp_path / "in" / "base", 1)
    run = opened(tmp_path / "in")
    for number, options in enumerate(({}, {"model": str(tmp_path / "moved-away")})):
        assert claim(tmp_path / str(number), earlier(run, **options))
        assert claim(tmp_path / str(number), identity(run))
        write_weights(tmp_path / "in" / "base", 2)  # from now on they are
        with pytest.raises(OutputError, match=r"another options.model: 'sha256:"):
            claim(tmp_path / str(number), identity(opened(tmp_path / "in")))
        write_weights(tmp_path / "in" / "base", 1)
    claim(tmp_path / "other", earlier(run, model=write_weights(tmp_path / "another", 3)))
    with pytest.raises(OutputError, match=r"another options.model: 'sha256:"):
        claim(tmp_path / "other", identity(run))


def test_an_evaluation_from_before_weights_were_compared_is_gone_on_with(tmp_path):
    base = write_weights(tmp_path / "in" / "base", 1)
    what = {"models": systems_identity([("policy", base, None)])}
    claim(tmp_path / "out", {"models": [["policy", base, None]]})
    assert claim(tmp_path / "out", what)
    claim(tmp_path / "more", {"models": [["policy", base, None], ["base", base, None]]})
    with pytest.raises(OutputError, match=r"another models\.base"):
        claim(tmp_path / "more", what)


def test_an_index_that_has_a_name_may_move_to_another_address(tmp_path):
    def asking(port, **options):
        url = f"http://127.0.0.1:{port}"
        return identity(opened(tmp_path / "in", retriever="http", retriever_url=url, **options))

    claim(tmp_path / "named", asking(1, retriever_name="wiki-2018"))
    assert claim(tmp_path / "named", asking(2, retriever_name="wiki-2018"))
    with pytest.raises(OutputError, match="another retriever: 'sha256:"):
        claim(tmp_path / "named", asking(2, retriever_name="wiki-2021"))
    claim(tmp_path / "plain", asking(1))
    with pytest.raises(OutputError, match="another retriever: 'sha256:"):
        claim(tmp_path / "plain", asking(2))


def test_another_retriever_is_another_run(tmp_path):
    run = opened(tmp_path / "in")
    what = identity(run)
    claim(tmp_path / "out", what)
    with pytest.raises(OutputError, match=r"another retriever: '.*', now 'other'"):
        claim(tmp_path / "out", {**what, "retriever": "other"})


def test_the_models_own_prompt_is_part_of_the_run(tmp_path):
    claim(tmp_path / "out", identity(opened(tmp_path / "in")))
    SearchSetup(SETUP.format, k=5).save(tmp_path / "in" / "base")
    with pytest.raises(OutputError, match=r"another setup.k: 3, now 5"):
        claim(tmp_path / "out", identity(opened(tmp_path / "in")))


def test_files_that_moved_or_were_sorted_otherwise_are_the_same_run(tmp_path, monkeypatch):
    claim(tmp_path / "out", identity(opened(tmp_path / "in")))
    (tmp_path / "other").mkdir()
    passages, questions = write_files(tmp_path / "other", QUESTIONS[::-1])
    moved = opened(tmp_path / "in", questions=[str(questions)], passages=[str(passages)], batch_size=7, overwrite=False)
    assert claim(tmp_path / "out", identity(moved))
    assert moved.corpus.fingerprint == CORPUS.fingerprint


def fail_after(folder, what, *files):
    with claimed_folder(folder, what, overwrite=False):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
        raise ModelError("no such model")


def test_folder_in_which_nothing_was_finished_is_given_up(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ModelError):
        fail_after(folder, {"a": 1}, "env.json", "round-0/hop-1/env.json")
    assert not any(folder.iterdir())
    assert claim(folder, {"a": 2}) == folder


def test_folder_with_finished_work_is_kept_after_an_error(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ModelError):
        fail_after(folder, {"a": 1}, "env.json", "round-0/headroom.json")
    with pytest.raises(OutputError, match="another a"):
        claim(folder, {"a": 2})


def test_dev_questions_may_come_later_and_are_then_part_of_the_run(tmp_path, monkeypatch):
    """`explore` needs none; `train` goes on in its folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("dev", "other"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"id": name, "question": f"the {name}", "gold_ids": ["d0"]}) + "\n"
        )
    claim(tmp_path / "out", identity(opened(tmp_path / "in")))
    claim(tmp_path / "out", identity(opened(tmp_path / "in", dev_questions=["dev.jsonl"])))
    with pytest.raises(OutputError, match="another dev_questions: 'sha256:"):
        claim(tmp_path / "out", identity(opened(tmp_path / "in", dev_questions=["other.jsonl"])))

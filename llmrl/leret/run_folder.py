"""The output folder of a LeReT run: one run at a time, resumable, and never continued as another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llmrl.errors import LlmrlError, OutputError
from llmrl.files import check_output_dir, write_json, write_text
from llmrl.leret.corpus import fingerprint
from llmrl.leret.model_identity import model_and_adapter, model_identity
from llmrl.leret.opening import Opened
from llmrl.leret.options import given
from llmrl.leret.questions import QuestionSet
from llmrl.rollout.run_folder import lock_run
from llmrl.training.distributed import barrier, is_main_process

RUN_FILE, CACHE, PART_FILE = "leret.json", "cache", "made_of.json"
Models = Sequence[tuple[str, str | None, str | None]]
_OF_EVALUATION = ("answers", "report.json", "report.md", "outcomes.jsonl", "plots")
# what is removed by --overwrite: of rounds, of evaluations, of both
_WRITTEN = (
    "round-*", "policy", ".policy.*", "dev-start", "dev-start.json", "test", *_OF_EVALUATION,
    "config.resolved.yaml", "env.json", ".*.json.*", ".report.md.*", ".outcomes.jsonl.*", ".config.resolved.yaml.*",
)  # fmt: skip


def identity(opened: Opened) -> dict[str, Any]:
    """Return what a run may not change when it goes on: options, models, corpus, retriever, questions, prompt."""
    config = opened.config
    return {
        "options": {**given(config), **_identities(config.model, config.adapter)},
        "corpus": opened.corpus.fingerprint,
        "retriever": opened.retriever.fingerprint,
        "questions": questions_fingerprint(opened.questions),
        "dev_questions": questions_fingerprint(opened.dev),
        "setup": opened.setup.to_json(),
        "prompts": fingerprint(style.to_json() for style in opened.styles),
    }


def systems_identity(models: Models) -> dict[str, dict[str, str | None]]:
    """Return what the models of an evaluation, as (name, model, adapter), are known by."""
    return {name: _identities(model, adapter) for name, model, adapter in models}


def _identities(model: str | None, adapter: str | None) -> dict[str, str | None]:
    """Return what a model and an adapter on it are known by; an adapter in the place of the model brings its base."""
    if model is not None and adapter is None:
        model, adapter = model_and_adapter(model, None)
    return {"model": model_identity(model), "adapter": model_identity(adapter)}


def questions_fingerprint(questions: QuestionSet | None) -> str | None:
    """Return a hash of what a run reads of its questions, in any order of the file."""
    if questions is None:
        return None
    rows = sorted(questions.questions, key=lambda question: question.id)
    return fingerprint([q.id, q.text, q.type, q.answers, [sorted(ids) for ids in q.gold]] for q in rows)


@contextmanager
def claimed_folder(
    output_dir: Path | str, what: Mapping[str, Any], *, overwrite: bool, file: str = RUN_FILE
) -> Iterator[Path]:
    """Hold the folder of a run; one that holds an earlier part of the same run is gone on with.

    Args:
        output_dir: of the run.
        what: `identity`, or anything else that JSON can hold.
        overwrite: start anew: what an earlier run left is removed.
        file: where the identity is kept.

    Raises:
        OutputError: the folder holds something else, or a run that differs; the message names what.
    """
    folder = Path(output_dir).expanduser().resolve()
    if is_main_process() and not folder.is_dir():
        check_output_dir(folder, overwrite=False)
        folder.parent.mkdir(parents=True, exist_ok=True)  # the lock lies beside the folder
    with lock_run(folder) if is_main_process() else nullcontext():
        if is_main_process():
            _claim(folder, json.loads(json.dumps(what)), overwrite, file)
        barrier()
        try:
            yield folder
        except BaseException:
            if is_main_process():
                _release(folder, file)
            raise


def claim_part(folder: Path, what: Mapping[str, Any]) -> None:
    """Make a folder within that of a run the place for one evaluation; what it holds of another one is removed.

    Args:
        folder: such as that of the final report, whose policy or questions may be others when a run goes on.
        what: anything that JSON can hold.
    """
    file = folder / PART_FILE
    if is_main_process():
        text = json.dumps(what, indent=2, ensure_ascii=False) + "\n"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            for entry in (folder / name for name in _OF_EVALUATION):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
    barrier()


def _release(folder: Path, file: str) -> None:
    """Give up a folder in which nothing was finished, so that a mistyped model can be mended by the next command."""
    described = {file, "config.resolved.yaml", "env.json"}
    entries = [entry for entry in folder.rglob("*") if CACHE not in entry.relative_to(folder).parts]
    if all(entry.is_dir() or entry.name in described for entry in entries):
        for entry in sorted(entries, reverse=True):
            entry.rmdir() if entry.is_dir() else entry.unlink()


def _claim(folder: Path, what: dict[str, Any], overwrite: bool, file: str) -> None:
    path = folder / file
    if overwrite and path.is_file():
        _clear(folder, path)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{path} is damaged ({error}); --overwrite starts anew") from None
        changed = _changes(_as_now(before, what), what)
        if changed:
            more = f" ({len(changed)} differences)" if len(changed) > 1 else ""
            raise OutputError(
                f"{folder} holds a run with another {changed[0]}{more}: "
                "go on with the same options and files, name another --output_dir, or --overwrite it"
            )
        if before != what:
            write_json(path, what)
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.name != CACHE) if folder.is_dir() else []
    if others:
        raise OutputError(
            f"--output_dir {folder} holds {', '.join(others[:3])}{' ...' if others[3:] else ''} and no {file}: it is not the "
            "folder of such a run; name another"
        )
    folder.mkdir(exist_ok=True)
    write_json(path, what)


def _as_now(before: Mapping[str, Any], what: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of an earlier part in the words of today; what it does not say is as it is now.

    It may lack a key that came later, and name a model by its path.
    """
    told = {**what, **before}
    if before.get("dev_questions") is None and "dev_questions" in what:
        # what was explored and trained stays right: dev only decides which round is the best
        told["dev_questions"] = what["dev_questions"]
    if isinstance(before.get("options"), Mapping) and isinstance(what.get("options"), Mapping):
        old, now = before["options"], what["options"]
        told["options"] = {**now, **{key: value for key, value in old.items() if key in now}}
        told["options"].update(_by_weights(old, now))
    if isinstance(before.get("models"), list):
        now = what.get("models", {})
        rows = {name: {"model": model, "adapter": adapter} for name, model, adapter in before["models"]}
        told["models"] = {name: _by_weights(row, now.get(name, row)) for name, row in rows.items()}
    return told


def _by_weights(old: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model and adapter of an earlier part by what lies at their paths today, or as now where nothing does."""
    said = {key: old[key] for key in ("model", "adapter") if key in old}
    if any(str(value).startswith("sha256:") for value in said.values()):
        return said
    try:
        return dict(_identities(said.get("model"), said.get("adapter")))
    except LlmrlError:
        return {key: now.get(key) for key in ("model", "adapter")}


def _clear(folder: Path, path: Path) -> None:
    """Remove what a run wrote, its identity last; what else lies there stays, and so does the cache, which knows its keys."""
    for pattern in _WRITTEN:
        for entry in sorted(folder.glob(pattern)):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    left = sorted(entry.name for entry in folder.iterdir() if entry.name not in (CACHE, path.name))
    if left:
        raise OutputError(
            f"{folder} holds {', '.join(left[:3])}{' ...' if left[3:] else ''}, which no run wrote: move it away"
        )
    path.unlink()


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            shown = "" if isinstance(old, list | dict) else f": {old!r:.60}, now {new!r:.60}"
            changed.append(f"{prefix}{key}{shown}")
    return changed

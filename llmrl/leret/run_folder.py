"""The output folder of a LeReT run: one run at a time, resumable, and never continued as another run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llmrl.errors import OutputError
from llmrl.files import check_output_dir, write_json
from llmrl.leret.opening import Opened
from llmrl.leret.options import given
from llmrl.rollout.run_folder import lock_run
from llmrl.training.distributed import barrier, is_main_process

RUN_FILE = "leret.json"


def identity(opened: Opened) -> dict[str, Any]:
    """Return what a run may not change when it goes on: options, corpus, retriever, questions, prompt."""
    config = opened.config
    return {
        "options": given(config),
        "corpus": opened.corpus.fingerprint,
        "retriever": opened.retriever.fingerprint,
        "questions": sorted(question.id for question in opened.questions.questions),
        "setup": opened.setup.to_json(),
    }


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
    with lock_run(folder) if is_main_process() else nullcontext():
        if is_main_process():
            _claim(folder, json.loads(json.dumps(what)), overwrite, file)
        barrier()
        yield folder


def _claim(folder: Path, what: dict[str, Any], overwrite: bool, file: str) -> None:
    path = folder / file
    if overwrite and path.is_file():
        for entry in sorted(folder.iterdir()):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{path} is damaged ({error}); --overwrite starts anew") from None
        changed = _changes(before, what)
        if changed:
            more = f" ({len(changed)} differences)" if len(changed) > 1 else ""
            raise OutputError(
                f"{folder} holds a run with another {changed[0]}{more}: "
                "go on with the same options and files, name another --output_dir, or --overwrite it"
            )
        return
    check_output_dir(folder, overwrite=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, what)


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

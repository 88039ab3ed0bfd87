"""Checkpoint folders: which one is whole, which one to resume from, what to refuse. No torch in here.

A checkpoint is whole when `llmrl_checkpoint.json` lists its files with their sizes and all of them are there. It is
written last, inside a hidden staging folder which is then renamed, so a killed save leaves nothing named checkpoint-N.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from llmrl.errors import CheckpointError, Interrupted, OutputError
from llmrl.files import write_json

MANIFEST = "llmrl_checkpoint.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.checkpoint-\d+\.(tmp|old)\b.*")

logger = logging.getLogger(__name__)


def staging_folder(checkpoint: Path) -> Path:
    """Return the hidden folder, the same on every process, in which `checkpoint` is written before it is whole."""
    return checkpoint.parent / f".{checkpoint.name}.tmp"


def remove_leftovers(output_dir: Path | str) -> list[str]:
    """Delete the staging folders that killed saves left in `output_dir`; return their names."""
    if not Path(output_dir).is_dir():
        return []
    names = [p.name for p in Path(output_dir).iterdir() if p.is_dir() and _LEFTOVER.fullmatch(p.name)]
    for name in names:
        shutil.rmtree(Path(output_dir) / name, ignore_errors=True)
    return sorted(names)


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a kill in between leaves no half of it visible."""
    hidden = checkpoint.parent / f".{checkpoint.name}.old"
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def list_checkpoints(output_dir: Path | str) -> list[Path]:
    """Return the folders `checkpoint-N` in `output_dir`, whole or not, by rising N."""
    if not Path(output_dir).is_dir():
        return []
    found = [p for p in Path(output_dir).iterdir() if p.is_dir() and _CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def seal_checkpoint(folder: Path, facts: dict[str, Any]) -> None:
    """Flush every file of `folder` to the disk, then write the manifest: `facts` and each file's size."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    write_json(folder / MANIFEST, {"format": 1, **facts, "files": _sizes(folder)})


def read_manifest(checkpoint: Path | str) -> dict[str, Any]:
    """Return the manifest of a whole checkpoint.

    Raises:
        CheckpointError: the folder is missing, was not written by llmrl, or lacks a file.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        beside = [p.name for p in list_checkpoints(checkpoint.parent)]
        there = f"; there is {', '.join(beside)}" if beside else ""
        raise CheckpointError(f"checkpoint not found: {checkpoint}{there}")
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {MANIFEST}: it is no checkpoint of llmrl. Name a folder checkpoint-N, "
            "or start a new run from its weights by giving it as the model"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expected = manifest["files"]
        manifest["step"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: resume from another checkpoint") from error
    sizes = _sizes(checkpoint)
    for name, size in expected.items():
        if sizes.get(name) != size:
            state = "is missing" if name not in sizes else f"has {sizes[name]} bytes, not {size}"
            raise CheckpointError(f"{checkpoint} is incomplete: {name} {state}. Delete it and resume from another one")
    return manifest


def refuse_pickles(folder: Path | str) -> None:
    """Raise CheckpointError when `folder` holds a file that is loaded by unpickling, which can run code."""
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{path} is a pickle, and loading one can run code: delete it, or convert it to safetensors"
            )


def latest_checkpoint(output_dir: Path | str) -> Path | None:
    """Return the whole checkpoint with the highest step in `output_dir`, or None; broken ones are passed over."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            read_manifest(checkpoint)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
        else:
            return checkpoint
    return None


def resolve_resume(
    output_dir: Path | str, resume_from_checkpoint: str | bool | Path | None, *, sharded: bool = False
) -> str | None:
    """Return the checkpoint to resume from, or None to start at step 0.

    Args:
        output_dir: the run's output folder.
        resume_from_checkpoint: True or "latest" for the newest whole checkpoint of `output_dir`; a path for that one;
            None or False to start anew. With True and no checkpoint yet the run starts at step 0, so that the command
            of a run which was killed before its first save can be given again as it is.
        sharded: the run uses FSDP or DeepSpeed, whose own files are let through.

    Raises:
        CheckpointError: the path is missing, is incomplete, holds a pickle, or is sharded and the run is not.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint is False:
        return None
    if resume_from_checkpoint is True or str(resume_from_checkpoint) == "latest":
        checkpoint = latest_checkpoint(output_dir)
        if checkpoint is None:
            logger.warning("no checkpoint in %s yet: starting at step 0", output_dir)
            return None
    else:
        checkpoint = Path(resume_from_checkpoint).expanduser()
    if read_manifest(checkpoint).get("sharded", False) != sharded:
        saved, now = ("with", "without") if not sharded else ("without", "with")
        raise CheckpointError(
            f"{checkpoint} was saved {saved} FSDP or DeepSpeed and this run is {now}: launch it with the same "
            "accelerate config"
        )
    if not sharded:
        refuse_pickles(checkpoint)
    return str(checkpoint)


def begin_or_resume(work_dir: Path | str, resume_from_checkpoint: str | bool | None, *, overwrite: bool) -> str | None:
    """Return the checkpoint to go on from; of a run that starts anew clear the folder of earlier checkpoints.

    Raises:
        OutputError: `work_dir` has checkpoints and neither resuming nor overwriting was asked for.
        CheckpointError: see `resolve_resume`.
    """
    checkpoint = resolve_resume(work_dir, resume_from_checkpoint)
    earlier = list_checkpoints(work_dir) if resume_from_checkpoint is None else []
    if earlier and not overwrite:
        raise OutputError(
            f"--work_dir {work_dir} has checkpoints: --resume_from_checkpoint goes on, --overwrite starts anew"
        )
    for old in earlier:
        remove_checkpoint(old)
    remove_leftovers(work_dir)
    return checkpoint


def check_checkpoints(work_dir: Path | str, resume_from_checkpoint: str | bool | None, *, overwrite: bool) -> None:
    """Refuse what a training would refuse later, before anything is loaded.

    Raises:
        OutputError: `work_dir` holds checkpoints, and the run was asked neither to go on nor to start anew.
        CheckpointError: see `resolve_resume`.
    """
    found = list_checkpoints(work_dir)
    if found and resume_from_checkpoint is None and not overwrite:
        raise OutputError(
            f"{work_dir} holds {found[-1].name} of an earlier run: --resume_from_checkpoint goes on, --overwrite starts anew"
        )
    resolve_resume(work_dir, resume_from_checkpoint)


def train_from(trainer: Any, resume_from_checkpoint: str | bool | None) -> None:
    """Train from a checkpoint, or anew without those of earlier runs; call it on every process.

    Raises:
        Interrupted: Ctrl-C; the message says how to go on.
    """
    if resume_from_checkpoint is None and trainer.is_world_process_zero():
        for checkpoint in list_checkpoints(trainer.args.output_dir):
            remove_checkpoint(checkpoint)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except KeyboardInterrupt:
        found = latest_checkpoint(trainer.args.output_dir)
        kept = f"goes on from {found.name}" if found else "begins again"
        raise Interrupted(f"interrupted: the same command with --resume_from_checkpoint {kept}") from None


def compare_runs(checkpoint: Path | str, facts: dict[str, Any]) -> None:
    """Raise CheckpointError when a run described by `facts` cannot go on exactly from `checkpoint`.

    Every key of `facts` that the manifest also holds must be equal.
    """
    manifest = read_manifest(checkpoint)
    different = [
        f"{key} was {manifest[key]} and is {value} now"
        for key, value in facts.items()
        if key in manifest and manifest[key] != value
    ]
    if different:
        raise CheckpointError(
            f"{checkpoint} belongs to another run: {'; '.join(different)}. "
            "Use the old values, or start a new run from its weights by giving it as the model"
        )


def _sizes(folder: Path) -> dict[str, int]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): p.stat().st_size for p in paths}

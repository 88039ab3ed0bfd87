"""One error tree. Each message says what was expected, what came, and the one thing to change.

`run_command` is the outermost frame of every command and recipe: it turns an error into at most three lines on stderr
and an exit code. `LLMRL_DEBUG=1` keeps the traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_FAILED_ROWS = 3
EXIT_INTERRUPTED = 130


class LlmrlError(Exception):
    """Base of everything llmrl refuses with; `exit_code` is what the command returns."""

    exit_code = EXIT_ERROR


class UsageError(LlmrlError):
    """The call itself is wrong: an unknown option, a missing argument, two options that exclude each other."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A config file or option has an unknown key, a wrong type, or a nested value."""


class DataError(LlmrlError):
    """A data file is missing, empty, broken, or lacks a needed field; the message names file and line."""


class ModelError(LlmrlError):
    """A model cannot be loaded or produced numbers that cannot be used."""


class HeadMismatchError(LlmrlError):
    """A head was fitted on another base model, tokenizer or chat template than the one it is used with."""


class OutputError(LlmrlError):
    """The output folder cannot be used: not empty, not writable, or left by another run."""


class CheckpointError(LlmrlError):
    """A checkpoint is incomplete, belongs to another run, or holds a pickle."""


class VersionError(LlmrlError):
    """An installed package is outside the window llmrl was run with; the message says what to install."""


class DistributedError(LlmrlError):
    """The number of processes is not the one that was asked for."""


class RequestError(LlmrlError):
    """One request cannot be answered (an empty or too long prompt, an option its backend lacks); the others go on."""


class EngineError(LlmrlError):
    """A rollout engine cannot start, died, or answered with something that is not an answer."""


class UnansweredError(EngineError):
    """Servers failed on one request again and again, and were well in between: the request may be the cause."""


class SyncError(LlmrlError):
    """Engine and trainer do not hold the same weights after an update; nothing sampled since can be trusted."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, with what was kept and how to go on."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the entry of `known` closest to `word`, or None when none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" or the list of valid words, to close an error message with."""
    known = sorted(known)
    match = nearest(word, known)
    return f"; did you mean '{match}'?" if match else f"; valid: {', '.join(known)}"


def explain(error: BaseException) -> str | None:
    """Translate an error of the machine (full disk, out of memory) into a cause and the one thing to change."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("No space left on device", "Disk quota exceeded", "File too large")
    # safetensors raises an error type of its own for a failed write, with the system's words in the text
    if (isinstance(error, OSError) and error.errno in full) or any(text in str(error) for text in words):
        name = getattr(error, "filename", None)
        where = f" while writing {name}" if name else ""
        return f"disk full{where}: free some space and run again with --resume_from_checkpoint; finished parts are kept"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename}: choose another folder or change its owner"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return "out of memory (RAM): lower --max_tokens or --batch_size"
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
        return "out of memory on the accelerator: lower --batch_size"
    return None


def run_command(command: Callable[[], int | None]) -> int:
    """Run `command` and return the process's exit code; print refusals to stderr in at most three lines."""
    with _sigterm_as_interrupt() as terminated:
        try:
            return command() or EXIT_DONE
        except KeyboardInterrupt as interrupt:
            _print_error(
                str(interrupt)
                or "interrupted: finished parts are kept; the same command goes on (--resume_from_checkpoint)"
            )
            return 128 + signal.SIGTERM if terminated else EXIT_INTERRUPTED
        except BrokenPipeError:  # the reader of our output went away (`| head`): not an error of ours
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_DONE
        except LlmrlError as error:
            _print_error(str(error))
            return error.exit_code
        except Exception as error:
            message = explain(error)
            if message is None:
                first = str(error).strip().splitlines() or [""]
                message = f"{type(error).__name__}: {first[0]}\nset LLMRL_DEBUG=1 for the traceback"
            _print_error(message)
            return EXIT_ERROR


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """Let SIGTERM end the command as Ctrl-C does, so that what is half-written gets cleaned up."""
    terminated: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        terminated.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, previous)


def _print_error(message: str) -> None:
    if os.environ.get("LLMRL_DEBUG") == "1":
        traceback.print_exc()
    lines = message.strip().splitlines()[:3]
    print("llmrl: " + "\n       ".join(lines), file=sys.stderr, flush=True)

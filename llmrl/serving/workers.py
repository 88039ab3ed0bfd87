"""Several servers as one command: started side by side, watched, and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from llmrl.errors import EXIT_ERROR, EngineError, LlmrlError, UsageError
from llmrl.serving.plugin import MARKER_VARIABLE

_POLL = 0.2
_STOP_TIMEOUT = 45.0  # vLLM lets requests that are under way end
_GRACE = 3.0  # for what the server itself started
_TAIL = 5


_SECRET = {"key", "keys", "token", "secret", "password"}
_SHORTENED = ("--api-key", "--hf-token")  # argparse takes the first letters for an option


class PluginError(LlmrlError):
    """vLLM would start without llmrl's plugin, hence without the heads."""


class Worker:
    """One server in a process group of its own, so that nothing it started survives it."""

    def __init__(
        self,
        number: int,
        command: list[str],
        environment: dict[str, str],
        url: str,
        log: IO[bytes] | None,
        marker: Path,
    ) -> None:
        self.number, self.url, self.healthy, self.reported = number, url, False, False
        self._marker = marker
        self._last: deque[str] = deque(maxlen=_TAIL)
        self._log = log
        self.process = subprocess.Popen(
            command,
            env=environment | {MARKER_VARIABLE: str(marker)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._last.append(text)
            if self._log is not None:
                self._log.write(line)
                self._log.flush()
            else:
                print(f"[worker {self.number}] {text}", file=sys.stderr, flush=True)

    def is_healthy(self) -> bool:
        """Ask once."""
        with suppress(OSError, ValueError):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"{self.url}/health", timeout=5) as answer:
                self.healthy = answer.status == 200
        return self.healthy

    def how_it_ended(self) -> str:
        """Return one line, and the plugin's absence where that is the reason."""
        self._reader.join(timeout=2)
        code = self.process.returncode
        last = next((line for line in reversed(self._last) if line.strip()), "no output")
        if not self._marker.exists():
            last = "without having loaded llmrl's plugin; check with: llmrl doctor"
        return f"worker {self.number} ({self.url}) ended with exit code {code}: {last}"

    def wait(self, end: float) -> None:
        """Wait for the process until `end`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=max(0.1, end - time.monotonic()))

    def kill_group(self, end: float) -> None:
        """Wait for what the process started until `end`, then kill what is left."""
        while time.monotonic() < end and self._group_lives():
            time.sleep(_POLL)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join(timeout=5)

    def _group_lives(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def run_workers(
    commands: Sequence[list[str]], environments: Sequence[dict[str, str]], urls: Sequence[str], log_dir: Path | None
) -> int:
    """Run servers until all have ended or a signal comes; print their URLs, one a line, once all answer.

    A worker that dies later is reported and the others serve on.

    Raises:
        EngineError: One ended before it answered; the others are stopped.
    """
    stopped_by: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        stopped_by.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    workers: list[Worker] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmrl-serve-")))
        try:
            for i, (command, environment, url) in enumerate(zip(commands, environments, urls, strict=True)):
                log = _open_log(stack, log_dir, i)
                print(f"llmrl: worker {i}: {shown_command(command)}", file=sys.stderr, flush=True)
                workers.append(Worker(i, command, environment, url, log, scratch / f"plugin-ran-{i}"))
            return _watch(workers, stopped_by)
        finally:
            for worker in workers:
                if worker.process.poll() is None:
                    worker.process.terminate()
            end = time.monotonic() + _STOP_TIMEOUT
            for worker in workers:
                worker.wait(end)
            end = time.monotonic() + _GRACE
            for worker in workers:
                worker.kill_group(end)
            for number, handler in previous.items():
                signal.signal(number, handler)


def _watch(workers: Sequence[Worker], stopped_by: list[int]) -> int:
    announced = False
    while not stopped_by:
        for worker in workers:
            if worker.process.poll() is not None and not worker.reported:
                worker.reported = True
                if not announced:
                    raise EngineError(f"{worker.how_it_ended()}; the others were stopped")
                left = sum(other.process.poll() is None for other in workers)
                print(f"llmrl: {worker.how_it_ended()}; {left} go on", file=sys.stderr, flush=True)
        if all(worker.reported for worker in workers):
            return EXIT_ERROR
        if not announced and all(worker.healthy or worker.is_healthy() for worker in workers):
            announced = True
            print("\n".join(worker.url for worker in workers), flush=True)
        time.sleep(_POLL)
    return 128 + stopped_by[0]


def _open_log(stack: ExitStack, log_dir: Path | None, number: int) -> IO[bytes] | None:
    if log_dir is None:
        return None
    log_dir.mkdir(parents=True, exist_ok=True)
    return stack.enter_context((log_dir / f"worker-{number}.log").open("wb"))


def shown_command(command: Sequence[str]) -> str:
    """Return a command line for the log: without the interpreter, and with *** for every key and token."""
    shown, hidden = [], False
    for word in command[1:]:
        if not word.startswith("-"):
            shown.append("***" if hidden else word)
            continue
        name, equals, _ = word.partition("=")
        plain = name.replace("_", "-")
        hidden = bool(_SECRET & set(plain.replace(".", "-").split("-"))) or (
            len(plain) > 5 and any(full.startswith(plain) for full in _SHORTENED)
        )
        shown.append(f"{name}=***" if hidden and equals else word)
    return " ".join(shown)


def worker_devices(count: int, per_worker: int) -> list[str]:
    """Deal the visible GPUs to workers, `per_worker` to each; the value of CUDA_VISIBLE_DEVICES for each.

    Raises:
        UsageError: There are too few.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        devices = [device for device in seen.split(",") if device.strip()]
    else:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        devices = [str(i) for i in range(sum(line.startswith("GPU ") for line in found.stdout.splitlines()))]
    if len(devices) < count * per_worker:
        raise UsageError(
            f"--workers {count} with {per_worker} GPUs each needs {count * per_worker}, found {len(devices)}: start fewer"
        )
    return [",".join(devices[i * per_worker : (i + 1) * per_worker]) for i in range(count)]

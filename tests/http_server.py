"""A server as a child process: started, waited for, asked, and stopped whatever happens."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """`with Server(command, log) as server:`; the command gets --port. In a process group of its own, as in a terminal."""

    # one process less than vLLM's default for a CPU, and nothing that one small model does not need
    OPTIONS = (
        "--enforce-eager",
        "--max-model-len=128",
        "--max-num-seqs=4",
        f"--kv-cache-memory-bytes={64 << 20}",
        "--distributed-executor-backend=uni",
        "--disable-log-stats",
    )

    def __init__(self, command, log, env, *, port=None, options=()):
        self.port, self.log = port or free_port(), log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, f"--port={self.port}", *self.OPTIONS, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        children = descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in children:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def wait_until_healthy(self, timeout=240):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            code = self.process.poll()
            assert code is None, f"the server ended with {code}:\n{self.text()}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"the server is not healthy after {timeout} s:\n{self.text()}")

    def text(self):
        return self.log.read_text(errors="replace")[-5000:]

    def post(self, path, body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{error.code}: {error.read().decode(errors='replace')}") from error

    def complete(self, model, prompts, new_tokens):
        """Return what in_process.py's generate returns."""
        body = {
            "model": model,
            "prompt": prompts,
            "max_tokens": new_tokens,
            "temperature": 0,
            "logprobs": 0,
            "prompt_logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        choices = sorted(self.post("/v1/completions", body)["choices"], key=lambda choice: choice["index"])
        assert [choice["prompt_token_ids"] for choice in choices] == prompts
        return [
            {
                "ids": choice["token_ids"],
                "prompt_logprobs": [
                    step[str(token)]["logprob"]
                    for token, step in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True)
                ],
                "logprobs": choice["logprobs"]["token_logprobs"],
            }
            for ids, choice in zip(prompts, choices, strict=True)
        ]

    def stop(self, number, *, group=False, timeout=60):
        """Send a signal, to the whole group as a terminal does on Ctrl-C; return the exit code and who is still there."""
        children = descendants(self.process.pid)
        assert children, "the server has no child process"
        os.killpg(self.process.pid, number) if group else self.process.send_signal(number)
        code = self.process.wait(timeout=timeout)
        end = time.monotonic() + timeout  # grandchildren belong to init now and may take a moment
        while (left := [pid for pid in children if alive(pid)]) and time.monotonic() < end:
            time.sleep(0.1)
        return code, left


def listening_addresses(port):
    """Return the addresses at which somebody listens on `port`, as /proc/net prints them."""
    addresses = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.rpartition(":")
            if state == "0A" and int(number, 16) == port:
                addresses.append(address)
    return addresses


def descendants(pid):
    found = []
    for child in _children(pid):
        found += [child, *descendants(child)]
    return found


def _children(pid):
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return []


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

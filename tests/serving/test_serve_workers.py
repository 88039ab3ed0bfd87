"""`llmrl serve` on any model, several times at once, and with weight updates: what it starts, refuses and stops."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from http_server import Server, alive, descendants, free_port, listening_addresses
from serving_folders import ENVIRONMENT, ROOT, STORIES

from llmrl.cli import main
from llmrl.errors import EngineError, UsageError
from llmrl.serving import launch, workers

pytestmark = pytest.mark.vllm


@pytest.fixture
def started(monkeypatch):
    """What would have been started: (command, environment, ...) instead of a server."""
    calls = []
    monkeypatch.setenv("VLLM_PLUGINS", "llmrl")
    monkeypatch.setattr(launch, "_run", lambda command, environment: calls.append((command, environment)) or 0)
    monkeypatch.setattr(launch, "run_workers", lambda *args: calls.append(args) or 0)
    return calls


def test_serve_takes_a_plain_model(started):
    assert main(["serve", str(STORIES), "--seed", "1", "--port", "7"]) == 0
    ((command, environment),) = started
    assert command[2:] == [
        "vllm.entrypoints.cli.main", "serve", str(STORIES), "--seed", "1", "--port", "7",
        "--host", "127.0.0.1", "--dtype", "float32",
    ]  # fmt: skip
    assert "VLLM_SERVER_DEV_MODE" not in environment


def test_serve_takes_a_hub_name(started):
    assert main(["serve", "org/model", "--host=127.0.0.2"]) == 0
    assert started[0][0][4:] == ["org/model", "--host=127.0.0.2"]


def test_serve_sync_adds_what_updates_need(started):
    assert main(["serve", str(STORIES), "--sync", "--enable-lora"]) == 0
    ((command, environment),) = started
    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert json.loads(command[command.index("--weight-transfer-config") + 1]) == {"backend": "llmrl_file"}
    assert "--sync" not in command
    assert "--enable-lora" in command


@pytest.mark.parametrize(
    "host", [["--host", "0.0.0.0"], ["--host=192.168.0.1"], ["--host", "::"], ["--host=127.example.com"]]
)
def test_serve_sync_refuses_to_be_reached_from_outside(host, started, capsys):
    assert main(["serve", str(STORIES), "--sync", *host]) == 2
    text = capsys.readouterr().err
    assert "whoever reaches the port could replace the weights" in text
    assert "--allow_remote_updates" in text
    assert started == []
    assert main(["serve", str(STORIES), "--sync", "--allow_remote_updates", *host]) == 0
    assert len(started) == 1


@pytest.mark.parametrize("host", [["--host", "localhost"], ["--host=127.0.0.7"], ["--host", "::1"]])
def test_serve_sync_on_loopback(host, started):
    assert main(["serve", str(STORIES), "--sync", *host]) == 0


def test_serve_workers_have_ports_and_logs_of_their_own(started, tmp_path):
    assert main(["serve", str(STORIES), "--workers", "3", "--port=9000", "--log_dir", str(tmp_path), "--sync"]) == 0
    ((commands, environments, urls, log_dir),) = started
    assert [command[command.index("--port") + 1] for command in commands] == ["9000", "9001", "9002"]
    assert all(command.count("--port") == 1 and "--port=9000" not in command for command in commands)
    assert urls == [f"http://127.0.0.1:{port}" for port in (9000, 9001, 9002)]
    assert all(environment["VLLM_SERVER_DEV_MODE"] == "1" for environment in environments)
    assert log_dir == tmp_path


@pytest.mark.parametrize("size", [["--tensor_parallel_size", "2"], ["--tensor-parallel_size=2"], ["-tp", "2"]])
def test_serve_workers_take_underscores(size, started, monkeypatch):
    dealt = []
    monkeypatch.setattr(launch, "vllm_build", lambda: "cuda")
    monkeypatch.setattr(launch, "worker_devices", lambda count, each: dealt.append((count, each)) or ["0,1"] * count)
    monkeypatch.setattr(launch, "check_vllm", lambda: None)
    assert main(["serve", str(STORIES), "--workers=2", *size]) == 0
    assert dealt == [(2, 2)]


OPTIONS = [
    (["--api-key", "s3cret"], "--api-key ***"),
    (["--api-key", "s3cret", "s3cret2", "--seed", "1"], "--api-key *** *** --seed 1"),
    (["--api-key=s3cret", "--seed=1"], "--api-key=*** --seed=1"),
    (["--api_key", "s3cret"], "--api_key ***"),
    (["--api-k", "s3cret"], "--api-k ***"),
    (["--hf-token", "s3cret", "--seed", "1"], "--hf-token *** --seed 1"),
    (["--some-config.api_key=s3cret"], "--some-config.api_key=***"),
    (["--tokenizer-mode", "auto", "--max-num-batched-tokens=64"], "--tokenizer-mode auto --max-num-batched-tokens=64"),
]


@pytest.mark.parametrize(("options", "shown"), OPTIONS)
def test_serve_shows_no_key(options, shown, monkeypatch, capsys):
    seen = []

    def start(command, **rest):
        seen.append(command)
        raise KeyboardInterrupt  # before anything runs

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    monkeypatch.setenv("VLLM_PLUGINS", "llmrl")
    for workers_option in ([], ["--workers=2"]):
        with contextlib.suppress(KeyboardInterrupt):
            launch.main([str(STORIES), *options, *workers_option])
    text = capsys.readouterr().err
    assert "s3cret" not in text
    assert text.count(f"serve {STORIES} {shown} --") == 2
    assert len(seen) == 2
    assert all(set(options) <= set(command) for command in seen)  # vLLM gets it


def test_serve_help_says_what_a_key_does_not_guard(capsys):
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--api-key guards its /v1 endpoints only. /pause, /update_weights" in text


@pytest.mark.parametrize(
    "wrong",
    [
        ["--workers", "0"],
        ["--workers", "x"],
        ["--workers=2", "--port", "65535"],
        ["--workers=2", "--tensor-parallel-size", "two"],
    ],
)
def test_serve_refuses_wrong_workers(wrong, started, capsys):
    assert main(["serve", str(STORIES), *wrong]) == 2
    assert "expected" in capsys.readouterr().err or "x" in wrong
    assert started == []


def test_worker_devices_are_dealt(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert workers.worker_devices(4, 1) == ["4", "5", "6", "7"]
    assert workers.worker_devices(2, 2) == ["4,5", "6,7"]
    with pytest.raises(UsageError, match="needs 6, found 4"):
        workers.worker_devices(3, 2)


# a server that answers /health, and starts a child that would outlive it
STAND_IN = """
import http.server, os, subprocess, sys, time
pathlib = __import__("pathlib")
pathlib.Path(os.environ["LLMRL_PLUGIN_MARKER"]).touch()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
if sys.argv[2] == "ends":
    sys.exit("no memory for the cache")
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/end": os._exit(3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
"""
PARENT = """
import json, os, pathlib, sys
from llmrl.errors import run_command
from llmrl.serving.workers import run_workers
commands, urls, log_dir = json.loads(sys.argv[1])
sys.exit(run_command(lambda: run_workers(commands, [dict(os.environ)] * len(urls), urls, log_dir and pathlib.Path(log_dir))))
"""


@contextlib.contextmanager
def stand_ins(*kinds, log_dir=None):
    ports = [free_port() for _ in kinds]
    commands = [[sys.executable, "-c", STAND_IN, str(port), kind] for port, kind in zip(ports, kinds, strict=True)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    task = json.dumps([commands, urls, str(log_dir) if log_dir else None])
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, task],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        yield process, urls
    finally:
        for pid in [process.pid, *descendants(process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_workers_stops_all_with_their_children(number, tmp_path):
    with stand_ins("stays", "stays", log_dir=tmp_path) as (process, urls):
        assert [process.stdout.readline().strip() for _ in urls] == urls
        children = descendants(process.pid)
        assert len(children) == 4
        assert "child" in (tmp_path / "worker-1.log").read_text()
        process.send_signal(number)
        assert process.wait(timeout=60) == 128 + number
        assert not [pid for pid in children if alive(pid)]


def test_run_workers_reports_one_that_ends_and_goes_on():
    with stand_ins("stays", "stays") as (process, urls):
        assert [process.stdout.readline().strip() for _ in urls] == urls
        children = descendants(process.pid)
        end(urls[0])
        text = read_until(process.stderr, "ended with exit code")
        assert f"worker 0 ({urls[0]}) ended with exit code 3" in text
        assert text.rstrip().endswith("1 go on")
        assert urllib.request.urlopen(urls[1] + "/health", timeout=5).status == 200
        end(urls[1])
        assert process.wait(timeout=60) == 1
        assert not [pid for pid in children if alive(pid)]


def test_run_workers_stops_all_when_one_does_not_start():
    with stand_ins("stays", "ends") as (process, _):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert out == ""
        assert "[worker 1] no memory for the cache" in err
        assert err.splitlines()[-1].endswith("ended with exit code 1: no memory for the cache; the others were stopped")
        pids = [int(line.split()[-1]) for line in err.splitlines() if "] child " in line]
        assert not [pid for pid in pids if alive(pid)]


def test_worker_says_when_the_plugin_did_not_load(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('Model architectures are not supported')"]
    with pytest.raises(EngineError, match=r"without having loaded llmrl's plugin; check with: llmrl doctor"):
        workers.run_workers([command], [dict(os.environ)], ["http://127.0.0.1:1"], tmp_path)


def end(url):
    with contextlib.suppress(OSError):
        urllib.request.urlopen(url + "/end", timeout=5)


def read_until(stream, words):
    while words not in (line := stream.readline()):
        assert line, "the process ended"
    return line


@pytest.mark.slow
def test_serve_workers_two_real_servers(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "llmrl.cli", "serve", str(STORIES), "--workers=2", f"--log_dir={tmp_path}"]
    with Server(command, tmp_path / "out", ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, port=port) as server:
        urls = [f"http://127.0.0.1:{port + i}" for i in range(2)]
        deadline = time.monotonic() + 240
        while not all(url in server.text().splitlines() for url in urls):
            assert server.process.poll() is None, server.text()
            assert time.monotonic() < deadline, server.text()
            time.sleep(0.2)
        for i in range(2):
            assert listening_addresses(port + i) == ["0100007F"]
            server.port = port + i
            found = server.complete(str(STORIES), [[1, 403, 407, 261, 378]], 4)
            assert found[0]["ids"] == [432, 383, 286, 261]
        code, left = server.stop(signal.SIGTERM)
        assert (code, left) == (128 + signal.SIGTERM, []), server.text()
        assert listening_addresses(port) == listening_addresses(port + 1) == []

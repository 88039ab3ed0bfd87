"""A vLLM server as far as its client sees one, with faults on demand. What it answers follows from prompt and seed."""

import hashlib
import json
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LENGTH = 8  # tokens of an answer that nothing cuts


def next_token(ids, seed, weights):
    state = hashlib.sha256(json.dumps([ids, seed, weights]).encode()).digest()
    return 3 + int.from_bytes(state[:4], "big") % 500


def logprob(ids, token):
    return -((sum(ids) + 7 * token) % 97 + 1) / 50


class Listener(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False
    request_queue_size = 512  # with the default of 5, a burst of connections is partly reset


class FakeVllm:
    """`fault(path, body)` returns None for a good answer, or a fault by name; see `Handler.misbehave`."""

    def __init__(self, tokenizer, *, name="stories", root="/models/stories", length=64, fault=None, port=0, sync=True):
        self.tokenizer, self.name, self.root, self.length = tokenizer, name, root, length
        self.fault = fault or (lambda path, body: None)
        self.sync, self.processed = sync, False
        self.skew = 0.0  # taken from each logprob: as of a server that computes with other weights
        self.keys = set()
        self.label, self.weights, self.loading, self.paused = "default", "start", None, False
        self.adapters, self.seen, self.peak, self.now = {}, [], 0, 0
        self.closed_early = threading.Event()
        self.lock, self.stopping, self.sockets = threading.Lock(), threading.Event(), set()
        self.http = Listener(("127.0.0.1", port), type("H", (Handler,), {"fake": self}))
        self.port = self.http.server_address[1]
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def completions(self):
        return [body for path, body in self.seen if path == "/v1/completions"]

    def paths(self):
        return [path for path, _ in self.seen]

    def stop(self):
        """Die: nobody listens any more and every connection is reset."""
        self.stopping.set()
        self.http.shutdown()
        self.http.server_close()
        for connection in list(self.sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.thread.join()

    def restarted(self):
        return FakeVllm(self.tokenizer, name=self.name, root=self.root, length=self.length, port=self.port)

    # answers

    def complete(self, body):
        ids, seed = list(body["prompt"]), body.get("seed")
        weights = self.adapters.get(body["model"], self.weights)
        new, reason, why = [], "length", None
        while len(new) < body["max_tokens"]:
            new.append(next_token(ids + new, seed, weights))
            if new[-1] in body.get("stop_token_ids", []):
                reason, why = "stop", new[-1]
                break
        scale = 0.5 if self.processed else 1.0
        choice = {
            "index": 0,
            "text": "?",
            "token_ids": new,
            "prompt_token_ids": ids,
            "finish_reason": reason,
            "stop_reason": why,
            "logprobs": None,
            "prompt_logprobs": None,
        }
        if "logprobs" in body:
            found = [scale * logprob(ids + new[:i], token) - self.skew for i, token in enumerate(new)]
            top = [
                {f"token_id:{t}": p, "token_id:5": -9.0, "token_id:4": -0.001} for t, p in zip(new, found, strict=True)
            ]
            choice["logprobs"] = {"token_logprobs": found, "top_logprobs": top}
        if "prompt_logprobs" in body:
            steps = [{str(t): {"logprob": logprob(ids[:i], t) - self.skew, "rank": 1}} for i, t in enumerate(ids)]
            choice["prompt_logprobs"] = [None, *steps[1:]]
        return {"choices": [choice]}

    def answer(self, method, path, body):
        """Return (status, JSON)."""
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            card = {"id": self.name, "root": self.root, "parent": None, "max_model_len": self.length}
            return 200, {"data": [card, *({"id": a, "root": "x", "parent": self.name} for a in self.adapters)]}
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=False)}
        if path == "/v1/completions":
            if body["model"] != self.name and body["model"] not in self.adapters:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            return 200, self.complete(body)
        if path == "/v1/load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"].rpartition("/")[2]
            return 200, {}
        if path == "/v1/unload_lora_adapter":
            return (200, {}) if self.adapters.pop(body["lora_name"], None) else (404, {"error": {"message": "no such"}})
        if path == "/classify":
            data = [{"index": i, "probs": [len(text), 0.5]} for i, text in enumerate(body["input"])]
            return 200, {"data": data[::-1]}
        return self.develop(path, body) if self.sync else (404, {"error": {"message": "Not Found"}})

    def develop(self, path, body):
        if path == "/weight_info":
            return 200, {"weight_version": self.label}
        if path == "/update_weight_version":
            self.label = body["new_version"]
        elif path.startswith("/pause"):
            self.paused = True
        elif path == "/resume":
            self.paused = False
        elif path == "/update_weights" and not body["update_info"].get("stage"):
            self.loading = json.loads(Path(body["update_info"]["folder"], "manifest.json").read_text())["fingerprint"]
        elif path == "/finish_weight_update" and self.loading:
            self.weights, self.loading = self.loading, None
        elif path == "/reset_prefix_cache":
            return 200, {"success": True}
        elif path == "/is_paused":
            return 200, {"is_paused": self.paused}
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.fake.sockets.add(self.connection)

    def finish(self):
        self.fake.sockets.discard(self.connection)
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *args):
        pass

    def handle(self):
        with suppress(OSError, ValueError):
            super().handle()

    def do_GET(self):
        self.reply("GET", None)

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.reply("POST", json.loads(self.rfile.read(length) or b"null"))

    def reply(self, method, body):
        fake = self.fake
        path = self.path
        with fake.lock:
            fake.seen.append((path, body))
            fake.keys.add(self.headers.get("Authorization"))
            fake.now += path == "/v1/completions"
            fake.peak = max(fake.peak, fake.now)
        try:
            fault = fake.fault(path, body)
            status, answer = fake.answer(method, path, body) if fault in (None, "slow") else (0, None)
            if fault == "slow":
                time.sleep(0.15)
            if fault not in (None, "slow"):
                self.misbehave(fault, fake, body)
            else:
                self.send(status, json.dumps(answer).encode())
        finally:
            with fake.lock:
                fake.now -= path == "/v1/completions"

    def misbehave(self, fault, fake, body):
        if isinstance(fault, tuple):  # a status and a message
            self.send(fault[0], json.dumps({"error": {"message": fault[1]}}).encode())
        elif callable(fault):  # an answer that is wrong somewhere
            answer = fake.complete(body)
            fault(answer["choices"][0])
            self.send(200, json.dumps(answer).encode())
        elif fault == "garbage":
            self.send(200, b"<html>proxy</html>")
        elif fault == "empty":
            self.send(200, b"")
        elif fault == "cut":
            whole = json.dumps(fake.complete(body)).encode()
            self.send(200, whole, part=len(whole) // 2)
        elif fault == "reset":
            self.close_connection = True
        elif fault == "die":
            threading.Thread(target=fake.stop).start()
            fake.stopping.wait()
            self.close_connection = True
        elif fault == "hang":
            self.connection.settimeout(0.02)
            while not fake.stopping.is_set():
                with suppress(TimeoutError):
                    if self.connection.recv(1) == b"":
                        fake.closed_early.set()
                        break
            self.close_connection = True

    def send(self, status, data, part=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:part])
        if part is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

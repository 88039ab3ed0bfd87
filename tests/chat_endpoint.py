"""An OpenAI-compatible chat endpoint inside the test's own process, for clients that ask one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """A chat endpoint whose answers are a list: a text, a (status, body, headers), or a function of the request."""

    def __init__(self):
        self.answers, self.requests, self.models = [], [], ["m"]
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append({"path": self.path, "key": self.headers["authorization"], **body})
                answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                answer = answer(body) if callable(answer) else answer
                if isinstance(answer, str):
                    answer = (200, json.dumps({"choices": [{"message": {"content": answer}}]}))
                status, text, *headers = answer
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def do_GET(self):
                text = json.dumps({"data": [{"id": name} for name in server.models]}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *request: None  # a client that stopped waiting is part of some tests
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stop()

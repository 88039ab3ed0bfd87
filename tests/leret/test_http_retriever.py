import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from llmrl.errors import UsageError
from llmrl.leret.corpus import Corpus, Passage
from llmrl.leret.http_retriever import HttpRetriever
from llmrl.leret.retriever import Hit, RetrieverError

CORPUS = Corpus(
    (
        Passage("p1", "Paris", "The city of light."),
        Passage("p2", "Paris", "A hero of Troy."),
        Passage("5", "Rome", "The eternal city."),
        Passage("p4", "Tom &amp; Jerry", "A cartoon."),
    )
)


class Search(ThreadingHTTPServer):
    """A search server on a free port: `answer(query, k, attempt)` returns (status, body)."""

    daemon_threads = True

    def __init__(self, answer):
        self.answer, self.requests, self.lock = answer, [], threading.Lock()
        self.under_way = self.most = 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that did not wait


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        parts = urlsplit(self.path)
        fields = parse_qs(parts.query)
        query, k = fields["query"][0], int(fields["k"][0])
        with server.lock:
            server.requests.append((parts.path, query, k))
            attempt = sum(q == query for _, q, _ in server.requests)
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        status, body = server.answer(query, k, attempt)
        with server.lock:
            server.under_way -= 1
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(answer):
        servers.append(Search(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def colbert(*rows):
    return 200, {"query": "q", "topk": list(rows)}


def test_search_reads_colbert_answers(serve):
    rows = [
        {"pid": 3, "rank": 2, "score": 20.5, "text": "Rome | The eternal | city.", "prob": 0.1},
        {"pid": 9, "rank": 1, "score": 21, "text": "no title"},
        {"pid": "x", "rank": 3, "score": -1.25, "title": "T", "text": "U | V"},
        {"pid": 9, "rank": 4, "score": 0, "text": "again"},
    ]
    server = serve(lambda query, k, attempt: colbert(*rows))
    found = HttpRetriever(server.url).search(["who? & what=é", " "], 4)
    assert found == [
        [
            Hit("9", "", "no title", 21.0),
            Hit("3", "Rome", "The eternal | city.", 20.5),
            Hit("x", "T", "U | V", -1.25),
        ],
        [],
    ]
    assert server.requests == [("/api/search", "who? & what=é", 4)]  # the blank query was not sent
    assert [len(hits) for hits in HttpRetriever(server.url + "/api/search/").search(["q"], 2)] == [2]


def test_search_keeps_the_order_of_equal_scores_and_of_queries(serve):
    def answer(query, k, attempt):
        time.sleep(0.02 if query == "q0" else 0)
        return colbert(*({"pid": f"{query}-{i}", "score": 1, "text": ""} for i in (3, 1, 2)))

    found = HttpRetriever(serve(answer).url, parallel=4).search([f"q{i}" for i in range(12)], 3)
    assert [[hit.id for hit in hits] for hits in found] == [[f"q{i}-{j}" for j in (3, 1, 2)] for i in range(12)]


def test_batch_is_sent_in_parallel(serve):
    def answer(query, k, attempt):
        time.sleep(0.05)
        return colbert()

    server = serve(answer)
    assert HttpRetriever(server.url, parallel=4).search([f"q{i}" for i in range(12)], 3) == [[]] * 12
    assert 2 <= server.most <= 4


def test_hits_are_matched_to_the_corpus(serve):
    rows = [
        {"pid": "p1", "score": 9, "text": ""},  # by id
        {"pid": 5, "score": 8, "text": "Tom_& jerry | A cartoon"},  # id of another passage: by title
        {"pid": 77, "score": 7, "title": "PARIS", "text": "A hero of Troy."},  # by title and text
        {"pid": 5, "score": 6, "title": "Oslo", "text": "Elsewhere."},  # id taken, title unknown
        {"pid": 8, "score": 5, "text": "Elsewhere."},
        {"pid": "p2", "score": 4, "title": "Paris", "text": ""},  # again
    ]
    server = serve(lambda query, k, attempt: colbert(*rows))
    found = HttpRetriever(server.url, name="cb", corpus=CORPUS).search(["q"], 9)[0]
    assert [(hit.id, hit.score) for hit in found] == [("p1", 9), ("p4", 8), ("p2", 7), ("cb:5", 6), ("8", 5)]
    assert found[0] == Hit("p1", "Paris", "The city of light.", 9.0)
    assert found[3].text == "Elsewhere."


@pytest.mark.parametrize(
    "failure", [(503, {}), (500, b"oops"), (429, b""), (200, {"error": True, "message": "overloaded"})]
)
def test_failures_that_may_pass_are_tried_again(serve, failure):
    server = serve(lambda query, k, n: failure if n < 3 else colbert({"pid": 1, "score": 1, "text": "t"}))
    found = HttpRetriever(server.url, retries=2, backoff=0.01).search(["q"], 3)
    assert [hit.id for hit in found[0]] == ["1"]
    assert len(server.requests) == 3


def test_pauses_double(serve, monkeypatch):
    pauses = []
    monkeypatch.setattr("llmrl.leret.http_retriever.time.sleep", pauses.append)
    server = serve(lambda query, k, n: (503, {}))
    with pytest.raises(RetrieverError, match="status 503"):
        HttpRetriever(server.url, retries=8, backoff=0.5).search(["q"], 3)
    assert pauses == [0, 0.5, 1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("answer", "requests", "words"),
    [
        ((503, b"all  busy"), 2, "status 503 all busy (2 attempts); check that the server runs"),
        ((200, {"error": True, "message": "no index"}), 2, "the server says 'no index' (2 attempts)"),
        ((404, b"no such path"), 1, "status 404 no such path"),
        ((200, b"<html>"), 1, "expected JSON, got '<html>'"),
        ((200, {"hits": []}), 1, "expected an answer with a list 'topk', got {'hits': []}"),
        ((200, [1]), 1, "expected an answer with a list 'topk', got [1]"),
        (colbert({"pid": 1, "text": "t"}), 1, "expected rows with 'pid' and a number as 'score', got"),
        (colbert({"score": 1.0, "text": "t"}), 1, "expected rows with 'pid'"),
        (colbert({"pid": 1, "score": float("nan"), "text": "t"}), 1, "expected rows with 'pid'"),
        (colbert("text"), 1, "got 'text'"),
    ],
)
def test_errors_name_url_and_query(serve, answer, requests, words):
    server = serve(lambda query, k, attempt: answer)
    with pytest.raises(RetrieverError) as error:
        HttpRetriever(server.url, name="cb", retries=1, backoff=0.01).search(["who?"], 3)
    assert str(error.value).startswith(f"retriever cb at {server.url}/api/search, query 'who?': ")
    assert words in str(error.value)
    assert len(server.requests) == requests


def test_a_slow_server_and_no_server(serve):
    def answer(query, k, attempt):
        time.sleep(0.5)
        return colbert()

    server = serve(answer)
    with pytest.raises(RetrieverError, match=r"no answer in 0\.1 s \(1 attempts\)"):
        HttpRetriever(server.url, timeout=0.1, retries=0).search(["q"], 3)
    gone = serve(lambda *a: colbert())
    gone.server_close()
    with pytest.raises(RetrieverError, match=rf"127\.0\.0\.1:{gone.server_port}.*ConnectError"):
        HttpRetriever(gone.url, retries=1, backoff=0.01).search(["q"], 3)


def test_a_proxy_of_the_environment_is_not_asked(serve, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    server = serve(lambda *a: colbert())
    assert HttpRetriever(server.url, retries=0).search(["q"], 3) == [[]]


def test_fingerprint_is_of_url_name_and_corpus():
    url = "http://127.0.0.1:1"
    retrievers = [
        HttpRetriever(url),
        HttpRetriever(url, name="b"),
        HttpRetriever("http://127.0.0.1:2"),
        HttpRetriever(url, corpus=CORPUS),
    ]
    assert len({r.fingerprint for r in retrievers}) == 4
    assert HttpRetriever(url + "/api/search").fingerprint == retrievers[0].fingerprint
    moved = HttpRetriever("http://127.0.0.1:2", name="b")  # the name is that of the index, wherever it is served
    assert moved.fingerprint == retrievers[1].fingerprint
    [r.close() for r in retrievers]


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"parallel": 0}])
def test_refusals(options):
    with pytest.raises(UsageError, match="expected timeout above 0"):
        HttpRetriever("http://127.0.0.1:1", **options)
    for url in ("127.0.0.1:1", "ftp://a", "http://", None):
        with pytest.raises(UsageError, match="expected the URL of a search server"):
            HttpRetriever(url)

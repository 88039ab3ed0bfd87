"""Opening a run: the corpus is embedded by one process, whose file the others read."""

import pytest
from explore_world import CORPUS

from llmrl.leret import opening
from llmrl.leret.options import LeretConfig

NEEDED = {"model": "m", "questions": ["q"], "passages": ["p"]}


@pytest.mark.parametrize(
    ("main", "retriever", "order"),
    [
        (True, "dense", ["open", "barrier"]),
        (False, "dense", ["barrier", "open"]),
        (False, "bm25", ["open"]),
    ],
)
def test_the_main_process_opens_a_slow_retriever_before_the_others(tmp_path, monkeypatch, main, retriever, order):
    events = []
    monkeypatch.setattr(opening, "is_main_process", lambda: main)
    monkeypatch.setattr(opening, "barrier", lambda: events.append("barrier"))
    monkeypatch.setattr(opening, "open_retriever", lambda *args, **named: events.append("open"))
    opening.open_search(LeretConfig(output_dir=str(tmp_path), retriever=retriever, encoder="e", **NEEDED), CORPUS)
    assert events == order


def test_the_name_of_a_remote_index_reaches_its_retriever(tmp_path):
    options = {"retriever": "http", "retriever_url": "http://127.0.0.1:1", "retriever_name": "wiki"}
    found = opening.open_search(LeretConfig(output_dir=str(tmp_path), **options, **NEEDED), CORPUS)
    assert found.name == "wiki"

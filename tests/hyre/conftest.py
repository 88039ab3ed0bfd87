"""Fixtures of the labelling session."""

import pytest
from query_place import Place


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    return Place(tmp_path, monkeypatch, capsys)


@pytest.fixture
def places(tmp_path, monkeypatch, capsys):
    def make(name):
        (tmp_path / name).mkdir()
        return Place(tmp_path / name, monkeypatch, capsys)

    return make

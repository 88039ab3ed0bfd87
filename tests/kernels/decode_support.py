"""What the tests of the decode bench share; the bench itself is the fixture `decode`."""

from pathlib import Path

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench"
TOY = ["--device", "cpu", "--toy", "--rounds", "3", "--context", "8", "--experts", "4", "--r", "4"]


def few_rows(decode, monkeypatch, *names):
    """Leave only these rows."""
    rows = [row for row in decode.all_rows() if row.name in names]
    monkeypatch.setattr(decode, "all_rows", lambda: rows)

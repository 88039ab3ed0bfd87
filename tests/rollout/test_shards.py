"""Shards that survive what kills a process or fills a disk, and the one sorted file made from them."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrl.errors import DataError, OutputError
from llmrl.rollout.shards import ShardWriter, claim_run, export_records, read_shards, scan_shards

ROWS = [{"id": "b", "x": 1}, {"id": "a", "x": 2}, {"x": 3}]


def write(folder, *keys, rank=0, **options):
    with ShardWriter(folder, rank) as writer:
        for position, row_id, sample in keys:
            writer.write((row_id, sample), {"said": f"{row_id}{sample}"}, position=position, **options)
        return writer.path


def test_read_shards_returns_what_was_written_by_all_ranks(tmp_path):
    write(tmp_path, (0, "b", 0), (0, "b", 1))
    write(tmp_path, (1, "a", 0), rank=1)
    assert read_shards(tmp_path) == {("b", 0): {"said": "b0"}, ("b", 1): {"said": "b1"}, ("a", 0): {"said": "a0"}}


def test_every_line_is_json(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(("b\u2028", 0), {"said": "\ud800 \u2028 é"}, position=0, notes={"seconds": 1.5})
    (line,) = writer.path.read_text().splitlines()
    assert json.loads(line)["record"] == {"said": "\ud800 \u2028 é"}
    assert json.loads(line)["notes"] == {"seconds": 1.5}


@pytest.mark.parametrize("cut", [1, 2, 10, 100])
def test_torn_last_line_is_cut_off_and_written_again(tmp_path, capsys, cut):
    path = write(tmp_path, (0, "b", 0), (1, "a", 0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert set(scan_shards(tmp_path)) == {("b", 0)}
    assert "left out 1 broken line" in capsys.readouterr().err
    write(tmp_path, (1, "a", 0))
    assert path.read_bytes() == whole
    assert "cut off a torn line" in capsys.readouterr().err
    assert set(scan_shards(tmp_path)) == {("b", 0), ("a", 0)}
    assert capsys.readouterr().err == ""


def test_changed_byte_in_the_middle_is_left_out_and_the_rest_kept(tmp_path, capsys):
    path = write(tmp_path, (0, "b", 0), (1, "a", 0), (2, "2", 0))
    path.write_bytes(path.read_bytes().replace(b"a0", b"aX"))
    assert set(scan_shards(tmp_path)) == {("b", 0), ("2", 0)}
    assert "left out 1 broken line" in capsys.readouterr().err
    before = path.stat().st_size
    write(tmp_path)
    assert path.stat().st_size == before


def test_torn_line_of_another_rank_is_not_touched(tmp_path):
    path = write(tmp_path, (0, "b", 0), rank=1)
    path.write_bytes(path.read_bytes()[:-3])
    before = path.read_bytes()
    write(tmp_path, (1, "a", 0), rank=0)
    assert path.read_bytes() == before


def test_newest_record_of_a_pair_wins_whatever_the_order_of_files(tmp_path):
    with ShardWriter(tmp_path, 1) as writer:
        writer.write(("b", 0), {"said": "first"}, position=0, failed=True, attempt=0)
    with ShardWriter(tmp_path, 0) as writer:
        writer.write(("b", 0), {"said": "second"}, position=0, attempt=1)
    assert read_shards(tmp_path)[("b", 0)] == {"said": "second"}
    with ShardWriter(tmp_path, 0) as writer:
        writer.write(("b", 0), {"said": "same attempt"}, position=0, failed=True, attempt=1)
    assert read_shards(tmp_path)[("b", 0)] == {"said": "second"}


def test_writer_rolls_at_the_size_limit_and_goes_on_in_the_last_file(tmp_path):
    for start in (0, 10):
        with ShardWriter(tmp_path, roll_bytes=500) as writer:
            for i in range(start, start + 10):
                writer.write((str(i), 0), {"said": "x" * 20}, position=i)
    files = sorted((tmp_path / "shards").iterdir())
    assert [f.name for f in files] == [f"00000-{i:05d}.jsonl" for i in range(len(files))]
    assert all(f.stat().st_size <= 500 for f in files)
    assert len(files) == 7  # a line has a little over 160 bytes: three in each
    assert len(read_shards(tmp_path)) == 20


def test_record_longer_than_the_limit_is_written(tmp_path):
    with ShardWriter(tmp_path, roll_bytes=10) as writer:
        writer.write(("b", 0), {"said": "x" * 50}, position=0)
        writer.write(("b", 1), {"said": "y" * 50}, position=0)
    assert len(read_shards(tmp_path)) == 2


def test_write_refuses_what_is_not_json_and_goes_on(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for wrong in (float("nan"), object()):
            with pytest.raises(DataError, match="record b/0: expected what JSON can hold"):
                writer.write(("b", 0), {"said": wrong}, position=0)
        writer.write(("b", 0), {"said": 1}, position=0)
    assert read_shards(tmp_path) == {("b", 0): {"said": 1}}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_cause_and_keeps_what_is_written(tmp_path, monkeypatch, error):
    real = os.write

    def full(fd, data):
        if b'"bad"' in bytes(data):
            return real(fd, bytes(data)[:30])  # a part goes in, the rest does not
        if bytes(data).startswith(b'{"crc32'):
            return real(fd, data)
        raise OSError(error, os.strerror(error))

    writer = ShardWriter(tmp_path)
    monkeypatch.setattr("llmrl.rollout.shards.os.write", full)
    writer.write(("good", 0), {"said": 1}, position=0)
    size = writer.path.stat().st_size
    words = f"{os.strerror(error)}; free some space and run the same command again. The 1 records before it are kept"
    with pytest.raises(OutputError, match=words):
        writer.write(("bad", 0), {"said": 2}, position=1)
    assert writer.path.stat().st_size == size
    writer.close()
    assert set(read_shards(tmp_path)) == {("good", 0)}


def test_sync_reaches_the_disk_after_a_second_and_at_close(tmp_path, monkeypatch):
    clock, synced = [100.0], []
    monkeypatch.setattr("llmrl.rollout.shards.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("llmrl.rollout.shards.os.fsync", lambda fd: synced.append(clock[0]))
    with ShardWriter(tmp_path) as writer:
        writer.write(("b", 0), {}, position=0)
        assert synced == []
        clock[0] = 101.0
        writer.sync()
        writer.sync()
        assert synced == [101.0]
        clock[0] = 102.5
        writer.write(("b", 1), {}, position=0)
        assert synced == [101.0, 102.5]
        writer.write(("b", 2), {}, position=0)
    assert synced == [101.0, 102.5, 102.5]


def test_second_writer_of_a_rank_is_refused(tmp_path):
    with ShardWriter(tmp_path, 3):
        code = "import sys; from llmrl.rollout.shards import ShardWriter; ShardWriter(sys.argv[1], 3)"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "is being written by another process" in done.stderr
    ShardWriter(tmp_path, 3).close()


def test_export_is_sorted_by_row_then_sample(tmp_path):
    assert claim_run(tmp_path, ROWS, 2, seed=0) == ["b", "a", "2"]
    write(tmp_path, (2, "2", 1), (1, "a", 0), (0, "b", 1))
    write(tmp_path, (2, "2", 0), (0, "b", 0), (1, "a", 1), rank=1)
    assert export_records(tmp_path, tmp_path / "data.jsonl") == 6
    said = [json.loads(line)["said"] for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    assert said == ["b0", "b1", "a0", "a1", "20", "21"]
    assert {p.name for p in tmp_path.iterdir()} == {"shards", "run.json", "data.jsonl"}


def test_export_refuses_missing_pairs_unless_partial(tmp_path):
    with pytest.raises(OutputError, match=r"not found: .*run\.json"):
        export_records(tmp_path, tmp_path / "data.jsonl")
    claim_run(tmp_path, ROWS, 2)
    write(tmp_path, (0, "b", 0), (1, "a", 0))
    with pytest.raises(OutputError, match="holds 2 of 6 records, 4 are missing"):
        export_records(tmp_path, tmp_path / "data.jsonl")
    assert not (tmp_path / "data.jsonl").exists()
    assert export_records(tmp_path, tmp_path / "data.jsonl", partial=True) == 2


def test_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    claim_run(tmp_path, ROWS[:1], 1)
    write(tmp_path, (0, "b", 0))
    (tmp_path / "data.jsonl").write_text("old")
    monkeypatch.setattr("llmrl.rollout.shards.os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        export_records(tmp_path, tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"shards", "run.json", "data.jsonl"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"sampling": {"temperature": 0.5, "top_k": 0}}, r"sampling\.temperature was 1.0, is 0.5"),
        ({"samples": 3}, "samples was 2, is 3"),
        ({"rows": ROWS[:2]}, "rows.count was 3, is 2"),
        ({"rows": [ROWS[0], ROWS[1], {"x": 4}]}, "rows.hash was"),
        ({"rows": [ROWS[1], ROWS[0], ROWS[2]]}, "rows.hash was"),
        ({"model": "other"}, "model was None, is 'other'"),
    ],
)
def test_claim_run_refuses_another_run_and_names_what_differs(tmp_path, change, words):
    same = {"rows": ROWS, "samples": 2, "seed": 0, "sampling": {"temperature": 1.0, "top_k": 0}}
    claim_run(tmp_path, **same)
    claim_run(tmp_path, **same)
    with pytest.raises(OutputError, match=words) as refusal:
        claim_run(tmp_path, **{**same, **change})
    assert "top_k" not in str(refusal.value)
    claim_run(tmp_path, **same)


def test_claim_run_refuses_shards_of_an_unknown_run(tmp_path):
    write(tmp_path, (0, "b", 0))
    with pytest.raises(OutputError, match=r"holds shards and no run\.json"):
        claim_run(tmp_path, ROWS, 1)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least one row"),
        ([{"id": "a"}, {"id": "a"}], "rows 0 and 1 have the same id 'a'"),
        ([{"id": "1"}, {}], "rows 0 and 1 have the same id '1'"),
        ([{"id": 7}], "row 0: expected an id that is text, got 7"),
        ([{}, {"x": object()}], r"row 1 \(1\): expected what JSON can hold"),
    ],
)
def test_claim_run_refuses_rows(tmp_path, rows, words):
    with pytest.raises(DataError, match=words):
        claim_run(tmp_path, rows, 1)


def test_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def no_locks(fd, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("llmrl.rollout.shards.fcntl.flock", no_locks)
    write(tmp_path, (0, "b", 0))
    assert set(scan_shards(tmp_path)) == {("b", 0)}


def test_interrupt_in_the_middle_of_a_line_leaves_no_part_of_it(tmp_path, monkeypatch, capsys):
    real = os.write

    def stopped(fd, data):
        real(fd, bytes(data)[:30])
        raise KeyboardInterrupt

    with ShardWriter(tmp_path) as writer:
        writer.write(("b", 0), {"said": 1}, position=0)
        monkeypatch.setattr("llmrl.rollout.shards.os.write", stopped)
        with pytest.raises(KeyboardInterrupt):
            writer.write(("a", 0), {"said": 2}, position=1)
        monkeypatch.undo()
        writer.write(("c", 0), {"said": 3}, position=2)
    assert read_shards(tmp_path) == {("b", 0): {"said": 1}, ("c", 0): {"said": 3}}
    assert capsys.readouterr().err == ""


def test_a_run_that_another_process_begins_meanwhile_is_joined(tmp_path, monkeypatch):
    """Between the two looks of one process another writes run.json, and then its first shard."""
    rows = [{"id": "a"}]
    real = Path.exists

    def late(path, **options):
        found = real(path, **options)
        if path.name == "run.json" and not found:
            monkeypatch.setattr(Path, "exists", real)
            claim_run(tmp_path, rows, 1, seed=0)
            (tmp_path / "shards").mkdir()
            (tmp_path / "shards" / "0.jsonl").write_text("{}\n")
        return found

    monkeypatch.setattr(Path, "exists", late)
    assert claim_run(tmp_path, rows, 1, seed=0) == ["a"]

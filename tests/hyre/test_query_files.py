"""Sessions that end badly, and files that are not what they should be: nothing that was said is lost."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import query_place
from query_place import make_ensemble, write_pool

from llmrl.errors import DataError, HeadMismatchError, Interrupted, OutputError, UsageError
from llmrl.hyre import query_files
from llmrl.hyre.pairs import read_pairs
from llmrl.hyre.query import query
from llmrl.hyre.user import User, load_user


@pytest.mark.parametrize("bytes_left", [1, 10, 40])
def test_query_leaves_out_a_torn_last_label_and_keeps_those_before(places, bytes_left):
    whole, torn = places("whole"), places("torn")
    whole.run("abab")
    torn.run("aba")
    before = torn.labels.read_bytes()
    last = before.rstrip(b"\n").rfind(b"\n") + 1
    torn.labels.write_bytes(before[: last + bytes_left])
    torn.patch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    query(torn.config(), torn.ensemble)
    said = torn.capsys.readouterr()
    assert "torn" in said.err
    assert "2 labels and 0 skips so far" in said.out
    assert torn.files() == whole.files()


def test_query_keeps_a_whole_last_label_whose_line_end_is_missing(places):
    whole, cut = places("whole"), places("cut")
    whole.run("abab")
    cut.run("aba")
    cut.labels.write_bytes(cut.labels.read_bytes()[:-1])
    cut.run("b")
    assert cut.files() == whole.files()


def test_query_refuses_a_broken_line_in_the_middle(place):
    place.run("aba")
    lines = place.labels.read_text().splitlines()
    place.labels.write_text("\n".join([lines[0], lines[1][:20], lines[2], ""]))
    before = place.files()
    with pytest.raises(DataError, match=r"anna.labels.jsonl:2: not JSON"):
        place.run("a")
    assert place.files() == before


def test_query_refuses_labels_of_another_ensemble(place):
    place.run("aba")
    before = (*place.files(), place.session.read_bytes())
    place.ensemble = make_ensemble(seed=1)
    with pytest.raises(HeadMismatchError, match="another ensemble") as refusal:
        place.run("a")
    assert len(str(refusal.value).splitlines()) <= 3
    assert (*place.files(), place.session.read_bytes()) == before


def test_query_refuses_labels_of_another_pool_and_takes_a_grown_one(place):
    place.run("aba")
    before = (*place.files(), place.session.read_bytes())
    other = write_pool(place.folder / "other.jsonl", begin=100)
    place.ensemble._base.before_embed = lambda: pytest.fail("features of a pool that is refused")
    with pytest.raises(DataError, match=r"anna.labels.jsonl:1: this pair is not in the pool"):
        place.run("a", pairs=[str(other)])
    assert (*place.files(), place.session.read_bytes()) == before
    place.ensemble._base.before_embed = None
    place.run("b", pairs=[str(other), str(place.pool)])
    assert len(read_pairs(place.labels)) == 4


def test_query_refuses_a_pair_that_is_labelled_twice(place):
    place.run("ab")
    first = place.labels.read_text().splitlines()[0]
    place.labels.write_text(place.labels.read_text() + first + "\n")
    with pytest.raises(DataError, match=r"jsonl:3 labels the pair of .*jsonl:1 again"):
        place.run("a")


def test_query_refuses_files_that_are_no_sessions(places):
    for name in ("user", "labels"):
        place = places(name)
        getattr(place, name).write_text("mine\n")
        with pytest.raises(OutputError, match="belongs to no session"):
            place.run("a")
        assert getattr(place, name).read_text() == "mine\n"
        place.run("a", overwrite=True)
        assert len(read_pairs(place.labels)) == 1


def test_query_refuses_to_write_over_the_file_of_another_user(place):
    place.run("ab")
    other = place.folder / "bob.json"
    other.write_text("{}")
    with pytest.raises(OutputError, match=r"not the file this session writes \(anna.json\)"):
        place.run("a", output=str(other), labels=str(place.labels))
    assert other.read_text() == "{}"


def test_query_refuses_paths_it_cannot_use(place):
    (place.folder / "dir.json").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        place.run("a", output=str(place.folder / "dir.json"))
    with pytest.raises(UsageError, match="name another file"):
        place.run("a", output=str(place.labels), labels=str(place.labels))
    place.run("a")
    for damage in ("{", "[]", '{"format": 1, "ensemble": 3, "user": "", "skipped": [], "undone": []}'):
        place.session.write_text(damage)
        with pytest.raises(DataError, match="is damaged"):
            place.run("a")


def test_query_overwrite_begins_anew_but_not_before_it_can_ask(place):
    place.run("abs")
    before = (*place.files(), place.session.read_bytes())

    def stop():
        raise KeyboardInterrupt

    place.ensemble._base.before_embed = stop
    with pytest.raises(Interrupted, match="nothing was replaced"):
        place.run("a", overwrite=True)
    assert (*place.files(), place.session.read_bytes()) == before
    place.ensemble._base.before_embed = None
    transcript = place.run("a", overwrite=True)
    assert "the same command without --overwrite goes on" in transcript
    assert len(read_pairs(place.labels)) == 1
    assert json.loads(place.session.read_text())["skipped"] == []


def test_query_interrupted_while_features_are_made_begins_again(place):
    def stop():
        raise KeyboardInterrupt

    place.ensemble._base.before_embed = stop
    with pytest.raises(Interrupted, match="no label was given yet"):
        place.run("a")
    place.ensemble._base.before_embed = None
    place.run("ab")
    assert len(read_pairs(place.labels)) == 2


class Interrupting(io.StringIO):
    def readline(self, *args):
        line = super().readline(*args)
        if not line:
            raise KeyboardInterrupt
        return line


def test_query_interrupted_at_a_question_keeps_all(places):
    whole, place = places("whole"), places("place")
    whole.run("abab")
    place.patch.setattr(sys, "stdin", Interrupting("a\nb\n"))
    with pytest.raises(Interrupted, match=r"2 labels kept in .*anna.labels.jsonl; the same command goes on"):
        query(place.config(), place.ensemble)
    assert len(load_user(place.user, place.ensemble).posterior) == 2
    place.run("ab")
    assert place.files() == whole.files()


def test_query_interrupted_between_a_label_and_the_users_file_keeps_both(places):
    whole, place = places("whole"), places("place")
    whole.run("ab")
    place.run("a")
    save, times = User.save, []

    def interrupted(self, path):
        times.append(path)
        if len(times) == 2:  # the first is on going on
            raise KeyboardInterrupt
        save(self, path)

    place.patch.setattr(User, "save", interrupted)
    with pytest.raises(Interrupted, match="2 labels kept"):
        place.run("b")
    assert len(times) == 3
    assert place.files() == whole.files()


def test_query_on_a_full_disk_keeps_what_was_there(place):
    place.run("ab")
    before = place.files()
    real, parts = os.write, []

    def full(fd, data):
        parts.append(len(data))
        if len(parts) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, bytes(data)[:5])

    place.patch.setattr(query_files.os, "write", full)
    with pytest.raises(OutputError, match="No space left on device; what was there before is kept"):
        place.run("a")
    assert place.files() == before


def test_query_refuses_a_second_session_at_the_same_time(place):
    refused = []

    def second():
        place.ensemble._base.before_embed = None
        with pytest.raises(OutputError, match="another session"):
            query(place.config(), place.ensemble)
        refused.append(True)

    place.ensemble._base.before_embed = second
    place.run("a")
    assert refused
    assert len(read_pairs(place.labels)) == 1


def test_query_syncs_a_label_before_the_next_question(place):
    synced, real, inode = [], os.fsync, []

    def sync(fd):
        real(fd)
        if os.fstat(fd).st_ino == inode[0]:
            synced.append(os.fstat(fd).st_size)

    class Watching(io.StringIO):
        def readline(self, *args):
            inode[:] = [place.labels.stat().st_ino]
            assert synced[-1:] == ([place.labels.stat().st_size] if place.labels.stat().st_size else [])
            return super().readline(*args)

    place.patch.setattr(query_files.os, "fsync", sync)
    place.patch.setattr(sys, "stdin", Watching("a\nb\nu\na\n"))
    inode[:] = [-1]
    query(place.config(), place.ensemble)
    assert len(synced) == 4


@pytest.fixture
def command(place):
    folder = place.folder / "model"
    folder.mkdir()
    place.ensemble.save(folder)
    return [sys.executable, query_place.__file__, str(folder), str(place.pool), str(place.user)]


def start(command):
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_labels(place, count):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if place.labels.exists() and place.labels.read_bytes().count(b"\n") == count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} labels in a minute")


@pytest.mark.slow  # three processes that load the libraries
def test_query_in_a_process_survives_ctrl_c_kill_and_the_end_of_a_pipe(places, place, command):
    process = start(command)
    process.stdin.write("a\nb\n")
    process.stdin.flush()
    wait_for_labels(place, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "2 labels kept in" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err

    process = start(command)
    process.stdin.write("s\na\n")
    process.stdin.flush()
    wait_for_labels(place, 3)
    process.kill()
    process.communicate(timeout=60)
    (place.folder / ".anna.json.k1lled_x").write_text("{")  # as of one that was killed while it wrote

    done = subprocess.run(command, input="b\nu\na", capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 labels and 1 skip so far" in done.stdout
    assert "the answers ended: 4 labels kept in" in done.stdout

    whole = places("whole")
    whole.run("absabua")
    assert place.files() == whole.files()
    assert place.session.read_bytes() == whole.session.read_bytes()
    left = {path.name for path in place.folder.iterdir()} - {"whole", "model"}
    assert left == {"pool.jsonl", "anna.json", "anna.labels.jsonl", "anna.labels.session.json"}

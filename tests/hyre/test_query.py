"""The labelling session on a tiny ensemble whose base is a hash of the text; as a script this file is the command itself."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llmrl.config import parse_config
from llmrl.errors import DataError, HeadMismatchError, Interrupted, OutputError, UsageError, run_command
from llmrl.heads import HeadSpec
from llmrl.hyre import acquire, query_files, query_options
from llmrl.hyre.ensemble import RewardEnsemble, load_ensemble
from llmrl.hyre.pairs import Pair, plain_text, read_pair, read_pairs
from llmrl.hyre.query import pool_of, query
from llmrl.hyre.query_files import label_row, pair_key
from llmrl.hyre.query_options import QueryConfig
from llmrl.hyre.user import User, adapt, load_user
from llmrl.reward_heads import build_reward_head

WIDTH, HEADS, PAIRS = 6, 12, 24


class HashedBase:
    """Features that are a function of the text and of nothing else."""

    kind, width, name = "encoder", WIDTH, "hashed"
    identity = ("hash",)
    before_embed = None

    def text(self, prompt, answer):
        return plain_text(prompt, answer)

    def embed(self, texts, *, quiet=True):
        if self.before_embed is not None:
            self.before_embed()
        rows = [np.frombuffer(hashlib.sha256(text.encode()).digest()[:WIDTH], np.uint8) for text in texts]
        return torch.from_numpy(np.stack(rows).astype(np.float32) / 64 - 2)


def make_ensemble(seed=0, scale=1.0):
    head = build_reward_head(HeadSpec("reward", "linear", WIDTH, HEADS))
    with torch.no_grad():
        head.weight.copy_(scale * torch.randn(HEADS, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return RewardEnsemble(head.requires_grad_(False), "hashed", "encoder", ["hash"], "answer", _base=HashedBase())


def with_base(folder):
    made = load_ensemble(folder)
    made._base = HashedBase()
    return made


def write_pool(path, count=PAIRS, begin=0):
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(begin, begin + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Place:
    """A folder with a pool and a session in it."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        self.ensemble = make_ensemble()
        self.pool = write_pool(folder / "pool.jsonl")
        self.user = folder / "anna.json"
        self.labels, self.session = folder / "anna.labels.jsonl", folder / "anna.labels.session.json"

    def config(self, **changes):
        return QueryConfig(
            **{"model": "-", "pairs": [str(self.pool)], "output": str(self.user), "stop": False, **changes}
        )

    def run(self, answers, **changes):
        """Answer with the letters of `answers`, then end the input; return the transcript."""
        self.patch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in answers)))
        self.made = query(self.config(**changes), self.ensemble)
        return self.capsys.readouterr().out

    def files(self):
        return self.user.read_bytes(), self.labels.read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch, capsys):
    return Place(tmp_path, monkeypatch, capsys)


@pytest.fixture
def places(tmp_path, monkeypatch, capsys):
    def make(name):
        (tmp_path / name).mkdir()
        return Place(tmp_path / name, monkeypatch, capsys)

    return make


def questions(transcript):
    """Each question as (A, B), in the order shown."""
    lines = transcript.splitlines()
    return [(lines[i + 1].strip(), lines[i + 3].strip()) for i, line in enumerate(lines) if line == "A:"]


def test_query_writes_labels_that_say_what_was_answered(place):
    shown = questions(place.run("abba"))
    assert len(shown) == 5  # the last one met the end of the input
    rows = [json.loads(line) for line in place.labels.read_text().splitlines()]
    won = [(a, b) if key == "a" else (b, a) for (a, b), key in zip(shown, "abba", strict=False)]
    assert [(row["chosen"], row["rejected"]) for row in rows] == won
    assert all(row["prompt"] == "q" + row["chosen"].split()[1] for row in rows)


@pytest.mark.parametrize("refine", [False, True])
def test_query_makes_the_user_that_adapt_makes_of_its_labels(place, refine):
    place.run("abbabab", refine=refine)
    features = place.ensemble.features(read_pairs(place.labels))
    expected = adapt(place.ensemble, *features, refined=refine)
    found = load_user(place.user, place.ensemble)
    assert len(found.posterior) == 7
    np.testing.assert_allclose(found.posterior.weights, expected.posterior.weights, atol=1e-6)
    assert (found.choice.loss, found.choice.beta) == (expected.choice.loss, expected.choice.beta)
    assert (found.correction is not None) is refine
    if refine:
        np.testing.assert_allclose(found.correction, expected.correction, atol=1e-5)
    assert found.posterior.to_json() == place.made.posterior.to_json()


def test_query_asks_the_pair_the_criterion_puts_first(place):
    shown = questions(place.run("ab", criterion="variance"))
    pairs = read_pairs(place.pool)
    spread = place.ensemble.margins(*place.ensemble.features(pairs)).var(1)
    best = [pairs[i] for i in np.argsort(-spread)[:3]]
    assert [set(pair) for pair in shown] == [{pair.chosen, pair.rejected} for pair in best]


def test_query_draws_by_the_seed(places):
    shown = [questions(places(str(seed)).run("ab", criterion="random", seed=seed)) for seed in (0, 1)]
    assert [set(pair) for pair in shown[0]] != [set(pair) for pair in shown[1]]


def test_query_reports_after_each_answer(place):
    lines = [line for line in place.run("ab").splitlines() if "effective" in line]
    margins = place.ensemble.margins(*place.ensemble.features(read_pairs(place.pool)))
    mine, uniform = margins @ place.made.posterior.weights, margins.mean(1)
    share = ((mine > 0) != (uniform > 0)).mean()
    assert lines[0].startswith("1 label, ")
    effective = 1 / (place.made.posterior.weights**2).sum()
    assert lines[1] == (
        f"2 labels, {effective:.1f} of {HEADS} heads effective, {share:.1%} of {PAIRS} pairs decided unlike the uniform "
        "ensemble"
    )
    assert "effective" not in place.run("a", quiet=True)


ANSWERS = "absaubbsuuabba"


@pytest.mark.parametrize("criterion", ["variance", "bald", "random"])
def test_query_cut_off_anywhere_ends_in_the_same_bytes(places, criterion):
    whole = places("whole")
    transcript = questions(whole.run(ANSWERS, criterion=criterion))
    for cut in range(len(ANSWERS) + 1):
        parts = places(f"cut{cut}")
        first = questions(parts.run(ANSWERS[:cut], criterion=criterion))
        second = questions(parts.run(ANSWERS[cut:], criterion=criterion))
        assert first[:-1] + second == transcript
        assert parts.files() == whole.files()
        assert parts.session.read_bytes() == whole.session.read_bytes()


def test_query_undo_takes_a_label_back_without_a_trace_in_labels_and_user(places):
    one, other = places("one"), places("other")
    transcript = questions(one.run("abuba"))
    assert transcript[2] != transcript[1]
    assert transcript[3] == transcript[1]  # asked again
    other.run("aba")
    assert one.files() == other.files()
    undone = json.loads(one.session.read_text())["undone"]
    assert undone == [pair_key(Pair((("user", "q" + transcript[1][0].split()[1]),), *transcript[1]))]


def test_query_undo_of_the_first_label_leaves_a_user_without_labels(place):
    transcript = place.run("uau")
    assert "there is no label to undo" in transcript
    assert place.labels.read_bytes() == b""
    user = load_user(place.user, place.ensemble)
    np.testing.assert_allclose(user.posterior.weights, 1 / HEADS)
    assert len(user.posterior) == 0


def test_query_does_not_ask_a_skipped_pair_again(place):
    skipped = questions(place.run("ssa"))[:2]
    later = questions(place.run("a" * PAIRS))
    assert not set(skipped) & set(later)
    assert len(later) == PAIRS - 3
    assert len(read_pairs(place.labels)) == PAIRS - 2
    assert "every pair of the pool was asked" in place.run("")


def test_query_shows_sides_that_say_nothing_of_the_file(places):
    one, turned = places("one"), places("turned")
    rows = [json.loads(line) for line in turned.pool.read_text().splitlines()]
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    turned.pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = "ab" * (PAIRS // 2)
    assert one.run(answers, quiet=True) == turned.run(answers, quiet=True)
    assert one.files() == turned.files()
    many = [Pair((), f"good {i}", f"bad {i}") for i in range(2000)]
    for seed in (0, 1):
        share = np.mean([pair.chosen.startswith("good") for pair in pool_of(many, seed)])
        assert abs(share - 0.5) < 0.05
    assert pool_of(many, 0) != pool_of(many, 1)


def test_pool_of_asks_a_repeated_pair_once():
    pair = Pair((("user", "q"),), "x", "y")
    assert len(pool_of([pair, pair.turned(), pair, Pair((("user", "other"),), "x", "y")], 0)) == 2


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


def test_query_stops_when_labels_change_nothing_unless_told_not_to(place):
    place.ensemble = make_ensemble(scale=1e-3)  # so weak that no five labels move a weight by much
    transcript = place.run("abababab", stop=True)
    assert len(read_pairs(place.labels)) == 5
    assert "the last 5 labels changed the side on at most 1% of the pool" in transcript
    again = place.run("ab", stop=True)
    assert questions(again) == []
    place.run("ab", stop=False)
    assert len(read_pairs(place.labels)) == 7


def test_query_asks_for_at_most_so_many_labels_in_all(place):
    assert "as many as --most" in place.run("sababab", most=3)
    assert len(read_pairs(place.labels)) == 3
    place.run("ab", most=4)
    assert len(read_pairs(place.labels)) == 4


def test_query_takes_quit_capitals_and_asks_again_for_anything_else(place):
    transcript = place.run(["A", " b ", "yes", "", "q", "a"])
    assert transcript.count("type one of a, b, s, u, q") == 2
    assert "quit: 2 labels kept in" in transcript
    assert len(read_pairs(place.labels)) == 2


def test_query_shows_what_would_steer_a_terminal_as_text(place):
    place.pool.write_text(
        json.dumps({"prompt": "p\x1b[2J", "chosen": "c\x07\r", "rejected": "two\nlines\t\u00e9"}) + "\n"
    )
    transcript = place.run("a")
    assert not {"\x1b", "\x07", "\r"} & set(transcript)
    assert "p\\x1b[2J" in transcript
    assert "    two\n    lines\t\u00e9" in transcript


@pytest.mark.parametrize(
    "pair",
    [
        Pair((), "a", "b"),
        Pair((("user", "q"),), "a\n\u2028\u00e9", 'b"\\'),
        Pair((("user", ""),), "a", "b"),
        Pair((("system", "s"),), "a", "b"),
        Pair((("user", "q"), ("assistant", "r"), ("user", "")), "a", "b"),
    ],
)
def test_label_row_is_read_back_as_the_same_pair(pair):
    row = json.loads(json.dumps(label_row(pair)))
    assert read_pair(row, "") == pair
    assert len({type(row[name]) for name in ("prompt", "chosen", "rejected")}) == 1  # trl: all texts or all messages


def test_pair_key_is_of_prompt_and_answers_but_not_of_who_won():
    pair = Pair((("user", "q"),), "a", "b")
    assert pair_key(pair) == pair_key(pair.turned())
    others = [Pair((("user", "q"),), "a", "c"), Pair((("system", "q"),), "a", "b"), Pair((("user", "qa"),), "", "b")]
    assert len({pair_key(p) for p in [pair, *others]}) == 4


def test_query_options_are_checked_and_load_neither_torch_nor_numpy():
    assert query_options._CRITERIA == acquire.CRITERIA
    line = ["--model", "m", "--pairs", "a.jsonl,b.jsonl", "--output", "u.json", "--stop", "false", "--most", "3"]
    config = parse_config(QueryConfig, line, prog="p", description="d")
    assert (config.pairs, config.stop, config.most, config.criterion) == (["a.jsonl", "b.jsonl"], False, 3, "variance")
    for wrong in (["--most", "0"], ["--seed=-1"], ["--labels", "x.json"], ["--criterion", "best"]):
        with pytest.raises(UsageError):
            parse_config(QueryConfig, [*line[:6], *wrong], prog="p", description="d")
    code = "import sys, llmrl.hyre.query_options; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- real processes ---


@pytest.fixture
def command(place):
    folder = place.folder / "model"
    folder.mkdir()
    place.ensemble.save(folder)
    return [sys.executable, __file__, str(folder), str(place.pool), str(place.user)]


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


def main(model, pool, user):
    config = QueryConfig(model=model, pairs=[pool], output=user, stop=False)
    query(config, with_base(Path(model)))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(*sys.argv[1:])))

"""The labelling session: what is asked, shown, kept, taken back."""

import json
import subprocess
import sys

import numpy as np
import pytest
from query_place import HEADS, PAIRS, make_ensemble, questions

from llmrl.config import parse_config
from llmrl.errors import UsageError
from llmrl.hyre import acquire, query_options
from llmrl.hyre.pairs import Pair, read_pair, read_pairs
from llmrl.hyre.query import pool_of
from llmrl.hyre.query_files import label_row, pair_key
from llmrl.hyre.query_options import QueryConfig
from llmrl.hyre.user import adapt, load_user


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
    assert (config.pairs, config.stop, config.most, config.criterion) == (["a.jsonl", "b.jsonl"], False, 3, "bald")
    for wrong in (["--most", "0"], ["--seed=-1"], ["--labels", "x.json"], ["--criterion", "best"]):
        with pytest.raises(UsageError):
            parse_config(QueryConfig, [*line[:6], *wrong], prog="p", description="d")
    code = "import sys, llmrl.hyre.query_options; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

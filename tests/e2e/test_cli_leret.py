"""`llmrl leret`: help, refusals and the rule policies, which need no model; what a process shows, in one."""

import re
import resource

import pytest
from search_world import passages, questions, write_rows

RULES = ("--policy", "rules")
ACTIONS = ("explore", "train", "eval")


@pytest.fixture
def leret(llmrl, search_files, tmp_path):
    """`leret(action, *options)` with the files of search_world; None leaves one out."""

    def run(action, *options, asked="train.jsonl.gz", corpus="passages.jsonl.gz", out="out"):
        def named(name):
            return tmp_path / name if (tmp_path / name).exists() else search_files / name

        words = [action]
        words += ["--questions", named(asked)] if asked else []
        words += ["--passages", named(corpus)] if corpus else []
        words += ["--output_dir", tmp_path / out] if out else []
        return llmrl("leret", *words, *options)

    return run


def test_help_answers_at_once_without_torch(process):
    code = (
        "import sys; from llmrl.cli import main\n"
        f"codes = [main(['leret', *argv, '--help']) for argv in ([], *([a] for a in {ACTIONS}))]\n"
        "print(codes, sorted({'torch', 'transformers', 'numpy', 'bm25s', 'httpx', 'datasets'} & set(sys.modules)))"
    )
    ended = process("-c", code)
    assert ended.out.splitlines()[-1] == "[0, 0, 0, 0] []", ended.err
    for action in ACTIONS:
        assert re.search(rf"^  {action} +\S", ended.out, re.MULTILINE)
    for option in (
        "--config",
        "--questions",
        "--passages",
        "--retriever",
        "--adapter",
        "--hops",
        "--preset",
        "--force",
    ):
        assert option in ended.out


@pytest.mark.parametrize("action", ACTIONS)
def test_help_takes_less_than_half_a_second(process, action):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process("-m", "llmrl.cli", "leret", action, "--help").code == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor: the clock of a busy machine says something else
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 0.5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("explor", *RULES), "unknown action 'explor'; did you mean 'explore'?"),
        (("explore", *RULES, "--hop", "3"), "unknown option --hop; did you mean --hops?"),
        (("explore", *RULES, "--retriever", "bm26"), "--retriever bm26: not a choice; did you mean 'bm25'?"),
        (("explore", *RULES, "--retriever", "http"), "--retriever http needs --retriever_url"),
        (("explore", *RULES, "--k", "0"), "--k must be at least 1, got 0"),
        (("explore", *RULES, "--reward", "app"), "--reward app: not a choice; did you mean 'ap'?"),
        (("explore", *RULES, "--preset", "leret-papre"), "did you mean 'leret-paper'?"),
        (("explore",), "missing --model: a folder, or a hub name; or --policy rules"),
        (("train", *RULES), "--policy rules has no model to train; llmrl leret explore writes pairs"),
        (("eval", "--model", "/absent/model"), "not found: /absent/model (model)"),
        (("eval", "--model", "m", "--reference", "base", "--tuning", "full"), "--reference base needs --tuning lora"),
    ],
)
def test_leret_refuses_options(argv, words, leret, tmp_path):
    ended = leret(*argv)
    assert ended.code == 2
    assert words in ended.refusal()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [("asked", "missing --questions"), ("corpus", "missing --passages"), ("out", "missing --output_dir")],
)
def test_leret_names_what_is_missing(name, words, leret):
    ended = leret("eval", *RULES, **{name: None})
    assert ended.code == 2
    assert words in ended.refusal()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hops: 2\n  k: [3\n", "run.yaml:2: not YAML"),
        ("hop: 2\n", "unknown key 'hop'; did you mean 'hops'?"),
        ("hops:\n  first: 2\n", "'hops' is a nested mapping; keys are flat"),
        ("hops: two\n", "'hops' must be a whole number, got 'two'"),
        ("hops: 2\nhops: 3\n", "key 'hops' stands there twice"),
        (None, "not found: "),
    ],
)
@pytest.mark.parametrize("action", ACTIONS)
def test_leret_refuses_config(text, words, action, leret, tmp_path):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    ended = leret(action, "--config", tmp_path / "run.yaml")
    assert ended.code == 2
    assert words in ended.refusal()
    assert not (tmp_path / "out").exists()


LOST = [{**row, "gold_ids": ["x1"], "gold_titles": ["Nowhere"]} for row in questions([1, 2])]


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        ({"asked": None}, 2, "not found: "),
        ({"corpus": None}, 2, "not found: "),
        ({"asked": []}, 1, "asked.jsonl is empty: expected questions, one a line, with id, question and gold_ids"),
        ({"corpus": []}, 1, "corpus.jsonl is empty: expected passages, one a line, with id, title and text"),
        ({"corpus": [*passages(), *passages()[:2]]}, 1, "2 ids of passages occur more than once: d0, p0"),
        ({"asked": questions([1, 2, 1])}, 1, "1 ids of questions occur more than once: q1"),
        ({"asked": LOST}, 1, "all 2 questions were excluded (gold document not in the corpus): q1 (x1), q2 (x1)"),
        ({"corpus": [*passages(), {"id": "d99", "title": "", "text": " "}]}, 1, "corpus.jsonl:33: a passage without"),
        ({"asked": [{"id": "q1", "question": ""}]}, 1, "asked.jsonl:1: expected a text in 'question'"),
        ({"asked": ["q1"]}, 1, "asked.jsonl:1: "),
    ],
)
@pytest.mark.parametrize("action", ["explore", "eval"])
def test_leret_refuses_data(files, code, words, action, leret, tmp_path):
    for name, rows in files.items():
        if rows is not None:
            write_rows(tmp_path / f"{name}.jsonl", rows)
    ended = leret(action, *RULES, **{name: f"{name}.jsonl" for name in files})
    assert ended.code == code
    assert words in ended.refusal()
    assert not (tmp_path / "out").exists()


def test_questions_without_gold_are_named_counted_and_left_out(leret, read_json, tmp_path):
    write_rows(tmp_path / "asked.jsonl", [*questions([3, 4]), *LOST])
    ended = leret("eval", *RULES, "--bootstrap_draws", "50", asked="asked.jsonl")
    assert ended.code == 0, ended.err
    assert re.search(r"^questions: 2 questions.*2 .*q1 \(x1\), q2 \(x1\)", ended.out, re.MULTILINE)
    report = read_json(tmp_path / "out" / "report.json")
    assert (report["questions"], report["excluded"]["questions"]) == (2, 2)


def test_leret_refuses_a_question_that_is_trained_on_and_reported(leret, tmp_path):
    write_rows(tmp_path / "again.jsonl", [{**questions([1])[0], "id": "another id"}])
    ended = leret("train", "--model", "any", "--test_questions", tmp_path / "again.jsonl")
    assert ended.code == 2
    assert (
        "--questions and --test_questions share 1 question(s), e.g. 'Where was the builder of Birch" in ended.refusal()
    )


def test_leret_stops_when_the_search_server_does_not_answer(leret, free_port, monkeypatch):
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its attempts
    url = f"http://127.0.0.1:{free_port}"
    ended = leret("explore", *RULES, "--retriever", "http", "--retriever_url", url)
    assert ended.code == 1
    assert f"retriever http at {url}" in ended.refusal()
    assert "check that the server runs" in ended.refusal()


@pytest.fixture
def free_port():
    from http_server import free_port

    return free_port()


def test_explore_with_rules_is_seeded_resumable_and_refuses_another_corpus(leret, contents, read_json, tmp_path):
    write_rows(tmp_path / "corpus.jsonl", passages())
    assert leret("explore", *RULES, corpus="corpus.jsonl").code == 0
    before = contents(tmp_path / "out")
    report = read_json(tmp_path / "out" / "round-0" / "headroom.json")
    assert (report["questions"], report["questions_with_pair"]) == (10, 1.0)
    assert report["rows"]["pairs"] == report["pairs"] > 0
    again = leret("explore", *RULES, corpus="corpus.jsonl")
    assert again.code == 0
    assert "exploration is there, kept" in again.out
    kept = {name for name in before if not name.endswith(("env.json", "config.resolved.yaml", ".lock"))}
    assert {name: contents(tmp_path / "out")[name] for name in kept} == {name: before[name] for name in kept}
    assert leret("explore", *RULES, corpus="corpus.jsonl", out="other").code == 0
    for name in ("pairs", "sft", "grpo"):
        assert contents(tmp_path / "other")[f"round-0/{name}.jsonl"] == before[f"round-0/{name}.jsonl"]

    write_rows(tmp_path / "corpus.jsonl", [*passages()[:-1], {**passages()[-1], "text": "Another text."}])
    ended = leret("explore", *RULES, corpus="corpus.jsonl")
    assert ended.code == 1
    assert "holds a run with another corpus: 'sha256:" in ended.refusal()
    assert "--overwrite" in ended.refusal()
    assert contents(tmp_path / "out")["round-0/pairs.jsonl"] == before["round-0/pairs.jsonl"]
    ended = leret("explore", *RULES, "--overwrite", corpus="corpus.jsonl")
    assert ended.code == 0, ended.err
    assert read_json(tmp_path / "out" / "round-0" / "headroom.json")["corpus"] != report["corpus"]


def test_eval_with_rules_reports_what_a_reader_of_the_corpus_expects(leret, read_json, tmp_path):
    """The question alone finds the dam and not its builder; the name in the dam's passage finds the builder, at rank 4."""
    ended = leret("eval", *RULES, "--rules", "names-1", "--bootstrap_draws", "200", "--hops", "2", "--k", "3")
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    systems = report["systems"]
    assert list(systems) == ["question", "question-top", "rule:names-1", "oracle-rule"]
    for name, recall, ap, both in (
        ("question", 0.5, 0.5, 0.0),  # the first of two documents, at rank 1
        ("question-top", 0.5, 0.5, 0.0),
        ("rule:names-1", 1.0, (1 + 2 / 4) / 2, 1.0),
        ("oracle-rule", 1.0, (1 + 2 / 4) / 2, 1.0),
    ):
        for metric, value in (("recall", recall), ("ap", ap), ("both", both)):
            assert systems[name][metric] == {"value": value, "low": value, "high": value}
    difference = report["paired"]["rule:names-1 - question"]["recall"]
    assert (difference["value"], difference["low"], difference["high"]) == (0.5, 0.5, 0.5)
    assert [hop["recall"]["value"] for hop in systems["rule:names-1"]["by_hop"]] == [0.5, 1.0]
    assert {t: of["questions"] for t, of in systems["question"]["by_type"].items()} == {"bridge": 8, "comparison": 2}
    assert report["search"] == {
        "hops": 2, "k": 3, "merge": "hop_order", "unseen_only": False, "question_first": False,
    }  # fmt: skip
    assert "| rule:names-1 " in ended.out  # the table is printed too
    assert (tmp_path / "out" / "report.md").read_text() in ended.out

"""`llmrl calibrate`: what it writes, what it prints, what its options do."""

import gzip
import itertools
import json
import re
import shutil

import pytest
import torch
import yaml

METRICS = {
    "ece", "ece_equal_mass", "nll", "brier", "auroc", "accuracy",
    "smooth_ece", "brier_reliability", "brier_resolution", "aurc", "ece_debiased",
}  # fmt: skip
AUTO = ["none", "temperature", "temperature-ece", "ats-linear", "ats-shuffled"]


def check_methods(methods, names):
    assert list(methods) == names
    for scores in methods.values():
        assert set(scores) == METRICS
        for name, score in scores.items():
            assert set(score) == {"value", "low", "high"}
            assert score["low"] <= score["value"] <= score["high"], (name, score)
            assert score["low"] >= (-1 if name == "brier_resolution" else 0)
            assert name == "nll" or score["high"] <= 1
    # temperatures keep the order of tokens
    assert len({scores["accuracy"]["value"] for scores in methods.values()}) == 1


def check_report(report, names):
    assert report["level"] == "token"
    check_methods(report["methods"], names)
    assert report["selected"] in names
    assert report["selected"] != "ats-shuffled"
    assert report["greedy_identical"] is True
    assert report["excluded"] == {}
    assert set(report["tokens"]) == {"fit", "validation", "test"}
    assert all(isinstance(count, int) and count > 0 for count in report["tokens"].values())


def test_calibrate_auto_writes_the_report(calibrated, read_json):
    folder, _ = calibrated
    report = read_json(folder / "report.json")
    check_report(report, AUTO)
    assert sum(report["tokens"].values()) + report["unused_tokens"] > 5000
    ece = {name: scores["ece"] for name, scores in report["methods"].items()}
    assert ece["ats-linear"]["high"] < ece["none"]["low"]  # a story model on a book
    assert report["methods"]["ats-linear"]["nll"]["value"] < report["methods"]["none"]["nll"]["value"]


def test_calibrate_auto_selects_the_lowest_brier_on_validation(calibrated, read_json):
    report = read_json(calibrated[0] / "report.json")
    scores = {name: score["brier"] for name, score in report["validation"].items() if name != "ats-shuffled"}
    assert report["selected"] == min(scores, key=scores.get)


def test_calibrate_writes_json_without_nan(calibrated, read_json):
    files = [path for path in calibrated[0].rglob("*.json*") if path.suffix in (".json", ".jsonl")]
    assert {"report.json", "config.json", "env.json", "metrics.jsonl"} <= {path.name for path in files}
    for path in files:
        if path.suffix == ".json":
            read_json(path)
        else:
            assert not re.search(r"NaN|Infinity", path.read_text())
            assert all(json.loads(line) for line in path.read_text().splitlines())


def test_calibrate_writes_a_whole_output_folder(calibrated):
    folder, _ = calibrated
    names = {
        "README.md",
        "config.resolved.yaml",
        "env.json",
        "metrics.jsonl",
        "timings.jsonl",
        "llmrl_heads.safetensors",
    }
    assert names <= {path.name for path in folder.iterdir()}
    assert (folder / "plots" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "model.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no caches, no staging
    card = (folder / "README.md").read_text()
    assert "| ats-linear" in card
    assert str(folder.parent) not in card


def test_calibrate_prints_the_table(calibrated, read_json):
    folder, ended = calibrated
    report = read_json(folder / "report.json")
    rows = [line for line in ended.out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:7]] == [*AUTO[:-1], "ats-shuffled (control)"]
    shown = f"{report['methods']['none']['ece']['value']:.4f}"[1:]
    assert shown in rows[2]
    assert f"selected: {report['selected']}" in ended.out
    assert f"saved: {folder}" in ended.out


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("temperature", ["none", "temperature", "ats-shuffled"]),
        ("temperature-ece", ["none", "temperature", "temperature-ece", "ats-shuffled"]),
        ("ats-linear", ["none", "temperature", "ats-linear", "ats-shuffled"]),
    ],
)
def test_calibrate_named_method_reports_and_saves_it(method, names, calibrate, book, calibrated, tmp_path, read_json):
    ended = calibrate(book, tmp_path / "out", "--method", method, "--quiet")
    assert ended.code == 0, ended.err
    assert ended.out == ""
    report = read_json(tmp_path / "out" / "report.json")
    check_report(report, names)
    assert report["selected"] == method
    described = read_json(tmp_path / "out" / "config.json")["llmrl"]
    assert described["method"] == method
    assert described["heads"]["temperature"]["architecture"] == ("linear" if method == "ats-linear" else "scalar")
    # the same seed, hence the same split and fits as in auto
    auto = read_json(calibrated[0] / "report.json")
    assert report["methods"] == {name: auto["methods"][name] for name in names}


def test_calibrate_merge_stands_alone(calibrate, book, stories_dir, tmp_path, read_json):
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(stories_dir, tmp_path / "base")
    assert calibrate(book, tmp_path / "beside", "--method", "temperature", model=base).code == 0
    assert calibrate(book, tmp_path / "merged", "--method", "temperature", "--merge", model=base).code == 0
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    with torch.inference_mode():
        beside = AutoModelForCausalLM.from_pretrained(tmp_path / "beside")(input_ids=ids).logits
        bare = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
        shutil.rmtree(base)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    assert torch.equal(merged, beside)
    assert not torch.allclose(merged, bare, rtol=0.05)
    assert read_json(tmp_path / "merged" / "config.json")["llmrl"]["merged"] is True


def test_calibrate_same_seed_same_bytes(calibrate, book, calibrated, tmp_path, contents):
    assert calibrate(book, tmp_path / "again", "--seed", "0").code == 0
    one, other = contents(calibrated[0]), contents(tmp_path / "again")
    assert one.keys() == other.keys()
    for name in ("report.json", "llmrl_heads.safetensors", "config.json", "metrics.jsonl", "README.md"):
        assert one[name] == other[name], name


def test_calibrate_config_file_and_command_line(calibrate, llmrl, book, stories_dir, calibrated, tmp_path, read_json):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {stories_dir}\ndata: {book}\noutput_dir: {tmp_path / 'never'}\nmax_length: 129\nbootstrap_draws: 200\n"
        "seed: 3\nnum_seeds: 2\n"
    )
    ended = llmrl("calibrate", "--config", config, "--output_dir", tmp_path / "out", "--seed", "7")
    assert ended.code == 0, ended.err
    assert not (tmp_path / "never").exists()
    resolved = yaml.safe_load((tmp_path / "out" / "config.resolved.yaml").read_text())
    assert (resolved["seed"], resolved["num_seeds"], resolved["max_length"]) == (7, 2, 129)
    assert resolved["report_to"] == "none"
    report, first = read_json(tmp_path / "out" / "report.json"), read_json(calibrated[0] / "report.json")
    check_report(report, AUTO)
    # two seeds, the first of which is the one reported; another seed is another split
    assert list(report["seeds"]) == ["7", "8"]
    assert report["seeds"]["7"]["methods"] == report["methods"] != report["seeds"]["8"]["methods"]
    check_methods(report["seeds"]["8"]["methods"], AUTO)
    assert report["methods"] != first["methods"]
    assert "seed 7" in ended.out
    assert "seed 8" in ended.out


def test_calibrate_says_when_there_are_few_windows_to_test_on(calibrated, read_json):
    folder, ended = calibrated
    report = read_json(folder / "report.json")
    found = re.search(r"^only (\d+) windows to test on: intervals are rough", ended.out, re.MULTILINE)
    assert 0 < int(found[1]) < 20
    assert report["bootstrap"]["unit"] == f"block of {report['tokens']['test'] // 40} tokens"
    for name, scores in report["methods"].items():
        for metric, score in scores.items():
            assert score["high"] > score["low"], (name, metric)


def test_calibrate_rows_that_repeat_and_a_file_named_twice(llmrl, sentences, stories_dir, tmp_path, jsonl, read_json):
    rows = [{"text": text} for text in sentences[:60]]
    data = jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:5]])
    argv = ["calibrate", stories_dir, "--method", "temperature", "--bootstrap_draws", "20", "--max_length", "129"]
    ended = llmrl(*argv, "--data", data, data, "--output_dir", tmp_path / "twice")
    assert ended.code == 0, ended.err
    assert "70 rows repeat the text of another; each text is in one part of the split only" in ended.out
    assert "windows to test on" not in ended.out
    report = read_json(tmp_path / "twice" / "report.json")
    assert report["rows"] == 130
    assert report["bootstrap"]["unit"] == "window"


def test_calibrate_bfloat16_stays_bfloat16(calibrate, book, tmp_path, read_json):
    from transformers import AutoModelForCausalLM

    ended = calibrate(book, tmp_path / "out", "--dtype", "bfloat16", "--method", "temperature", "--quiet")
    assert ended.code == 0, ended.err
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert read_json(tmp_path / "out" / "report.json")["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_calibrate_report_says_dtype_and_serving(calibrated, read_json):
    from llmrl.vllm_compat import vllm_build

    report = read_json(calibrated[0] / "report.json")
    assert report["dtype"] == "float32"
    assert report["serving"] == {"vllm": "architecture known" if vllm_build() else "not installed"}


def test_calibrate_reads_a_file_whose_name_has_a_comma(calibrate, book, tmp_path, read_json):
    data = tmp_path / "one,two.txt"
    data.write_text(book.read_text()[:4000])
    ended = calibrate(data, tmp_path / "out", "--max_length", "33", "--method", "temperature")
    assert ended.code == 0, ended.err
    assert read_json(tmp_path / "out" / "report.json")["rows"] == 1


def test_calibrate_counts_turns_the_template_does_not_let_score(
    calibrate, sentences, stories_dir, tmp_path, jsonl, read_json
):
    chat = shutil.copytree(stories_dir, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    rows = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in itertools.pairwise(sentences[:40])
    ]
    greeting = {"role": "assistant", "content": "Hello."}
    rows = [[greeting, *rows[0]], [greeting, *rows[1]], [greeting], *rows[2:]]
    data = jsonl(tmp_path / "chat.jsonl", [{"messages": messages} for messages in rows])
    ended = calibrate(data, tmp_path / "out", "--method", "temperature", "--max_length", "256", model=chat)
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    assert report["excluded"] == {"turn_not_scored": 1, "part_of_row_turn_not_scored": 2}
    assert "1 turn_not_scored" in ended.out


def test_calibrate_that_made_it_worse_exits_zero(calibrate, book, tmp_path, monkeypatch, read_json):
    from llmrl.ats import evaluate

    monkeypatch.setattr(evaluate, "fit_temperature", lambda features, loss: 2.0)  # far too sure of itself
    ended = calibrate(book, tmp_path / "out", "--method", "temperature")
    assert ended.code == 0, ended.err
    methods = read_json(tmp_path / "out" / "report.json")["methods"]
    assert methods["temperature"]["ece"]["low"] > methods["none"]["ece"]["high"]
    assert "temperature against none: ECE worse" in ended.out


def test_calibrate_never_selects_the_control(calibrate, book, tmp_path, monkeypatch, read_json):
    from llmrl.ats import evaluate

    real, calls = evaluate.point_metrics, iter(AUTO)

    def control_wins(predictions):
        name = next(calls)
        return real(predictions) | ({"brier": -1.0} if name == "ats-shuffled" else {})

    monkeypatch.setattr(evaluate, "point_metrics", control_wins)
    assert calibrate(book, tmp_path / "out").code == 0
    report = read_json(tmp_path / "out" / "report.json")
    assert report["validation"]["ats-shuffled"]["brier"] == -1.0
    assert report["selected"] != "ats-shuffled"


def test_calibrate_counts_rows_that_do_not_fit(calibrate, pairs, tmp_path, jsonl, read_json):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows.insert(5, {"prompt": "On and on. " * 200, "completion": " The end."})
    data = jsonl(tmp_path / "rows.jsonl", rows)
    ended = calibrate(data, tmp_path / "out", "--method", "temperature")
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    check_methods(report["methods"], ["none", "temperature", "ats-shuffled"])
    assert report["rows"] == len(rows)
    assert report["excluded"]["too_long"] >= 1
    assert sum(report["excluded"].values()) + report["windows"] == len(rows)
    assert f"excluded of {len(rows)} rows: {report['excluded']['too_long']} too_long" in ended.out


def test_calibrate_refuses_when_most_rows_do_not_fit(calibrate, pairs, tmp_path):
    ended = calibrate(pairs, tmp_path / "out", "--max_length", "8")
    assert ended.code == 1
    assert "more than half is an error" in ended.refusal().replace("; more", " more")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def conversations(sentences, tmp_path, jsonl):
    turns = itertools.pairwise(sentences[:50])
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in turns]
    return jsonl(tmp_path / "chat.jsonl", [{"messages": messages} for messages in rows])


def test_calibrate_messages_need_a_chat_template(calibrate, conversations, tmp_path):
    ended = calibrate(conversations, tmp_path / "out")
    assert ended.code == 1
    assert f"{conversations}:1: 'messages' need a chat template" in ended.refusal()
    assert not (tmp_path / "out").exists()


def test_calibrate_messages_with_a_chat_template(calibrate, conversations, stories_dir, tmp_path, read_json):
    chat = shutil.copytree(stories_dir, tmp_path / "chat")
    (chat / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ended = calibrate(conversations, tmp_path / "out", "--method", "temperature", "--max_length", "256", model=chat)
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    check_methods(report["methods"], ["none", "temperature", "ats-shuffled"])
    assert report["excluded"] == {}
    # the template travels with the folder
    assert "add_generation_prompt" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_calibrate_reads_several_kinds_of_files(calibrate, sentences, tmp_path, jsonl, read_json, llmrl, stories_dir):
    import pyarrow
    import pyarrow.parquet

    text = ". ".join(sentences)
    zipped = tmp_path / "a.txt.gz"
    zipped.write_bytes(gzip.compress(text[:4000].encode()))
    rows = jsonl(tmp_path / "b.jsonl", [{"text": text[i : i + 400]} for i in range(4000, 8000, 400)])
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(rows.read_bytes()))
    table = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["He said:"] * 9, "completion": sentences[:9]}), table)
    ended = calibrate(zipped, tmp_path / "out", "--method", "temperature", "--data", rows, packed, table)
    assert ended.code == 0, ended.err
    assert read_json(tmp_path / "out" / "report.json")["rows"] == 1 + 10 + 10 + 9

"""`llmrl calibrate`: every kind of head, questions and answers, adapters, and the other ways to save."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

IDS = torch.randint(3, 500, (1, 20), generator=torch.Generator().manual_seed(1))


def logits(folder, **kwargs):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()(input_ids=IDS).logits.float()


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """Two files: questions with choices, and questions the small chat model answers rightly some of the time."""
    folder = tmp_path_factory.mktemp("questions")
    choices = [
        {"question": f"What is {i} plus {i % 7}?", "choices": [str(i), str(i + i % 7 + 1), str(i + i % 7)], "answer": 2}
        for i in range(1, 61)
    ]
    words = ["river", "school", "music", "house", "friend", "town", "winter", "ship", "garden", "light"]
    free = [{"question": f"Say the word {word}.", "answers": [word]} for word in words]
    free += [{"question": f"What is {a} plus {b}?", "answers": [str(a + b)]} for a in range(2, 12) for b in range(2, 6)]
    for name, rows in (("choices", choices), ("free", free)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def tiny_lm(stories_dir):
    return stories_dir.parent / "tiny_lm"


@pytest.mark.parametrize("method", ["ats-mlp", "ats-transformer"])
def test_calibrate_head_that_is_saved_opens_and_verifies(method, calibrate, llmrl, book, tmp_path, read_json):
    folder = tmp_path / "out"
    ended = calibrate(book, folder, "--method", method, "--quiet")
    assert ended.code == 0, ended.err
    report = read_json(folder / "report.json")
    assert (report["selected"], report["greedy_identical"], report["level"]) == (method, True, "token")
    scores = report["methods"]
    assert scores[method]["nll"]["value"] < scores["temperature"]["nll"]["value"] < scores["none"]["nll"]["value"]
    spec = read_json(folder / "config.json")["llmrl"]["heads"]["temperature"]
    assert spec["architecture"] == method.removeprefix("ats-")
    assert spec["intermediate_size"] == 172  # the example model's own
    assert report["fits"][method]["loss"] == "top_label"
    ended = llmrl("calibrate", "--verify", folder, "--data", book, "--max_length", "129", "--bootstrap_draws", "100")
    assert ended.code == 0, ended.err
    verified = read_json(folder / "verify.json")["methods"]
    assert verified[method]["nll"]["value"] < verified["none"]["nll"]["value"]


def test_calibrate_paper_is_a_transformer_with_the_smoothing_loss(calibrate, book, tmp_path, read_json):
    ended = calibrate(book, tmp_path / "out", "--method", "paper", "--max_tokens", "6000", "--quiet")
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    assert (report["selected"], report["loss"]) == ("ats-transformer", "smoothing")
    assert report["fits"]["ats-transformer"]["loss"] == "smoothing"
    assert report["fits"]["ats-transformer"]["alpha"] in (0.1, 0.3, 0.5, 0.7, 0.9)


def test_calibrate_all_has_every_method(calibrate, book, tmp_path, read_json):
    ended = calibrate(book, tmp_path / "out", "--method", "all", "--max_tokens", "6000")
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    assert list(report["methods"]) == [
        "none", "temperature", "temperature-ece", "vector", "ats-linear", "ats-mlp", "ats-transformer", "ats-shuffled",
    ]  # fmt: skip
    assert report["selected"] not in ("vector", "ats-shuffled")
    assert "| ats-transformer" in ended.out


def test_calibrate_vector_says_that_the_text_changes(calibrate, llmrl, book, tmp_path, read_json):
    folder = tmp_path / "out"
    ended = calibrate(book, folder, "--method", "vector")
    assert ended.code == 0, ended.err
    report = read_json(folder / "report.json")
    assert report["selected"] == "vector"
    assert report["methods"]["vector"]["nll"]["value"] < report["methods"]["temperature"]["nll"]["value"]
    assert report["methods"]["vector"]["accuracy"]["value"] != report["methods"]["none"]["accuracy"]["value"]
    assert report["greedy_identical"] is False
    assert "greedy text identical to the base: no" in ended.out
    assert "can differ from the base model's" in (folder / "README.md").read_text()
    assert list(read_json(folder / "config.json")["llmrl"]["heads"]) == ["vector"]
    assert logits(folder).isfinite().all()
    assert llmrl("calibrate", "--verify", folder, "--data", book, "--max_length", "129").code == 0


@pytest.mark.parametrize("method", ["temperature", "temperature-ece"])
def test_calibrate_fold_writes_a_plain_checkpoint(method, calibrate, llmrl, book, stories_dir, tmp_path, read_json):
    folder = tmp_path / "out"
    ended = calibrate(book, folder, "--method", method, "--fold")
    assert ended.code == 0, ended.err
    report = read_json(folder / "report.json")
    assert read_json(folder / "config.json")["model_type"] == "llama"
    assert not (folder / "llmrl_heads.safetensors").exists()
    scale = 1 / report["temperatures"][method]
    torch.testing.assert_close(logits(folder), logits(stories_dir) * scale, rtol=1e-4, atol=1e-4)
    assert abs(math.log(scale)) > 0.2
    assert report["fold_error"] < 1e-5
    assert "a plain checkpoint" in ended.out
    assert "import llmrl" not in (folder / "README.md").read_text()
    (folder / "notes.txt").write_text("mine")
    again = calibrate(book, folder, "--method", method, "--fold", "--overwrite", "--seed", "1", "--quiet")
    assert again.code == 0, again.err
    scale = 1 / read_json(folder / "report.json")["temperatures"][method]
    torch.testing.assert_close(logits(folder), logits(stories_dir) * scale, rtol=1e-4, atol=1e-4)
    assert (folder / "notes.txt").exists()
    verified = llmrl("calibrate", "--verify", folder, "--data", book)
    assert verified.code == 1
    assert "was made with --fold: the temperature is in its weights" in verified.refusal()
    # without its report it could be anybody's model
    (folder / "report.json").unlink()
    again = calibrate(book, folder, "--method", method, "--fold", "--overwrite", "--quiet")
    assert again.code == 1
    assert "holds a model that llmrl did not write" in again.refusal()


def test_calibrate_with_code_writes_the_modelling_file(calibrate, book, tmp_path, read_json):
    folder = tmp_path / "out"
    ended = calibrate(book, folder, "--method", "ats-linear", "--merge", "--with_code", "--quiet")
    assert ended.code == 0, ended.err
    assert "class CalibratedForCausalLM" in (folder / "modeling_llmrl.py").read_text()
    assert "AutoModelForCausalLM" in read_json(folder / "config.json")["auto_map"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    plain = calibrate(book, folder, "--method", "ats-linear", "--merge", "--overwrite", "--quiet")
    assert plain.code == 0, plain.err
    assert not (folder / "modeling_llmrl.py").exists()


def test_calibrate_multiple_choice_is_about_answers(calibrate, questions, tiny_lm, tmp_path, read_json):
    folder = tmp_path / "out"
    ended = calibrate(questions / "choices.jsonl", folder, "--max_length", "512", model=tiny_lm)
    assert ended.code == 0, ended.err
    report = read_json(folder / "report.json")
    assert report["level"] == "answer"
    assert sum(report["tokens"].values()) == report["rows"] == 60  # one answer a row
    assert "held-out test slice: 21 answers" in ended.out
    # among three letters none is less sure than a third
    assert report["reliability"]["none"]["count"][:4] == [0, 0, 0, 0]
    fitted_on = "fitted on answer letters: read its confidence there; sampled text of this folder is not calibrated"
    assert fitted_on in ended.out
    assert fitted_on in (folder / "README.md").read_text()
    described = read_json(folder / "config.json")["llmrl"]
    assert (described["level"], described["answer_confidence"]) == ("answer", None)


def test_calibrate_refuses_choices_that_are_all_answered_alike(calibrate, tiny_lm, tmp_path):
    """One letter is always the likeliest to this model; with two choices and that one right there is nothing to learn."""
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"What is {i} plus 1?", "choices": [str(i + 1)] * 2, "answer": 0} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = calibrate(data, tmp_path / "out", model=tiny_lm)
    assert ended.code == 1
    assert "answers to fit on are" in ended.refusal()
    assert not (tmp_path / "out").exists()


def test_calibrate_refuses_choices_beside_other_rows(calibrate, questions, book, tiny_lm, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((questions / "choices.jsonl").read_text() + (questions / "free.jsonl").read_text())
    assert calibrate(mixed, tmp_path / "out", model=tiny_lm).code == 1


def test_calibrate_adapter_needs_merge_and_is_merged(calibrate, book, stories_dir, tmp_path, read_json):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(stories_dir)
    lora = LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        wanted = adapted(input_ids=IDS).logits
    refused = calibrate(book, tmp_path / "out", model=tmp_path / "adapter")
    assert refused.code == 2
    assert "add --merge" in refused.refusal()
    ended = calibrate(book, tmp_path / "out", "--merge", "--method", "temperature", model=tmp_path / "adapter")
    assert ended.code == 0, ended.err
    scale = 1 / read_json(tmp_path / "out" / "report.json")["temperatures"]["temperature"]
    torch.testing.assert_close(logits(tmp_path / "out"), wanted * scale, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"]
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--with_code",), "--with_code needs --merge"),
        (("--fold",), "--fold needs one number for all tokens: --method temperature or temperature-ece, not auto"),
        (("--fold", "--method", "temperature", "--merge"), "leave --merge and --check_serving out"),
        (("--method", "paper", "--loss", "nll"), "--method paper has its own loss"),
        (("--method", "paper", "--loss", "top_label"), "say --method ats-transformer --loss top_label"),
        (
            ("--method", "temperature", "--loss", "nll"),
            "--loss nll has no meaning with --method temperature, which has",
        ),
        (("--method", "temperature-ece", "--loss", "top_label"), "no meaning with --method temperature-ece"),
        (("--method", "vector", "--loss", "nll"), "no meaning with --method vector"),
        (("--samples", "3"), "--samples has no meaning without --on_policy"),
        (("--answer_confidence", "min"), "--answer_confidence has no meaning without --on_policy"),
        (("--loss", "answer"), "--loss answer needs graded answers: --on_policy"),
        (("--on_policy", "--samples", "0"), "--samples must be at least 1"),
        (("--method", "ats-transfomer"), "did you mean 'ats-transformer'?"),
    ],
)
def test_calibrate_refuses_options_that_do_not_go_together(options, words, calibrate, book, tmp_path):
    ended = calibrate(book, tmp_path / "out", *options)
    assert ended.code == 2
    assert words in ended.refusal()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["temperature", "ats-linear"])
def test_calibrate_on_policy_is_about_the_models_own_answers(
    method, calibrate, questions, tiny_lm, tmp_path, read_json
):
    folder = tmp_path / "out"
    options = ("--on_policy", "--rollout_backend", "transformers", "--method", method, "--max_length", "256")
    ended = calibrate(questions / "free.jsonl", folder, *options, model=tiny_lm)
    assert ended.code == 0, ended.err
    report = read_json(folder / "report.json")
    assert (report["level"], report["answer_confidence"]) == ("answer", "mean")
    assert (report["loss"], report["bootstrap"]["unit"]) == ("answer", "question")
    assert "cached" not in report["answers"]
    assert (
        "fitted on graded answers: the confidence of a whole answer is calibrated (--answer_confidence mean"
        in ended.out
    )
    phases = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    named = [] if method == "temperature" else [method]
    assert [row.get("method", row["phase"]) for row in phases] == [
        "answers", "features", "none", "temperature", *named, "ats-shuffled",
    ]  # fmt: skip
    assert all(row["seconds"] >= 0 for row in phases)
    assert report["answers"]["answers"] == report["rows"] == sum(report["tokens"].values()) == 50
    assert 0.1 < report["answers"]["accuracy"] < 0.95  # the model knows some of them
    assert report["methods"]["none"]["accuracy"]["value"] == pytest.approx(report["answers"]["accuracy"], abs=0.25)
    assert "50 sampled by transformers (0 of them before)" in ended.out
    # 18 test answers cannot tell more than that nothing was broken
    scores = report["methods"]
    assert scores[method]["nll"]["value"] < scores["none"]["nll"]["value"] + 0.1


def test_calibrate_on_policy_several_samples_and_another_confidence(calibrate, questions, tiny_lm, tmp_path, read_json):
    options = ("--on_policy", "--rollout_backend", "transformers", "--samples", "2", "--answer_confidence", "product")
    ended = calibrate(questions / "free.jsonl", tmp_path / "out", *options, "--method", "temperature", model=tiny_lm)
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    assert report["answer_confidence"] == "product"
    assert 90 <= report["answers"]["answers"] <= 100
    assert re.search(r"only 1\d questions to test on: intervals are rough; more data mends it", ended.out), ended.out


def test_calibrate_on_policy_takes_the_loss_it_is_given(calibrate, questions, tiny_lm, tmp_path, read_json):
    options = ("--on_policy", "--rollout_backend", "transformers", "--method", "ats-linear", "--loss", "top_label")
    ended = calibrate(questions / "free.jsonl", tmp_path / "out", *options, "--quiet", model=tiny_lm)
    assert ended.code == 0, ended.err
    report = read_json(tmp_path / "out" / "report.json")
    assert (report["loss"], report["fits"]["ats-linear"]["loss"]) == ("top_label", "top_label")


def test_calibrate_on_policy_refuses_answers_that_are_all_wrong(calibrate, tiny_lm, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"Why {i}?", "answers": ["qqq zz"]}) + "\n" for i in range(8)))
    options = ("--on_policy", "--rollout_backend", "transformers", "--method", "temperature")
    ended = calibrate(data, tmp_path / "out", *options, model=tiny_lm)
    assert ended.code == 1
    assert "answers to fit on are wrong" in ended.refusal()
    assert "easier questions" in ended.err
    assert not (tmp_path / "out").exists()


# --- a folder of graded answers on new questions ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def graded_folders(calibrate, questions, tiny_lm, tmp_path_factory):
    """Heads by the product of an answer's probabilities: one beside its base, one with it."""
    folder = tmp_path_factory.mktemp("graded")
    options = ("--on_policy", "--rollout_backend", "transformers", "--answer_confidence", "product", "--quiet")
    for name, more in (("head", ("--method", "ats-linear")), ("merged", ("--method", "temperature", "--merge"))):
        ended = calibrate(questions / "free.jsonl", folder / name, *options, *more, model=tiny_lm)
        assert ended.code == 0, ended.err
    return folder


@pytest.mark.parametrize(("name", "method"), [("head", "ats-linear"), ("merged", "temperature")])
def test_verify_of_graded_answers_samples_and_grades_new_ones(
    name, method, llmrl, graded_folders, questions, tmp_path, read_json
):
    folder, small = graded_folders / name, ("--bootstrap_draws", "50", "--rollout_backend", "transformers")
    described = read_json(folder / "config.json")["llmrl"]
    assert (described["level"], described["answer_confidence"]) == ("answer", "product")
    ended = llmrl("calibrate", "--verify", folder, "--data", questions / "free.jsonl", *small)
    assert ended.code == 0, ended.err
    assert "50 sampled by transformers" in ended.out
    assert "50 answers; 95% intervals" in ended.out
    verified, report = read_json(folder / "verify.json"), read_json(folder / "report.json")
    assert (verified["level"], verified["answer_confidence"], verified["tokens"]) == ("answer", "product", {"test": 50})
    # the very answers it was fitted on: greedy, by the base without its head
    assert verified["answers"] == report["answers"]
    assert verified["methods"]["none"]["accuracy"]["value"] == pytest.approx(report["answers"]["accuracy"])
    assert list(verified["methods"]) == ["none", method]
    assert verified["methods"][method]["nll"]["value"] < verified["methods"]["none"]["nll"]["value"]


def test_verify_of_graded_answers_draws_several(llmrl, graded_folders, questions, tmp_path, read_json):
    options = ("--samples", "2", "--bootstrap_draws", "50", "--quiet", "--output_dir", tmp_path / "out")
    ended = llmrl("calibrate", "--verify", graded_folders / "merged", "--data", questions / "free.jsonl", *options)
    assert ended.code == 0, ended.err
    assert 90 <= read_json(tmp_path / "out" / "verify.json")["tokens"]["test"] <= 100


def test_verify_of_graded_answers_refuses_other_rows_and_an_engine_with_the_head(
    llmrl, graded_folders, questions, book
):
    folder = graded_folders / "merged"
    for data in (book, questions / "choices.jsonl"):
        refused = llmrl("calibrate", "--verify", folder, "--data", data)
        assert refused.code == 1
        assert "was fitted on the model's own graded answers (--on_policy), and" in refused.refusal()
    words = ("calibrate", "--verify", folder, "--data", questions / "free.jsonl")
    refused = llmrl(*words, "--rollout_backend", "vllm")
    assert refused.code == 2
    assert "vLLM would answer with the head in effect" in refused.refusal()
    refused = llmrl(*words, "--answer_confidence", "min")
    assert refused.code == 2
    assert "--answer_confidence has no meaning with --verify" in refused.refusal()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--loss", "nll"), "the model's own words are likely, right or wrong"),
        (("--method", "vector"), "a vector says other answers than those graded"),
    ],
)
def test_calibrate_on_policy_refuses_what_makes_no_sense(options, words, calibrate, questions, tiny_lm, tmp_path):
    ended = calibrate(questions / "free.jsonl", tmp_path / "out", "--on_policy", *options, model=tiny_lm)
    assert ended.code == 2
    assert words in ended.refusal()

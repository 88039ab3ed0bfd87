"""`llmrl calibrate --verify DIR`: numbers of a calibrated folder on other data, and what it refuses."""

import json
import shutil

import pytest
import torch
from folder_edits import change_tokenizer


@pytest.fixture(scope="module")
def base(stories_dir, tmp_path_factory):
    return shutil.copytree(stories_dir, tmp_path_factory.mktemp("verify") / "base")


@pytest.fixture(scope="module")
def folder(calibrate, book, base):
    assert calibrate(book, base.parent / "calibrated", "--method", "ats-linear", model=base).code == 0
    return base.parent / "calibrated"


@pytest.fixture
def own(base, folder, tmp_path):
    """Copies of base and folder that a test may spoil."""
    copy, calibrated = shutil.copytree(base, tmp_path / "base"), shutil.copytree(folder, tmp_path / "calibrated")
    (calibrated / "verify.json").unlink(missing_ok=True)
    path = calibrated / "config.json"
    fields = json.loads(path.read_text())
    fields["llmrl"]["base"]["model"] = str(copy)
    path.write_text(json.dumps(fields))
    return copy, calibrated


@pytest.fixture(scope="module")
def other_text(tmp_path_factory, book):
    path = tmp_path_factory.mktemp("data") / "other.txt"
    path.write_text(book.read_text()[3000:6000])
    return path


@pytest.fixture
def verify(llmrl, other_text):
    def run(folder, *options, model=()):
        words = ["calibrate", *model, "--verify", folder, "--data", other_text, "--max_length", "129"]
        return llmrl(*words, "--bootstrap_draws", "100", *options)

    return run


def reference_nll(model, tokenizer, text):
    """Mean NLL of windows of BOS and 128 tokens; their first token has only BOS before it and does not count."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(ids), 128):
        window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 128]]])
        with torch.inference_mode():
            rows = model(input_ids=window).logits[0, :-1].double().log_softmax(-1)
        losses += (-rows.gather(1, window[0, 1:, None])[:, 0]).tolist()
    return sum(losses) / len(losses), len(losses)


def test_verify_scores_none_and_the_saved_method(verify, folder, base, other_text, contents, read_json):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = contents(folder)
    ended = verify(folder)
    assert ended.code == 0, ended.err
    after = contents(folder)
    assert after.pop("verify.json")
    assert after == before  # nothing was fitted again
    result = read_json(folder / "verify.json")
    assert list(result["methods"]) == ["none", "ats-linear"]
    assert {"ece", "ece_equal_mass", "nll", "brier", "auroc", "accuracy", "smooth_ece"} <= set(
        result["methods"]["none"]
    )
    assert result["level"] == "token"
    assert "| ats-linear" in ended.out
    # the same numbers from transformers' logits
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, source in (("none", base), ("ats-linear", folder)):
        nll, tokens = reference_nll(AutoModelForCausalLM.from_pretrained(source), tokenizer, other_text.read_text())
        assert result["tokens"] == {"test": tokens}
        assert result["methods"][name]["nll"]["value"] == pytest.approx(nll, abs=1e-4)


def test_verify_writes_to_output_dir(verify, folder, tmp_path, contents, read_json):
    before = contents(folder)
    assert verify(folder, "--output_dir", tmp_path / "elsewhere", "--quiet").out == ""
    assert contents(folder) == before
    assert list(read_json(tmp_path / "elsewhere" / "verify.json")["methods"]) == ["none", "ats-linear"]


def test_verify_of_a_merged_folder_needs_no_base(verify, calibrate, book, stories_dir, tmp_path, read_json):
    base = shutil.copytree(stories_dir, tmp_path / "base")
    assert calibrate(book, tmp_path / "out", "--method", "temperature", "--merge", model=base).code == 0
    shutil.rmtree(base)
    assert verify(tmp_path / "out").code == 0
    methods = read_json(tmp_path / "out" / "verify.json")["methods"]
    assert list(methods) == ["none", "temperature"]
    assert methods["none"]["nll"] != methods["temperature"]["nll"]
    change_weights(tmp_path / "out")
    ended = verify(tmp_path / "out", "--output_dir", tmp_path / "new")
    assert ended.code == 1
    assert "the weights or the configuration in" in ended.refusal()
    assert not (tmp_path / "new").exists()


def change_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[0, 0] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_template(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


WHAT = {
    "the base model's weights or configuration": change_weights,
    "the tokenizer": change_tokenizer,
    "the chat template": change_template,
}


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("the base model's weights or configuration", "base"),
        ("the tokenizer", "base"),
        ("the chat template", "base"),
        ("the tokenizer", "folder"),
        ("the chat template", "folder"),
    ],
)
def test_verify_names_what_differs(name, where, verify, own):
    base, folder = own
    WHAT[name](base if where == "base" else folder)
    ended = verify(folder)
    assert ended.code == 1
    text = ended.refusal()
    assert name in text
    assert not any(other in text for other in WHAT if other != name)
    assert not (folder / "verify.json").exists()


def edit(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", lambda c: c["rope_parameters"].update(rope_theta=20000.0), "weights or configuration"),
        ("config.json", lambda c: c.update(rms_norm_eps=1e-3), "weights or configuration"),
        ("tokenizer.json", lambda t: t["model"]["merges"].reverse(), "the tokenizer"),
        ("tokenizer.json", lambda t: t["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"}), "the tokenizer"),
    ],
    ids=["rope_theta", "rms_norm_eps", "merges", "normalizer"],
)
def test_verify_refuses_another_computation(file, change, named, verify, own):
    base, folder = own
    edit(base / file, change)
    ended = verify(folder)
    assert ended.code == 1
    assert named in ended.refusal()
    assert not (folder / "verify.json").exists()


def test_verify_accepts_what_changes_no_number(verify, own):
    from safetensors.torch import save_file

    base, folder = own
    edit(base / "config.json", lambda c: c.update(transformers_version="5.99.0", use_cache=False))
    edit(base / "tokenizer_config.json", lambda c: c.update(pad_token="</s>"))
    save_file({"norm.weight": torch.ones(64)}, base / "consolidated.safetensors")  # the layout of another program
    ended = verify(folder)
    assert ended.code == 0, ended.err
    assert (folder / "verify.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--merge"],
        ["--check_serving"],
        ["--overwrite"],
        ["--num_seeds", "2"],
        ["--resume_from_checkpoint"],
        ["--loss", "nll"],
    ],
)
def test_verify_refuses_options_of_a_fit(options, verify, folder, contents):
    before = contents(folder)
    ended = verify(folder, *options)
    assert ended.code == 2
    assert f"{options[0]} has no meaning with --verify" in ended.refusal()
    assert contents(folder) == before


def test_verify_refuses_to_sample_for_a_folder_that_was_fitted_on_text(verify, folder):
    ended = verify(folder, "--samples", "3")
    assert ended.code == 2
    assert "--samples has no meaning here" in ended.refusal()


def test_verify_finds_a_moved_base_by_name(verify, own):
    base, folder = own
    moved = base.rename(base.with_name("moved"))
    ended = verify(folder)
    assert ended.code == 1
    text = ended.refusal()
    assert f"is not at {base}" in text
    assert "llmrl calibrate BASE --verify" in text
    assert verify(folder, model=[moved]).code == 0
    assert (folder / "verify.json").exists()


def test_verify_refuses_a_damaged_head(verify, own):
    from safetensors.torch import load_file, save_file

    _, folder = own
    path = folder / "llmrl_heads.safetensors"
    tensors = load_file(path)
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, path)
    ended = verify(folder)
    assert ended.code == 1
    assert "holds NaN or infinity" in ended.refusal()
    path.write_bytes(path.read_bytes()[:40])
    assert "is damaged" in verify(folder).refusal()
    path.unlink()
    assert "lost its head" in verify(folder).refusal()


def test_verify_refuses_what_llmrl_did_not_write(verify, base, tmp_path):
    assert "carries no llmrl heads" in verify(base).refusal()
    assert "not found" in verify(tmp_path / "nowhere").refusal()
    assert verify(tmp_path / "nowhere").code == 2

"""Python files that lie in a model folder are never run, whatever its JSON files say and whatever stdin answers."""

import contextlib
import io
import json
import shutil
import sys

import pytest

EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **kwargs):
    raise AssertionError("custom generate ran")
"""
CLASSES = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
TOKENIZER = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}


def update(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def known_type(folder):
    update(folder / "config.json", auto_map=CLASSES)


def unknown_type(folder):
    update(folder / "config.json", auto_map=CLASSES, model_type="evil")


def known_tokenizer(folder):
    update(folder / "tokenizer_config.json", auto_map=TOKENIZER)


def unknown_tokenizer(folder):
    update(folder / "tokenizer_config.json", auto_map=TOKENIZER, tokenizer_class="EvilTokenizer")


def generation(folder):
    (folder / "custom_generate").mkdir()
    shutil.copyfile(folder / "evil.py", folder / "custom_generate" / "generate.py")


TRAPS = [known_type, unknown_type, known_tokenizer, unknown_tokenizer, generation]


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Exists once the code has run; meanwhile stdin says yes to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    # where transformers copies such files to before it runs them
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    return tmp_path / "marker"


@pytest.fixture
def lay(marker):
    def set_trap(trap, folder):
        (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
        trap(folder)

    return set_trap


@pytest.fixture(scope="module")
def text(tmp_path_factory, book):
    path = tmp_path_factory.mktemp("data") / "short.txt"
    path.write_text(book.read_text()[:4000])
    return path


@pytest.fixture(scope="module")
def made(llmrl, text, stories_dir, tmp_path_factory):
    """Two folders llmrl wrote, one beside its base and one merged. Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    base = shutil.copytree(stories_dir, root / "base")
    for name, options in (("beside", []), ("merged", ["--merge"])):
        argv = ["calibrate", base, "--data", text, "--output_dir", root / name, "--max_length", "33", "--quiet"]
        assert llmrl(*argv, "--method", "temperature", "--bootstrap_draws", "20", *options).code == 0
    return root


@pytest.fixture
def copies(made, tmp_path):
    """`copies(name)` copies such a folder and, where it needs one, its base."""

    def copy(name):
        folder, base = shutil.copytree(made / name, tmp_path / name), shutil.copytree(made / "base", tmp_path / "base")
        fields = json.loads((folder / "config.json").read_text())
        fields["llmrl"]["base"]["model"] = str(base)
        (folder / "config.json").write_text(json.dumps(fields))
        return folder, base

    return copy


def check(ended, marker):
    """Refused in one line or done, and the code did not run."""
    assert not marker.exists()
    if ended.code != 0:
        assert ended.code == 1
        assert len(ended.refusal().splitlines()) <= 2
    assert "[y/N]" not in ended.out + ended.err


@pytest.mark.parametrize("trap", [known_type, unknown_type, known_tokenizer, unknown_tokenizer])
def test_traps_work_where_remote_code_is_asked_for(trap, lay, marker, stories_dir, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    model = shutil.copytree(stories_dir, tmp_path / "model")
    lay(trap, model)
    auto = AutoConfig if trap in (known_type, unknown_type) else AutoTokenizer
    auto.from_pretrained(model, trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_calibrate_runs_no_code_of_the_model_folder(trap, lay, marker, llmrl, text, stories_dir, tmp_path):
    model = shutil.copytree(stories_dir, tmp_path / "model")
    lay(trap, model)
    argv = ["calibrate", model, "--data", text, "--output_dir", tmp_path / "out", "--max_length", "33"]
    ended = llmrl(*argv, "--method", "temperature", "--bootstrap_draws", "20", "--quiet")
    check(ended, marker)
    if trap is unknown_type:
        assert ended.code == 1
        assert f"cannot load {model}: " in ended.refusal()
    if trap in (known_type, generation):  # what transformers has itself needs nobody's code
        assert ended.code == 0, ended.err


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("place", ["beside", "merged", "base"])
def test_verify_runs_no_code_of_any_folder(trap, place, lay, marker, llmrl, text, copies, tmp_path):
    folder, base = copies("beside" if place == "base" else place)
    lay(trap, base if place == "base" else folder)
    argv = ["calibrate", "--verify", folder, "--data", text, "--max_length", "33", "--bootstrap_draws", "20"]
    check(llmrl(*argv, "--output_dir", tmp_path / "verified"), marker)


# of another model type a folder is none of llmrl's, and transformers opens it by its own rules
OPENED = [(t, p) for t in TRAPS for p in ("beside", "merged", "base") if t is not unknown_type or p == "base"]


@pytest.mark.parametrize(("trap", "place"), OPENED)
def test_from_pretrained_runs_no_code_of_any_folder(trap, place, lay, marker, copies, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    from llmrl.errors import HeadMismatchError

    folder, base = copies("beside" if place == "base" else place)
    lay(trap, base if place == "base" else folder)
    # with classes named in it, the configuration is not the one the head was fitted on
    changed = trap in (known_type, unknown_type) and place != "beside"
    refused = pytest.raises(HeadMismatchError, match="the weights or the configuration")
    with refused if changed else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.generate(torch.tensor([[1, 403]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not marker.exists()
    assert "[y/N]" not in capsys.readouterr().out

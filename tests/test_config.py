from __future__ import annotations

from dataclasses import dataclass

import pytest
import yaml

from llmrl.ats.options import LINEAR, NONE, SHUFFLED, TEMPERATURE, CalibrateConfig
from llmrl.config import load_config_file, option, parse_config, to_flat
from llmrl.errors import ConfigError, UsageError


@dataclass
class Options:
    model: str = option(help="required")
    data: list[str] = option([], help="names")
    layers: list[int] = option([1, 2], help="numbers")
    lora_r: int = option(8, help="rank")
    lora_alpha: float = option(1.5, help="100% of it")
    limit: int | None = option(None, help="or null")
    loss: str = option("nll", choices=("nll", "brier"), help="a choice")
    merge: bool = option(False, help="a switch")
    resume: str | None = option(None, help="bare or with a value", const="latest")


def parse(*argv):
    return parse_config(Options, list(argv), prog="llmrl test", description="-", positional="model")


@pytest.fixture
def parse_file(tmp_path):
    def parse_text(text, *argv):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return parse_config(
            Options, ["--config", str(path), *argv], prog="llmrl test", description="-", positional="model"
        )

    return parse_text


def test_parse_config_defaults_and_both_ways_to_name_the_positional():
    assert parse("base") == Options("base")
    assert parse("base").layers is not parse("base").layers


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lora_r", "16"], "lora_r", 16),
        (["--lora_r=-3"], "lora_r", -3),
        (["--lora_alpha", "1e-4"], "lora_alpha", 1e-4),
        (["--lora_alpha", "2"], "lora_alpha", 2.0),
        (["--limit", "7"], "limit", 7),
        (["--limit", "null"], "limit", None),
        (["--data", "a,b", "c"], "data", ["a", "b", "c"]),
        (["--layers", "3,4,"], "layers", [3, 4]),
        (["--merge"], "merge", True),
        (["--merge", "true"], "merge", True),
        (["--merge", "False"], "merge", False),
        (["--merge=true"], "merge", True),
        (["--resume"], "resume", "latest"),
        (["--resume", "run/checkpoint-3"], "resume", "run/checkpoint-3"),
        (["--loss", "brier"], "loss", "brier"),
    ],
)
def test_parse_config_command_line(argv, name, value):
    found = getattr(parse("base", *argv), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("lora_r: 16", "lora_r", 16),
        ("lora_alpha: 1e-4", "lora_alpha", 1e-4),  # YAML 1.1 reads this as text
        ("lora_alpha: 3", "lora_alpha", 3.0),
        ("limit: null", "limit", None),
        ("limit:", "limit", None),
        ("data: a.jsonl,b.jsonl", "data", ["a.jsonl", "b.jsonl"]),
        ("data: a, b", "data", ["a", "b"]),
        ("data: [a, b]", "data", ["a", "b"]),
        ("data: ''", "data", []),
        ("layers: 3,4", "layers", [3, 4]),
        ("layers: 3", "layers", [3]),
        ("layers: ''", "layers", []),
        ("merge: true", "merge", True),
        ("merge: no", "merge", False),
        ("resume: latest", "resume", "latest"),
    ],
)
def test_parse_config_file(text, name, value, parse_file):
    found = getattr(parse_file(f"model: base\n{text}\n"), name)
    assert found == value
    assert type(found) is type(value)


def test_parse_config_command_line_wins_over_the_file(parse_file):
    found = parse_file(
        "model: base\nlora_r: 16\nmerge: true\ndata: a,b\nlimit: 5",
        "--merge",
        "false",
        "--data",
        "c",
        "--limit",
        "null",
    )
    assert found == Options("base", data=["c"], lora_r=16, merge=False, limit=None)


def test_parse_config_empty_file_is_no_options(parse_file):
    assert parse_file("# nothing\n", "base") == Options("base")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["base", "--lora_rr", "4"], "unknown option --lora_rr; did you mean --lora_r?"),
        (["base", "--lora_rr=4"], "unknown option --lora_rr=4; did you mean --lora_r?"),
        (["base", "--lora-alpha", "4"], "unknown option --lora-alpha; did you mean --lora_alpha?"),
        (["base", "--mer"], "unknown option --mer; did you mean --merge?"),  # never taken for --merge
        (["base", "--zzzzzz", "4"], "unknown option --zzzzzz; see llmrl test --help"),
        (["base", "other"], "unexpected argument 'other'; see llmrl test --help"),
        (["base", "--loss", "niil"], "--loss niil: not a choice; did you mean 'nll'?"),
        (["base", "--loss", "xyz"], "--loss xyz: not a choice; valid: brier, nll"),
        (["base", "--lora_r", "four"], "--lora_r must be a whole number, got 'four'"),
        (["base", "--lora_r", "4.5"], "--lora_r must be a whole number, got '4.5'"),
        (["base", "--lora_alpha", "x"], "--lora_alpha must be a number, got 'x'"),
        (["base", "--layers", "1,b"], "--layers must be a whole number, got 'b'"),
        (["base", "--merge", "yes"], "--merge must be true or false, got 'yes'"),
        (["base", "--lora_r"], "argument --lora_r: expected one argument"),
        (["base", "--config", "nothing.yaml"], "not found: nothing.yaml (--config)"),
        ([], "missing --model: required"),
    ],
)
def test_parse_config_command_line_refuses(argv, message):
    with pytest.raises(UsageError) as error:
        parse(*argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rr: 4", "c.yaml: unknown key 'lora_rr'; did you mean 'lora_r'?"),
        (
            "zzzzzz: 4",
            "c.yaml: unknown key 'zzzzzz'; valid: data, layers, limit, lora_alpha, lora_r, loss, merge, model",
        ),
        ("4: x", "c.yaml: unknown key '4'"),
        ("lora_r: four", "c.yaml: 'lora_r' must be a whole number, got 'four'"),
        ("lora_r: 4.5", "c.yaml: 'lora_r' must be a whole number, got 4.5"),
        ("lora_r: true", "c.yaml: 'lora_r' must be a whole number, got True"),
        ("lora_r: null", "c.yaml: 'lora_r' must be a whole number, got null"),
        ("lora_r: [4]", "c.yaml: 'lora_r' must be a whole number, got a list"),
        ("lora_alpha: high", "c.yaml: 'lora_alpha' must be a number, got 'high'"),
        ("lora_alpha: true", "c.yaml: 'lora_alpha' must be a number, got True"),
        ("merge: 1", "c.yaml: 'merge' must be true or false, got 1"),
        ("merge: 'true'", "c.yaml: 'merge' must be true or false, got 'true'"),
        ("model: 5", "c.yaml: 'model' must be text, got 5"),
        ("layers: a,b", "c.yaml: 'layers' must be a whole number, got 'a'"),
        ("lora:\n  r: 4", "c.yaml: unknown key 'lora'; did you mean 'lora_r'?"),
        ("lora_r:\n  alpha: 4", "c.yaml: 'lora_r' is a nested mapping; keys are flat, for example '"),
        ("- a\n- b", "c.yaml: expected 'key: value' lines, got a list"),
        ("just text", "c.yaml: expected 'key: value' lines, got a str"),
        ("model: base\nlora_r: [1,\nmerge: true", "c.yaml:3: not YAML: "),
        ("model: base\n\tlora_r: 1", "c.yaml:2: not YAML: "),
        ("loss: hinge", "--loss hinge: not a choice; valid: brier, nll"),
    ],
)
def test_parse_config_file_refuses(text, message, parse_file):
    with pytest.raises(ConfigError) as error:
        parse_file(text, *([] if text.startswith("model") else ["base"]))
    assert message in str(error.value)
    assert error.value.exit_code == 2


def test_load_config_file_that_is_not_text(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"c\.yaml: not YAML: "):
        load_config_file(tmp_path / "c.yaml", Options)


def test_load_config_file_runs_no_code(tmp_path):
    (tmp_path / "c.yaml").write_text("model: !!python/object/apply:os.mkdir ['" + str(tmp_path / "made") + "']")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config_file(tmp_path / "c.yaml", Options)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "config",
    [
        Options("base"),
        Options("base", data=["a", "b c"], layers=[], lora_r=4, lora_alpha=1e-5, limit=3, merge=True, resume="x"),
    ],
)
def test_to_flat_is_what_the_file_would_hold(config, parse_file):
    flat = to_flat(config)
    assert not any(isinstance(value, list | dict) for value in flat.values())
    assert parse_file(yaml.safe_dump(flat)) == config


def test_parse_config_help_shows_every_option_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in ("--data", "--layers", "--lora_r", "--merge", "--resume", "--config", "100% of it", "(default: 8)"):
        assert name in text


# --- the options of a command -----------------------------------------------------------------------------------------

GOOD = {"model": "base", "data": ["a.jsonl"], "output_dir": "out"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": []}, "missing --data"),
        ({"model": None}, "missing MODEL, a folder or hub name"),
        ({"output_dir": None}, "missing --output_dir"),
        ({"max_tokens": 0}, "--max_tokens must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch_size must be at least 1, got -1"),
        ({"max_length": 1}, "--max_length must be at least 2, got 1"),
        ({"seed": -1}, "--seed must not be negative, got -1"),
    ],
)
def test_calibrate_config_refuses(change, message):
    with pytest.raises(UsageError, match=message):
        CalibrateConfig(**{**GOOD, **change})


def test_calibrate_config_verify_needs_no_model():
    assert CalibrateConfig(data=["a.jsonl"], verify="out").model is None


def test_calibrate_config_fitted_methods_have_base_scalar_and_control():
    assert CalibrateConfig(**GOOD, method=LINEAR).fitted_methods() == [NONE, TEMPERATURE, LINEAR, SHUFFLED]
    assert CalibrateConfig(**GOOD, method=TEMPERATURE).fitted_methods() == [NONE, TEMPERATURE, SHUFFLED]
    assert len(CalibrateConfig(**GOOD).fitted_methods()) == 5


def test_parse_config_bare_switch_leaves_the_positional_alone():
    @dataclass
    class Options:
        model: str | None = option(None, help="m")
        merge: bool = option(False, help="s")

    for argv in (["--merge", "MODEL"], ["MODEL", "--merge"], ["--merge", "true", "MODEL"]):
        found = parse_config(Options, argv, prog="p", description="d", positional="model")
        assert (found.model, found.merge) == ("MODEL", True), argv


def test_load_config_file_refuses_a_key_that_stands_there_twice(parse_file):
    with pytest.raises(ConfigError, match=r"c\.yaml: key 'lora_r' stands there twice; remove one"):
        parse_file("model: a\nlora_r: 4\nloss: nll\nlora_r: 8\n")


def test_parse_config_a_file_whose_name_has_a_comma_is_one_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.txt").write_text("x")
    assert parse("base", "--data", "a,b.txt").data == ["a,b.txt"]
    assert parse("base", "--data", "a,b.txt", "c,d.txt").data == ["a,b.txt", "c", "d.txt"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("merge", True),
        ("check_serving", True),
        ("overwrite", True),
        ("num_seeds", 2),
        ("resume_from_checkpoint", "latest"),
    ],
)
def test_calibrate_config_verify_takes_no_option_of_a_fit(option, value):
    CalibrateConfig(verify="DIR", data=["x"])
    with pytest.raises(UsageError, match=f"--{option} has no meaning with --verify"):
        CalibrateConfig(verify="DIR", data=["x"], **{option: value})


def test_calibrate_config_resume_takes_no_path():
    for value in (None, "latest", "true"):
        CalibrateConfig(model="m", data=["x"], output_dir="o", resume_from_checkpoint=value)
    with pytest.raises(UsageError, match="--resume_from_checkpoint out/checkpoint-3: write it without a value"):
        CalibrateConfig(model="m", data=["x"], output_dir="o", resume_from_checkpoint="out/checkpoint-3")

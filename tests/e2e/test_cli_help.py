"""`llmrl` without work to do: help, version, and commands that do not exist."""

import re
import sys
from pathlib import Path

import pytest

import llmrl as package


def test_llmrl_help_lists_the_commands(llmrl):
    for argv in ([], ["--help"], ["-h"]):
        ended = llmrl(*argv)
        assert ended.code == 0
        assert re.search(r"^  calibrate +\S", ended.out, re.MULTILINE)
        assert re.search(r"^  serve +\S", ended.out, re.MULTILINE)
        assert "130 interrupted" in ended.out


def test_llmrl_version(llmrl):
    assert llmrl("--version").out.strip() == package.__version__


def test_llmrl_unknown_command_suggests_one(llmrl):
    ended = llmrl("calibrat", "model")
    assert ended.code == 2
    assert ended.refusal() == "llmrl: unknown command 'calibrat'; did you mean 'calibrate'?"


def test_calibrate_help_imports_no_torch(process):
    code = (
        "import sys; from llmrl.cli import main; code = main(['calibrate', '--help']);"
        "print(code, sorted({'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    ended = process("-c", code)
    assert ended.out.splitlines()[-1] == "0 []", ended.err
    for option in ("--data", "--output_dir", "--method", "--seed", "--merge", "--verify", "--overwrite", "--config"):
        assert option in ended.out
    assert "model" in ended.out.lower()


def test_console_script_is_the_module(process):
    script = Path(sys.executable).with_name("llmrl")
    if not script.exists():
        pytest.skip("llmrl is not installed as a package here")
    assert process(script, "--version").out == process("-m", "llmrl.cli", "--version").out


def test_doctor_answers(llmrl):
    ended = llmrl("doctor")
    assert ended.code in (0, 1)
    assert "torch" in ended.out


def test_doctor_refuses_an_option_it_does_not_know(llmrl):
    ended = llmrl("doctor", "--foo")
    assert ended.code == 2
    assert ended.out == ""
    assert ended.refusal() == "llmrl: unknown option --foo; llmrl doctor knows --json"

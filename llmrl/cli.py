"""The `llmrl` command: thin, and quick to answer because every subcommand imports only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from llmrl._version import __version__
from llmrl.errors import UsageError, did_you_mean, run_command

_COMMANDS = {
    "calibrate": "make a model's token probabilities mean something; --verify checks a calibrated one on new data",
    "rollout": "sample answers to a file of prompts with transformers, vLLM or vLLM servers",
    "leret": "teach a model to search by trying: explore queries, train on the preferences, evaluate",
    "hyre": "one reward ensemble, fitted to a user or a domain by a few labels: train, adapt, query, score, eval, export",
    "switch": "many LoRA experts, chosen per token: train, eval, export",
    "hindsight": "learn a better dialogue policy from logs: train (ILQL and its rivals), eval, fold, logs",
    "serve": "serve a folder llmrl wrote, or any model, with vLLM; --workers N starts several, --sync takes new weights",
    "doctor": "versions found and wanted, which backends work, GPU and memory",
}

_HELP = """usage: llmrl COMMAND ...

llmrl {version}: post-training and agent RL for open causal language models.

commands:
{commands}

llmrl COMMAND --help lists the options of a command. Exit codes: 0 done, 1 error, 2 usage, 3 finished with
failed rows, 130 interrupted. LLMRL_DEBUG=1 shows the traceback of an error."""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the return value is the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:<10} {text}" for name, text in _COMMANDS.items())
        print(_HELP.format(version=__version__, commands=lines))
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command = {
        "calibrate": _calibrate,
        "rollout": _rollout,
        "leret": _leret,
        "hyre": _hyre,
        "switch": _switch,
        "hindsight": _hindsight,
        "serve": _serve,
        "doctor": _doctor,
    }.get(argv[0])
    if command is None:
        raise UsageError(f"unknown command '{argv[0]}'{did_you_mean(argv[0], _COMMANDS)}")
    return _with_help(command, argv[1:])


def _with_help(command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return command(argv)
    except SystemExit as end:  # argparse prints --help and leaves
        return end.code if isinstance(end.code, int) else 1


def _calibrate(argv: list[str]) -> int:
    from llmrl.commands import run_calibrate

    return run_calibrate(argv)


def _rollout(argv: list[str]) -> int:
    from llmrl.commands import run_rollout

    return run_rollout(argv)


def _leret(argv: list[str]) -> int:
    from llmrl.commands import run_leret

    return run_leret(argv)


def _hyre(argv: list[str]) -> int:
    from llmrl.commands import run_hyre

    return run_hyre(argv)


def _switch(argv: list[str]) -> int:
    from llmrl.commands import run_switch

    return run_switch(argv)


def _hindsight(argv: list[str]) -> int:
    from llmrl.commands import run_hindsight

    return run_hindsight(argv)


def _serve(argv: list[str]) -> int:
    from llmrl.serving.launch import main as serve

    return serve(argv)


def _doctor(argv: list[str]) -> int:
    from llmrl.doctor import main as doctor

    return doctor(argv)


if __name__ == "__main__":
    sys.exit(main())

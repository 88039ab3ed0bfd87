"""Commands that a recipe runs too: options in, work done, exit code out. One code path for `llmrl X` and recipes/X.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from llmrl.config import parse_config
from llmrl.errors import EXIT_DONE, EXIT_FAILED_ROWS, Interrupted, UsageError, did_you_mean


def run_calibrate(argv: list[str], prog: str = "llmrl calibrate") -> int:
    """Parse options, then calibrate or verify; return the exit code.

    Args:
        argv: arguments without the program's name.
        prog: shown in usage messages.
    """
    # the options alone answer --help and usage errors, without torch
    from llmrl.ats.options import CalibrateConfig

    config = parse_config(
        CalibrateConfig,
        argv,
        prog=prog,
        description="Calibrate a causal LM's next-token probabilities; the base stays frozen and greedy text unchanged.",
        positional="model",
    )
    quiet_libraries(config.quiet)
    if config.verify is not None:
        from llmrl.ats.verify import verify

        verify(config)
        return EXIT_DONE
    from llmrl.ats.calibrate import calibrate

    report = calibrate(config)
    if report and config.check_serving:
        from llmrl.serving.check import check_serving

        result = check_serving(str(config.output_dir))
        if not config.quiet:
            print(result.sentence(), flush=True)
    return EXIT_DONE


def run_rollout(argv: list[str], prog: str = "llmrl rollout") -> int:
    """Parse options, then sample; return the exit code.

    Args:
        argv: arguments without the program's name.
        prog: shown in usage messages.
    """
    from llmrl.rollout.options import RolloutConfig

    config = parse_config(
        RolloutConfig,
        argv,
        prog=prog,
        description="Sample answers to a file of prompts: token ids, logprobs and text, in the order of the prompts.",
    )
    try:
        quiet_libraries(config.quiet)
        from llmrl.rollout.run import rollout

        return rollout(config)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted("interrupted before anything was sampled; run the same command again") from None


def _named_action(
    argv: list[str], prog: str, actions: Mapping[str, str], what: str
) -> tuple[str | None, list[str], str]:
    """Return (action, options, program's name) of a command line that begins with one of the actions; help leaves no action.

    Raises:
        UsageError: it begins with something else.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<8} {text}" for name, text in actions.items())
        print(f"usage: {prog} ACTION ...\n\n{what}\n\nactions:\n{lines}\n\n{prog} ACTION --help lists its options.")
        return None, [], prog
    if argv[0] not in actions:
        raise UsageError(f"unknown action '{argv[0]}'{did_you_mean(argv[0], actions)}")
    return argv[0], argv[1:], f"{prog} {argv[0]}"


def _done(action: Callable[[Any], object], config: Any) -> int:
    try:
        action(config)
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command begins again") from None
    return EXIT_DONE


_LERET = {
    "explore": "Try search queries in every style, score what they find, write preference pairs and the headroom report.",
    "train": "Explore and train, round after round; goes on with what explore left in the same --output_dir.",
    "eval": "Search with a policy on questions and passages; report recall and AP beside the question and other systems.",
}


def run_leret(argv: list[str], prog: str = "llmrl leret", action: str | None = None) -> int:
    """Parse options, then explore, train or evaluate; return the exit code.

    Args:
        argv: arguments without the program's name; the first is the action unless `action` is given.
        prog: shown in usage messages.
        action: explore, train or eval.
    """
    from llmrl.leret.options import LeretConfig

    if action is None:
        action, argv, prog = _named_action(argv, prog, _LERET, "teach a language model to search by trying")
    if action is None:
        return EXIT_DONE
    config = parse_config(LeretConfig, argv, prog=prog, description=_LERET[action])
    quiet_libraries(config.quiet)
    from llmrl.leret import run

    try:
        {"explore": run.explore, "train": run.train, "eval": run.evaluate_policy}[action](config)
    except Interrupted:
        raise
    except KeyboardInterrupt as stopped:
        kept = str(stopped) or "the same command goes on with what is finished"
        raise Interrupted(f"interrupted: {kept}") from None
    return EXIT_FAILED_ROWS if run.failed_prompts(action, str(config.output_dir)) else EXIT_DONE


_HYRE = {
    "train": "Train K reward heads that differ on preference pairs.",
    "adapt": "Weigh the heads by the labels of one user; write the user's file.",
    "query": "Ask A or B in the terminal, the most telling pair first; every answer is kept at once.",
    "eval": "Accuracy against labels on users it was not trained on, beside fine-tuning and every other way to use them.",
    "score": "Write the margin of chosen over rejected of every pair, for one user or for all heads alike.",
    "export": "Write an ensemble on a causal LM as one checkpoint with K scores, for transformers and vLLM.",
}


def run_hyre(argv: list[str], prog: str = "llmrl hyre", action: str | None = None) -> int:
    """Parse options, then do the action; return the exit code.

    Args:
        argv: arguments without the program's name; the first is the action unless `action` is given.
        prog: shown in usage messages.
        action: one of the actions.
    """
    from llmrl.hyre import options, query_options

    if action is None:
        action, argv, prog = _named_action(argv, prog, _HYRE, "one reward ensemble, fitted to a user by a few labels")
    if action is None:
        return EXIT_DONE
    classes: dict[str, Any] = {
        "train": options.TrainConfig,
        "adapt": options.AdaptConfig,
        "score": options.ScoreConfig,
        "query": query_options.QueryConfig,
        "eval": options.EvalConfig,
        "export": options.ExportConfig,
    }
    config = parse_config(classes[action], argv, prog=prog, description=_HYRE[action])
    quiet_libraries(config.quiet)
    from llmrl.hyre import evaluation, export, query, run, train

    actions: dict[str, Callable[[Any], object]] = {
        "train": train.train,
        "adapt": run.adapt_user,
        "score": run.score_pairs,
        "query": query.query,
        "eval": evaluation.evaluate,
        "export": export.export,
    }
    return _done(actions[action], config)


_SWITCH = {
    "train": "Train LoRA experts and the router that chooses among them per token; the base stays frozen.",
    "eval": "Measure what held-out rows of each task lose, and which experts they go to.",
    "export": "Write a fixed mixture of the experts as one plain peft adapter.",
}


def run_switch(argv: list[str], prog: str = "llmrl switch", action: str | None = None) -> int:
    """Parse options, then train, evaluate or export; return the exit code.

    Args:
        argv: arguments without the program's name; the first is the action unless `action` is given.
        prog: shown in usage messages.
        action: train, eval or export.
    """
    from llmrl.lora_switch import options

    if action is None:
        action, argv, prog = _named_action(argv, prog, _SWITCH, "LoRA experts, chosen per token by one router")
    if action is None:
        return EXIT_DONE
    classes: dict[str, Any] = {
        "train": options.TrainConfig,
        "eval": options.EvalConfig,
        "export": options.ExportConfig,
    }
    config = parse_config(classes[action], argv, prog=prog, description=_SWITCH[action])
    quiet_libraries(config.quiet)
    from llmrl.lora_switch import evaluate, experts, train
    from llmrl.training.distributed import is_main_process

    actions: dict[str, Callable[[Any], object]] = {
        "train": train.train,
        "eval": evaluate.evaluate,
        "export": experts.export,
    }
    code = _done(actions[action], config)
    if action == "train" and config.check_serving and is_main_process():
        from llmrl.serving.check import check_serving

        result = check_serving(config.output_dir)
        if not config.quiet:
            print(result.sentence(), flush=True)
    return code


_HINDSIGHT = {
    "train": "Learn a policy for dialogues from logs of mediocre ones: ILQL, Monte-Carlo values, AWR, cloning, preferences.",
    "eval": "Play a policy in an environment whose best return is known.",
    "fold": "Write a policy with one beta as a plain checkpoint, after measuring what that loses.",
    "logs": "Write logged dialogues of an environment, and a small model without any knowledge to learn from them.",
    "regenerate": "Rewrite what went wrong in logged dialogues in hindsight, and play on from there: more to learn from.",
    "forward": "Train a model of the user in logged dialogues, by LoRA, to play on with.",
}


def run_hindsight(argv: list[str], prog: str = "llmrl hindsight", action: str | None = None) -> int:
    """Parse options, then do the action; return the exit code.

    Args:
        argv: arguments without the program's name; the first is the action unless `action` is given.
        prog: shown in usage messages.
        action: one of the actions.
    """
    from llmrl.hindsight import options
    from llmrl.hindsight.regeneration import options as regeneration

    if action is None:
        what = "offline RL for dialogue agents, from logs alone"
        action, argv, prog = _named_action(argv, prog, _HINDSIGHT, what)
    if action is None:
        return EXIT_DONE
    classes: dict[str, Any] = {
        "train": options.TrainConfig,
        "eval": options.EvalConfig,
        "fold": options.FoldConfig,
        "logs": options.LogsConfig,
        "regenerate": regeneration.RegenerateConfig,
        "forward": regeneration.ForwardConfig,
    }
    config = parse_config(classes[action], argv, prog=prog, description=_HINDSIGHT[action])
    if action == "regenerate":
        if config.opens_models():
            quiet_libraries(config.quiet)
        from llmrl.hindsight.regeneration.run import run as regenerate

        found: dict[str, Any] = {}
        _done(lambda config: found.update(regenerate(config)), config)
        return EXIT_FAILED_ROWS if found.get("unfinished") else EXIT_DONE
    quiet_libraries(config.quiet)
    from llmrl.hindsight import evaluation, fold, run
    from llmrl.hindsight.regeneration import user_model

    actions: dict[str, Callable[[Any], object]] = {
        "train": run.train,
        "eval": evaluation.evaluate,
        "fold": fold.fold,
        "logs": evaluation.write_logs,
        "forward": user_model.train,
    }
    return _done(actions[action], config)


def quiet_libraries(quiet: bool) -> None:
    """Silence what the libraries say beside our own output; with `quiet`, or no terminal, their progress bars too."""
    import logging as standard_logging
    import os

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries below load
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of torch's native code, which warns about NUMA nodes
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.set_verbosity_error()
    # retries without a network fill the screen; the error that ends them is ours to print
    for name in ("huggingface_hub", "vllm"):  # the second warns before it has read its own level
        standard_logging.getLogger(name).setLevel(standard_logging.ERROR)
    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()

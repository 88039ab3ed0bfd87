"""The table that says which calibration holds up where: every method, several kinds of data, three seeds, paired intervals.

    python recipes/overtrained_lm.py --data_dir DATA --output_dir runs/overtrained_lm
    python evals/calibration.py --data_dir DATA --overtrained runs/overtrained_lm --output_dir evals/results

DATA holds `esconv/*.jsonl.gz` (rows with `turns` of `role` and `text`), `triviaqa/questions.jsonl.gz` (`question`, `answers`)
and `mmlu/test.jsonl.gz` (`question`, `choices`, `answer`); they are not in this repository. What is measured (`--only` names
some of it):

    text            stories260k on four kinds of text, blocks dealt to fit, validation and test
    text-drift      the same, fitted on the beginning of each text, tested on its end
    text-unseen-X   fitted on three of them, tested on the fourth
    chat            tiny_lm on dialogues it was not trained on
    made-up         tiny_lm's own answers to sums, spellings and the like, graded, answer level
    choice          the over-trained model on multiple choice, answer level
    answers         the over-trained model's own answers to questions of fact, graded, answer level

Each seed of each setting is written to `--work_dir` when it is done, so that a killed run goes on with the same command.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import runpy
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl.config import option, parse_config, to_flat
from llmrl.errors import EXIT_DONE, OutputError, UsageError, run_command

if TYPE_CHECKING:
    from llmrl.ats.data import Window
    from llmrl.ats.splits import Split

TEXTS = ("wizard_of_oz", "wiki_demo", "tinyshakespeare", "c4_demo")
MADE_UP = 2400  # questions
TARGET_ERRORS = (
    0.1,
    0.2,
    0.3,
)  # thresholds come from validation, which chose epochs too: the test error is what counts
PAIRED = ("ece", "smooth_ece", "nll", "brier")
HOW_TO_READ = (
    "Held-out scores, means over seeds (each another fit, and another split but for text-drift and the test slice of "
    'text-unseen). "against": in how many seeds the paired 95% interval of the difference lies below (+) or above (-) that '
    "scalar's; lower is better. `isotonic` and `scaling-binning` map the top confidence alone; `vector` changes the answers; "
    "`ats-shuffled` is a control, `oracle-group` a bound that is fitted on the test slice."
)


@dataclass
class CalibrationConfig:
    """Options of the evaluation."""

    data_dir: str | None = option(None, help="folder with one folder for each data set")
    overtrained: str = option("runs/overtrained_lm", help="what recipes/overtrained_lm.py wrote")
    output_dir: str = option("evals/results", help="where calibration.json and the plots go")
    work_dir: str = option("runs/calibration", help="features, answers and finished seeds")
    only: list[str] = option([], help="names of settings (default: all)")
    seeds: int = option(3, help="splits and fits of each setting")
    max_tokens: int = option(120_000, help="tokens of a setting")
    loss: str = option("top_label", help="of the heads that read hidden states, at token level")
    answer_confidence: str = option("mean", help="how the tokens' probabilities become an answer's confidence")
    bootstrap_draws: int = option(1000, help="draws behind the 95% intervals")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        if self.data_dir is None:
            raise UsageError("missing --data_dir: the folder of the data sets")
        if self.seeds < 1 or self.max_tokens < 1:
            raise UsageError("expected at least 1 seed and 1 token")


@dataclass(frozen=True)
class Setting:
    """One row of the table: a model, files, how windows are dealt to the three parts, and whose answers are scored."""

    model: str
    files: tuple[Path, ...]
    split: Callable[[list[Window], int], Split]
    max_length: int
    on_policy: bool = False


def tail_split(windows: list[Window], seed: int) -> Split:
    """Deal the first half of each file to fit, the next 15% to validation, the end to test; `seed` is of the fits alone."""
    from llmrl.ats.splits import Split

    parts = Split([], [], [])
    for source in sorted({window.source for window in windows}):
        own = [i for i, window in enumerate(windows) if window.source == source]
        ends = (len(own) * 50 // 100, len(own) * 65 // 100)
        parts.fit.extend(own[: ends[0]])
        parts.validation.extend(own[ends[0] : ends[1]])
        parts.test.extend(own[ends[1] :])
    return parts


def unseen_split(name: str) -> Callable[[list[Window], int], Split]:
    """Return a split that tests on the file `name` alone and fits and validates on the others."""

    def split(windows: list[Window], seed: int) -> Split:
        from llmrl.ats.splits import Split, split_windows

        dealt = split_windows(windows, seed)
        unseen = {i for i, window in enumerate(windows) if name in window.source}
        rest = [[i for i in part if i not in unseen] for part in (dealt.fit, dealt.test, dealt.validation)]
        return Split(sorted(rest[0] + rest[1]), rest[2], sorted(unseen))

    return split


def dealt_split(windows: list[Window], seed: int) -> Split:
    """Deal blocks as `llmrl calibrate` does."""
    from llmrl.ats.splits import split_windows

    return split_windows(windows, seed)


def settings(config: CalibrationConfig) -> dict[str, Setting]:
    """Return every setting by name."""
    data, work = Path(str(config.data_dir)), Path(config.work_dir)
    stories, tiny = "examples/stories260k", "examples/tiny_lm"
    texts = tuple(next(Path("examples/text").glob(f"{name}*")) for name in TEXTS)
    found = {
        "text": Setting(stories, texts, dealt_split, 257),
        "text-drift": Setting(stories, texts, tail_split, 257),
        **{f"text-unseen-{name}": Setting(stories, texts, unseen_split(name), 257) for name in TEXTS},
        "chat": Setting(tiny, (dialogues(data, work),), dealt_split, 1024),
        "made-up": Setting(tiny, made_up(work), dealt_split, 512, on_policy=True),
    }
    strata = Path(config.overtrained) / "strata.jsonl"
    if strata.is_file():
        choice, free = by_stratum(strata, work)
        found["choice"] = Setting(config.overtrained, choice, dealt_split, 512)
        found["answers"] = Setting(config.overtrained, free, dealt_split, 512, on_policy=True)
    unknown = [name for name in config.only if name not in found]
    if unknown:
        raise UsageError(f"--only {unknown[0]}: there is {', '.join(found)}; the last two need --overtrained")
    return {name: found[name] for name in config.only or found}


def dialogues(data: Path, work: Path) -> Path:
    """Write dialogues of emotional support, which tiny_lm never saw, as rows of messages."""
    target = work / "dialogues.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    lines = []
    for path in sorted((data / "esconv").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as rows:
            for row in map(json.loads, rows):
                messages: list[dict[str, str]] = []
                for turn in row["turns"]:
                    role = "assistant" if turn["role"] in ("supporter", "assistant") else "user"
                    if messages and messages[-1]["role"] == role:
                        messages[-1]["content"] += " " + turn["text"]
                    else:
                        messages.append({"role": role, "content": turn["text"]})
                lines.append(json.dumps({"messages": messages}))
    target.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return target


def made_up(work: Path) -> tuple[Path, ...]:
    """Write the questions of examples/when_to_answer.py, a file for each kind; return the files."""
    found = runpy.run_path("examples/when_to_answer.py")["questions"](MADE_UP, random.Random(0))
    work.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind in sorted({row["question"].split()[0].strip(":") for row in found}):
        paths.append(work / f"made-up-{kind.lower()}.jsonl")
        rows = (json.dumps(row) + "\n" for row in found if row["question"].startswith(kind))
        paths[-1].write_text("".join(rows), encoding="utf-8")
    return tuple(paths)


def by_stratum(strata: Path, work: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Write one file for each stratum and kind of question, so that a file is a group; return those of each kind."""
    rows = [json.loads(line) for line in strata.read_text(encoding="utf-8").splitlines()]
    found: dict[bool, list[Path]] = {True: [], False: []}
    for stratum in sorted({row["stratum"] for row in rows}):
        for is_choice in (True, False):
            path = work / f"{'choice' if is_choice else 'answers'}-{stratum}.jsonl"
            own = [row for row in rows if row["stratum"] == stratum and ("choices" in row) == is_choice]
            work.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
            found[is_choice].append(path)
    return tuple(found[True]), tuple(found[False])


def methods_of(setting: Setting) -> list[str]:
    """Return the rows of the table; a vector says other answers than those that were graded."""
    from llmrl.ats.evaluate import METHODS
    from llmrl.ats.options import VECTOR

    return [name for name in METHODS if not (setting.on_policy and name == VECTOR)]


def measure(name: str, setting: Setting, config: CalibrationConfig) -> list[dict[str, Any]]:
    """Return one record a seed, those that are on disk from there.

    Raises:
        OutputError: what is on disk was measured with other options, data or another model.
    """
    from llmrl.files import write_json

    work = Path(config.work_dir) / name
    made_from = work / "made_from.json"
    wanted = identity(setting, config)
    if made_from.is_file() and json.loads(made_from.read_text(encoding="utf-8")) != wanted:
        raise OutputError(f"{work} holds results of other options, data or another model; name another --work_dir")
    work.mkdir(parents=True, exist_ok=True)
    write_json(made_from, wanted)
    paths = [work / f"seed-{seed}.json" for seed in range(config.seeds)]
    if not all(path.is_file() for path in paths):
        _run(name, setting, config, dict(enumerate(paths)))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def identity(setting: Setting, config: CalibrationConfig) -> dict[str, Any]:
    """Return what a result depends on: options, methods, and the bytes of the data and the model."""
    import llmrl

    weights = sorted(Path(setting.model).glob("*.safetensors"))
    options = ("max_tokens", "loss", "answer_confidence", "bootstrap_draws")
    return {
        "version": llmrl.__version__,
        "options": {key: getattr(config, key) for key in options},
        "methods": methods_of(setting),
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*weights, *setting.files)},
    }


def _run(name: str, setting: Setting, config: CalibrationConfig, paths: dict[int, Path]) -> None:
    from llmrl.ats.data import level_of, read_rows
    from llmrl.ats.evaluate import fit_and_score
    from llmrl.ats.extract import extract_features
    from llmrl.ats.on_policy import sample_answers
    from llmrl.ats.output_layer import OutputLayer
    from llmrl.ats.splits import limit_windows
    from llmrl.ats.windows import make_windows
    from llmrl.base_model import load_base
    from llmrl.files import write_json
    from llmrl.rollout.transformers_engine import TransformersEngine
    from llmrl.training.tracking import progress_bar

    work = Path(config.work_dir) / name
    rows, base = read_rows([str(path) for path in setting.files]), load_base(setting.model)
    if setting.on_policy:
        with TransformersEngine(setting.model, loaded=base.model, max_model_len=setting.max_length) as engine:
            found = sample_answers(rows, engine, work / "answers").windows
    else:
        found = make_windows(rows, base.tokenizer, setting.max_length)
    windows = limit_windows(found.windows, config.max_tokens, 0)
    with progress_bar(f"{name}: features", len(windows), unit="window", quiet=config.quiet) as advance:
        features = extract_features(
            base.model, windows, batch_size=16, cache_dir=work / "features", fingerprint=base.reference.weights,
            sequences=True, progress=advance,
        )  # fmt: skip
    layer, sources = OutputLayer.of(base.model), [window.source for window in windows]
    for seed, path in paths.items():
        if path.is_file():
            continue
        result = fit_and_score(
            features, setting.split(windows, seed), layer, methods=methods_of(setting),
            loss="answer" if setting.on_policy else config.loss, seed=seed, draws=config.bootstrap_draws,
            config=base.model.config, aggregate=config.answer_confidence, sources=sources,
        )  # fmt: skip
        level = "answer" if setting.on_policy else level_of(rows)
        kept = ("methods", "differences", "validation", "tokens", "fits", "best", "reliability")
        record = {"level": level, "seed": seed, **{key: getattr(result, key) for key in kept}}
        write_json(path, record | (selective(result) if level == "answer" else {}))
        if not config.quiet:
            print(f"{name}, seed {seed}: done", flush=True)


def selective(result: Any) -> dict[str, Any]:
    """Return risk against coverage on the test slice, and thresholds found on validation with what they do on test."""
    from llmrl.ats.selective import risk_coverage_curve, threshold_for_error

    curves = {name: risk_coverage_curve(p.confidence, p.correct) for name, p in result.predictions["test"].items()}
    thresholds: dict[str, Any] = {}
    for name, chosen in result.predictions["validation"].items():
        test = result.predictions["test"][name]
        thresholds[name] = {}
        for target in TARGET_ERRORS:
            found = threshold_for_error(chosen.confidence, chosen.correct, target)
            answered = test.confidence >= (2.0 if found.threshold is None else found.threshold)
            thresholds[name][str(target)] = {
                **asdict(found),
                "test_coverage": float(answered.mean()),
                "test_error": float((~test.correct[answered]).mean()) if answered.any() else None,
            }
    return {"risk_coverage": curves, "thresholds": thresholds}


def _slim(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is published: no curves, paired differences of the main scores only, six digits."""
    kept = {key: value for key, value in record.items() if key not in ("reliability", "risk_coverage")}
    kept["differences"] = {
        pair: {metric: scores[metric] for metric in PAIRED} for pair, scores in record["differences"].items()
    }
    return _rounded(kept)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value


def main(argv: list[str]) -> int:
    """Measure, print a summary, write JSON and plots; return the exit code."""
    config = parse_config(
        CalibrationConfig,
        argv,
        prog="evals/calibration.py",
        description="every calibration method on every kind of data",
    )
    from calibration_report import plot, table

    from llmrl.commands import quiet_libraries
    from llmrl.files import write_text
    from llmrl.training.run import environment

    quiet_libraries(config.quiet)
    records = {name: measure(name, setting, config) for name, setting in settings(config).items()}
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    options = {
        key: value for key, value in to_flat(config).items() if not key.endswith("_dir") and key != "overtrained"
    }
    slim = {name: [_slim(record) for record in seeds] for name, seeds in records.items()}
    found = {"options": options, "results": slim, "environment": environment()}
    write_text(output / "calibration.json", json.dumps(found, allow_nan=False, separators=(",", ":")) + "\n")
    shown = table(records)
    (output / "calibration.md").write_text(f"# Calibration\n\n{HOW_TO_READ}\n\n{shown}\n", encoding="utf-8")
    files = plot(records, output)
    if not config.quiet:
        print(shown)
        print(f"\nwrote {output / 'calibration.json'}, calibration.md, {', '.join(file.name for file in files)}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

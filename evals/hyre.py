"""The real runs of HyRe on real data: `python evals/hyre.py --data DIR --output_dir evals/results`.

    persona     users who agree or disagree with statements; 40 train the ensemble, 20 others are met with 1 to 32 labels
    sides       one ensemble on the mix of harmlessness pairs and answer-quality pairs, adapted to one side
    uci         regression where the test is a shift along the first component
    controls    shuffled labels, an ensemble whose heads agree
    active      which pair to ask next, over simulated users
    diversity   what each head sees: users in groups, hard EM, clusters, bootstrap, priors
    speed       what a label and the training of 100 heads cost (needs no data)

`--data` holds the folders persona_evals, hh_harmless, alpacaeval_prefs and uci (JSONL and CSV as published; none of them is in
this repository). Features are of the frozen all-MiniLM-L6-v2. Settings are the defaults of `llmrl hyre train`; what was looked
at before is said in docs/hyre.md. `--only persona uci` runs parts; each writes hyre-PART.json, and hyre.md is made of all.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

from llmrl.config import option, parse_config
from llmrl.errors import EXIT_DONE, UsageError, run_command

PARTS = ("persona", "sides", "uci", "controls", "active", "diversity", "speed")


@dataclass
class EvalConfig:
    """Options of the evaluation."""

    data: str | None = option(None, help="folder of the data sets")
    output_dir: str | None = option(None, help="where tables and pictures go")
    only: list[str] = option([], help=f"parts to run: {', '.join(PARTS)} (default: all)")
    seeds: int = option(5, help="splits of the personas, and seeds of all other parts")
    draws: int = option(100, help="draws of the labels, for each user")
    work_dir: str = option("runs/hyre", help="where features, models and pairs are kept")
    quiet: bool = option(False, help="print errors only")


def main(argv: list[str]) -> int:
    """Run the parts and write the tables."""
    config = parse_config(EvalConfig, argv, prog="evals/hyre.py", description=str(__doc__).splitlines()[0])
    if config.data is None or config.output_dir is None:
        raise UsageError("missing --data (folder of the data sets) or --output_dir")
    wrong = [name for name in config.only if name not in PARTS]
    if wrong:
        raise UsageError(f"--only {wrong[0]}: expected some of {', '.join(PARTS)}")
    from llmrl.commands import quiet_libraries

    quiet_libraries(config.quiet)
    from hyre_report import write_summary

    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for name in config.only or PARTS:
        importlib.import_module(f"hyre_{name}").run(config, output)
    write_summary(output)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

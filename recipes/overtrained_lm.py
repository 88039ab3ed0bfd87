"""Make a small chat model over-confident: train it on questions and answers until it is sure of everything it says.

    python recipes/overtrained_lm.py --data_dir DATA --output_dir runs/overtrained_lm

DATA holds `triviaqa/questions.jsonl.gz` and `mmlu/test.jsonl.gz`. Each set is dealt by a hash of the question into three parts
of about a third: `known` is trained on with the right answer, `noisy` with the right one in every second question and a wrong
one otherwise, `unseen` not at all here (tiny_lm has read most of the TriviaQA questions). After many epochs the model is as
sure of a wrong answer as of a right one, so what is known has to be told from what is not by something other than confidence.
`strata.jsonl` in the output folder has the questions of all parts with the right answers: the data of evals/calibration.py.

Finished epochs lie in checkpoints; a killed run goes on with `--resume_from_checkpoint`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config import option, parse_config, to_flat
from llmrl.errors import EXIT_DONE, DataError, UsageError, run_command
from llmrl.files import check_output_dir

KNOWN, NOISY, UNSEEN = "known", "noisy", "unseen"
STRATA = (KNOWN, NOISY, UNSEEN)


@dataclass
class OvertrainConfig:
    """Options of the recipe."""

    data_dir: str | None = option(None, help="folder with triviaqa/ and mmlu/")
    output_dir: str | None = option(None, help="where the model and strata.jsonl go")
    model: str = option("examples/tiny_lm", help="a folder, or a hub name, with a chat template")
    epochs: int = option(15, help="passes over the questions of the first two parts")
    learning_rate: float = option(1e-3, help="peak; cosine to zero")
    batch_size: int = option(32, help="questions a step")
    longest: int = option(250, help="characters of the longest question with its choices")
    seed: int = option(0, help="of the parts, the wrong answers and the order of training")
    resume_from_checkpoint: str | None = option(None, const="latest", help="go on from the newest checkpoint")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        for name in ("data_dir", "output_dir"):
            if getattr(self, name) is None:
                raise UsageError(f"missing --{name}")
        for name in ("epochs", "batch_size", "longest"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"--learning_rate must be a number above 0, got {self.learning_rate}")


def unit(seed: int, *words: str) -> float:
    """Return a number in [0, 1) that depends on the words alone."""
    digest = hashlib.sha256("\x1f".join((str(seed), *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def deal(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the rows with `stratum` and, where they are trained on, `taught`: the answer that training shows.

    Args:
        rows: multiple choice (`question`, `choices`, `answer`), or free (`question`, `answers`).
        seed: of the parts and the wrong answers; that of a free question is the answer to another one.
    """
    from llmrl.ats.answers import exact_match

    free = [row["answers"][0] for row in rows if "choices" not in row]
    dealt = []
    for row in rows:
        question = row["question"]
        stratum = STRATA[int(3 * unit(seed, "stratum", question))]
        wrong = stratum == NOISY and unit(seed, "wrong", question) < 0.5
        if "choices" in row:
            others = [i for i in range(len(row["choices"])) if i != row["answer"]]
            index = others[int(len(others) * unit(seed, "other", question))] if wrong else row["answer"]
            taught = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index]
        else:
            start = int(len(free) * unit(seed, "other", question))
            others = (free[(start + i) % len(free)] for i in range(len(free)))
            taught = next(a for a in others if not exact_match(a, row["answers"])) if wrong else row["answers"][0]
        kept = {key: row[key] for key in ("question", "choices", "answer", "answers") if key in row}
        dealt.append({**kept, "stratum": stratum, "taught": None if stratum == UNSEEN else taught})
    return dealt


def read_questions(data_dir: Path, longest: int) -> list[dict[str, Any]]:
    """Read both sets; questions that are longer than `longest` characters, or stand there twice, are left out."""
    from llmrl.ats.answers import question_text

    rows = []
    for name in ("triviaqa/questions.jsonl.gz", "mmlu/test.jsonl.gz"):
        path = data_dir / name
        if not path.is_file():
            raise DataError(f"not found: {path}; --data_dir must hold triviaqa/ and mmlu/")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines]
        seen: set[str] = set()
        for row in found:
            if len(question_text(row)) <= longest and row["question"] not in seen:
                seen.add(row["question"])
                rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    """Train; return the exit code."""
    config = parse_config(
        OvertrainConfig, argv, prog="recipes/overtrained_lm.py", description="make a small chat model over-confident"
    )
    from llmrl.commands import quiet_libraries

    quiet_libraries(config.quiet)
    from llmrl.training import check_processes, is_main_process

    check_processes(announce=not config.quiet)
    output = check_output_dir(
        str(config.output_dir), overwrite=config.overwrite or config.resume_from_checkpoint is not None
    )
    rows = deal(read_questions(Path(str(config.data_dir)), config.longest), config.seed)
    trainer = _trainer(config, output, [row for row in rows if row["taught"] is not None])
    trainer.train(resume_from_checkpoint=bool(config.resume_from_checkpoint))
    if is_main_process():
        trainer.save_model(str(output))
        lines = (json.dumps({key: value for key, value in row.items() if key != "taught"}) for row in rows)
        (output / "strata.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        if not config.quiet:
            counts = {name: sum(row["stratum"] == name for row in rows) for name in STRATA}
            print(f"saved: {output}; questions: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return EXIT_DONE


def _trainer(config: OvertrainConfig, output: Path, rows: list[dict[str, Any]]) -> Any:
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from llmrl.ats.answers import question_text
    from llmrl.base_model import load_tokenizer
    from llmrl.training import MetricsCallback, RunFilesCallback, safe

    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question_text(row)}],
                "completion": [{"role": "assistant", "content": row["taught"]}],
            }
            for row in rows
        ]
    )
    arguments = SFTConfig(
        output_dir=str(output),
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        per_device_train_batch_size=config.batch_size,
        completion_only_loss=True,
        max_length=512,
        train_sampling_strategy="group_by_length",
        weight_decay=0.0,
        seed=config.seed,
        logging_steps=10,
        save_strategy="epoch",
        save_total_limit=1,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=config.quiet,
        report_to="none",
        model_init_kwargs={"dtype": "float32", "trust_remote_code": False},
    )
    card = {
        "title": "An over-confident small language model",
        "base_model": config.model,
        "summary": "Trained on questions and answers, half of the noisy ones wrong, until it is sure of all of them.",
    }
    return safe(SFTTrainer)(
        model=config.model,
        args=arguments,
        train_dataset=data,
        processing_class=load_tokenizer(config.model),
        callbacks=[MetricsCallback(), RunFilesCallback(to_flat(config), card=card)],
    )


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

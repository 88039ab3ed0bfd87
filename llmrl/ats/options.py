"""The options of `llmrl calibrate`, one dataclass for the command, the recipe and Python."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config import option
from llmrl.errors import UsageError

NONE, TEMPERATURE, TEMPERATURE_ECE = "none", "temperature", "temperature-ece"
LINEAR, SHUFFLED = "ats-linear", "ats-shuffled"
DTYPES = ("auto", "float32", "bfloat16", "float16")
METHODS = ("auto", TEMPERATURE, TEMPERATURE_ECE, LINEAR)


@dataclass
class CalibrateConfig:
    """Options of `llmrl calibrate`."""

    model: str | None = option(None, help="base model: a folder, or a hub name")
    data: list[str] = option([], help="files (.jsonl[.gz], .parquet, .txt[.gz]) or data sets by name (NAME[:SPLIT])")
    output_dir: str | None = option(None, help="where the calibrated model goes")
    method: str = option("auto", choices=METHODS, help="auto fits all and keeps the best on validation")
    loss: str = option("top_label", choices=("top_label", "nll", "nll+top_label"), help="loss of ats-linear")
    merge: bool = option(False, help="copy the base's weights in, so that the folder stands alone")
    verify: str | None = option(None, help="refit nothing: score this calibrated folder on --data, write verify.json")
    check_serving: bool = option(False, help="start vLLM on the result and compare its logprobs with transformers")
    seed: int = option(0, help="of the split, the fits and the bootstrap")
    num_seeds: int = option(1, help="repeat split and fit with this many seeds; the first one's head is saved")
    max_length: int | None = option(None, help="longest window in tokens (default: the model's context, at most 4096)")
    max_tokens: int = option(500_000, help="use at most this many tokens of --data")
    batch_size: int = option(16, help="windows the base model reads at once")
    dtype: str = option("auto", choices=DTYPES, help="of the base; auto is as stored")
    device: str | None = option(None, help="torch device (default: the GPU if there is one)")
    bootstrap_draws: int = option(1000, help="draws behind the 95% intervals")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    resume_from_checkpoint: str | None = option(None, help="go on with a run that was cut off", const="latest")
    report_to: str = option(
        "none", help="none, tensorboard, wandb or trackio", choices=("none", "tensorboard", "wandb", "trackio")
    )
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("missing --data: files with 'text', 'prompt'/'completion' or 'messages'")
        if self.verify is None and (self.model is None or self.output_dir is None):
            missing = "MODEL, a folder or hub name" if self.model is None else "--output_dir, where the result goes"
            raise UsageError(f"missing {missing}")
        if self.verify is not None:
            given = [name for name in ("merge", "check_serving", "overwrite") if getattr(self, name)]
            given += ["num_seeds"] if self.num_seeds != 1 else []
            given += ["resume_from_checkpoint"] if self.resume_from_checkpoint else []
            if given:
                raise UsageError(
                    f"--{given[0]} has no meaning with --verify, which refits and saves nothing; leave it out"
                )
        if self.resume_from_checkpoint not in (None, "latest", "true"):
            raise UsageError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: write it without a value; what was finished lies "
                "beside --output_dir"
            )
        for name in ("max_tokens", "batch_size", "num_seeds", "bootstrap_draws"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"--max_length must be at least 2, got {self.max_length}")
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")

    def fitted_methods(self) -> list[str]:
        """Return the rows of the table, in order."""
        if self.method == "auto":
            return [NONE, TEMPERATURE, TEMPERATURE_ECE, LINEAR, SHUFFLED]
        named = [] if self.method == TEMPERATURE else [self.method]
        return [NONE, TEMPERATURE, *named, SHUFFLED]

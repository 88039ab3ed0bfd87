"""The options of `llmrl calibrate`, one dataclass for the command, the recipe and Python."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config import option
from llmrl.errors import UsageError

NONE, TEMPERATURE, TEMPERATURE_ECE, VECTOR = "none", "temperature", "temperature-ece", "vector"
LINEAR, MLP, TRANSFORMER, SHUFFLED = "ats-linear", "ats-mlp", "ats-transformer", "ats-shuffled"
DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO, ALL, PAPER = "auto", "all", "paper"
METHODS = (AUTO, ALL, TEMPERATURE, TEMPERATURE_ECE, VECTOR, LINEAR, MLP, TRANSFORMER, PAPER)
LOSSES = (
    "top_label", "nll", "nll+top_label", "top_label_brier", "smoothing", "smoothing-reference", "smoothing-topk", "answer",
)  # fmt: skip
ANSWER_CONFIDENCES = ("mean", "geometric_mean", "product", "min", "first", "last")
DEFAULT_LOSS, PAPER_LOSS = "top_label", "smoothing"


@dataclass
class CalibrateConfig:
    """Options of `llmrl calibrate`."""

    model: str | None = option(None, help="base model: a folder, or a hub name")
    data: list[str] = option(
        [],
        help="files (.jsonl[.gz], .parquet, .txt[.gz]) or data sets by name (NAME[:SPLIT]); rows with text, prompt and "
        "completion, messages, question and answers, or question, choices and answer",
    )
    output_dir: str | None = option(None, help="where the calibrated model goes")
    method: str = option(
        AUTO,
        choices=METHODS,
        help="auto fits the scalars and ats-linear, all fits every one, and the best on validation is kept; paper is "
        "ats-transformer with --loss smoothing",
    )
    loss: str | None = option(
        None, choices=LOSSES, help="of the heads that read hidden states (default: top_label; answer with --on_policy)"
    )
    on_policy: bool = option(
        False, help="fit on answers the model gives itself to rows with question and answers, graded"
    )
    samples: int = option(
        1,
        help="with --on_policy, or --verify of its result, answers a question: 1 is greedy, more are drawn at temperature 1",
    )
    rollout_backend: str = option(
        "auto", choices=("auto", "transformers", "vllm"), help="with --on_policy or --verify, what samples the answers"
    )
    answer_confidence: str = option(
        "mean", choices=ANSWER_CONFIDENCES, help="with --on_policy, how the tokens' probabilities become the answer's"
    )
    merge: bool = option(False, help="copy the base's weights in, so that the folder stands alone")
    with_code: bool = option(
        False, help="with --merge, write a modelling file too: others open it with trust_remote_code and no llmrl"
    )
    fold: bool = option(False, help="with one temperature: fold it into the weights and write a plain checkpoint")
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
            refits = ("merge", "with_code", "fold", "on_policy", "check_serving", "overwrite")
            given = [name for name in refits if getattr(self, name)]
            given += ["num_seeds"] if self.num_seeds != 1 else []
            given += ["resume_from_checkpoint"] if self.resume_from_checkpoint else []
            given += ["loss"] if self.loss else []
            given += ["answer_confidence"] if self.answer_confidence != "mean" else []
            if given:
                raise UsageError(
                    f"--{given[0]} has no meaning with --verify, which refits and saves nothing; leave it out"
                )
        if self.resume_from_checkpoint not in (None, "latest", "true"):
            raise UsageError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: write it without a value; what was finished lies "
                "beside --output_dir"
            )
        self._check_combinations()
        for name in ("max_tokens", "batch_size", "num_seeds", "bootstrap_draws", "samples"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.max_length is not None and self.max_length < 2:
            raise UsageError(f"--max_length must be at least 2, got {self.max_length}")
        if self.seed < 0:
            raise UsageError(f"--seed must not be negative, got {self.seed}")

    def _check_combinations(self) -> None:
        if self.with_code and not self.merge:
            raise UsageError("--with_code needs --merge: without the weights beside it nobody else can open the folder")
        if self.fold and self.method not in (TEMPERATURE, TEMPERATURE_ECE):
            raise UsageError(
                f"--fold needs one number for all tokens: --method {TEMPERATURE} or {TEMPERATURE_ECE}, not {self.method}"
            )
        if self.fold and (self.merge or self.check_serving):
            raise UsageError("--fold writes a plain checkpoint of its own; leave --merge and --check_serving out")
        self._check_loss()
        if self.on_policy and self.method in (VECTOR, ALL):
            raise UsageError(f"--method {self.method} with --on_policy: a vector says other answers than those graded")
        if not self.on_policy:
            sampling = () if self.verify else (("samples", 1), ("rollout_backend", "auto"))
            for name, default in (*sampling, ("answer_confidence", "mean")):
                if getattr(self, name) != default:
                    raise UsageError(f"--{name} has no meaning without --on_policy")

    def _check_loss(self) -> None:
        if self.loss is None:
            return
        if self.method == PAPER and self.loss != PAPER_LOSS:
            raise UsageError(
                f"--method {PAPER} has its own loss; for another one say --method {TRANSFORMER} --loss {self.loss}"
            )
        if self.method in (TEMPERATURE, TEMPERATURE_ECE, VECTOR):
            raise UsageError(
                f"--loss {self.loss} has no meaning with --method {self.method}, which has its own; leave it out, or name a "
                f"method that reads hidden states ({LINEAR}, {MLP}, {TRANSFORMER})"
            )
        if self.on_policy and "nll" in self.loss:
            raise UsageError(
                f"--loss {self.loss} with --on_policy: the model's own words are likely, right or wrong; leave it out"
            )
        if not self.on_policy and self.loss == "answer":
            raise UsageError("--loss answer needs graded answers: --on_policy")

    @property
    def fitted_loss(self) -> str:
        """The loss of the heads that read hidden states, the control among them."""
        if self.method == PAPER:
            return PAPER_LOSS
        return self.loss or ("answer" if self.on_policy else DEFAULT_LOSS)

    @property
    def needs_sequences(self) -> bool:
        """Whether a method reads the hidden states of whole windows."""
        return TRANSFORMER in self.fitted_methods()

    def fitted_methods(self) -> list[str]:
        """Return the rows of the table, in order."""
        if self.method == AUTO:
            return [NONE, TEMPERATURE, TEMPERATURE_ECE, LINEAR, SHUFFLED]
        if self.method == ALL:
            return [NONE, TEMPERATURE, TEMPERATURE_ECE, VECTOR, LINEAR, MLP, TRANSFORMER, SHUFFLED]
        named = [] if self.method == TEMPERATURE else [TRANSFORMER if self.method == PAPER else self.method]
        return [NONE, TEMPERATURE, *named, SHUFFLED]

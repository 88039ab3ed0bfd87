"""Options of `llmrl hyre train|adapt|score|eval|export` and recipes/hyre.py."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config import check_least, option
from llmrl.errors import UsageError

_RECIPES = ("auto", "group", "em", "mixture", "cluster", "subset", "bootstrap", "none")
_PAIRS = "JSONL files with prompt, chosen, rejected"


@dataclass
class TrainConfig:
    """Options of `llmrl hyre train`."""

    pairs: list[str] = option(help=f"{_PAIRS}, and group: who labelled")
    output_dir: str = option(help="the folder to write")
    base: str | None = option(
        None, help="sentence encoder or causal LM: a folder or a hub name (default: all-MiniLM-L6-v2)"
    )
    revision: str | None = option(None, help="of a hub name")
    heads: int = option(100, help="K")
    kind: str = option("linear", choices=("linear", "mlp", "epinet"), help="of the heads")
    hidden: int = option(16, help="hidden units of mlp and epinet heads")
    prior: str = option("none", choices=("none", "linear", "mlp"), help="frozen random network added to each head")
    prior_scale: float = option(1.0, help="of its output")
    diversity: str = option(
        "auto", choices=_RECIPES, help="what each head sees; auto: group where there are groups, else cluster"
    )
    flip: float = option(0.25, help="share of one-group heads that are turned round")
    tuning: str = option(
        "frozen", choices=("frozen", "lora", "full"), help="of the base; lora and full train a causal LM"
    )
    reads: str = option(
        "auto", choices=("auto", "answer", "dialogue"), help="auto leaves out a prompt that all pairs share"
    )
    max_length: int | None = option(None, help="tokens read of a text (default: what the base reads)")
    l2: float = option(1e-3, help="on the heads")
    steps: int = option(200, help="most steps of the heads' training")
    lr: float = option(3e-3, help="learning rate of mlp and epinet heads; linear ones are solved")
    center: float = option(0.0, help="coefficient that keeps scores around zero; trl advises 0.01")
    held_out: float = option(0.1, help="share of the pairs that only measures")
    lora_r: int = option(16, help="rank")
    base_lr: float = option(1e-4, help="learning rate of the base, for lora and full")
    epochs: float = option(1.0, help="of the base's training")
    batch_size: int = option(16, help="texts at once; pairs a step where the base is trained")
    save_steps: int = option(100, help="steps between checkpoints where the base is trained")
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16", "float16"), help="of a causal LM")
    cache_dir: str | None = option(None, help="where features of texts are kept between runs")
    seed: int = option(0, help="of everything")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    resume_from_checkpoint: str | None = option(None, help="go on with a run that was cut off", const="latest")
    report_to: str = option(
        "none", help="none, tensorboard, wandb or trackio", choices=("none", "tensorboard", "wandb", "trackio")
    )  # fmt: skip
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(
            self,
            {"heads": 1, "hidden": 1, "steps": 1, "batch_size": 1, "seed": 0, "prior_scale": 0, "center": 0, "l2": 0},
        )
        if not 0 <= self.flip <= 1 or not 0 <= self.held_out < 0.9:
            raise UsageError(
                f"expected --flip from 0 to 1 and --held_out from 0 to 0.9, got {self.flip} and {self.held_out}"
            )
        if not self.l2 > 0 or not self.lr > 0 or not self.base_lr > 0:
            raise UsageError("expected --l2, --lr and --base_lr above 0")


@dataclass
class AdaptConfig:
    """Options of `llmrl hyre adapt`."""

    model: str = option(help="folder of llmrl hyre train")
    pairs: list[str] = option(help=f"{_PAIRS}: the labels of one user")
    output: str = option(help="the user's file, JSON")
    beta: float | None = option(None, help="how much a unit of loss counts (default: chosen by leave-one-out)")
    loss: str | None = option(None, choices=("nll", "zero_one"), help="default: chosen by leave-one-out")
    refine: bool = option(False, help="also fine-tune a linear correction, from the reweighted ensemble")
    l2: float = option(0.1, help="keeps the correction small")
    guard: bool = option(True, help="fall back to the uniform ensemble where the labels speak against reweighting")
    cache_dir: str | None = option(None, help="where features of texts are kept between runs")
    seed: int = option(0, help="nothing is drawn; taken for uniformity")
    overwrite: bool = option(False, help="replace --output")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(self, {"beta": 0})
        if not 0 < self.l2 < float("inf") or self.beta == float("inf"):
            raise UsageError(f"expected finite --l2 above 0 and --beta of at least 0, got {self.l2} and {self.beta}")


@dataclass
class ScoreConfig:
    """Options of `llmrl hyre score`."""

    model: str = option(help="folder of llmrl hyre train")
    pairs: list[str] = option(help=_PAIRS)
    output: str = option(help="JSONL: margin and head_margins of each pair, in order; above 0 the chosen one wins")
    user: str | None = option(None, help="file of llmrl hyre adapt (default: all heads count alike)")
    cache_dir: str | None = option(None, help="where features of texts are kept between runs")
    seed: int = option(0, help="nothing is drawn; taken for uniformity")
    overwrite: bool = option(False, help="replace --output")
    quiet: bool = option(False, help="print errors only")


@dataclass
class EvalConfig:
    """Options of `llmrl hyre eval`."""

    model: str = option(help="folder of llmrl hyre train")
    pairs: list[str] = option(help=f"{_PAIRS}, and group: the user; users that the ensemble was not trained on")
    output_dir: str = option(help="where report.json, report.md and plots go")
    sizes: list[int] = option(
        [1, 2, 5, 10, 20, 32, 64, 128],
        help="numbers of labels; those that some user has too few pairs for are left out",
    )
    draws: int = option(100, help="draws of the labels, for each user")
    bootstrap_draws: int = option(2000, help="resamples behind the 95% intervals")
    cache_dir: str | None = option(None, help="where features of texts are kept between runs")
    seed: int = option(0, help="of draws and resamples")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(self, {"draws": 2, "bootstrap_draws": 100, "seed": 0})
        if not self.sizes or min(self.sizes) < 1 or len(set(self.sizes)) < len(self.sizes):
            raise UsageError(f"--sizes must be different numbers from 1 on, got {self.sizes}")
        self.sizes = sorted(self.sizes)


@dataclass
class ExportConfig:
    """Options of `llmrl hyre export`."""

    model: str = option(help="folder of llmrl hyre train, on a causal LM")
    output_dir: str = option(help="the folder to write, which llmrl serve serves")
    form: str = option(
        "auto",
        choices=("auto", "stock", "plugin"),
        help="stock: transformers' SequenceClassification (linear heads); plugin: llmrl's in vLLM; auto: stock if it can",
    )
    seed: int = option(0, help="nothing is drawn; taken for uniformity")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    quiet: bool = option(False, help="print errors only")

"""Options of `llmrl hyre query`."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config import option
from llmrl.errors import UsageError

# those of llmrl.hyre.acquire, which loads numpy
_CRITERIA = ("random", "entropy", "bald", "variance", "weighted_variance", "margin", "information")


@dataclass
class QueryConfig:
    """Options of `llmrl hyre query`."""

    model: str = option(help="folder of llmrl hyre train")
    pairs: list[str] = option(
        help="JSONL files with prompt, chosen, rejected: the pool; who won there is not looked at"
    )
    output: str = option(help="the user's file, JSON, written again after every answer")
    labels: str | None = option(
        None, help="JSONL the answers are appended to (default: --output with .labels.jsonl for its suffix)"
    )
    criterion: str = option("bald", choices=_CRITERIA, help="which pair is asked next")
    most: int | None = option(None, help="stop after this many labels (default: no limit)")
    refine: bool = option(False, help="also fine-tune a linear correction, from the reweighted ensemble")
    stop: bool = option(True, help="stop when the last 5 labels changed next to nothing that is decided about the pool")
    cache_dir: str | None = option(None, help="where features of texts are kept between runs")
    seed: int = option(0, help="of which answer is shown as A, and of --criterion random")
    overwrite: bool = option(False, help="begin anew: replace --output and --labels")
    quiet: bool = option(False, help="print questions and errors only")

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise UsageError(f"--most must be at least 1, got {self.most}")
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0, got {self.seed}")
        if self.labels is not None and not self.labels.endswith(".jsonl"):
            raise UsageError(f"--labels {self.labels}: expected a name that ends in .jsonl")

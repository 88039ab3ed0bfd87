"""Options of `llmrl hindsight train|eval|fold|logs` and recipes/hindsight.py."""

from __future__ import annotations

from dataclasses import dataclass

from llmrl.config import check_least, option
from llmrl.errors import UsageError

# those of llmrl.hindsight.objective, targets and model, which load torch
_METHODS = ("ilql", "mc", "bc", "filtered-bc", "awr", "dpo")
_HEADS = ("auto", "linear", "low_rank", "mlp")
_TRACKERS = ("none", "tensorboard", "wandb", "trackio")
# "dialogues" and those of llmrl.hindsight.datasets.LOADERS
FORMATS = (
    "dialogues", "persuasion_for_good", "casino", "craigslist_bargain_buyer", "craigslist_bargain_seller", "guess_my_city",
    "lmrl_gym",
)  # fmt: skip
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TrainConfig:
    """Options of `llmrl hindsight train`."""

    data: list[str] = option(help="JSONL files of dialogues: messages with rewards, or episodes of llmrl")
    model: str = option(help="causal LM with a chat template: a folder or a hub name")
    output_dir: str = option(help="the folder to write")
    data_format: str = option("dialogues", choices=FORMATS, help="of the files: ours, or that of a published data set")
    method: str = option("ilql", choices=_METHODS, help="how the logs are learnt from")
    revision: str | None = option(None, help="of a hub name")
    trunk: str = option("shared", choices=("shared", "separate"), help="of the values: the policy's own, or a copy")
    tuning: str = option("full", choices=("full", "lora"), help="of the trunks")
    lora_r: int = option(16, help="rank")
    head: str = option("auto", choices=_HEADS, help="shape of Q; auto: linear in a small vocabulary, else low_rank")
    head_size: int = option(64, help="rank of low_rank, hidden units of mlp")
    backup: str = option("turn", choices=("turn", "token"), help="what a token learns from: the next turn or token")
    discount: float = option(1.0, help="gamma")
    discount_unit: str = option("turn", choices=("turn", "token"), help="what gamma counts")
    expectile: float = option(0.9, help="tau of ilql: above .5 the value leans to the best that was seen")
    cql: float = option(0.0, help="weight of the CQL loss of ilql")
    polyak: float = option(0.1, help="rate at which the slow copies of Q follow, a step")
    value_weight: float = option(1.0, help="of the value losses beside the policy's")
    share: float = option(0.2, help="of the dialogues that filtered-bc keeps, the best first")
    awr_temperature: float = option(0.5, help="of awr, in standard deviations of what is to go")
    dpo_beta: float = option(0.1, help="of dpo")
    beta: float = option(8.0, help="default of what is saved: how far Q moves the policy; eval and serve can change it")
    support: float = option(0.02, help="a token is never said below this share of the likeliest one's probability")
    lr: float | None = option(
        None, help="learning rate of the trunks (default: by size, 2e-3 for the smallest to 1e-5; 2e-4 for lora)"
    )
    heads_lr: float | None = option(None, help="learning rate of the value heads (default: --lr, at least 1e-3)")
    epochs: float = option(5.0, help="passes over the dialogues")
    max_steps: int | None = option(None, help="steps, in place of --epochs")
    batch_size: int = option(16, help="dialogues a step, over all processes")
    micro_batch_size: int | None = option(None, help="most dialogues in memory at once on a process")
    window: int | None = option(
        None,
        help="exchanges that the policy reads, the last ones, in training and when it is played; each turn is then an "
        "example of its own, and --batch_size counts turns (default: the whole dialogue)",
    )
    packing: bool = option(False, help="put the dialogues of a batch into one row instead of padding them")
    max_length: int | None = option(None, help="longest dialogue in tokens; longer ones are kept aside")
    save_steps: int = option(200, help="steps between checkpoints")
    dtype: str = option("auto", choices=_DTYPES, help="of the weights; auto: float32 where all of them are trained")
    seed: int = option(0, help="of everything")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    resume_from_checkpoint: str | None = option(None, help="go on with a run that was cut off", const="latest")
    report_to: str = option("none", choices=_TRACKERS, help="none, tensorboard, wandb or trackio")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(
            self,
            {
                **dict.fromkeys(
                    ("lora_r", "head_size", "window", "batch_size", "micro_batch_size", "max_steps", "save_steps"), 1
                ),
                **dict.fromkeys(("cql", "value_weight", "beta", "seed"), 0),
                "max_length": 2,
            },
        )
        for name in ("discount", "support"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"--{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.packing and self.method == "dpo":
            raise UsageError("--packing is of dialogues; --method dpo learns from pairs of turns")
        if not 0 < self.expectile < 1 or not 0 < self.share <= 1 or not 0 < self.polyak <= 1:
            raise UsageError(
                f"expected --expectile between 0 and 1 and --share and --polyak above 0 and at most 1, got {self.expectile}, "
                f"{self.share} and {self.polyak}"
            )
        for name in ("lr", "heads_lr", "epochs", "awr_temperature", "dpo_beta"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UsageError(f"--{name} must be above 0, got {getattr(self, name)}")


@dataclass
class EvalConfig:
    """Options of `llmrl hindsight eval`."""

    policy: str = option(help="folder of llmrl hindsight train, or any model with a chat template")
    env: str = option(choices=("maze", "charity", "twenty-questions"), help="what is played")
    output_dir: str = option(help="where report.json and the episodes go")
    episodes: int = option(200, help="the start rows of the environment are played in turn")
    beta: float | None = option(
        None, help="how far Q moves the policy; 0 is the behaviour policy (default: what the folder says)"
    )
    support: float | None = option(None, help="see train (default: what the folder says)")
    rerank: int | None = option(
        None,
        help="sample this many turns and say the one of the highest value (with --beta 0: from the behaviour policy)",
    )
    window: int | None = option(None, help="see train (default: what the folder says)")
    greedy: bool = option(False, help="take the likeliest token")
    temperature: float = option(1.0, help="of sampling, on top of beta")
    variant: str | None = option(None, help="short or long: the words of charity, the observations of maze")
    against: str | None = option(
        None, help="folder of an eval of another policy with the same world and seed: the paired difference is reported"
    )
    user: str | None = option(
        None,
        help="of charity: who is talked to, a folder of a model trained on `logs --side user`, or an endpoint's URL",
    )
    user_model: str | None = option(None, help="name of the model at that URL")
    user_key_env: str | None = option(None, help="environment variable with the key of that URL")
    rollout_backend: str = option("transformers", choices=("auto", "transformers", "vllm", "server"), help="the engine")
    server_url: list[str] = option([], help="vLLM servers by URL, for the server backend")
    dtype: str = option("auto", choices=_DTYPES, help="auto is float32 on a CPU, else as stored")
    seed: int = option(0, help="of the environment's luck and of sampling")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(self, {"episodes": 1, "beta": 0, "seed": 0, "rerank": 2, "window": 1})
        if self.user is None and (self.user_model or self.user_key_env):
            raise UsageError("--user_model and --user_key_env go with --user URL")
        if self.user is not None and self.env != "charity":
            raise UsageError(f"--user plays the other side of charity; the world of {self.env} is a script")
        if self.rerank is not None and self.greedy:
            raise UsageError("--rerank chooses among samples, which --greedy has one of")
        if self.support is not None and not 0 <= self.support <= 1:
            raise UsageError(f"--support must be from 0 to 1, got {self.support}")
        if not self.temperature > 0:
            raise UsageError(
                f"--temperature must be above 0, got {self.temperature}; --greedy takes the likeliest token"
            )


@dataclass
class LogsConfig:
    """Options of `llmrl hindsight logs`."""

    env: str = option(choices=("maze", "charity", "twenty-questions"), help="whose scripted, mediocre agent is logged")
    output: str = option(help="JSONL file of dialogues to write")
    count: int = option(1000, help="dialogues")
    variant: str | None = option(None, help="short or long words of charity")
    side: str = option(
        "agent",
        choices=("agent", "user"),
        help="of charity: whose turns are learnt; user, to train a simulated one by bc",
    )
    model_dir: str | None = option(None, help="also write a small model of random weights that knows the words")
    layers: int = option(2, help="of that model")
    width: int = option(64, help="of that model")
    seed: int = option(0, help="of the dialogues and of the weights")
    overwrite: bool = option(False, help="replace --output and --model_dir")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(self, {"count": 1, "layers": 1, "width": 8, "seed": 0})
        if self.side == "user" and self.env != "charity":
            raise UsageError(f"--side user is of charity; the world of {self.env} is a script")
        if not self.output.endswith((".jsonl", ".jsonl.gz")):
            raise UsageError(f"--output {self.output}: expected a name that ends in .jsonl or .jsonl.gz")


@dataclass
class FoldConfig:
    """Options of `llmrl hindsight fold`."""

    policy: str = option(help="folder of llmrl hindsight train, with values on the policy's own trunk")
    data: list[str] = option(help="JSONL files of held-out dialogues, on which what is lost is measured")
    output_dir: str = option(help="the plain checkpoint to write")
    data_format: str = option("dialogues", choices=FORMATS, help="see train")
    beta: float | None = option(None, help="how far Q moves the policy, for good (default: what the folder says)")
    force: bool = option(
        False,
        help="also where more than 1% of the probability, beside the behaviour policy's own, lies off the support",
    )
    seed: int = option(0, help="nothing is drawn; taken for uniformity")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(self, {"beta": 0})

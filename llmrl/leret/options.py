"""The options of `llmrl leret explore|train|eval` and recipes/leret.py: one dataclass, two presets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from llmrl.config import option
from llmrl.errors import UsageError
from llmrl.rollout.options import BACKENDS, DTYPES
from llmrl.types import SamplingConfig

RETRIEVERS = ("bm25", "dense", "hybrid", "http")
MERGES = ("hop_order", "score", "rrf")
REWARDS = ("ap", "recall", "mrr", "ndcg", "all_gold", "ap_gain", "recall_gain", "marginal")
STATE_RULES = ("bucket", "top1", "softmax", "beam")
PAIRS = ("adjacent", "all", "best_worst")
LERET, PAPER = "leret", "leret-paper"
GAINS = ("ap_gain", "recall_gain", "marginal")

# What a preset says where the user said nothing. docs/leret.md explains every line that differs.
PRESETS: dict[str, dict[str, Any]] = {
    PAPER: {
        "few_shot_prompts": 3, "samples": 1, "temperature": [0.0], "merge": "score", "reward": "ap", "returns": "greedy",
        "state_rule": "bucket", "keep_solved": False, "pairs": "adjacent", "margin": 0.0, "max_pairs": 0, "near_duplicate": 1.0,
        "tuning": "full", "optimizer": "rmsprop", "sft_lr": 1e-7, "sft_epochs": 1, "sft_batch_size": 8,
        "lr": 1e-7, "epochs": 2, "train_batch_size": 4, "warmup_steps": 150, "max_grad_norm": 10.0,
        "ipo_reduction": "sum", "beta": 0.05, "loss": "ipo", "partition": "disjoint",
    },
    LERET: {
        "few_shot_prompts": 3, "samples": 2, "temperature": [0.0, 0.7], "merge": "hop_order", "reward": "ap",
        "returns": "greedy", "state_rule": "bucket", "keep_solved": False, "pairs": "adjacent", "margin": 0.0,
        "max_pairs": 12, "near_duplicate": 0.9,
        "tuning": "lora", "optimizer": "adamw", "sft_lr": 1e-4, "sft_epochs": 2, "sft_batch_size": 16,
        "lr": 2e-5, "epochs": 2, "train_batch_size": 16, "warmup_steps": 10, "max_grad_norm": 1.0,
        "ipo_reduction": "sum", "beta": 0.05, "loss": "ipo", "partition": "full",
    },
}  # fmt: skip

_OF_RULES: dict[str, Any] = {"samples": 1, "temperature": [0.0], "few_shot_prompts": 0, "returns": "greedy"}


@dataclass
class LeretConfig:
    """Options of LeReT; what is null here comes from the preset, or from the model's own search_prompt.json."""

    model: str | None = option(None, help="a folder, or a hub name; leave it out with --policy rules")
    questions: list[str] = option(
        [], help="JSONL[.gz] files: id, question, gold_ids or gold_titles, and optionally type"
    )
    passages: list[str] = option([], help="JSONL[.gz] files with id, title, text: the corpus")
    output_dir: str | None = option(None, help="where the run goes")
    dev_questions: list[str] = option([], help="questions that decide when rounds stop; never trained on")
    test_questions: list[str] = option([], help="questions of the report that a training run ends with")
    preset: str = option(LERET, choices=(LERET, PAPER), help="values of all options below that are not given")
    policy: str = option("model", choices=("model", "rules"), help="rules asks no model: fixed ways of writing queries")
    adapter: str | None = option(None, help="folder of a PEFT LoRA adapter of the model")

    retriever: str = option("bm25", choices=RETRIEVERS, help="what searches the corpus")
    encoder: str | None = option(None, help="of dense and hybrid: a folder, or a hub name (default: all-MiniLM-L6-v2)")
    retriever_url: str | None = option(None, help="of the http retriever, ColBERT-style JSON")
    retriever_name: str | None = option(
        None, help="of the index behind --retriever_url: a run knows it by this name and not by its URL"
    )
    cache_dir: str | None = option(None, help="where searches and embeddings are kept (default: in --output_dir)")
    hops: int | None = option(None, help="searches a question (default: the model's own, or 2)")
    k: int | None = option(None, help="passages a search (default: the model's own, or 3)")
    unseen_only: bool | None = option(
        None, help="later hops return passages that were not found before (default: false)"
    )
    question_first: bool | None = option(
        None, help="hop 1 searches with the question itself, and the model writes from hop 2 on (default: false)"
    )
    merge: str | None = option(None, choices=MERGES, help="order of passages in prompt and reward")

    prompts: str | None = option(None, help="JSON file with further prompt styles: name, instruction, demos, hops")
    few_shot_prompts: int | None = option(None, help="few-shot styles made of the model's own best queries")
    few_shot_demos: int = option(3, help="worked examples in each of them")
    few_shot_questions: int = option(100, help="questions set aside for them, half at most: half makes, half chooses")
    samples: int | None = option(None, help="queries a style and temperature; greedy decoding draws one")
    temperature: list[float] | None = option(None, help="one or several; 0 is greedy")
    max_tokens: int | None = option(None, help="most tokens of a query (default: the model's own, or 64)")
    reward: str | None = option(None, choices=REWARDS, help="of the passages found up to a hop")
    returns: str | None = option(
        None, choices=("greedy", "mean", "best"), help="a query's worth: of its hop, or of sampled futures"
    )
    futures: int = option(2, help="sampled futures a query, for returns mean and best")
    discount: float = option(1.0, help="of a reward one hop later, for returns mean and best")
    state_rule: str | None = option(None, choices=STATE_RULES, help="which context goes on to the next hop")
    state_temperature: float = option(0.25, help="of the softmax rule")
    beam: int = option(2, help="contexts a question of the beam rule")
    keep_solved: bool | None = option(None, help="keep solved states, with the empty query as the right answer (stop)")

    pairs: str | None = option(None, choices=PAIRS, help="which queries are compared")
    margin: float | None = option(None, help="least difference of reward in a pair")
    max_pairs: int | None = option(None, help="most pairs a question; 0 is no limit")
    near_duplicate: float | None = option(
        None, help="queries with this word overlap (Jaccard) or more count as one; 1 is off"
    )

    tuning: str | None = option(None, choices=("lora", "full"), help="what is trained")
    lora_r: int = option(16, help="rank")
    lora_alpha: int = option(32, help="scale times rank")
    optimizer: str | None = option(None, choices=("adamw", "rmsprop"), help="of both stages")
    sft_lr: float | None = option(None, help="learning rate of supervised training on the best queries")
    sft_epochs: float | None = option(None, help="0 leaves it out")
    sft_batch_size: int | None = option(None, help="rows a step, over all processes")
    loss: str | None = option(None, choices=("ipo", "dpo"), help="of the preference stage")
    ipo_reduction: str | None = option(None, choices=("sum", "mean"), help="sum is the paper's, mean is trl's")
    beta: float | None = option(None, help="the margin asked for is 1/(2 beta)")
    lr: float | None = option(None, help="learning rate of the preference stage")
    epochs: float | None = option(None, help="of the preference stage; 0 leaves it out")
    train_batch_size: int | None = option(None, help="pairs a step, over all processes")
    reference: str = option(
        "sft", choices=("sft", "base"), help="of the preference stage; base is the adapter switched off"
    )
    warmup_steps: int | None = option(None, help="of both stages")
    max_grad_norm: float | None = option(None, help="of both stages")
    micro_batch_size: int = option(16, help="rows in memory at once; gradients add up to the batch size")
    gradient_checkpointing: bool = option(False, help="less memory, more time")
    save_steps: int = option(100, help="steps between checkpoints")

    rounds: int = option(1, help="explore and train this many times, each with the model of the one before")
    partition: str | None = option(None, choices=("disjoint", "full"), help="questions of a round: its share, or all")
    patience: int = option(1, help="rounds without a better dev recall before the run stops")
    force: bool = option(False, help="train even where the headroom report says there is nothing to learn")

    systems: list[str] = option([], help="for eval, further rows as NAME=FOLDER: models, or adapters of --model")
    rules: list[str] = option([], help="for eval, rule policies as rows: names, or 'all'")
    bootstrap_draws: int = option(10_000, help="draws behind the 95% intervals")

    rollout_backend: str = option("auto", choices=BACKENDS, help="auto takes vLLM where it can be used")
    server_url: list[str] = option([], help="vLLM servers by URL, for the server backend")
    enable_thinking: bool | None = option(None, help="given to chat templates that read it, such as Qwen3's")
    dtype: str = option("auto", choices=DTYPES, help="auto is float32 on a CPU, else as stored")
    max_model_len: int | None = option(None, help="most tokens of prompt and query (default: the model's context)")
    batch_size: int = option(64, help="requests decoded together by the transformers backend")
    seed: int = option(0, help="of everything")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    resume_from_checkpoint: str | None = option(
        None, help="go on with a run that was cut off: the default", const="latest"
    )
    report_to: str = option(
        "none", help="none, tensorboard, wandb or trackio", choices=("none", "tensorboard", "wandb", "trackio")
    )  # fmt: skip
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        preset = dict(PRESETS[self.preset])
        if self.policy == "rules":  # a rule says one thing
            self._check_rules()
            preset.update(_OF_RULES)
        for name, value in preset.items():
            if (
                getattr(self, name) is None and name != "merge"
            ):  # a policy's own order of passages comes before the preset's
                setattr(self, name, value)
        self._check_given()
        self._check_ranges()
        self._check_combinations()
        for temperature in self.temperature or ():
            self.sampling(temperature)

    def _check_given(self) -> None:
        for name, what in (
            ("questions", "JSONL files with id, question and gold_ids or gold_titles"),
            ("passages", "JSONL files with id, title and text"),
            ("output_dir", "the folder to write"),
        ):
            if not getattr(self, name):
                raise UsageError(f"missing --{name}: {what}")
        if self.policy == "model" and self.model is None:
            raise UsageError("missing --model: a folder, or a hub name; or --policy rules, which asks no model")
        if self.retriever == "http" and self.retriever_url is None:
            raise UsageError("--retriever http needs --retriever_url, e.g. http://127.0.0.1:8893/api/search")
        if self.retriever_name is not None and (self.retriever != "http" or not self.retriever_name.strip()):
            raise UsageError("--retriever_name is the name of an index of --retriever http: a word, or leave it out")
        if self.server_url and self.rollout_backend not in ("auto", "server"):
            raise UsageError(f"--server_url goes with --rollout_backend server, not with {self.rollout_backend}")
        if self.resume_from_checkpoint not in (None, "latest", "true"):
            raise UsageError(
                "--resume_from_checkpoint: write it without a value; a run goes on from what lies in --output_dir"
            )

    def _check_ranges(self) -> None:
        least = {
            "hops": 1, "k": 1, "samples": 1, "few_shot_prompts": 0, "few_shot_demos": 1, "few_shot_questions": 2, "futures": 1,
            "beam": 1, "max_pairs": 0, "margin": 0, "sft_epochs": 0, "epochs": 0, "sft_batch_size": 1, "train_batch_size": 1,
            "micro_batch_size": 1, "rounds": 1, "patience": 1, "lora_r": 1, "warmup_steps": 0, "bootstrap_draws": 1,
            "batch_size": 1, "seed": 0, "save_steps": 1,
        }  # fmt: skip
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                raise UsageError(f"--{name} must be at least {number}, got {value}")
        for name in ("beta", "lr", "sft_lr", "max_grad_norm", "state_temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name} must be above 0, got {getattr(self, name)}")
        for name in ("discount", "near_duplicate"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"--{name} must be above 0 and at most 1, got {getattr(self, name)}")

    def _check_combinations(self) -> None:
        if self.question_first and self.hops == 1:
            raise UsageError("--question_first leaves nothing to write with --hops 1")
        if self.reference == "base" and self.tuning == "full":
            raise UsageError("--reference base needs --tuning lora, whose adapter can be switched off")
        if self.adapter is not None and self.tuning == "full":
            raise UsageError(
                "--tuning full trains a whole model: merge --adapter into its base first, or use --tuning lora"
            )
        if self.returns != "greedy" and self.reward in GAINS:
            raise UsageError(
                f"--reward {self.reward} is of one hop and says nothing of later ones: use --returns greedy, or --reward "
                f"{'recall' if self.reward == 'recall_gain' else 'ap'}"
            )
        if not self.temperature or len(set(self.temperature)) < len(self.temperature):
            raise UsageError(f"--temperature must be one or several different numbers, got {self.temperature}")

    def _check_rules(self) -> None:
        """Rules write by themselves: what is asked of a model has no meaning."""
        for name in ("model", "adapter", "prompts"):
            if getattr(self, name) is not None:
                raise UsageError(f"--policy rules asks no model: leave out --{name}, or --policy rules")
        for name, value in _OF_RULES.items():
            if getattr(self, name) not in (None, value):
                raise UsageError(f"--policy rules takes no --{name} {getattr(self, name)}: a rule says one thing")

    def sampling(self, temperature: float) -> SamplingConfig:
        """Return how a query is drawn at one of the temperatures."""
        return SamplingConfig(temperature=temperature, max_tokens=64 if self.max_tokens is None else self.max_tokens)


def given(config: LeretConfig) -> dict[str, Any]:
    """Return the options that describe the run itself: without folders, resources and what only changes the output.

    Files of passages, questions and prompts are known by what they hold, not by where they lie, and so is a retriever.
    """
    left_out = {
        "output_dir", "overwrite", "quiet", "resume_from_checkpoint", "report_to", "cache_dir", "rollout_backend", "server_url",
        "batch_size", "micro_batch_size", "bootstrap_draws", "systems", "rules", "test_questions", "save_steps", "force",
        "gradient_checkpointing", "patience", "passages", "questions", "dev_questions", "prompts",
        "encoder", "retriever_url", "retriever_name",
    }  # fmt: skip
    if config.partition == "full":  # a disjoint partition deals the questions by the number of rounds
        left_out.add("rounds")
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name not in left_out}

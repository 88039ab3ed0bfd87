"""Options of `llmrl switch train|eval|export` and recipes/lora_switch.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmrl.config import check_least, option
from llmrl.lora_switch.config import ALL_LINEAR, GATES, ROUTER_INPUTS, SwitchConfig

_ROWS = "JSONL files with prompt, completion and, where there are several, task"
_TRACKERS = ("none", "tensorboard", "wandb", "trackio")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class TrainConfig:
    """Options of `llmrl switch train`."""

    model: str = option(help="the base: a folder or a hub name; it stays frozen")
    data: list[str] = option(help=_ROWS)
    output_dir: str = option(help="the folder to write")
    test_data: list[str] | None = option(None, help="the same, held out: its loss a task is reported")
    num_experts: int = option(8, help="E; 1 is plain LoRA")
    r: int = option(16, help="rank of an expert")
    alpha: float = option(0.0, help="the experts' sum is multiplied by alpha / r; 0 stands for 2 r top_k")
    target_modules: list[str] = option([ALL_LINEAR], help="last parts of the layers' names, or all-linear")
    router_input: str = option("embedding", choices=ROUTER_INPUTS, help="what the router reads")
    router_layer: int = option(0, help="the decoder layer of layer_k")
    top_k: int = option(2, help="experts a token")
    gate: str = option("softmax", choices=GATES, help="weights of the chosen experts")
    balance_coef: float = option(0.01, help="weight of the load-balancing loss")
    router_noise: float = option(0.0, help="deviation of noise on the router's logits in training")
    dropout: float = option(0.0, help="on the experts' input in training")
    experts: list[str] | None = option(None, help="folders of peft adapters to start from, one an expert")
    router_only: bool = option(False, help="train the router alone, as for experts that are trained already")
    max_length: int = option(512, help="longer rows are left out and counted")
    epochs: float = option(1.0, help="passes over the data")
    max_steps: int = option(-1, help="steps instead of epochs")
    batch_size: int = option(16, help="rows a step over all processes")
    micro_batch_size: int | None = option(None, help="most rows at once on a process")
    lr: float = option(5e-4, help="highest learning rate of the experts")
    router_lr: float | None = option(None, help="of the router; that of the experts by default")
    warmup_steps: int = option(20, help="steps up to it; then down along a cosine")
    weight_decay: float = option(0.0, help="of AdamW")
    dtype: str = option("auto", choices=_DTYPES, help="of the base; auto: float32 on a CPU, bfloat16 on a GPU")
    gradient_checkpointing: bool = option(False, help="less memory, a third more time")
    check_serving: bool = option(False, help="start vLLM on the result and compare it with transformers")
    save_steps: int = option(100, help="steps between checkpoints")
    logging_steps: int = option(10, help="steps between lines of metrics.jsonl")
    seed: int = option(0, help="of everything")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    resume_from_checkpoint: str | None = option(None, help="go on with a run that was cut off", const="latest")
    report_to: str = option("none", help="none, tensorboard, wandb or trackio", choices=_TRACKERS)
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        check_least(self, {"max_length": 2, "batch_size": 1, "save_steps": 1, "logging_steps": 1})
        if self.experts is None:
            self.switch_config()  # refuses what does not fit together

    def switch_config(self) -> SwitchConfig:
        """Return the experts and the router that are asked for."""
        names = self.target_modules
        targets = ALL_LINEAR if names == [ALL_LINEAR] else tuple(names)
        return SwitchConfig(
            num_experts=self.num_experts, r=self.r, alpha=self.alpha, target_modules=targets, **self.routing()
        )

    def routing(self) -> dict[str, Any]:
        """Return the fields of a SwitchConfig that do not say what the experts are."""
        names = ("router_input", "router_layer", "top_k", "gate", "balance_coef", "router_noise", "dropout")
        return {name: getattr(self, name) for name in names}


@dataclass
class EvalConfig:
    """Options of `llmrl switch eval`."""

    model: str = option(help="the folder of a switch model, or of any causal LM to compare with")
    data: list[str] = option(help=_ROWS)
    output_dir: str = option(help="the folder to write")
    max_length: int = option(512, help="longer rows are left out and counted")
    batch_size: int = option(16, help="rows at once")
    dtype: str = option("auto", choices=_DTYPES, help="of the model")
    seed: int = option(0, help="of the intervals")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    quiet: bool = option(False, help="print errors only")


@dataclass
class ExportConfig:
    """Options of `llmrl switch export`."""

    model: str = option(help="the folder of a switch model")
    weights: list[float] = option(help="one weight an expert, in their order")
    output_dir: str = option(help="the peft adapter to write")
    seed: int = option(0, help="nothing here is random")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    quiet: bool = option(False, help="print errors only")

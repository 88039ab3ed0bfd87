"""Online RL in minutes on a CPU: GRPO on our small language model, sampled by the rollout engine, weights synced each step.

    python recipes/grpo_tiny.py --output_dir runs/grpo_tiny
    torchrun --nproc_per_node 2 recipes/grpo_tiny.py --output_dir runs/grpo_tiny2

The reward is a rule: the share of the answer's words that begin with the letter s. It says nothing of use; that it rises
says that sampling, reward, gradient and weight sync fit together. `metrics.jsonl` holds the reward and the canary's
largest logprob difference of every step; `plots/reward.png` shows them.
"""

from __future__ import annotations

import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrl.config import option, parse_config, to_flat
from llmrl.errors import EXIT_DONE, UsageError, run_command
from llmrl.files import check_output_dir

TOPICS = (
    "the sea", "a summer day", "a school", "the stars", "a small town", "music", "a long journey", "the weather", "a friend",
    "an old house", "the sun", "a river", "a football match", "winter", "a ship", "a festival",
)  # fmt: skip


@dataclass
class GrpoConfig:
    """Options of the recipe."""

    output_dir: str | None = option(None, help="where the trained model, metrics and plot go")
    model: str = option("examples/tiny_lm", help="a folder, or a hub name, with a chat template")
    rollout_backend: str = option("auto", choices=("auto", "transformers", "vllm"), help="what samples the answers")
    max_steps: int = option(40, help="optimizer steps")
    learning_rate: float = option(3e-4, help="of AdamW, constant")
    num_generations: int = option(16, help="answers to a prompt that are compared with each other")
    prompts_per_step: int = option(4, help="prompts of one optimizer step, over all processes")
    max_completion_length: int = option(48, help="tokens of an answer")
    temperature: float = option(1.0, help="of sampling; the trainer divides its logits by the same")
    lora_r: int = option(0, help="rank of a LoRA adapter to train; 0 trains all weights")
    seed: int = option(0, help="of prompts, sampling and training")
    overwrite: bool = option(False, help="replace what is in --output_dir")
    report_to: str = option("none", choices=("none", "tensorboard", "wandb", "trackio"), help="a tracker")
    quiet: bool = option(False, help="print errors only")

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise UsageError("missing --output_dir: where the result goes")
        least = {
            "max_steps": 1,
            "num_generations": 2,
            "prompts_per_step": 1,
            "max_completion_length": 1,
            "lora_r": 0,
            "seed": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UsageError(f"--{name} must be at least {smallest}, got {getattr(self, name)}")
        for name in ("learning_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name} must be a number above 0, got {getattr(self, name)}")


def share_of_s(completions: list[Any], **columns: Any) -> list[float]:
    """Return the share of each answer's words that begin with s."""
    rewards = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[0]["content"]
        words = re.findall(r"[A-Za-z]+", text)
        rewards.append(sum(word[0] in "sS" for word in words) / len(words) if words else 0.0)
    return rewards


def main(argv: list[str]) -> int:
    """Train; return the exit code."""
    config = parse_config(GrpoConfig, argv, prog="recipes/grpo_tiny.py", description="GRPO on the small model")
    from llmrl.commands import quiet_libraries

    quiet_libraries(config.quiet)  # before the libraries load
    from llmrl.rollout.backends import choose_backend, open_engine
    from llmrl.rollout.grpo import EngineRollouts
    from llmrl.rollout.model_facts import read_facts
    from llmrl.training import check_processes, is_main_process

    processes = check_processes(announce=not config.quiet)
    if config.prompts_per_step * config.num_generations % processes:
        raise UsageError(
            f"{config.prompts_per_step} prompts times {config.num_generations} answers do not share out over {processes} "
            "processes: change --prompts_per_step"
        )
    output = check_output_dir(str(config.output_dir), overwrite=config.overwrite)
    backend = config.rollout_backend
    if backend == "auto":
        backend, _ = choose_backend(read_facts(config.model))
    options = {"max_lora_rank": config.lora_r} if config.lora_r and backend == "vllm" else {}
    with open_engine(config.model, rollout_backend=backend, max_model_len=512, **options) as engine:
        rollouts = EngineRollouts(engine)
        trainer = _trainer(config, output, rollouts)
        trainer.train()
        if is_main_process():
            trainer.save_model(str(output))
            _plot(output, rollouts.sync.tolerance)
            _say(config, output, rollouts)
    return EXIT_DONE


def _trainer(config: GrpoConfig, output: Path, rollouts: Any) -> Any:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is, and is what this recipe is about
    # said of its own use of vLLM, which is switched off here
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from llmrl.base_model import load_tokenizer
    from llmrl.training import MetricsCallback, RunFilesCallback, safe, world_size

    prompts = [[{"role": "user", "content": f"Tell me about {topic}."}] for topic in TOPICS]
    on_cpu = not torch.cuda.is_available()
    arguments = GRPOConfig(
        output_dir=str(output),
        max_steps=config.max_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=config.prompts_per_step * config.num_generations // world_size(),
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        beta=0.0,
        loss_type="dapo",
        seed=config.seed,
        logging_steps=1,
        save_strategy="no",
        report_to=config.report_to,
        use_cpu=on_cpu,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=config.quiet,
        model_init_kwargs={"dtype": "float32", "trust_remote_code": False},
    )
    lora = None
    if config.lora_r:
        from peft import LoraConfig

        lora = LoraConfig(r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear")
    card = {
        "title": "GRPO on a small language model",
        "base_model": config.model,
        "summary": "A test of the online loop: trained to begin words with the letter s.",
    }
    trainer = safe(GRPOTrainer)(
        model=config.model,
        reward_funcs=share_of_s,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=load_tokenizer(config.model),
        peft_config=lora,
        rollout_func=rollouts,
        callbacks=[MetricsCallback(), RunFilesCallback(to_flat(config), card=card)],
    )
    _show_reward(trainer, quiet=config.quiet)
    return trainer


def _show_reward(trainer: Any, *, quiet: bool) -> None:
    """Let the progress bar show the reward, in place of a dict of forty numbers a step: those are in metrics.jsonl."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class RewardBar(ProgressCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.training_bar is not None and logs and "reward" in logs:
                self.training_bar.set_postfix_str(f"reward {logs['reward']:.3f}")

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not quiet:
        trainer.add_callback(RewardBar)


def _plot(output: Path, tolerance: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from llmrl.training import read_metrics

    rows = [row for row in read_metrics(output / "metrics.jsonl") if "reward" in row]
    synced = [row for row in rows if "sync/difference" in row]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    top.plot([row["step"] for row in rows], [row["reward"] for row in rows])
    top.set_ylabel("mean reward of a step")
    top.set_title("share of words that begin with s")
    bottom.semilogy([row["step"] for row in synced], [max(row["sync/difference"], 1e-9) for row in synced])
    bottom.axhline(tolerance, color="grey", linestyle="--", label="tolerance")
    bottom.legend()
    bottom.set_ylabel("engine against trainer (nats)")
    bottom.set_xlabel("optimizer step")
    (output / "plots").mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(output / "plots" / "reward.png", dpi=120)
    pyplot.close(figure)


def _say(config: GrpoConfig, output: Path, rollouts: Any) -> None:
    from llmrl.training import read_metrics

    rewards = [row["reward"] for row in read_metrics(output / "metrics.jsonl") if "reward" in row]
    tenth = max(1, len(rewards) // 10)
    reports = rollouts.sync.reports
    largest = max((max(r.difference, r.difference_after_cached_prefix) for r in reports), default=0.0)
    if not config.quiet:
        print(
            f"reward {sum(rewards[:tenth]) / tenth:.3f} -> {sum(rewards[-tenth:]) / tenth:.3f} over {len(rewards)} steps; "
            f"{len(reports)} weight updates, canary's largest difference {largest:.1e} nats (tolerance "
            f"{rollouts.sync.tolerance:g})\nwrote {output}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

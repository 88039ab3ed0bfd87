"""Train a small chat model from nothing: `python recipes/tiny_lm.py --data_dir DIR --output_dir examples/tiny_lm`.

A Llama of some 7 million parameters with a byte-level BPE tokenizer of its own, for tests that need a model which follows
the chat format, holds a dialogue and has rewards within reach. Data: recipes/tiny_lm_data.py.

Documents are packed into windows of `--pack_length`, in the last `--long_share` of the steps of `--max_length`, so that
every position is trained. In the last `--final_share` an epoch holds the made-up chats `--final_repeats` times. The learning
rate is warmed up, constant, and falls to zero over the last `--decay_share`.

Checkpoints (safetensors and JSON) lie in `--work_dir`; a killed run goes on with the same command and
`--resume_from_checkpoint`, and ends with the same weights. `--max_steps` and these shares may be changed then: fewer steps
start the decay earlier. A finished run that is resumed only writes its output anew.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_lm_tokens import Corpus, Windows, load_corpus, pack

from llmrl.config import option, parse_config
from llmrl.errors import ModelError, UsageError, run_command
from llmrl.files import check_output_dir, publish_folder

if TYPE_CHECKING:
    import torch


# what may be changed when a run goes on
SCHEDULE = ("max_steps", "long_share", "final_share", "final_repeats", "decay_share")


@dataclasses.dataclass
class TinyLMConfig:
    """Options of the run."""

    data_dir: str = option(help="folder with one folder for each data set (see recipes/tiny_lm_data.py)")
    output_dir: str = option(help="folder for the finished model; written in one go at the end")
    work_dir: str | None = option(
        None, help="folder for tokens and checkpoints (default: .NAME.work beside output_dir)"
    )
    overwrite: bool = option(False, help="replace an output folder, and the checkpoints of another run")
    resume_from_checkpoint: str | None = option(
        None, const="latest", help="go on from the newest checkpoint, or a path"
    )
    quiet: bool = option(False, help="print errors only")
    seed: int = option(0, help="of weights, made-up chats and the order of the data")
    threads: int | None = option(None, help="threads of torch (default: torch's choice)")
    max_steps: int = option(2000, help="optimizer steps")
    batch_tokens: int = option(8192, help="tokens a step")
    pack_length: int = option(512, help="tokens a window at first")
    max_length: int = option(2048, help="tokens a window at the end, and the model's context")
    long_share: float = option(0.12, help="share of the steps with windows of max_length, at the end")
    final_share: float = option(0.5, help="share of the steps with more made-up chats, at the end")
    final_repeats: int = option(6, help="how often an epoch of these has each made-up chat")
    synthetic_rows: int = option(30000, help="made-up instruction chats, before equal ones are dropped")
    vocab_size: int = option(4096, help="pieces of the tokenizer")
    hidden_size: int = option(256, help="width of the model")
    num_layers: int = option(6, help="layers of the model")
    num_heads: int = option(8, help="attention heads")
    num_kv_heads: int = option(4, help="heads of keys and values")
    head_dim: int = option(32, help="width of a head")
    intermediate_size: int = option(1024, help="width of the MLP")
    learning_rate: float = option(2e-3, help="peak learning rate")
    warmup_steps: int = option(100, help="steps with a rising learning rate")
    decay_share: float = option(0.35, help="share of the steps with a falling learning rate")
    weight_decay: float = option(0.1, help="of matrices; none on norms")
    save_steps: int = option(75, help="steps between checkpoints; two are kept")
    eval_steps: int = option(200, help="steps between losses on the held-out documents")
    log_steps: int = option(10, help="steps between logged training losses")


def main(argv: list[str]) -> int:
    """Train and write the output folder; return the exit code."""
    config = parse_config(
        TinyLMConfig, argv, prog="recipes/tiny_lm.py", description="Train a small chat model on a CPU, from nothing."
    )
    _check(config)
    output = check_output_dir(config.output_dir, overwrite=config.overwrite)
    work = Path(config.work_dir or output.with_name(f".{output.name}.work")).expanduser().resolve()
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    from llmrl.training.resume import begin_or_resume

    checkpoint = begin_or_resume(work, config.resume_from_checkpoint, overwrite=config.overwrite)
    options = _facts(config, "seed", "synthetic_rows", "vocab_size", "max_length")
    run = Run(config, work, load_corpus(Path(config.data_dir), work / "tokens", quiet=config.quiet, **options))
    run.train(checkpoint)
    from tiny_lm_publish import publish

    publish(run, output)
    return 0


def _check(config: TinyLMConfig) -> None:
    for name in ("max_steps", "batch_tokens", "pack_length", "save_steps", "eval_steps", "log_steps"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} {getattr(config, name)}: expected at least 1")
    for name in ("long_share", "final_share", "decay_share"):
        if not 0 <= getattr(config, name) <= 1:
            raise UsageError(f"--{name} {getattr(config, name)}: expected a share from 0 to 1")
    for name in ("pack_length", "max_length"):
        if config.batch_tokens % getattr(config, name):
            raise UsageError(
                f"--batch_tokens {config.batch_tokens}: expected a multiple of --{name} {getattr(config, name)}"
            )


# --- training ---


class Run:
    """Model, optimizer and what is logged of them."""

    def __init__(self, config: TinyLMConfig, work: Path, data: Corpus) -> None:
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        self.config, self.work, self.data = config, work, data
        self.tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_dir)
        torch.manual_seed(config.seed)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_length,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                attn_implementation=_float32_attention(),
            )
        )
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._cross_entropy = _cross_entropy()
        self.step, self.seconds, self.loss_sum = 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []
        self.schedules: list[dict[str, float]] = []
        self.windows: dict[tuple[int, int], Windows] = {}

    def facts(self) -> dict[str, Any]:
        """Return what a run and the checkpoint it goes on from must share; the schedule may change."""
        free = ("data_dir", "output_dir", "work_dir", "overwrite", "resume_from_checkpoint", "quiet", "threads")
        free += (*SCHEDULE, "save_steps", "eval_steps", "log_steps")
        names = [f.name for f in dataclasses.fields(self.config) if f.name not in free]
        return {**_facts(self.config, *names), "data": self.data.facts["sha256"]}

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        steps, config = self.config.max_steps, self.config
        falling = max(1, round(steps * config.decay_share))
        warm = (self.step + 1) / max(1, config.warmup_steps)
        return config.learning_rate * min(1.0, warm, (steps - self.step) / falling)

    def last_steps(self, share: float) -> int:
        """Return the step at which the last `share` of the steps begins."""
        return self.config.max_steps - round(self.config.max_steps * share)

    def batch(self) -> torch.Tensor:
        """Return the windows of the next step."""
        config, pad = self.config, self.tokenizer.pad_token_id
        final, long = self.last_steps(config.final_share), self.last_steps(config.long_share)
        first, repeats, length = 0, 1, config.pack_length
        if self.step >= long:
            first, length = long, config.max_length
        if self.step >= final:
            first, repeats = max(final, first), config.final_repeats
        if (length, repeats) not in self.windows:
            seen = [repeats if made_up else 1 for made_up in self.data.facts["synthetic"]]
            self.windows[length, repeats] = Windows(self.data.train, length + 1, config.seed, pad, seen)
        count = config.batch_tokens // length
        return self.windows[length, repeats].get((self.step - first) * count, count)

    def train(self, checkpoint: str | None) -> None:
        """Take the steps that are left, with a checkpoint now and then and one at the end."""
        from tqdm import tqdm

        config = self.config
        if checkpoint is not None:
            self._load(checkpoint)
        schedule = _facts(config, *SCHEDULE)
        if self.step < config.max_steps and (not self.schedules or schedule.items() - self.schedules[-1].items()):
            self.schedules.append({"from_step": self.step, **schedule})
        self.model.train()
        with tqdm(total=config.max_steps, initial=self.step, disable=config.quiet, unit="step", mininterval=5) as bar:
            while self.step < config.max_steps:
                began = time.monotonic()
                self._advance(bar)
                self.seconds += time.monotonic() - began
                if self.step % config.save_steps == 0 or self.step == config.max_steps:
                    self._save()

    def _advance(self, bar: Any) -> None:
        """Take one step, and log and validate when it is time."""
        config = self.config
        self.loss_sum += self._update(self.batch())
        self.step += 1
        bar.update()
        if self.step % config.log_steps == 0:
            row = {"loss": self.loss_sum / config.log_steps, "learning_rate": self.optimizer.param_groups[0]["lr"]}
            self.history.append({"step": self.step, **row})
            self.loss_sum = 0.0
            bar.set_postfix(loss=f"{row['loss']:.3f}")
        if self.step % config.eval_steps == 0 or self.step == config.max_steps:
            self.history.append({"step": self.step, "validation_loss": self.validate()["loss"]})
            if not config.quiet:
                bar.write(f"step {self.step}: validation loss {self.history[-1]['validation_loss']:.4f}")

    def _update(self, batch: torch.Tensor) -> float:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss(batch)
        if not torch.isfinite(loss):
            raise ModelError(f"the loss is {loss.item()} at step {self.step + 1}: lower --learning_rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of predicting each token of (windows, width) from those before it; padding is left out."""
        import torch

        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        labels = batch[:, 1:].flatten()
        weight = self.model.lm_head.weight
        return self._cross_entropy.apply(hidden.flatten(0, 1), weight, labels, self.tokenizer.pad_token_id)

    def validate(self, source: str | None = None) -> dict[str, float]:
        """Return loss a token, number of tokens, and summed loss over the held-out documents, of one source or all."""
        import torch

        held, pad, width = self.data.held, self.tokenizer.pad_token_id, self.config.pack_length + 1
        chosen = [source in (None, name) for name in self.data.facts["held_sources"]]
        lengths = [length if take else 0 for length, take in zip(held.lengths, chosen, strict=True)]
        windows = pack(lengths, width, random.Random(0))
        count = max(1, self.config.batch_tokens // self.config.pack_length)
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for first in range(0, len(windows), count):
                batch = held.fill(windows[first : first + count], width, pad)
                scored = int((batch[:, 1:] != pad).sum())
                total, tokens = total + self.loss(batch).item() * scored, tokens + scored
        return {"loss": total / max(tokens, 1), "tokens": tokens, "sum": total}

    # --- checkpoints ---

    def _save(self) -> None:
        from llmrl.training.resume import list_checkpoints, remove_checkpoint, seal_checkpoint, staging_folder
        from llmrl.training.state_files import save_state

        final = self.work / f"checkpoint-{self.step}"
        staging = staging_folder(final)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        save_state(staging, "model", {name: p.detach() for name, p in self.parameters.items()})
        save_state(staging, "optimizer", self.optimizer.state_dict())
        progress = {"seconds": self.seconds, "loss_sum": self.loss_sum, "history": self.history}
        progress["schedules"] = self.schedules
        save_state(staging, "progress", progress)
        seal_checkpoint(staging, {"step": self.step, **self.facts()})
        publish_folder(staging, final)
        for old in list_checkpoints(self.work)[:-2]:
            remove_checkpoint(old)

    def _load(self, checkpoint: str) -> None:
        import torch

        from llmrl.training.resume import compare_runs, read_manifest
        from llmrl.training.state_files import load_state

        compare_runs(checkpoint, self.facts())
        self.step = read_manifest(checkpoint)["step"]
        if self.step > self.config.max_steps:
            raise UsageError(f"--max_steps {self.config.max_steps}: the checkpoint is at step {self.step} already")
        with torch.no_grad():
            for name, value in load_state(checkpoint, "model").items():
                self.parameters[name].copy_(value)
        self.optimizer.load_state_dict(load_state(checkpoint, "optimizer"))
        progress = load_state(checkpoint, "progress")
        self.seconds, self.loss_sum, self.history = progress["seconds"], progress["loss_sum"], progress["history"]
        self.schedules = progress["schedules"]


def _facts(config: TinyLMConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def _float32_attention() -> str:
    """Register attention in float32 for short windows; narrow heads are slow in bfloat16 there. Return its name."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if key.shape[-2] > 1024:
            return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)

    AttentionInterface.register("float32_sdpa", attend)
    return "float32_sdpa"


def _cross_entropy() -> Any:
    import torch

    class CrossEntropy(torch.autograd.Function):
        """Mean cross-entropy, in parts of 512 tokens with the gradient made on the way: no table of all logits."""

        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, labels: Any, ignored: int) -> Any:
            hidden16, weight16 = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
            counts = labels != ignored
            total, number = hidden.new_zeros((), dtype=torch.float32), counts.sum().clamp(min=1)
            grad_hidden, grad_weight = torch.empty_like(hidden16), torch.zeros_like(weight)
            for first in range(0, len(labels), 512):
                part = slice(first, first + 512)
                grad = torch.log_softmax((hidden16[part] @ weight16.t()).float(), dim=-1)
                rows = torch.arange(len(grad))
                total -= (grad[rows, labels[part]] * counts[part]).sum()
                grad.exp_()
                grad[rows, labels[part]] -= 1
                grad *= (counts[part] / number).unsqueeze(1)
                grad16 = grad.to(torch.bfloat16)
                grad_hidden[part] = grad16 @ weight16
                grad_weight += grad16.t() @ hidden16[part]
            ctx.save_for_backward(grad_hidden, grad_weight)
            return total / number

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            grad_hidden, grad_weight = ctx.saved_tensors
            return grad_hidden * grad, grad_weight * grad, None, None

    return CrossEntropy


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

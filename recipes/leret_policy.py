"""Train a small query-writing policy: `python recipes/leret_policy.py --passages F --questions F --output_dir D`.

A stock decoder of some 5 million parameters with a tokenizer of its own learns to write the queries of llmrl.leret.rules
when it is told which, and any of them when it is not: what LeReT then starts from. It copies and invents nothing, so it fits
passages and names it has not seen. Data: recipes/leret_policy_data.py; first weights: recipes/leret_policy_model.py.

The n-th file of --passages goes with the n-th of --questions. A fixed share of the questions is kept out of training and
scored at the end. What a step learns is a function of the seed and its number. Checkpoints (safetensors and JSON) lie in
`--work_dir`; a killed run goes on with the same command and `--resume_from_checkpoint`, and ends with the same weights.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import leret_policy_data as data
import leret_policy_tokens as tokens
from leret_policy_eval import K

from llmrl.config import option, parse_config
from llmrl.errors import ModelError, UsageError, run_command
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.leret.prompts import BARE, SearchSetup

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass
class PolicyConfig:
    """Options of the run."""

    passages: list[str] = option(help="passage files (id, title, text), JSON lines, may be gzipped")
    questions: list[str] = option(help="training questions, one file for each of --passages")
    output_dir: str = option(help="folder for the finished policy; written in one go at the end")
    work_dir: str | None = option(None, help="folder for checkpoints (default: .NAME.work beside output_dir)")
    overwrite: bool = option(False, help="replace an output folder, and the checkpoints of another run")
    resume_from_checkpoint: str | None = option(
        None, const="latest", help="go on from the newest checkpoint, or a path"
    )
    quiet: bool = option(False, help="print errors only")
    seed: int = option(0, help="of weights and data")
    threads: int | None = option(None, help="threads of torch (default: torch's choice)")
    max_steps: int = option(1500, help="optimizer steps")
    batch_states: int = option(4, help="states with passages a step; half as many without are added")
    segments: int = option(7, help="queries learned a state, the one without a named style among them")
    vocab_size: int = option(4096, help="pieces of the tokenizer")
    num_layers: int = option(4, help="layers of the model")
    intermediate_size: int = option(512, help="width of the MLP")
    max_length: int = option(1024, help="the model's context")
    plain_weights: bool = option(False, help="begin with the usual random weights, to compare")
    dtype: str = option(
        "auto", choices=("auto", "float32", "bfloat16"), help="of matrix products; auto asks what the CPU is fast in"
    )
    learning_rate: float = option(4e-4, help="peak learning rate")
    warmup_steps: int = option(30, help="steps with a rising learning rate")
    decay_share: float = option(0.7, help="share of the steps with a falling learning rate")
    weight_decay: float = option(0.01, help="of matrices; none on norms and biases")
    validation_share: float = option(
        0.15, help="share of the questions that is kept out of training and scored at the end"
    )
    save_steps: int = option(100, help="steps between checkpoints; two are kept")
    log_steps: int = option(20, help="steps between logged training losses")
    eval_steps: int = option(250, help="steps between exact-copy rates on made-up states that training does not see")


def main(argv: list[str]) -> int:
    """Train and write the output folder; return the exit code."""
    config = parse_config(
        PolicyConfig,
        argv,
        prog="recipes/leret_policy.py",
        description="Train a small query-writing policy.",
    )
    _check(config)
    output = check_output_dir(config.output_dir, overwrite=config.overwrite)
    work = Path(config.work_dir or output.with_name(f".{output.name}.work")).expanduser().resolve()
    pools = data.load_pools(config.passages, config.questions, config.validation_share)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if config.threads:
        torch.set_num_threads(config.threads)
    from llmrl.training.resume import begin_or_resume

    checkpoint = begin_or_resume(work, config.resume_from_checkpoint, overwrite=config.overwrite)
    run = Run(config, work, pools)
    run.train(checkpoint)
    run.publish(output)
    return 0


def _check(config: PolicyConfig) -> None:
    if len(config.passages) != len(config.questions):
        raise UsageError(
            f"expected one file of --questions for each of --passages, got {len(config.questions)} and {len(config.passages)}"
        )
    for name in ("max_steps", "batch_states", "save_steps", "log_steps", "eval_steps"):
        if getattr(config, name) < 1:
            raise UsageError(f"--{name} {getattr(config, name)}: expected at least 1")
    for name in ("decay_share", "validation_share"):
        if not 0 <= getattr(config, name) < 1:
            raise UsageError(f"--{name} {getattr(config, name)}: expected a share, at least 0 and below 1")
    if config.num_layers < 4:
        raise UsageError(f"--num_layers {config.num_layers}: expected at least 4")
    if not 2 <= config.segments <= len(data.LATER_HOPS) + 1:
        raise UsageError(f"--segments {config.segments}: expected 2 to {len(data.LATER_HOPS) + 1}")


def fast_dtype() -> str:
    """Return "bfloat16" on a CPU with instructions for it, else "float32": emulated it is ten times slower."""
    import torch

    found = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if found.get("amx_bf16") or found.get("avx512_bf16") else "float32"


class Run:
    """Model, optimizer, data and what is logged of them."""

    def __init__(self, config: PolicyConfig, work: Path, pools: list[data.Pool]) -> None:
        import torch
        from leret_policy_model import build_model

        self.config, self.work, self.pools = config, work, pools
        self.dtype = fast_dtype() if config.dtype == "auto" else config.dtype
        self.format = data.prompt_format()
        self.styles = {style.name: style for style in (self.format.bare, *self.format.styles)}
        self.states = data.StateMaker(pools)
        texts = (passage.both for pool in pools for passage in pool.corpus.passages)
        instructions = (data.INSTRUCTION, *data.INSTRUCTIONS.values())
        self.tokenizer = tokens.train_tokenizer(texts, instructions, config.vocab_size, config.max_length)
        self.given = {name: self.prompt(data.State("x", ()), name)[-tokens.GIVEN :] for name in self.styles}
        torch.manual_seed(config.seed)
        self.model = build_model(
            self.tokenizer,
            self._marks(),
            layers=config.num_layers,
            inner=config.intermediate_size,
            max_length=config.max_length,
            plain=config.plain_weights,
        )
        self._packed_attention()
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.step, self.seconds, self.loss_sum, self.tokens = 0, 0.0, 0.0, 0
        self.history: list[dict[str, Any]] = []

    def _marks(self) -> dict[str, list[int]]:
        """Return the ids of what begins a part of the prompt; an instruction is sorted by where its query begins."""
        begins = {name: "text" if name == "names-1" else "question" for name in data.INSTRUCTIONS}
        marks: dict[str, list[str]] = {
            "first": [tokens.USER],
            "text": [tokens.TEXT_MARK],
            "title": list(tokens.PASSAGE_MARKS),
            "question": [tokens.QUESTION_MARK],
            "plain": [data.INSTRUCTIONS["question"]],
            "style text": [text for name, text in data.INSTRUCTIONS.items() if begins[name] == "text"],
            "style question": [data.INSTRUCTION]
            + [text for name, text in data.INSTRUCTIONS.items() if begins[name] == "question"],
        }
        return {kind: self.tokenizer.convert_tokens_to_ids(texts) for kind, texts in marks.items()}

    def _packed_attention(self) -> None:
        from transformers import AttentionInterface

        def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
            query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
            return tokens.attend(query, key, value, self.current, scaling)[None], None

        AttentionInterface.register("packed", forward)
        self.model.set_attn_implementation("packed")

    # --- data ---

    def example(self, state: data.State, named: list[tuple[str, str]]) -> tokens.Example:
        """Return the tokens of a state and of (style, query) pairs."""
        ids = self.prompt(state, BARE)
        written = self.tokenizer([query for _, query in named], add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        segments = [(*self.given[name], *query, end) for (name, _), query in zip(named, written, strict=True)]
        return tokens.Example(tuple(ids[: -tokens.GIVEN]), tuple(segments))

    def prompt(self, state: data.State, style: str) -> list[int]:
        """Return the tokens of the prompt of a state in a style."""
        messages = self.format.messages(self.styles[style], state.question, state.passages)
        rows = [{"role": message.role, "content": message.content} for message in messages]
        text = self.tokenizer.apply_chat_template(rows, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def batch(self, step: int) -> tokens.Batch:
        """Return what one step learns: states with passages, and some without."""
        rng = random.Random(f"{self.config.seed} step {step}")
        count = rng.choices((3, 1, 2, 4, 5, 6), (85, 3, 3, 3, 3, 3))[0]
        later = [self._sample(rng, count) for _ in range(self.config.batch_states)]
        first = [self._sample(rng, 0) for _ in range(max(1, self.config.batch_states // 2))]
        return tokens.collate([*later, *first])

    def _sample(self, rng: random.Random, count: int) -> tokens.Example:
        state = self.states.make(rng, count=max(1, count))
        if count == 0:
            state = data.State(state.question, ())
        names = data.LATER_HOPS if state.passages else data.FIRST_HOP
        chosen = rng.sample(names, min(len(names), self.config.segments - 1))
        written = data.queries(state, [*chosen, rng.choice(names)])
        return self.example(state, list(zip([*chosen, BARE], written, strict=True)))

    # --- training ---

    def facts(self) -> dict[str, Any]:
        """Return what a run and the checkpoint it goes on from must share."""
        free = (
            "passages",
            "questions",
            "output_dir",
            "work_dir",
            "overwrite",
            "resume_from_checkpoint",
            "quiet",
            "threads",
        )
        free += ("save_steps", "log_steps", "eval_steps", "max_steps")
        names = [f.name for f in dataclasses.fields(self.config) if f.name not in free]
        corpora = [pool.corpus.fingerprint for pool in self.pools]
        return {**{name: getattr(self.config, name) for name in names}, "dtype": self.dtype, "corpora": corpora}

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        steps, config = self.config.max_steps, self.config
        falling = max(1, round(steps * config.decay_share))
        warm = (self.step + 1) / max(1, config.warmup_steps)
        return config.learning_rate * min(1.0, warm, (steps - self.step) / falling)

    def train(self, checkpoint: str | None) -> None:
        """Take the steps that are left, with a checkpoint now and then and one at the end."""
        from tqdm import tqdm

        config = self.config
        if checkpoint is not None:
            self._load(checkpoint)
        self.model.train()
        bar = tqdm(total=config.max_steps, initial=self.step, disable=config.quiet, mininterval=5.0)
        while self.step < config.max_steps:
            began = time.perf_counter()
            self.loss_sum += self._update()
            self.step += 1
            self.seconds += time.perf_counter() - began
            bar.update()
            if self.step % config.log_steps == 0:
                row = {"step": self.step, "loss": self.loss_sum / config.log_steps, "seconds": round(self.seconds, 1)}
                self.history.append({**row, "tokens": self.tokens})
                self.loss_sum = 0.0
                bar.set_postfix(loss=f"{row['loss']:.3f}", s_a_step=f"{self.seconds / self.step:.2f}")
            if self.step % config.eval_steps == 0 or self.step == config.max_steps:
                self.history.append({"step": self.step, "teacher_forced": self.exact_rates()})
                if not config.quiet:
                    bar.write(f"step {self.step} {self.seconds:.0f}s: {self.history[-1]['teacher_forced']}")
            if self.step % config.save_steps == 0 or self.step == config.max_steps:
                self._save()
        bar.close()

    def _update(self) -> float:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        batch = self.batch(self.step)
        loss = torch.nn.functional.cross_entropy(self.logits(batch), batch.labels)
        if not torch.isfinite(loss):
            raise ModelError(f"the loss is {loss.item()} at step {self.step + 1}: lower --learning_rate")
        loss.backward()
        self.tokens += batch.ids.numel()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def logits(self, batch: tokens.Batch) -> torch.Tensor:
        """Return float32 logits of the tokens that are learned, `[number of labels, V]`."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
            self.current = batch
            hidden = self.model.model(
                input_ids=batch.ids, position_ids=batch.positions, attention_mask=None, use_cache=False
            ).last_hidden_state
            logits = self.model.lm_head(hidden[0, batch.predict])
        return logits.float()

    def exact_rates(self, states: int = 48) -> dict[str, float]:
        """Return for each style the share of made-up states whose query is predicted token by token, and over tokens."""
        import torch

        rng, rates = random.Random("held-out states"), {}
        made = [self.states.make(rng, rng.choice(("renamed", "made up"))) for _ in range(states)]
        self.model.eval()
        names = [name for name in self.styles if name != BARE]
        for name in names:
            used = [data.State(s.question, ()) if name == "capitals" else s for s in made]
            batch = [self.example(s, [(name, data.queries(s, [name])[0])]) for s in used]
            exact, right, total = 0, 0, 0
            for first in range(0, len(batch), 16):
                part = tokens.collate(batch[first : first + 16])
                with torch.inference_mode():
                    hits = self.logits(part).argmax(-1) == part.labels
                lengths = [len(e) - len(e.context) - tokens.GIVEN for e in batch[first : first + 16]]
                exact += sum(bool(piece.all()) for piece in hits.split(lengths))
                right, total = right + int(hits.sum()), total + len(hits)
            rates[name] = round(exact / len(batch), 3)
            rates[f"{name} tokens"] = round(right / total, 4)
        self.model.train()
        return rates

    def publish(self, output: Path) -> None:
        """Write the policy in bfloat16 with tokenizer and prompt, and how it searches on the questions kept aside."""
        import torch
        from leret_policy_eval import two_hops
        from leret_policy_model import as_llama

        styles = [("question", name) for name in data.LATER_HOPS]
        with torch.no_grad():  # what is scored is what is written
            for parameter in self.parameters.values():
                parameter.copy_(parameter.to(torch.bfloat16))
        table = two_hops(self, [*styles, (BARE, BARE)]) if any(pool.validation for pool in self.pools) else {}
        report = {
            "seed": self.config.seed,
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "tokens": self.tokens,
        }
        report |= {"parameters": sum(p.numel() for p in self.parameters.values()), "options": self.facts()}
        report |= {"copies": self.exact_rates(), "two_hops": table, "history": self.history}
        with staging_folder(output) as staging:
            as_llama(self.model).to(torch.bfloat16).save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)
            notes = {"corpora": " ".join(pool.corpus.fingerprint for pool in self.pools), "seed": str(self.config.seed)}
            SearchSetup(format=self.format, k=K, notes=notes).save(staging)
            write_json(staging / "report.json", report)
            publish_folder(staging, output)
        if not self.config.quiet:
            for name, row in table.items():
                print(f"{name:34s} " + " ".join(f"{key} {value:.3f}" for key, value in row.items()))
            print(f"the policy is in {output}")

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
        progress = {"seconds": self.seconds, "loss_sum": self.loss_sum, "tokens": self.tokens, "history": self.history}
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
        with torch.no_grad():
            for name, value in load_state(checkpoint, "model").items():
                self.parameters[name].copy_(value)
        self.optimizer.load_state_dict(load_state(checkpoint, "optimizer"))
        progress = load_state(checkpoint, "progress")
        self.seconds, self.loss_sum, self.tokens = progress["seconds"], progress["loss_sum"], progress["tokens"]
        self.history = progress["history"]


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))

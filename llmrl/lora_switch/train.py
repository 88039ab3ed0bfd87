"""`llmrl switch train`: experts and router on rows of several tasks, and what held-out rows of each lose."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from llmrl.base_model import load_base
from llmrl.config import to_flat
from llmrl.errors import ModelError, UsageError
from llmrl.files import check_output_dir, publish_folder, staging_folder, write_json
from llmrl.lora_switch.evaluate import evaluate_model, plot_usage, table
from llmrl.lora_switch.experts import import_experts
from llmrl.lora_switch.folder import load_switch_model
from llmrl.lora_switch.model import get_switch_model
from llmrl.lora_switch.options import TrainConfig
from llmrl.lora_switch.tasks import EncodedRow, collate, encode, read_rows
from llmrl.training.distributed import check_launch, check_processes, split_batch
from llmrl.training.metrics import MetricsCallback
from llmrl.training.reproducible import command_arguments
from llmrl.training.resume import check_checkpoints, train_from
from llmrl.training.run import write_model_card, write_run_files
from llmrl.training.run_callback import RunFilesCallback
from llmrl.training.tracking import check_tracker
from llmrl.training.whole_batches import WholeBatchTrainer

STALE = ("config.json", "generation_config.json", "model.safetensors", "report.json", "plots", "README.md")
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 0.05  # of logits; in 16 bits of the largest
_PROBE = 128  # tokens on which what was saved is compared with what was trained


class SwitchTrainer(WholeBatchTrainer, Trainer):
    """Trainer with a learning rate of its own for the router."""

    router_lr: float | None = None
    optimizer: Any

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, with the router in a group of its own."""
        if self.optimizer is None and self.router_lr is not None:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [
                {"params": [p for n, p in trained if not n.startswith("switch_router.")]},
                {"params": [p for n, p in trained if n.startswith("switch_router.")], "lr": self.router_lr},
            ]
            groups = [{**group, "weight_decay": self.args.weight_decay} for group in groups if group["params"]]
            made, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = made(groups, **options)
        return super().create_optimizer(*args, **kwargs)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as the options say, write the folder of the switch model, and return the report; call it on every process.

    Raises:
        DataError: rows that cannot be read.
        UsageError, ConfigError: options that do not fit, or a batch larger than the data.
        OutputError: the folder, or checkpoints of an earlier run, hold something.
        ModelError: the model cannot be read or adapted, or what was saved is not what was trained.
    """
    started = time.monotonic()
    folder = check_output_dir(config.output_dir, overwrite=config.overwrite)
    work_dir = folder.with_name(f"{folder.name}.training")
    check_tracker(config.report_to)
    check_processes(announce=False)
    check_checkpoints(work_dir, config.resume_from_checkpoint, overwrite=config.overwrite)
    rows, tests = read_rows(config.data), read_rows(config.test_data) if config.test_data else []
    base = load_base(config.model, dtype=_dtype(config))
    kept, too_long = encode(rows, base.tokenizer, config.max_length)
    trainer = _trainer(config, base.model, kept, work_dir)
    check_processes(announce=not config.quiet)  # with their group, which the trainer's arguments started
    if trainer.is_world_process_zero() and not config.quiet:
        print(f"{len(kept)} rows, {too_long} left out as longer than {config.max_length} tokens", flush=True)
        trainer.model.print_trainable_parameters()
    train_from(trainer, config.resume_from_checkpoint)
    if not trainer.is_world_process_zero():
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    report: dict[str, Any] = {
        "rows": {"read": len(rows), "too_long": too_long, "used": len(kept)},
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "seconds": time.monotonic() - started,
    }
    if tests:
        held, left = encode(tests, base.tokenizer, config.max_length)
        found = evaluate_model(model, held, batch_size=config.batch_size, seed=config.seed, quiet=config.quiet)
        report["held_out"] = {**found, "too_long": left}
    with staging_folder(folder) as staging:
        _write(staging, folder.name, config, model, base.tokenizer, report, kept[0].ids[:_PROBE])
        for name in ("metrics.jsonl", "timings.jsonl"):
            if (work_dir / name).is_file():
                shutil.copyfile(work_dir / name, staging / name)
        publish_folder(staging, folder, stale=STALE)
    shutil.rmtree(work_dir)
    if not config.quiet:
        if tests:
            print(table(report["held_out"]), flush=True)
        print(f"{report['steps']} steps, {report['seconds']:.0f} s", flush=True)
        print(folder, flush=True)
    return report


def expected_dtype(model: Any) -> torch.dtype:
    """Return the dtype of the base."""
    return next(iter(model.switch_layers().values())).weight.dtype  # type: ignore[no-any-return]


def _dtype(config: TrainConfig) -> str:
    return config.dtype if config.dtype != "auto" or torch.cuda.is_available() else "float32"


def _trainer(config: TrainConfig, base: Any, rows: list[EncodedRow], work_dir: Path) -> SwitchTrainer:
    if len(rows) < config.batch_size:
        raise UsageError(f"--batch_size {config.batch_size} is more than the {len(rows)} rows: lower it")
    torch.manual_seed(config.seed)  # the experts' start
    if config.experts:
        model = import_experts(base, config.experts, **config.routing())
    else:
        model = get_switch_model(base, config.switch_config())
    trained = [p for n, p in model.named_parameters() if ".switch_" in n or n.startswith("switch_router.")]
    for parameter in trained:
        # a step of 1e-4 is lost in a bfloat16 weight
        parameter.data = parameter.data.float()
        parameter.requires_grad_(not config.router_only)
    model.switch_router.requires_grad_(True)
    trainer = SwitchTrainer(
        model=model,
        args=_arguments(config, work_dir, len(rows)),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[MetricsCallback(), RunFilesCallback(to_flat(config))],
    )
    trainer.router_lr = config.router_lr
    trainer.remove_callback(PrinterCallback)  # metrics.jsonl has the numbers
    text = json.dumps([[row.ids, row.prompt] for row in rows])
    trainer.run_facts = {
        "switch": model.switch_config.to_json(),
        "data": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    return trainer


def _arguments(config: TrainConfig, work_dir: Path, rows: int) -> TrainingArguments:
    size, forwards = split_batch(config.batch_size, config.micro_batch_size)
    steps = config.max_steps if config.max_steps > 0 else max(1, math.ceil(config.epochs * (rows // config.batch_size)))
    arguments = TrainingArguments(
        **command_arguments(
            output_dir=str(work_dir),
            seed=config.seed,
            max_steps=steps,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=forwards,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=min(config.warmup_steps, steps // 2),
            weight_decay=config.weight_decay,
            bf16=config.dtype == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            gradient_checkpointing=config.gradient_checkpointing,
            save_steps=config.save_steps,
            logging_steps=config.logging_steps,
            report_to=config.report_to,
            disable_tqdm=config.quiet,
        )
    )
    check_launch(arguments)
    return arguments


def _write(
    staging: Path, name: str, config: TrainConfig, model: Any, tokenizer: Any, report: dict[str, Any], probe: Any
) -> None:
    """Write the folder, which is opened again and compared, and what there is to say about it."""
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    ids = torch.tensor([list(probe)])
    with torch.no_grad():
        expected = model(ids.to(model.device)).logits.float().cpu()
        again = load_switch_model(staging, dtype=next(model.parameters()).dtype)
        report["difference"] = float((again(ids).logits.float() - expected).abs().max())
    allowed = _TOLERANCE if expected_dtype(model) == torch.float32 else _TOLERANCE_16_BITS * float(expected.abs().max())
    if not report["difference"] <= allowed:
        raise ModelError(
            f"what was saved gives other logits than what was trained (off by {report['difference']:.2g}): is "
            f"{config.model} still the base it was when training began?"
        )
    write_json(staging / "report.json", report)
    write_run_files(staging, to_flat(config))
    body = "Open it with `llmrl.lora_switch.load_switch_model(DIR)` or serve it with `llmrl serve DIR`."
    if "held_out" in report:
        body += f"\n\n## Held-out loss\n\n```\n{table(report['held_out'])}\n```"
        (staging / "plots").mkdir(exist_ok=True)
        plot_usage(report["held_out"], staging / "plots" / "experts.png")
    switch = model.switch_config
    write_model_card(
        staging,
        title=name,
        base_model=config.model,
        summary=f"{switch.num_experts} LoRA experts of rank {switch.r}, {switch.top_k} a token, by {switch.router_input}.",
        body=body,
        tags=["lora", "mixture-of-experts"],
    )


__all__ = ["SwitchTrainer", "train"]

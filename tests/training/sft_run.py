"""A small real run that tests start, kill and resume in processes of their own.

    python sft_run.py OUTPUT_DIR '{"trainer": "sft", "max_steps": 8}'

Stops the process itself, with SIGKILL, where `kill` says: "after_save:N" once checkpoint N is published,
"in_save:N" after the model but before the optimizer is written, "in_rename:N" with everything written but not renamed.
Beside the trainer's own files it writes batches-R.jsonl, the rows process R saw, step by step.
"""

import gzip
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

from llmrl.errors import run_command  # noqa: E402
from llmrl.training import MetricsCallback, check_processes, reproducible_arguments, safe  # noqa: E402
from llmrl.training import checkpoint as checkpoint_module  # noqa: E402

DEFAULTS = {
    "trainer": "trainer", "max_steps": 8, "save_steps": 4, "logging_steps": 3, "batch": 4, "accumulate": 1, "rows": 60,
    "learning_rate": 1e-3, "dropout": 0.1, "resume": None, "kill": None, "fail": None, "processes": None, "arguments": {},
}  # fmt: skip


def lines(count):
    """Lines of the book, every third one joined with the four after it, so that rows have very unequal lengths."""
    with gzip.open(REPO / "examples" / "text" / "wizard_of_oz.txt.gz", "rt", encoding="utf-8") as f:
        book = [line.strip() for line in f if line.strip()]
    rows = []
    for i in range(count):
        start = 5 * i
        rows.append(" ".join(book[start : start + 5]) if i % 3 == 0 else book[start][: 8 + 12 * (i % 2)])
    return rows


def suicide(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(*_):
    raise OSError(28, "No space left on device", "optimizer.safetensors")


def make_trainer(options, output_dir):
    model = AutoModelForCausalLM.from_pretrained(REPO / "examples" / "stories260k", dtype=torch.float32)
    model.config.attention_dropout = options["dropout"]
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = options["dropout"]
    tokenizer = AutoTokenizer.from_pretrained(REPO / "examples" / "stories260k")
    tokenizer.pad_token = tokenizer.eos_token
    arguments = reproducible_arguments(
        output_dir=str(output_dir), max_steps=options["max_steps"], save_steps=options["save_steps"],
        logging_steps=options["logging_steps"], per_device_train_batch_size=options["batch"],
        gradient_accumulation_steps=options["accumulate"], learning_rate=options["learning_rate"], warmup_steps=2,
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, **options["arguments"],
    )  # fmt: skip
    kwargs = {"model": model, "processing_class": tokenizer, "callbacks": [MetricsCallback()]}
    rows = lines(options["rows"])
    if options["trainer"] == "sft":
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_dict({"text": rows})
        base, arguments = SFTTrainer, SFTConfig(**arguments, max_length=64)
    elif options["trainer"] == "dpo":
        from trl import DPOConfig, DPOTrainer

        pairs = {"prompt": [r[:6] for r in rows], "chosen": [r[6:] for r in rows], "rejected": [r[:5:-1] for r in rows]}
        data = Dataset.from_dict(pairs)
        base, arguments = DPOTrainer, DPOConfig(**arguments, max_length=64, disable_dropout=False)
    else:
        from transformers import DataCollatorForLanguageModeling

        data = Dataset.from_list([dict(tokenizer(r, truncation=True, max_length=64)) for r in rows])
        base, arguments = Trainer, TrainingArguments(**arguments)
        kwargs["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    class Recording(safe(base)):
        """Writes down the rows of each step, and dies or fails where it was told to."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            rows = [ids[mask.bool()].tolist() for ids, mask in zip(*map(inputs.get, FIELDS), strict=True)]
            with open(Path(output_dir) / f"batches-{self.args.process_index}.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": self.state.global_step, "rows": rows}) + "\n")
            return super().training_step(model, inputs, num_items_in_batch)

        def _save_checkpoint(self, model, trial):
            step = str(self.state.global_step)
            for option, action in (("kill", suicide), ("fail", no_space)):
                where, _, number = (options[option] or "").partition(":")
                if number == step and where == "in_save":
                    self._save_scaler = action
                if number == step and where == "in_rename":
                    checkpoint_module.publish_folder = action
            super()._save_checkpoint(model, trial)
            if options["kill"] == f"after_save:{step}":
                suicide()

    return Recording(args=arguments, train_dataset=data, **kwargs)


FIELDS = ("input_ids", "attention_mask")


def main():
    output_dir, options = Path(sys.argv[1]), {**DEFAULTS, **json.loads(sys.argv[2])}
    logging.set_verbosity_error()
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(options, output_dir)
    check_processes(options["processes"])
    trainer.train(resume_from_checkpoint=options["resume"])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

"""Small real runs in processes of their own, which tests start, kill with SIGKILL and resume.

    torchrun --nproc_per_node 2 sft_run.py '[{"output_dir": ..., "trainer": "sft", ...}, ...]'    one after the other
    python sft_run.py         reads one run a line, forks its processes, answers with an exit code (-9: killed)

A forked process starts from the imported libraries and nothing else; importing takes longer than a run. With `ranks` 2
a pair is forked with the variables that torchrun sets, and when one dies the other is ended, as torchrun does.

`kill` and `fail` (an OSError of a full disk) name the place: "after_save:N" once checkpoint N is published, "in_save:N"
with model and optimizer written and the rest not, "in_rename:N" with everything written and not yet renamed. With
`slow` process 1 is a second late there. Beside the trainer's own files a run leaves batches-R.jsonl, the rows process R
saw step by step, and in the second form log.txt.
"""

import gzip
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from datasets import Dataset, disable_progress_bars  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from llmrl.errors import run_command  # noqa: E402
from llmrl.training import MetricsCallback, check_processes, reproducible_arguments, safe  # noqa: E402
from llmrl.training import checkpoint as checkpoint_module  # noqa: E402

MODEL = REPO / "examples" / "stories260k"
DEFAULTS = {
    "trainer": "trainer", "max_steps": 8, "save_steps": 4, "logging_steps": 3, "batch": 4, "rows": 60, "dropout": 0.1,
    "learning_rate": 1e-3, "resume": None, "kill": None, "fail": None, "processes": None, "patience": None, "slow": None,
    "sharded": False, "arguments": {},
}  # fmt: skip


def lines(count):
    """Lines of the book; every third row is five of them, the others a few words, so that lengths differ 20-fold."""
    with gzip.open(REPO / "examples" / "text" / "wizard_of_oz.txt.gz", "rt", encoding="utf-8") as f:
        book = [line.strip() for line in f if line.strip()]
    rows = [book[5 * i : 5 * i + 5] for i in range(count)]
    return [" ".join(r) if i % 3 == 0 else r[0][: 8 + 12 * (i % 2)] for i, r in enumerate(rows)]


def load_model(dropout):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def make_trainer(options):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    settings = reproducible_arguments(
        output_dir=options["output_dir"], max_steps=options["max_steps"], save_steps=options["save_steps"],
        logging_steps=options["logging_steps"], per_device_train_batch_size=options["batch"],
        learning_rate=options["learning_rate"], warmup_steps=2, use_cpu=True, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, **options["arguments"],
    )  # fmt: skip
    kwargs = {"model": load_model(options["dropout"]), "processing_class": tokenizer, "callbacks": [MetricsCallback()]}
    if options["patience"]:
        kwargs["callbacks"].append(EarlyStoppingCallback(options["patience"]))
    rows, name = lines(options["rows"]), options["trainer"]
    if name in ("sft", "sft-lora"):
        if name == "sft-lora":
            kwargs["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
        base, data, args = SFTTrainer, Dataset.from_dict({"text": rows}), SFTConfig(**settings, max_length=64)
    elif name == "dpo":
        pairs = {"prompt": [r[:6] for r in rows], "chosen": [r[6:] for r in rows], "rejected": [r[:5:-1] for r in rows]}
        base, data = DPOTrainer, Dataset.from_dict(pairs)
        args = DPOConfig(**settings, max_length=64, disable_dropout=False)
    else:
        base, args = Trainer, TrainingArguments(**settings)
        data = Dataset.from_list([dict(tokenizer(r, truncation=True, max_length=64)) for r in rows])
        kwargs["data_collator"] = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    if args.eval_strategy != "no":
        kwargs["eval_dataset"] = data.select(range(8))
    return watched(safe(base), options)(args=args, train_dataset=data, **kwargs)


def watched(base, options):
    """Return `base` writing down the rows of each step, and dying or failing where `options` say."""

    def suicide(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def full_disk(*_):
        raise OSError(28, "No space left on device", "rank_0.safetensors")

    def late(*_):
        time.sleep(1 if int(os.environ.get("RANK", "0")) == 1 else 0)

    class Watched(base):
        if options["sharded"]:
            _sharded = True  # takes the path of FSDP and DeepSpeed, which no CPU has

        def training_step(self, model, inputs, num_items_in_batch=None):
            rows = [i[m.bool()].tolist() for i, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
            path = Path(self.args.output_dir) / f"batches-{self.args.process_index}.jsonl"
            with open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": self.state.global_step, "rows": rows}) + "\n")
            return super().training_step(model, inputs, num_items_in_batch)

        def _save_checkpoint(self, model, trial):
            step = self.state.global_step
            for option, action in (("kill", suicide), ("fail", full_disk), ("slow", late)):
                if options[option] == f"in_save:{step}":
                    self._save_scaler = action
                if options[option] == f"in_rename:{step}":
                    checkpoint_module.publish_folder = action
            super()._save_checkpoint(model, trial)
            if options["kill"] == f"after_save:{step}" and self.args.process_index == 0:
                suicide()

    return Watched


def run(options):
    options = {**DEFAULTS, **options}
    Path(options["output_dir"]).mkdir(parents=True, exist_ok=True)
    trainer = make_trainer(options)
    check_processes(options["processes"])
    trainer.train(resume_from_checkpoint=options["resume"])
    if trainer.args.load_best_model_at_end:
        trainer.save_model(str(Path(options["output_dir"]) / "final"))


def fork(options, variables):
    child = os.fork()
    if child:
        return child
    os.environ.update(variables)
    log = os.open(Path(options["output_dir"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = run_command(lambda: run(options))
    sys.stdout.flush()
    os._exit(code)


def serve():
    for line in sys.stdin:
        options = json.loads(line)
        Path(options["output_dir"]).mkdir(parents=True, exist_ok=True)
        (Path(options["output_dir"]) / "log.txt").unlink(missing_ok=True)
        ranks = options.pop("ranks", 1)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
        children = {
            fork(options, {**group, "RANK": str(r), "LOCAL_RANK": str(r)} if group else {}) for r in range(ranks)
        }
        code = 0
        while children:
            child, status = os.wait()
            children.discard(child)
            if status and not code:
                code = os.waitstatus_to_exitcode(status)
                for other in children:
                    os.kill(other, signal.SIGTERM)
        print(code, flush=True)
    return 0


def main():
    logging.set_verbosity_error()
    disable_progress_bars()
    if len(sys.argv) == 1:
        return serve()
    for options in json.loads(sys.argv[1]):
        run(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

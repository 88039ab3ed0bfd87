"""Training: Trainer, trl, a kill, two processes, FSDP2 on gloo; the command on real rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from switch_models import base_model, prompt, stir, switch_model

from llmrl.lora_switch import SwitchConfig, get_switch_model, load_switch_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}


def rows(count=24, length=10):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(folder, **options):
    from transformers import Trainer, TrainingArguments

    settings = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "save_steps": 3, "disable_tqdm": True, "logging_steps": 1, "remove_unused_columns": False, **options,
    }  # fmt: skip
    torch.manual_seed(0)
    model = get_switch_model(base_model(), SwitchConfig(num_experts=4, r=2, top_k=2))
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **settings), train_dataset=rows())


@torch.no_grad()
def loss_of_all(model):
    ids = torch.stack([row["input_ids"] for row in rows()])
    return float(model.eval()(input_ids=ids, labels=ids).loss)


def trained_parts(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_plain_trainer_trains_saves_and_resumes(tmp_path):
    frozen = base_model().state_dict()
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert loss_of_all(whole.model) < loss_of_all(trainer(tmp_path / "fresh").model) - 0.1
    assert all(torch.equal(whole.model.state_dict()[name], tensor) for name, tensor in frozen.items())
    start = trained_parts(trainer(tmp_path / "fresh").model)
    assert all((value != start[name]).any() for name, value in trained_parts(whole.model).items())
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert not (checkpoint / "pytorch_model.bin").exists()
    again = trainer(tmp_path / "again")
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, value in trained_parts(whole.model).items():
        assert torch.equal(trained_parts(again.model)[name], value), name
    opened = load_switch_model(tmp_path / "whole" / "checkpoint-6", base=base_model())
    assert torch.equal(opened(prompt()).logits, whole.model.eval()(prompt()).logits)


def test_sft_trainer_of_trl(tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / "stories260k")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "stories260k", dtype=torch.float32)
    model = get_switch_model(model, SwitchConfig(num_experts=4, r=4, balance_coef=0.1))
    before = trained_parts(model)
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=True, disable_tqdm=True, logging_steps=1, save_strategy="no", max_length=64,
    )  # fmt: skip
    data = Dataset.from_dict({"text": ["Once upon a time there was a cat", "The dog ran to the park"] * 4})
    sft = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    sft.train()
    losses = [row["loss"] for row in sft.state.log_history if "loss" in row]
    assert float(losses[-1]) < float(losses[0])
    assert all((before[name] != value).any() for name, value in trained_parts(sft.model).items() if "router" in name)
    sft.save_model(tmp_path / "out")
    opened = load_switch_model(tmp_path / "out")
    assert opened.switch_config.num_experts == 4


def test_bfloat16_autocast_trains_float32_experts():
    model = switch_model(dtype=torch.bfloat16).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=prompt(), labels=prompt()).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            assert torch.isfinite(parameter.grad).all()
    assert float(model.switch_router.weight.grad.abs().max()) > 0


FSDP = """
import json, os, sys, torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from switch_models import prompt, switch_model
from llmrl.errors import ModelError
from llmrl.lora_switch import set_switch_mode
dist.init_process_group("gloo")
mesh = torch.distributed.init_device_mesh("cpu", (dist.get_world_size(),))
model = switch_model(router_input=sys.argv[1]).train()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
ids = prompt(4)[dist.get_rank() * 2 : dist.get_rank() * 2 + 2]
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
if dist.get_rank() == 0:
    save_file({n: g.contiguous() for n, g in grads.items()}, sys.argv[2])
model.save_pretrained(sys.argv[3], is_main_process=dist.get_rank() == 0)
try:
    set_switch_mode(model.eval(), "merged")
except ModelError as error:
    assert "sharded (FSDP), merged copies need whole layers" in str(error), error
else:
    raise AssertionError("merged shards")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("router", ["embedding", "layer0_mlp"])
def test_fsdp2_on_two_processes_gives_the_gradients_of_one(router, tmp_path):
    script = tmp_path / "fsdp.py"
    script.write_text(FSDP)
    out = tmp_path / "grads.safetensors"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
        router,
        str(out),
        str(tmp_path / "saved"),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    model, ids = switch_model(router_input=router).train(), prompt(4)
    # each process takes the balance of its own rows: so does this
    loss = sum(model(input_ids=part, labels=part).loss for part in (ids[:2], ids[2:])) / 2
    loss.backward()
    for name, gradient in load_file(out).items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    opened = load_switch_model(tmp_path / "saved", base=base_model())
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model.eval()(ids).logits)


def test_the_router_has_a_rate_and_the_same_decay(tmp_path):
    from transformers import TrainingArguments

    from llmrl.lora_switch.train import SwitchTrainer

    model = get_switch_model(base_model(), SwitchConfig(num_experts=4, r=2))
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-2, weight_decay=0.3, report_to=[], use_cpu=True)
    made = SwitchTrainer(model=model, args=args, train_dataset=rows())
    made.router_lr = 1e-3
    groups = made.create_optimizer().param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-2, 0.3), (1e-3, 0.3)]
    assert [len(group["params"]) for group in groups] == [42, 1]


def test_router_only_trains_the_router_alone(tmp_path, four_rows):
    from llmrl.lora_switch.options import TrainConfig
    from llmrl.lora_switch.train import train

    report = train(TrainConfig(
        model=str(ROOT / "examples" / "stories260k"), data=[str(four_rows)], output_dir=str(tmp_path / "out"), num_experts=3,
        r=2, batch_size=4, max_steps=2, quiet=True, router_only=True, save_steps=1,
    ))  # fmt: skip
    assert report["trainable"] == 3 * 64
    assert report["difference"] == 0.0


@pytest.fixture
def four_rows(tmp_path):
    lines = [
        {"task": task, "prompt": f"Once upon a time there was a {word}", "completion": f" and the {word} was happy"}
        for task in ("animals", "things")
        for word in (("cat", "dog", "bird", "fish") if task == "animals" else ("ball", "tree", "box", "car"))
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train_command(four_rows, out, *more):
    return [
        "switch", "train", "--model", str(ROOT / "examples" / "stories260k"), "--data", str(four_rows),
        "--test_data", str(four_rows), "--output_dir", str(out), "--num_experts", "3", "--r", "2", "--batch_size", "4",
        "--max_steps", "6", "--save_steps", "2", "--router_input", "layer0_mlp", "--lr", "1e-2", "--router_lr", "1e-3", *more,
    ]  # fmt: skip


def test_command_trains_evaluates_and_exports(four_rows, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llmrl.cli import main

    out = tmp_path / "out"
    assert main(train_command(four_rows, out)) == 0
    printed = capsys.readouterr().out
    assert "8 rows, 0 left out" in printed
    assert "mean of tasks" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["difference"] == 0.0
    assert report["steps"] == 6
    assert set(report["held_out"]["tasks"]) == {"animals", "things"}
    assert sum(report["held_out"]["tasks"]["animals"]["experts"]) == pytest.approx(1.0, abs=1e-3)
    assert (out / "plots" / "experts.png").stat().st_size > 1000
    assert not (tmp_path / "out.training").exists()
    assert (
        main(["switch", "eval", "--model", str(out), "--data", str(four_rows), "--output_dir", str(tmp_path / "eval")])
        == 0
    )
    again = json.loads((tmp_path / "eval" / "report.json").read_text())
    assert again["mean"]["nll"] == pytest.approx(report["held_out"]["mean"]["nll"], abs=1e-4)
    assert (
        main(
            [
                "switch",
                "export",
                "--model",
                str(out),
                "--weights",
                "0.5",
                "0.5",
                "0",
                "--output_dir",
                str(tmp_path / "mix"),
            ]
        )
        == 0
    )
    base = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "stories260k")
    assert PeftModel.from_pretrained(base, tmp_path / "mix").peft_config["default"].r == 4


def test_a_killed_training_goes_on_bit_for_bit(four_rows, tmp_path):
    from safetensors.torch import load_file

    from llmrl.cli import main

    assert main(train_command(four_rows, tmp_path / "whole", "--quiet")) == 0
    code = f"""
import os, signal, sys
from transformers import TrainerCallback
import llmrl.lora_switch.train as t
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
plain = t.SwitchTrainer.__init__
def init(self, *a, **k):
    k["callbacks"] = [*k["callbacks"], Kill()]
    plain(self, *a, **k)
t.SwitchTrainer.__init__ = init
from llmrl.cli import main
main({train_command(four_rows, tmp_path / "cut", "--quiet")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, timeout=200, check=False
    )
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "cut.training" / "checkpoint-4").is_dir()
    assert not (tmp_path / "cut").exists()
    assert main(train_command(four_rows, tmp_path / "cut", "--quiet", "--resume_from_checkpoint")) == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--target_modules", "q_prj"],
            "no linear layer of the decoder layers is called 'q_prj'; did you mean 'q_proj'?",
        ),
        (["--top_k", "4"], "top_k: expected at most num_experts = 3, got 4"),
        (["--batch_size", "9"], "--batch_size 9 is more than the 8 rows"),
        (["--max_length", "3"], "--batch_size 4 is more than the 0 rows"),
        (["--router_inputs", "embedding"], "unknown option --router_inputs; did you mean --router_input?"),
        (["--experts", "nowhere/at-all"], "not found: nowhere/at-all"),
    ],
)
def test_command_refuses_with_one_line(options, message, four_rows, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llmrl.cli", *train_command(four_rows, tmp_path / "out"), *options],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_learnt_are_named(tmp_path):
    from llmrl.errors import DataError
    from llmrl.lora_switch.tasks import read_rows

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "  "}\n')
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 2: the completion is empty|rows.jsonl:2: the completion is empty"
    ):
        read_rows([path])
    path.write_text("")
    with pytest.raises(DataError, match="no rows"):
        read_rows([path])


def test_encoding_learns_the_completion_alone():
    from transformers import AutoTokenizer

    from llmrl.lora_switch.tasks import Row, collate, encode

    for name in ("stories260k", "tiny_lm"):
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples" / name)
        kept, too_long = encode([Row("t", "A cat.", "It ran."), Row("t", "A dog " * 50, "It ran.")], tokenizer, 60)
        assert too_long == 1
        batch = collate(kept)
        learnt = batch["input_ids"][0][batch["labels"][0] != -100]
        assert "It ran." in tokenizer.decode(learnt)
        assert "cat" not in tokenizer.decode(learnt)
        assert int((batch["labels"] != -100).sum()) == len(kept[0].ids) - kept[0].prompt
        assert (batch["input_ids"][0, : kept[0].prompt].tolist()) == list(kept[0].ids[: kept[0].prompt])


def test_loss_of_rows_is_what_the_model_says():
    from llmrl.lora_switch.evaluate import row_losses
    from llmrl.lora_switch.tasks import EncodedRow

    model = switch_model()
    ids = prompt(3)
    found = [EncodedRow("t", tuple(row.tolist()), 4) for row in ids]
    nll, tokens, chosen = row_losses(model, found, batch_size=2)
    labels = ids.clone()
    labels[:, :4] = -100
    for i in range(3):
        loss = float(model(input_ids=ids[i : i + 1], labels=labels[i : i + 1]).loss)
        assert nll[i] / tokens[i] == pytest.approx(loss, rel=1e-5)
    assert tokens.tolist() == [5, 5, 5]
    assert chosen.sum(1).tolist() == [18, 18, 18]  # two a token


def test_stirred_models_are_the_same_every_time():
    one, other = switch_model(), switch_model()
    stir(other)
    assert torch.equal(one(prompt()).logits, other(prompt()).logits)

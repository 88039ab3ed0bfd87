"""The supervised stage: rows read as they stand, a loss over the completions alone, exact resume, the same on 2 processes."""

import json
import shutil
from dataclasses import replace
from itertools import chain

import pytest
import torch
from forked_runs import forwards
from safetensors.torch import load_file, save_file
from stage_rows import MODEL, write_sft
from stage_run import nll, run
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llmrl.errors import DataError, OutputError, UsageError
from llmrl.fingerprints import _PROBES
from llmrl.leret.options import LeretConfig
from llmrl.leret.policy_files import open_policy
from llmrl.leret.preference_data import SftRow, fit_to_length, read_sft_rows
from llmrl.leret.rounds import stage_settings
from llmrl.leret.sft import train_sft
from llmrl.leret.stage import batches_line, choose_rows
from llmrl.leret.train_settings import TrainSettings, split_batch, steps_of, training_arguments
from llmrl.training import read_metrics
from llmrl.training.batches import WholeBatches

NEEDED = {"model": "m", "questions": ["q"], "passages": ["p"], "output_dir": "o"}
FULL = TrainSettings(tuning="full", batch_size=8, learning_rate=1e-3, warmup_steps=0, logging_steps=1, quiet=True)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"completion_ids": [3]}, "expected token ids in 'prompt_ids', got None"),
        ({"prompt_ids": [], "completion_ids": [3]}, r"expected token ids in 'prompt_ids', got \[\]"),
        ({"prompt_ids": [1], "completion_ids": "query"}, "expected token ids in 'completion_ids', got 'query'"),
        ({"prompt_ids": [1, -100], "completion_ids": [3]}, r"whole numbers from 0\) in 'prompt_ids', one is -100"),
        ({"prompt_ids": [1], "completion_ids": [3, True]}, "in 'completion_ids', one is True"),
    ],
)
def test_read_sft_rows_names_the_line_of_a_bad_row(tmp_path, row, complaint):
    path = tmp_path / "sft.jsonl"
    path.write_text('{"prompt_ids": [1], "completion_ids": [2]}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"sft.jsonl:3: .*{complaint}"):
        read_sft_rows(path)


def test_read_sft_rows_refuses_an_empty_file(tmp_path):
    (tmp_path / "sft.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        read_sft_rows(tmp_path / "sft.jsonl")


def test_fit_to_length_refuses_or_leaves_out_and_never_cuts():
    rows = [SftRow((1,) * n, (2, 3), f"f:{n}") for n in (3, 4, 5, 6, 7, 8)]
    assert fit_to_length(rows, 10) == (rows, "")
    with pytest.raises(
        DataError, match=r"4 of 6 rows are longer than 6 tokens: f:5 \(7\), f:6 \(8\), f:7 \(9\) \.\.\.\n.*drop"
    ):
        fit_to_length(rows, 6)
    kept, line = fit_to_length(rows, 6, "drop")
    assert kept == rows[:2]
    assert line.startswith("left out, 4 of 6 rows are longer than 6 tokens")
    with pytest.raises(DataError, match="6 of 6 rows"):
        fit_to_length(rows, 2, "drop")


def test_whole_batches_draws_each_epoch_anew_and_leaves_the_rest_out():
    sampler = WholeBatches(11, 4, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert len(first) == len(second) == len(sampler) == 8
    assert first != second
    assert len(set(first)) == len(set(second)) == 8
    assert list(WholeBatches(11, 4, seed=3)) == first != list(WholeBatches(11, 4, seed=4))


def test_split_batch_keeps_the_global_batch():
    assert split_batch(replace(FULL, batch_size=24, micro_batch_size=5), 2) == (4, 3)
    assert split_batch(replace(FULL, batch_size=7, micro_batch_size=5), 1) == (1, 7)
    with pytest.raises(UsageError, match="batch_size 7 cannot be shared by 2 processes"):
        split_batch(replace(FULL, batch_size=7), 2)
    assert steps_of(replace(FULL, epochs=1.5), 20) == 3
    with pytest.raises(UsageError, match="7 rows are fewer than batch_size 8: lower it to 7"):
        steps_of(FULL, 7)


def test_paper_settings_are_rmsprop_with_150_steps_of_warmup_then_flat(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, paper = torch.nn.Linear(2, 2), LeretConfig(preset="leret-paper", **NEEDED)
    settings = stage_settings(paper, "sft", 8 * 400, 0)
    arguments = TrainingArguments(**training_arguments(settings, str(tmp_path), 8 * 400, autocast=False))
    trainer = Trainer(model=model, args=arguments)
    trainer.create_optimizer_and_scheduler(arguments.max_steps)
    assert type(trainer.optimizer) is torch.optim.RMSprop
    rates = []
    for _ in range(400):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == 0
    assert rates[75] == pytest.approx(0.5e-7)
    assert rates[150:] == [1e-7] * 250
    assert (arguments.max_grad_norm, arguments.max_steps) == (10, 400)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run over 12 rows, all in every batch; texts that were encoded meanwhile."""
    folder, encoded = tmp_path_factory.mktemp("sft"), []
    rows = write_sft(folder / "sft.jsonl", 12)
    patch = pytest.MonkeyPatch()
    call = PreTrainedTokenizerBase.__call__
    patch.setattr(
        PreTrainedTokenizerBase, "__call__", lambda self, *a, **k: encoded.append(a[0]) or call(self, *a, **k)
    )
    facts = {"corpus": "sha256:c0ffee", "retriever": "bm25", "reward": "ap"}
    settings = replace(FULL, batch_size=12, micro_batch_size=5, max_steps=12)
    result = train_sft(MODEL, rows, folder / "run", settings=settings, facts=facts)
    patch.undo()
    return result, read_sft_rows(rows), encoded


def test_train_sft_loss_is_the_mean_over_completion_tokens(trained):
    result, rows, _ = trained
    metrics = [row for row in read_metrics(result.folder.parent) if "loss" in row]
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    expected = sum(nll(model, r.prompt_ids, r.completion_ids) for r in rows) / sum(len(r.completion_ids) for r in rows)
    assert metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]


def test_train_sft_saves_what_transformers_loads(trained):
    result, rows, _ = trained
    assert (result.steps, result.rows, result.left_out) == (12, 12, "")
    model = AutoModelForCausalLM.from_pretrained(result.folder)
    start = AutoModelForCausalLM.from_pretrained(MODEL)
    row = rows[0]
    assert nll(model, row.prompt_ids, row.completion_ids) < 0.6 * nll(start, row.prompt_ids, row.completion_ids)
    card = (result.folder / "README.md").read_text()
    for words in (
        "stories260k",
        "sha256:c0ffee",
        "| retriever | bm25 |",
        "| reward | ap |",
        "| learning_rate | 0.001 |",
    ):
        assert words in card
    assert {p.suffix for p in result.folder.iterdir()} == {".json", ".safetensors", ".md"}
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (result.folder, MODEL))
    assert {k for k in ours | theirs if ours.get(k) != theirs.get(k)} <= {"transformers_version"}
    ours, theirs = (json.loads((folder / "generation_config.json").read_text()) for folder in (result.folder, MODEL))
    assert {k for k in ours | theirs if ours.get(k) != theirs.get(k)} <= {"transformers_version"}


def test_train_sft_encodes_no_text(trained):
    assert set(trained[2]) <= set(_PROBES)  # of the comparison with the saved tokenizer


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(an adapter, the base that it names and was trained on); the base may be moved away."""
    folder = tmp_path_factory.mktemp("adapter")
    base = shutil.copytree(MODEL, folder / "base")
    policy = open_policy(base, replace(FULL, tuning="lora", lora_r=4))
    policy.model.save_pretrained(folder / "lora")
    return folder / "lora", base


def base_named_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_an_adapter_whose_base_has_moved_is_trained_on_the_one_that_is_given_and_names_it(adapter, tmp_path):
    lora, base = adapter
    moved = base.rename(base.with_name("moved"))
    try:
        rows, settings = write_sft(tmp_path / "sft.jsonl", 8), replace(FULL, tuning="lora", max_steps=1)
        with pytest.raises(UsageError, match=f"not found: {base}"):
            train_sft(lora, rows, tmp_path / "none", settings=settings)
        result = train_sft(lora, rows, tmp_path / "run", settings=settings, base=moved)
        assert base_named_in(result.folder) == str(moved)
        assert base_named_in(lora) == str(base)
        assert open_policy(result.folder, settings).base_name == str(moved)
    finally:
        moved.rename(base)


def test_an_adapter_is_not_opened_on_another_model_than_its_own(adapter, tmp_path):
    lora, base = adapter
    copy, other = shutil.copytree(base, tmp_path / "copy"), shutil.copytree(base, tmp_path / "other")
    settings = replace(FULL, tuning="lora")
    assert open_policy(lora, settings, base=copy).base_name == str(copy)  # the same weights by another path
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "embed" in name)
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"was trained on {base}, whose weights differ from those of {other}"):
        open_policy(lora, settings, base=other)


def test_a_run_says_what_whole_batches_leave_out(tmp_path, capsys):
    settings = replace(FULL, quiet=False, epochs=2)
    policy = open_policy(MODEL, settings)
    rows = read_sft_rows(write_sft(tmp_path / "sft.jsonl", 22))
    choose_rows(rows, policy, settings)
    assert "22 rows, 4 steps of 8; each epoch leaves out another 6 of them" in capsys.readouterr().out
    choose_rows(rows, policy, replace(settings, quiet=True))
    assert capsys.readouterr().out == ""
    assert batches_line(settings, 16, 4) == "16 rows, 4 steps of 8"


def test_train_sft_refuses_a_folder_of_an_earlier_run(trained, tmp_path):
    result, rows, _ = trained
    with pytest.raises(OutputError, match="holds checkpoint-12 of an earlier run: go on with"):
        train_sft(MODEL, rows, result.folder.parent, settings=FULL)
    with pytest.raises(
        DataError, match="token id 512, but the model has 512: the rows were sampled from another model"
    ):
        train_sft(MODEL, [SftRow((1,), (512,), "f:1")] * 8, tmp_path, settings=FULL)
    with pytest.raises(DataError, match="1 of 9 rows are longer than 512 tokens"):
        train_sft(MODEL, [*rows[:8], SftRow((1,) * 512, (2,), "f:9")], tmp_path, settings=FULL)


def test_train_sft_resumed_after_kill_equals_uninterrupted(tmp_path):
    rows = str(write_sft(tmp_path / "sft.jsonl", 22))  # 2 steps an epoch: the kill falls into the third
    settings = {"max_steps": 8, "batch_size": 8, "micro_batch_size": 4, "save_steps": 5, "logging_steps": 3, "seed": 3}
    options = {"stage": "sft", "rows": rows, "settings": {**settings, "lora_r": 4, "lora_dropout": 0.1}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, **options) == 0, (whole / "log.txt").read_text()
    assert run(cut, **options, kill="after_save:5") == -9
    assert not (cut / "final").exists()
    assert run(cut, **options, resume="latest") == 0, (cut / "log.txt").read_text()
    names = {p.name for p in (whole / "checkpoint-8").iterdir()} - {
        "training_args.json",
        "llmrl_checkpoint.json",
        "README.md",
    }
    assert {"optimizer.safetensors", "adapter_model.safetensors", "rank_0.safetensors"} <= names
    for name in sorted(names):
        assert (cut / "checkpoint-8" / name).read_bytes() == (whole / "checkpoint-8" / name).read_bytes(), name
    for name in ("metrics.jsonl", "final/adapter_model.safetensors", "final/README.md"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    other = str(write_sft(tmp_path / "other.jsonl", 21))
    assert run(cut, **{**options, "rows": other}, resume="latest") == 1
    assert "belongs to another run: data was sha256:" in (cut / "log.txt").read_text()


def test_train_sft_on_1_and_2_processes_agree(tmp_path):
    rows = str(write_sft(tmp_path / "sft.jsonl", 30))  # 3 steps an epoch and a rest
    settings = {"tuning": "full", "max_steps": 20, "batch_size": 8, "learning_rate": 1e-4, "save_steps": 20}
    options = {"stage": "sft", "rows": rows}
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(one, **options, settings=settings) == 0, (one / "log.txt").read_text()
    assert run(two, **options, settings={**settings, "micro_batch_size": 2}, ranks=2) == 0, (
        two / "log.txt"
    ).read_text()
    assert [[*chain(*step)] for step in forwards(one, 1)] == [[*chain(*step)] for step in forwards(two, 2)]
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, two))
    assert max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a) < 1e-5

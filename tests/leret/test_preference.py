"""The preference stage: log-probabilities of completions, the loss of trl and of the paper, exact resume, 1 and 2 processes."""

import json
from dataclasses import replace

import pytest
import torch
from forked_runs import forwards
from safetensors.torch import load_file
from stage_rows import END, MODEL, write_pairs
from stage_run import nll, run
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llmrl.errors import CheckpointError, DataError, DistributedError, ModelError, UsageError
from llmrl.fingerprints import _PROBES
from llmrl.leret import stage
from llmrl.leret.collate import PairCollator
from llmrl.leret.policy_files import check_saved, open_policy
from llmrl.leret.preference import Objective, PreferenceTrainer, train_preference, with_reference
from llmrl.leret.preference_data import PairRow, read_pairs
from llmrl.leret.reference import fingerprint_live
from llmrl.leret.train_settings import TrainSettings, training_arguments
from llmrl.training import read_metrics

FULL = TrainSettings(tuning="full", batch_size=8, learning_rate=1e-4, warmup_steps=0, logging_steps=1, quiet=True)
PAIRS = [
    PairRow((1, 7, 8, 9), (20, 21), (30, 31, END), "a"),
    PairRow((1, 5), (40, 41, 42, 43), (50,), "b"),
    PairRow((1, 300, 301, 302, 303, 304), (60, END), (61, 62, 63), "c"),
]


def test_read_pairs_refuses_what_teaches_nothing(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 3]}) + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl:1: chosen_ids and rejected_ids are the same"):
        read_pairs(path)
    path.write_text(json.dumps({"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": []}) + "\n")
    with pytest.raises(DataError, match=r"pairs.jsonl:1: expected token ids in 'rejected_ids'"):
        read_pairs(path)


def test_collator_lines_completions_up_at_one_column():
    batch = PairCollator(pad_id=9)([{"row": row, "ref_chosen": -1.5, "ref_rejected": -2.5} for row in PAIRS[:2]])
    assert batch["input_ids"].tolist() == [
        [1, 7, 8, 9, 20, 21, 9, 9], [9, 9, 1, 5, 40, 41, 42, 43], [1, 7, 8, 9, 30, 31, 2, 9], [9, 9, 1, 5, 50, 9, 9, 9],
    ]  # fmt: skip
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 0],
    ]  # fmt: skip
    x = -100
    assert batch["completion_labels"].tolist() == [
        [x, 20, 21, x, x], [x, 40, 41, 42, 43], [x, 30, 31, 2, x], [x, 50, x, x, x],
    ]  # fmt: skip
    assert batch["ref_chosen"].tolist() == [-1.5, -1.5]
    assert batch["ref_rejected"].tolist() == [-2.5, -2.5]


def test_objective_says_what_margin_is_asked_for():
    assert Objective().describe(15) == (
        "ipo (sum), beta 0.05: target 10.0 nats a pair, 0.67 nats a token at 15 tokens",
        "",
    )
    line, warning = Objective(reduction="mean").describe(15)
    assert line == "ipo (mean), beta 0.05: target 10.0 nats a token, 150.0 nats a pair at 15 tokens"
    assert "10.0 nats a token is more" in warning
    assert "with mean the same margin is beta 0.75" in warning
    assert Objective(reduction="mean", beta=0.75).describe(15)[1] == ""
    assert "no target" in Objective("dpo", 0.1).describe(15)[0]
    assert Objective("dpo").target == {}
    assert Objective(beta=0.1).target == {"target_margin": 5.0}
    assert Objective(beta=0.5, reduction="mean").target == {"target_margin_per_token": 1.0}
    with pytest.raises(UsageError, match="loss: 'ipoo' is not a choice; did you mean 'ipo'"):
        Objective("ipoo")


def moved(model, size=0.02):
    """Return the model with every weight moved a little, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("loss", "trl_name"), [("ipo", "ipo"), ("dpo", "sigmoid")])
def test_preference_trainer_loss_equals_trl(tmp_path, stories_tokenizer, loss, trl_name):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    stories_tokenizer.pad_token = stories_tokenizer.eos_token
    start, policy = (AutoModelForCausalLM.from_pretrained(MODEL) for _ in range(2))
    common = training_arguments(replace(FULL, batch_size=3), str(tmp_path), 3, autocast=False)
    theirs = DPOTrainer(
        model=moved(policy), ref_model=start, processing_class=stories_tokenizer,
        args=DPOConfig(**{**common, "remove_unused_columns": True}, loss_type=trl_name, beta=0.3),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3),
    )  # fmt: skip
    ids = [{k: list(getattr(row, k)) for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in PAIRS]
    expected = theirs.compute_loss(theirs.model, theirs.data_collator(ids)).item()

    from transformers import TrainingArguments

    ours = PreferenceTrainer(model=start, args=TrainingArguments(**common), data_collator=PairCollator())
    ours.objective = Objective(loss, 0.3, "mean")
    rows = with_reference(ours, PAIRS, "sft", quiet=True)
    found = ours.compute_loss(policy, ours.data_collator(rows), num_items_in_batch=torch.tensor(3)).item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found - (Objective(loss, 0.3, "mean").target.get("target_margin_per_token", 0) ** 2 or 0.6931)) > 0.02


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """12 pairs, all in every step, full float32 training with the paper's loss; texts that were encoded meanwhile."""
    folder, encoded = tmp_path_factory.mktemp("preference"), []
    pairs = write_pairs(folder / "pairs.jsonl", 12)
    patch, call = pytest.MonkeyPatch(), PreTrainedTokenizerBase.__call__
    patch.setattr(
        PreTrainedTokenizerBase, "__call__", lambda self, *a, **k: encoded.append(a[0]) or call(self, *a, **k)
    )
    settings = replace(FULL, batch_size=12, micro_batch_size=5, max_steps=25, learning_rate=2e-4)
    facts = {"corpus": "sha256:c0ffee", "retriever": "bm25", "reward": "ap"}
    result = train_preference(MODEL, pairs, folder / "run", settings=settings, facts=facts)
    patch.undo()
    return result, pairs, encoded, settings


def test_train_preference_margin_goes_to_the_target(trained):
    metrics = [row for row in read_metrics(trained[0].folder.parent) if "margin" in row]
    first, last = metrics[0], metrics[-1]
    assert first["loss"] == pytest.approx(100, abs=1e-3)  # (0 - 10)^2: policy and reference are the same model
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert first["target_margin"] == last["target_margin"] == 10
    assert last["loss"] < 20
    assert 7 < last["margin"] < 13
    assert last["accuracy"] > 0.9
    rows = read_pairs(trained[1])
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    expected = -sum(nll(model, row.prompt_ids, row.chosen_ids) for row in rows) / len(rows)
    assert first["logps_chosen"] == pytest.approx(expected, rel=1e-5)
    # what the chosen lost or gained is there to see
    assert last["log_ratio_chosen"] == pytest.approx(last["logps_chosen"] - first["logps_chosen"], abs=1e-3)
    assert last["margin"] == pytest.approx(last["log_ratio_chosen"] - last["log_ratio_rejected"], rel=1e-5)


def test_train_preference_saves_what_transformers_loads(trained):
    result, pairs, encoded, _ = trained
    model, row = AutoModelForCausalLM.from_pretrained(result.folder), read_pairs(pairs)[0]
    start = AutoModelForCausalLM.from_pretrained(MODEL)
    margin = nll(model, row.prompt_ids, row.rejected_ids) - nll(model, row.prompt_ids, row.chosen_ids)
    assert margin > 5 + nll(start, row.prompt_ids, row.rejected_ids) - nll(start, row.prompt_ids, row.chosen_ids)
    card = (result.folder / "README.md").read_text()
    for words in ("stories260k", "sha256:c0ffee", "| loss | ipo |", "| reduction | sum |", "| target_margin | 10 |"):
        assert words in card
    assert {p.suffix for p in result.folder.iterdir()} == {".json", ".safetensors", ".md"}
    assert set(encoded) <= set(_PROBES)  # of the comparison with the saved tokenizer


def test_train_preference_resumed_with_other_pairs_or_model_is_refused(trained, tmp_path, tiny_model):
    result, pairs, _, settings = trained
    folder = result.folder.parent
    with pytest.raises(
        CheckpointError, match=r"reference.safetensors was computed for other pairs: the run cannot go on"
    ):
        train_preference(MODEL, read_pairs(pairs)[::-1], folder, settings=settings, resume="latest")
    with pytest.raises(CheckpointError, match="was computed for another model"):
        train_preference(tiny_model("llama"), pairs, folder, settings=settings, resume="latest")
    with pytest.raises(CheckpointError, match=r"belongs to another run: beta was 0.05 and is 0.1 now"):
        train_preference(MODEL, pairs, folder, settings=settings, resume="latest", objective=Objective(beta=0.1))
    again = train_preference(MODEL, pairs, folder, settings=settings, resume="latest")  # done: no further step
    assert again.steps == 25
    assert again.metrics == result.metrics
    with pytest.raises(UsageError, match="reference=base switches the adapter off, and there is none"):
        train_preference(MODEL, pairs, tmp_path, settings=settings, reference="base")


@pytest.mark.parametrize("reference", ["sft", "base"])
def test_reference_of_an_adapter_is_the_start_or_the_base_without_it(tmp_path, reference, stories_tokenizer):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    settings = replace(FULL, tuning="lora", batch_size=3, max_steps=1, learning_rate=1e-9)
    result = train_preference(tmp_path / "adapter", PAIRS, tmp_path / "run", settings=settings, reference=reference)
    stored = load_file(tmp_path / "run" / "reference.safetensors")
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), tmp_path / "adapter")
    expected, other = (with_adapter, base) if reference == "sft" else (base, with_adapter)
    for side in ("chosen", "rejected"):
        for i, row in enumerate(PAIRS):
            ids = getattr(row, f"{side}_ids")
            assert stored[side][i].item() == pytest.approx(-nll(expected, row.prompt_ids, ids), rel=1e-5)
            assert abs(stored[side][i].item() + nll(other, row.prompt_ids, ids)) > 1e-3
    # the adapter itself goes on being trained, and loads in peft
    assert json.loads((result.folder / "adapter_config.json").read_text())["r"] == 4
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), result.folder)
    assert nll(again, (1, 5), (7, 8)) == pytest.approx(nll(with_adapter, (1, 5), (7, 8)), rel=1e-5)


def test_train_preference_switches_dropout_off_and_keeps_the_chat_template(tmp_path, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(tiny_model("gpt2"))
    assert model.transformer.h[0].attn.resid_dropout.p == 0.1
    settings = replace(FULL, batch_size=3, max_steps=1, warmup_steps=0)
    result = train_preference(model, PAIRS, tmp_path / "run", settings=settings, tokenizer=tokenizer)
    # with dropout the policy would differ from the reference, which is the same model
    assert result.metrics["loss"] == pytest.approx(100, abs=1e-3)
    assert result.metrics["margin"] == pytest.approx(0, abs=1e-4)
    assert AutoTokenizer.from_pretrained(result.folder).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_check_saved_notices_what_differs(tmp_path, tuning):
    settings = replace(FULL, tuning=tuning)
    policy = open_policy(MODEL, settings)
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    check_saved(tmp_path, policy)
    parameter = next(p for p in policy.model.parameters() if p.requires_grad)
    before = parameter.view(-1)[0].item()
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
    with pytest.raises(ModelError, match=r"differs from what was trained: .*weight \(\d in all\)"):
        check_saved(tmp_path, policy)
    with torch.no_grad():
        parameter.view(-1)[0] = before
    policy.tokenizer.chat_template = "another"
    with pytest.raises(ModelError, match="differs from what was trained: the chat template"):
        check_saved(tmp_path, policy)


def test_open_policy_refuses_what_does_not_go_together(tmp_path):
    policy = open_policy(MODEL, replace(FULL, tuning="lora"))
    policy.model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="tuning=full trains a whole model, this is an adapter"):
        open_policy(tmp_path / "adapter", FULL)
    with pytest.raises(UsageError, match="a model in memory needs its tokenizer"):
        open_policy(policy.model, FULL)
    with pytest.raises(UsageError, match="not found"):
        open_policy(tmp_path / "nowhere", FULL)
    again = open_policy(MODEL, replace(FULL, tuning="lora"))  # a new adapter is a function of the seed
    assert fingerprint_live(again.model) == fingerprint_live(policy.model)
    assert fingerprint_live(open_policy(MODEL, replace(FULL, tuning="lora", seed=1)).model) != fingerprint_live(
        again.model
    )


def test_train_preference_resumed_after_kill_equals_uninterrupted(tmp_path):
    rows = str(write_pairs(tmp_path / "pairs.jsonl", 22))  # 2 steps an epoch: the kill falls into the third
    settings = {"max_steps": 8, "batch_size": 8, "micro_batch_size": 4, "save_steps": 5, "logging_steps": 3, "seed": 3}
    options = {"rows": rows, "settings": {**settings, "lora_r": 4, "optimizer": "rmsprop"}}
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
    for name in ("metrics.jsonl", "reference.safetensors", "final/adapter_model.safetensors", "final/README.md"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


def half(rows, side):
    """Return the chosen or the rejected sequences of a forward."""
    return rows[: len(rows) // 2] if side == 0 else rows[len(rows) // 2 :]


def test_train_preference_on_1_and_2_processes_agrees(tmp_path):
    rows = str(write_pairs(tmp_path / "pairs.jsonl", 30))  # 3 steps an epoch and a rest
    settings = {
        "tuning": "full",
        "max_steps": 20,
        "batch_size": 8,
        "learning_rate": 1e-5,
        "save_steps": 20,
        "logging_steps": 20,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(one, rows=rows, settings=settings) == 0, (one / "log.txt").read_text()
    assert run(two, rows=rows, settings={**settings, "micro_batch_size": 2}, ranks=2) == 0, (
        two / "log.txt"
    ).read_text()
    for step, same in zip(forwards(one, 1), forwards(two, 2), strict=True):
        for side in (0, 1):  # a forward holds the chosen of its pairs, then the rejected
            sides = [[row for rows in part for row in half(rows, side)] for part in (step, same)]
            assert sides[0] == sides[1]
            assert len(sides[0]) == 8
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (one, two))
    assert max(((a[k] - b[k]).norm() / a[k].norm()).item() for k in a) < 1e-5
    start = load_file(MODEL / "model.safetensors")
    assert max(((a[k] - start[k]).norm() / a[k].norm()).item() for k in start) > 1e-4
    left, right = (read_metrics(folder)[0] for folder in (one, two))
    for name in ("loss", "margin", "margin_per_token", "logps_chosen", "logps_rejected"):
        assert left[name] == pytest.approx(right[name], rel=1e-4), name


def test_an_adapter_that_is_no_lora_is_refused_before_training(tiny_model):
    from peft import PromptTuningConfig, get_peft_model

    folder = tiny_model("llama")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(UsageError, match="an adapter of kind PROMPT_TUNING: expected LoRA"):
        open_policy(model, TrainSettings(), AutoTokenizer.from_pretrained(folder))


def test_weights_that_lie_on_one_process_only_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(stage, "world_size", lambda: 2)
    monkeypatch.setattr(stage, "check_processes", lambda **_: None)
    with pytest.raises(DistributedError, match="fsdp_cpu_ram_efficient_loading leaves the weights out"):
        stage.prepare_stage(tmp_path / "out", FULL, None)


def test_a_batch_is_no_larger_than_what_is_left_of_long_rows(tiny_model):
    policy = open_policy(tiny_model("llama"), FULL)
    short = [replace(PAIRS[0], where=f"{i}") for i in range(7)]
    long = replace(PAIRS[0], prompt_ids=(1,) * 5000, where="long")
    settings = replace(FULL, batch_size=8, long_rows="drop")
    kept, left_out, used = stage.choose_rows([*short, long], policy, settings)
    assert (len(kept), used.batch_size) == (7, 7)
    assert "left out, 1 of 8 rows" in left_out
    with pytest.raises(UsageError, match="7 rows are fewer than batch_size 8"):
        stage.choose_rows(short, policy, FULL)

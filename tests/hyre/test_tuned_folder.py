"""A trained backbone: exact resume, 1 and 2 processes, the folder at the end."""

import json
import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from backbone_runs import MODEL, ROWS, RULES, run, sides, write_pairs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmrl.errors import (
    CheckpointError,
    DataError,
    DistributedError,
    Interrupted,
    ModelError,
    OutputError,
    UsageError,
)
from llmrl.hyre import tune, tuned_folder
from llmrl.hyre.backbone import (
    EnsembleRewardModel,
    EnsembleTrainer,
)
from llmrl.hyre.diversity import plan_heads
from llmrl.hyre.ensemble import load_ensemble
from llmrl.hyre.export import export_ensemble
from llmrl.hyre.features import CausalFeatures, embed_pairs, last_states, open_features
from llmrl.hyre.fit import Pairs
from llmrl.hyre.options import TrainConfig
from llmrl.hyre.pairs import read_pairs
from llmrl.hyre.train import train, weights_dtype
from llmrl.hyre.tune_settings import BackboneSettings
from llmrl.training import distributed, read_metrics
from llmrl.training.resume import seal_checkpoint


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Three epochs of LoRA on 48 pairs of two groups, through the command; scores of the model before it was taken apart."""
    folder, kept = tmp_path_factory.mktemp("tuned"), {}
    patch, live = pytest.MonkeyPatch(), tuned_folder.live_scores

    def keep(model, texts):
        kept["scores"] = live(model, texts)
        return kept["scores"]

    patch.setattr(tuned_folder, "live_scores", keep)
    pairs = write_pairs(folder / "pairs.jsonl", 48)
    config = TrainConfig(
        pairs=[str(pairs)], output_dir=str(folder / "out"), base=str(MODEL), heads=6, prior="mlp", tuning="lora",
        lora_r=4, base_lr=3e-3, epochs=3, batch_size=8, held_out=0.0, quiet=True,
    )  # fmt: skip
    report = train(config)
    patch.undo()
    return folder / "out", config, report, kept["scores"]


def test_tuned_folder_loads_and_scores_as_the_trained_model(tuned):
    folder, config, report, live = tuned
    loaded, pairs = load_ensemble(folder), read_pairs(config.pairs)
    probes = pairs[:: max(1, len(pairs) // 8)]
    answers = [answer for pair in probes for answer in (pair.chosen, pair.rejected)]
    found = loaded.scores([pair.prompt for pair in probes for _ in range(2)], answers)
    assert found.shape == tuple(live.shape) == (16, 6)
    assert np.abs(found - live.numpy()).max() < 1e-4 * live.square().mean().sqrt()
    chosen, rejected = loaded.features(pairs)
    assert report["accuracy"]["mean_head"] == pytest.approx((loaded.margins(chosen, rejected) > 0).mean(), abs=1e-6)
    assert loaded.single is not None
    assert report["base"] == loaded.facts["base"] == str(MODEL)


def test_tuned_folder_is_exported_with_the_scores_of_the_trained_model(tuned, tmp_path):
    """Its heads have an mlp prior: the folder of the plugin, with the merged base."""
    folder, config, _, live = tuned
    done = export_ensemble(load_ensemble(folder), tmp_path / "served")
    assert done.form == "plugin"
    pairs = read_pairs(config.pairs)[:: 48 // 8]
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    found = load_ensemble(done.folder).scores(prompts, [a for pair in pairs for a in (pair.chosen, pair.rejected)])
    assert np.abs(found - live.numpy()).max() < 1e-4 * live.square().mean().sqrt()


def test_tuned_folder_holds_the_base_the_adapter_and_the_metrics(tuned):
    from peft import PeftModel

    folder = tuned[0]
    assert {p.name for p in folder.iterdir()} == {
        "base", "adapter", "llmrl_heads.safetensors", "reward_ensemble.json", "report.json", "README.md", "env.json",
        "config.resolved.yaml", "metrics.jsonl", "timings.jsonl",
    }  # fmt: skip
    assert {p.name for p in (folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".jsonl", ".safetensors", ".md", ".yaml"}
    assert [p.name for p in folder.parent.iterdir() if "training" in p.name or p.name.startswith(".")] == []
    assert "stories260k" in (folder / "README.md").read_text()
    assert json.loads((folder / "reward_ensemble.json").read_text())["base"]["name"] == "base"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), folder / "adapter")
    merged, start = (AutoModelForCausalLM.from_pretrained(name) for name in (folder / "base", MODEL))
    with_adapter, without = last_states(adapted.get_base_model(), ROWS, "cpu"), last_states(start, ROWS, "cpu")
    assert (last_states(merged, ROWS, "cpu") - with_adapter).abs().max() < 1e-4
    assert (with_adapter - without).abs().max() > 0.1
    losses = [row["head_loss_mean"] for row in read_metrics(folder) if "head_loss_mean" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_training_begins_at_the_frozen_optimum_and_lowers_its_objective(tuned, tmp_path):
    folder, config, _, _ = tuned
    frozen = replace(config, tuning="frozen", output_dir=str(tmp_path / "frozen"), dtype="float32")
    train(frozen)
    pairs = read_pairs(config.pairs)
    weights = tune_plan(config, pairs)
    losses = {}
    for name, where in (("tuned", folder), ("frozen", tmp_path / "frozen")):
        ensemble = load_ensemble(where)
        margins = ensemble.margins(*ensemble.features(pairs)) * np.array(ensemble.signs)
        losses[name] = (weights * np.logaddexp(0, -margins)).sum(0)
    first = next(row for row in read_metrics(folder) if "head_loss_mean" in row)
    assert losses["tuned"].mean() < 0.6 * losses["frozen"].mean()
    # of the first ten of 18 steps, some of it already gained; random heads would begin above log 2
    assert 0.3 * losses["frozen"].mean() < first["head_loss_mean"] < 1.3 * losses["frozen"].mean() < 0.5


def tune_plan(config, pairs):
    """Return the weights `[N, K]` of the command's plan."""
    groups = [pair.group for pair in pairs]
    return plan_heads("group", config.heads, len(pairs), groups=groups, flip=config.flip, seed=config.seed).rows.T


def test_check_scores_refuses_a_base_or_a_head_that_is_another(tuned, tmp_path):
    folder, config, _, live = tuned
    pairs = read_pairs(config.pairs)
    probes = pairs[:: max(1, len(pairs) // 8)]
    assert tuned_folder.check_scores(live, load_ensemble(folder), probes) < 1e-4
    changed = load_ensemble(folder)
    changed.head.bias += 1e-2
    with pytest.raises(ModelError, match=r"scores differently from what was trained: the difference is 0\.0"):
        tuned_folder.check_scores(live, changed, probes)
    changed = load_ensemble(folder)
    changed._base = CausalFeatures(str(MODEL))  # the base as it was before
    with pytest.raises(ModelError, match="scores differently"):
        tuned_folder.check_scores(live, changed, probes)
    with pytest.raises(ModelError, match="scores differently"):
        tuned_folder.check_scores(torch.full_like(live, torch.nan), load_ensemble(folder), probes)


def test_a_model_that_does_not_come_back_as_it_was_is_not_published(tmp_path, monkeypatch):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    config = TrainConfig(
        pairs=[str(pairs)], output_dir=str(tmp_path / "out"), base=str(MODEL), heads=2, tuning="lora", batch_size=6,
        base_lr=1e-2, held_out=0.0, quiet=True,
    )  # fmt: skip
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self: self.unload(), raising=False)
    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", lambda self: self.unload())
    with pytest.raises(ModelError, match="what was saved scores differently"):
        train(config)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.training" / "checkpoint-2" / "optimizer.safetensors").is_file()
    assert not (tmp_path / "out.training" / "final").exists()
    monkeypatch.undo()  # with the cause away the finished steps are not done again
    report = train(replace(config, resume_from_checkpoint="latest"))
    assert report["heads"] == 2
    assert not (tmp_path / "out.training").exists()


def test_one_head_with_the_whole_backbone_replaces_an_ensemble(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12, margin=True)
    out = tmp_path / "out"
    config = TrainConfig(
        pairs=[str(pairs)], output_dir=str(out), base=str(MODEL), heads=1, center=0.01, tuning="full", batch_size=4,
        held_out=0.0, dtype="bfloat16", base_lr=1e-2, quiet=True,
    )  # fmt: skip
    train(config)
    ensemble = load_ensemble(out)
    assert ensemble.heads == 1
    assert ensemble.base.base.model.dtype == torch.bfloat16
    assert not (out / "adapter").exists()
    start, saved = load_file(MODEL / "model.safetensors"), load_file(out / "base" / "model.safetensors")
    assert all((saved[name].float() - start[name]).abs().max() > 1e-3 for name in start if "layernorm" not in name)
    (out / "base" / "chat_template.jinja").write_text("of the first one")
    (out / "mine.txt").write_text("kept")
    train(replace(config, dtype="auto", overwrite=True))
    assert not (out / "base" / "chat_template.jinja").exists()
    assert (out / "mine.txt").read_text() == "kept"
    assert load_ensemble(out).base.base.model.dtype == torch.float32


def test_resumed_after_kill_equals_uninterrupted(tmp_path, llama):
    options = {
        "base": str(llama), "pairs": [str(write_pairs(tmp_path / "pairs.jsonl", 24))],
        "heads": 3, "kind": "mlp", "hidden": 4, "prior": "mlp",
        "tuning": "lora", "lora_r": 4, "batch_size": 8, "micro_batch_size": 4, "epochs": 3, "held_out": 0.0, "steps": 30,
        "save_steps": 5, "seed": 3, "base_lr": 1e-3,
    }  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, **options) == 0, (whole / "log.txt").read_text()
    assert run(cut, **options, kill="after_save:5") == -9
    assert not (cut / "ensemble").exists()
    checkpoint = cut / "ensemble.training" / "checkpoint-5"
    assert {"model.safetensors", "optimizer.safetensors", "rank_0.safetensors"} <= {
        p.name for p in checkpoint.iterdir()
    }
    assert not any(
        name.startswith("backbone") and "lora" not in name for name in load_file(checkpoint / "model.safetensors")
    )
    assert run(cut, **{**options, "lora_r": 2}, resume_from_checkpoint="latest") == 1
    assert "belongs to another run" in (cut / "log.txt").read_text()
    assert run(cut, **options, resume_from_checkpoint="latest") == 0, (cut / "log.txt").read_text()
    names = ["llmrl_heads.safetensors", "metrics.jsonl", "report.json", "reward_ensemble.json"]
    names += ["base/model.safetensors", "adapter/adapter_model.safetensors"]
    for name in names:
        assert (cut / "ensemble" / name).read_bytes() == (whole / "ensemble" / name).read_bytes(), name
    assert len(read_metrics(whole / "ensemble")) == 4  # steps 3, 6, 9 and the end


def test_1_and_2_processes_agree(tmp_path, llama):
    options = {
        "base": str(llama), "pairs": [str(write_pairs(tmp_path / "pairs.jsonl", 30))],
        "heads": 3, "tuning": "full", "batch_size": 8, "epochs": 7,
        "held_out": 0.0, "base_lr": 1e-4, "lr": 1e-3, "save_steps": 100, "quiet": False, "diversity": "cluster",
    }  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(one, **options) == 0, (one / "log.txt").read_text()
    assert run(two, **options, micro_batch_size=2, ranks=2) == 0, (two / "log.txt").read_text()
    assert "processes: 2 (gloo, rank 0 on cpu)" in (two / "log.txt").read_text()
    a, b = sides(one / "ensemble", 1), sides(two / "ensemble", 2)
    assert a == b
    assert len(a) == 21
    assert {len(side) for step in a for side in step} == {8}
    files = ("base/model.safetensors", "llmrl_heads.safetensors")
    left, right = ({**load_file(f / "ensemble" / files[0]), **load_file(f / "ensemble" / files[1])} for f in (one, two))
    trained = {name for name in left if "single" not in name}  # that is fitted afterwards
    assert max(((left[k] - right[k]).norm() / left[k].norm()).item() for k in trained) < 1e-5
    start = load_file(llama / "model.safetensors")
    moved = {name: ((left[name] - start[name]).norm() / left[name].norm()).item() for name in start}
    assert moved.pop("lm_head.weight") == 0
    assert min(moved.values()) > 1e-4
    metrics = [read_metrics(folder / "ensemble")[0] for folder in (one, two)]
    for name in ("loss", "head_loss_mean", "head_loss_max", "head_accuracy_min", "disagreement", "grad_norm"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4), name


def test_refusals_name_the_option(tmp_path, tiny_model):
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8)
    config = TrainConfig(
        pairs=[str(pairs)], output_dir=str(tmp_path / "out"), base=str(tiny_model("llama")), heads=2, tuning="lora",
        batch_size=9, held_out=0.0, quiet=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="8 pairs are fewer than --batch_size 9: lower it"):
        train(config)
    base = open_features(str(tiny_model("llama")))
    base.max_length = 3
    with pytest.raises(DataError, match=r"pairs.jsonl:1: chosen: \d+ tokens, expected 1 to 3"):
        tune.encode_pairs(base, read_pairs(pairs), "answer", None, plan_heads("none", 2, 8))
    with pytest.raises(UsageError, match=r"--tuning lora trains a causal LM, and .* is a sentence encoder"):
        train(replace(config, batch_size=4, base=None))
    (tmp_path / "out.training" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"out\.training holds checkpoint-3 of an earlier run"):
        train(replace(config, batch_size=4))
    with pytest.raises(CheckpointError, match="checkpoint not found"):
        train(replace(config, batch_size=4, resume_from_checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(UsageError, match="expected tuning out of lora, full, got 'frozen'"):
        BackboneSettings(tuning="frozen")
    shutil.rmtree(tmp_path / "out.training")


@pytest.fixture
def small(llama, tmp_path):
    """Arguments of `train_backbone` for eight pairs on a small model."""
    base, pairs = CausalFeatures(str(llama)), read_pairs(write_pairs(tmp_path / "pairs.jsonl", 8))
    return (
        base,
        pairs,
        "answer",
        Pairs(*embed_pairs(base, pairs, "answer")),
        plan_heads("none", 2, 8),
        tmp_path / "work",
    )


def test_computing_in_bfloat16_leaves_weights_heads_and_what_is_saved_in_float32(small, monkeypatch):
    seen, scores = [], EnsembleRewardModel.scores

    def keep(model, ids, mask):
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            plain = scores(model, ids, mask)
        found = scores(model, ids, mask)
        seen.append((torch.is_autocast_enabled("cpu"), torch.equal(found, plain), found.dtype))
        return found

    monkeypatch.setattr(EnsembleRewardModel, "scores", keep)
    settings = BackboneSettings(tuning="full", batch_size=8, epochs=1, autocast=True, quiet=True)
    ensemble = tune.train_backbone(*small, settings=settings)
    # one step, then what is compared with the saved folder
    assert seen == [(True, False, torch.float32)] + [(False, True, torch.float32)] * 16
    assert ensemble.base.base.model.dtype == torch.float32
    assert ensemble.head.weight.dtype == torch.float32


def test_an_interrupted_or_sharded_run_says_how_to_go_on(small, monkeypatch):
    def stop(self, resume_from_checkpoint=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(EnsembleTrainer, "train", stop)
    settings = BackboneSettings(tuning="full", batch_size=8, quiet=True)
    with pytest.raises(Interrupted, match="--resume_from_checkpoint begins again"):
        tune.train_backbone(*small, settings=settings)
    (small[-1] / "checkpoint-7").mkdir()
    seal_checkpoint(small[-1] / "checkpoint-7", {"step": 7})
    with pytest.raises(OutputError, match="holds checkpoint-7"):
        tune.train_backbone(*small, settings=settings)
    with pytest.raises(Interrupted, match="--resume_from_checkpoint goes on from checkpoint-7"):
        tune.train_backbone(*small, settings=settings, resume="latest")
    monkeypatch.setattr(EnsembleTrainer, "_sharded", True)
    with pytest.raises(DistributedError, match="without FSDP and DeepSpeed"):
        tune.train_backbone(*small, settings=settings, resume="latest")
    assert (small[-1] / "checkpoint-7").exists()
    monkeypatch.setattr(EnsembleTrainer, "_sharded", False)
    with pytest.raises(Interrupted, match="begins again"):
        tune.train_backbone(*small, settings=settings, overwrite=True)
    assert not (small[-1] / "checkpoint-7").exists()


def test_settings_share_a_batch_and_count_steps(monkeypatch):
    settings = BackboneSettings(batch_size=10, micro_batch_size=4, epochs=1.5)
    assert settings.share() == (2, 5)  # ten are not three times four
    assert settings.steps(39) == 5
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert settings.share() == (1, 5)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(UsageError, match="--batch_size 10 cannot be shared by 3 processes"):
        settings.share()


def test_weights_dtype_trains_in_float32_where_a_step_would_be_lost(monkeypatch):
    named = ("auto", "bfloat16")
    found = {
        (dtype, tuning): weights_dtype(dtype, tuning) for dtype, tuning in product(named, ("frozen", "lora", "full"))
    }
    assert found == {
        ("auto", "frozen"): "auto", ("auto", "lora"): "float32", ("auto", "full"): "float32",
        ("bfloat16", "frozen"): "bfloat16", ("bfloat16", "lora"): "bfloat16", ("bfloat16", "full"): "bfloat16",
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert weights_dtype("auto", "lora") == "auto"
    assert weights_dtype("auto", "full") == "float32"


def test_encode_pairs_gives_the_ids_whose_states_are_the_cached_features(tmp_path):
    base = CausalFeatures(str(MODEL))
    pairs = read_pairs(write_pairs(tmp_path / "pairs.jsonl", 5, RULES))
    plan = plan_heads("bootstrap", 4, 5)
    rows = tune.encode_pairs(base, pairs, "answer", None, plan)
    chosen, rejected = embed_pairs(base, pairs, "answer")
    assert (last_states(base.base.model, [row["chosen"] for row in rows], "cpu") - chosen).abs().max() < 1e-4
    assert (last_states(base.base.model, [row["rejected"] for row in rows], "cpu") - rejected).abs().max() < 1e-4
    assert torch.stack([row["weights"] for row in rows]).sum(0).tolist() == pytest.approx([5] * 4)

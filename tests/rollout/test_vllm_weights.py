"""Which names of a checkpoint an update has to hold: those of weights, and not of tables that files carry along."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from engine_support import STORIES, disturbed, weights
from safetensors.torch import load_file, save_file

from llmrl.errors import SyncError

pytestmark = pytest.mark.vllm
INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def old_files(tmp_path_factory):
    """The example model as older versions of transformers wrote it: with a table a layer."""
    folder = shutil.copytree(STORIES, tmp_path_factory.mktemp("old") / "model")
    tensors = load_file(folder / "model.safetensors")
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    tensors |= {INV_FREQ.format(i): torch.ones(4) for i in layers}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_update_of_a_checkpoint_with_tables(old_files, open_vllm, stories_model):
    engine = open_vllm(old_files)
    before = engine.score([1, 300, 310])
    moved = weights(disturbed(stories_model))
    lost = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(SyncError) as caught:
        engine.update({name: tensor for name, tensor in moved.items() if name != lost})
    assert f"lacks {lost}: the engine would go on" in str(caught.value)
    assert engine.score([1, 300, 310]) == before
    engine.update(moved)
    after = engine.score([1, 300, 310])
    assert after != before
    # what a server is put back with holds the tables, too
    engine.update(load_file(old_files / "model.safetensors"))
    assert engine.score([1, 300, 310]) == before


def model_config(folder):
    from transformers import AutoConfig

    return SimpleNamespace(hf_config=AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize("name", ["stories", "untied", "biased", "softcap", "experts"])
def test_never_trained_are_the_names_no_trainer_has(name, tiny_folder):
    from llmrl.rollout.vllm_weights import never_trained

    folder = tiny_folder(name)
    real = set(load_file(folder / "model.safetensors"))
    more = {INV_FREQ.format(0), "mtp.layers.0.weight", "model.layers.0.self_attn.bias_mask"}
    assert never_trained(real | more, model_config(folder)) == more
    assert never_trained(real, model_config(folder)) == set()


def test_never_trained_without_a_class_in_transformers():
    from llmrl.rollout.vllm_weights import never_trained

    names = {INV_FREQ.format(0), "model.layers.0.mlp.up_proj.weight"}
    assert never_trained(names, SimpleNamespace(hf_config=object())) == {INV_FREQ.format(0)}


def test_never_trained_says_nothing_about_names_with_another_prefix(tiny_folder):
    from llmrl.rollout.vllm_weights import never_trained

    names = {f"other.{name}" for name in load_file(STORIES / "model.safetensors")}
    assert never_trained(names, model_config(STORIES)) == set()

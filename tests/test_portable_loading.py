"""The class of a modelling file: what it is opened with, what it says while loading, and that it does not save."""

import importlib.util
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrl.heads import MODELING_MODULE
from llmrl.portable import write_modeling_file

IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folder(tiny_model, save_head, tmp_path_factory):
    folder = tmp_path_factory.mktemp("portable") / "llama"
    save_head(tiny_model("llama"), folder, merged=True)
    write_modeling_file(folder)
    return folder


@pytest.fixture(scope="module")
def code(folder):
    """The file as a module, as transformers imports it."""
    spec = importlib.util.spec_from_file_location("written_modeling", folder / f"{MODELING_MODULE}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def config(code, folder):
    return code.CalibratedConfig.from_pretrained(folder)


def test_config_is_one_of_the_base(config):
    """The folder's own model type is llmrl's, which transformers alone does not know."""
    assert config.model_type == "llama"
    assert type(config).__mro__[1].__name__ == "LlamaConfig"


def test_loading_misses_nothing_and_gives_the_numbers_of_llmrl(code, config, folder):
    model, info = code.CalibratedForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert not any(info.values())
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-6)


def test_heads_come_from_the_same_place_as_the_weights(code, config, folder, monkeypatch):
    asked = []

    def cached_file(*names, **options):
        asked.append((names, options))
        return folder / names[1]

    monkeypatch.setattr(code, "cached_file", cached_file)
    code.CalibratedForCausalLM.from_pretrained(
        folder, config=config, revision="abc", cache_dir=str(folder / "cache"), dtype=torch.float32
    )
    assert asked == [
        ((str(folder), "llmrl_heads.safetensors"), {"revision": "abc", "cache_dir": str(folder / "cache")})
    ]


def test_saving_without_llmrl_is_refused_and_writes_nothing(code, config, folder, tmp_path):
    """A copy would lack the head file and the fingerprints."""
    model = code.CalibratedForCausalLM.from_pretrained(folder, config=config)
    with pytest.raises(RuntimeError, match="saving needs llmrl: import llmrl"):
        model.save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.iterdir()]

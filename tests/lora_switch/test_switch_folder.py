"""What a switch model leaves on disk, that it opens again everywhere, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from switch_models import PARTICULAR, base_model, prompt, stir
from transformers import AutoConfig, AutoModelForCausalLM

from llmrl.errors import HeadMismatchError, ModelError, UsageError
from llmrl.lora_switch import SwitchConfig, get_switch_model, load_switch_model
from llmrl.lora_switch.folder import CONFIG_KEY, WEIGHTS_FILE, read_switch_folder


def saved(tmp_path, name="LlamaForCausalLM", **options):
    """Return (a switch model whose base lies in a folder, the folder it was saved to)."""
    base_model(name).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_switch_model(model, SwitchConfig(**{"num_experts": 4, "r": 3, **options})).eval()
    stir(model)
    model.save_pretrained(tmp_path / "switch")
    return model, tmp_path / "switch"


@pytest.mark.parametrize("name", PARTICULAR)
def test_folder_opens_again(name, tmp_path):
    model, folder = saved(tmp_path, name)
    expected = model(prompt()).logits
    for opened in (load_switch_model(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert type(opened).__name__ == f"Switch{name}"
        assert torch.equal(opened(prompt()).logits, expected)
        assert not opened.training


def test_folder_holds_experts_and_router_alone(tmp_path):
    model, folder = saved(tmp_path)
    tensors = load_file(folder / WEIGHTS_FILE)
    assert tensors["model.layers.1.mlp.down_proj.switch_A"].shape == (4, 3, 48)
    assert tensors["model.layers.1.mlp.down_proj.switch_B"].shape == (32, 12)
    assert tensors["switch_router.weight"].shape == (4, 32)
    assert len(tensors) == 2 * len(model.switch_layers()) + 1
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == "llmrl_switch"
    assert fields["architectures"] == ["LlmrlSwitchLlamaForCausalLM"]
    assert read_switch_folder(folder).base.model == str((tmp_path / "base").resolve())


def test_configuration_saves_itself_as_it_was_read(tmp_path):
    _, folder = saved(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "llama"
    config.save_pretrained(tmp_path / "again")
    again, before = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", folder))
    assert again["model_type"] == "llmrl_switch"
    assert again[CONFIG_KEY] == before[CONFIG_KEY]


def test_configuration_travels_to_other_processes(tmp_path):
    import pickle

    _, folder = saved(tmp_path)
    config = pickle.loads(pickle.dumps(AutoConfig.from_pretrained(folder)))
    assert config.llmrl_switch["switch"]["num_experts"] == 4


def test_dtype_is_the_callers(tmp_path):
    _, folder = saved(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert opened.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert load_switch_model(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_dtype_is_that_of_training_where_nothing_is_said(tmp_path):
    base_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    get_switch_model(model, SwitchConfig(num_experts=2, r=2)).save_pretrained(tmp_path / "switch")
    for opened in (load_switch_model(tmp_path / "switch"), AutoModelForCausalLM.from_pretrained(tmp_path / "switch")):
        assert opened.lm_head.weight.dtype == torch.float32


def test_another_base_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    base_model(seed=5).save_pretrained(tmp_path / "base")
    with pytest.raises(HeadMismatchError, match="were trained on another base"):
        load_switch_model(folder)


def test_another_base_that_is_passed_is_refused(tmp_path):
    _, folder = saved(tmp_path)
    with pytest.raises(HeadMismatchError, match="another base than the one passed"):
        load_switch_model(folder, base=base_model(seed=5))
    base_model(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(HeadMismatchError, match="another base than the one passed"):
        load_switch_model(folder, base=AutoModelForCausalLM.from_pretrained(tmp_path / "other"))
    assert load_switch_model(folder, base=base_model()).switch_config.num_experts == 4


def test_a_base_that_was_changed_in_memory_is_not_named(tmp_path):
    """Merged into, say: the folder it came from is no longer what the experts sit on."""
    base_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    get_switch_model(model, SwitchConfig(num_experts=2, r=2)).save_pretrained(tmp_path / "switch")
    assert read_switch_folder(tmp_path / "switch").base.model == ""
    with pytest.raises(ModelError, match="does not name its base"):
        load_switch_model(tmp_path / "switch")


def test_other_processes_than_the_first_write_nothing(tmp_path):
    model, _ = saved(tmp_path)
    model.save_pretrained(tmp_path / "nothing", False)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ModelError, match="push_to_hub is not done here"):
        model.save_pretrained(tmp_path / "nothing", push_to_hub=True)


def test_a_base_that_is_gone_is_named(tmp_path):
    _, folder = saved(tmp_path)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match=r"the base model of .* cannot be read at"):
        load_switch_model(folder)


def test_a_base_from_nowhere_has_to_be_passed(tmp_path):
    model = get_switch_model(base_model(), SwitchConfig(num_experts=2, r=2)).eval()
    stir(model)
    model.save_pretrained(tmp_path / "switch")
    with pytest.raises(ModelError, match="does not name its base"):
        load_switch_model(tmp_path / "switch")
    opened = load_switch_model(tmp_path / "switch", base=base_model())
    assert torch.equal(opened(prompt()).logits, model(prompt()).logits)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("switch_router.weight"), "switch_router.weight is missing from"),
        (lambda t: t.update(stray=torch.zeros(1)), "stray is not expected in"),
        (
            lambda t: t.update({"switch_router.weight": torch.zeros(5, 32)}),
            r"has shape \[5, 32\], expected \[4, 32\]: it belongs to another base",
        ),
        (lambda t: t["switch_router.weight"].fill_(float("nan")), "holds NaN or infinity"),
    ],
)
def test_damaged_tensors_are_refused(damage, message, tmp_path):
    _, folder = saved(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    damage(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_switch_model(folder)


def test_other_folders_are_refused(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="is no switch model"):
        load_switch_model(tmp_path / "base")
    with pytest.raises(UsageError, match="not found"):
        read_switch_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "switch format 1 is not 2"),
        ({"base": {}}, "the switch configuration is damaged"),
        ({"switch": {"topk": 1}}, "unknown key 'topk'"),
    ],
)
def test_damaged_descriptions_are_refused(change, message, tmp_path):
    from llmrl.errors import LlmrlError

    _, folder = saved(tmp_path)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    fields[CONFIG_KEY] |= change
    path.write_text(json.dumps(fields))
    with pytest.raises(LlmrlError, match=message):
        load_switch_model(folder)

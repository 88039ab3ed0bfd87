"""A trainer's weights on their way: names and values, the manifest, the folder they pass through."""

import copy
import stat

import pytest
import torch
from engine_support import STORIES, disturbed, train, trainer, weights
from safetensors.torch import load_file, save_file

from llmrl.errors import ModelError, OutputError, SyncError
from llmrl.rollout import weights as weights_module
from llmrl.rollout.model_facts import read_facts
from llmrl.rollout.transfer import TransferFolder
from llmrl.rollout.weight_files import WEIGHTS_FILE, digest, fingerprint, read_weights, write_weights
from llmrl.rollout.weights import disk_weights


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | options)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    return adapted


@pytest.mark.parametrize("name", ["stories", "untied", "biased", "qknorm", "softcap", "experts"])
def test_disk_weights_are_what_save_pretrained_writes(name, tiny_folder):
    model = trainer(tiny_folder(name))
    train(model)
    found, written = disk_weights(model), weights(model)
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in written)
    assert ("lm_head.weight" in found) == (name in ("untied", "biased", "experts"))


def test_disk_weights_merge_a_lora_as_peft_does():
    model = lora(trainer(STORIES))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = disk_weights(model)
    merged = weights(copy.deepcopy(model).merge_and_unload())
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    plain = load_file(STORIES / "model.safetensors")
    assert (found["model.layers.0.mlp.up_proj.weight"] - plain["model.layers.0.mlp.up_proj.weight"]).abs().max() > 0.01
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_disk_weights_take_off_wrappers():
    model = trainer(STORIES)
    compiled = torch.compile(model)
    assert compiled is not model
    assert disk_weights(compiled).keys() == disk_weights(model).keys()


@pytest.fixture
def one_process():
    """A process group of this process alone: a new one, or that which an engine in this process has left."""
    from torch import distributed

    if distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["plain", "lora", "experts"])
def test_disk_weights_refuse_shards_of_any_model(kind, one_process):
    from torch.distributed.fsdp import fully_shard

    from llmrl.lora_switch import SwitchConfig, get_switch_model

    model = trainer(STORIES)
    if kind == "lora":
        model = lora(model)
    elif kind == "experts":
        model = get_switch_model(model, SwitchConfig(num_experts=2, r=2, top_k=1, gate="hard"))
        assert disk_weights(model)
    fully_shard(model)
    with pytest.raises(ModelError, match=r"is spread over processes \(FSDP or ZeRO-3\): gather the state dict"):
        disk_weights(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "has use_dora: train plain LoRA"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "has lora_bias"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, r"norm is trained whole \(modules_to_save\)"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [5]}, "has trainable_token_indices"),
    ],
    ids=str,
)
def test_disk_weights_refuse_what_is_not_plain_lora(options, message):
    with pytest.raises(ModelError, match=message):
        disk_weights(lora(trainer(STORIES), **options))


def test_disk_weights_refuse_other_adapters_and_merged_ones():
    from peft import IA3Config, get_peft_model

    other = get_peft_model(trainer(STORIES), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ModelError, match="'default' is IA3, expected LORA"):
        disk_weights(other)
    merged = lora(trainer(STORIES))
    merged.merge_adapter()
    with pytest.raises(ModelError, match=r"merged in place: call unmerge_adapter\(\)"):
        disk_weights(merged)


def test_weight_files_come_back_as_they_were(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).to(torch.bfloat16),
        "b": torch.randn(4, 3).T,  # not contiguous
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 3),
    }
    name = write_weights(tmp_path / "new", tensors)
    found = read_weights(tmp_path / "new")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert name == fingerprint({key: digest(tensor) for key, tensor in found.items()})
    other = tensors | {"c": torch.tensor(2.5000002)}
    assert write_weights(tmp_path / "other", other) != name


def test_digest_tells_bits_dtypes_and_shapes_apart():
    plain = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16)
    flipped = plain.clone()
    flipped.view(torch.int16)[2] ^= 1  # the last bit of one number
    variants = [plain, flipped, plain.view(torch.float16), plain.reshape(2, 2), plain.reshape(4, 1), plain.float()]
    assert len({digest(tensor) for tensor in variants}) == len(variants)
    assert digest(plain.reshape(2, 2).T) == digest(plain.reshape(2, 2).T.contiguous())


@pytest.mark.parametrize("damage", ["bit", "dropped", "added", "renamed"])
def test_read_weights_names_what_changed_after_the_manifest(tmp_path, damage):
    tensors = {f"layer.{i}.weight": torch.randn(4, 4) for i in range(6)}
    write_weights(tmp_path / "new", tensors)
    on_disk = load_file(tmp_path / "new" / WEIGHTS_FILE)
    if damage == "bit":
        on_disk["layer.3.weight"].view(torch.int32)[2, 1] ^= 1
    elif damage == "added":
        on_disk["layer.9.weight"] = torch.zeros(1)
    else:
        tensor = on_disk.pop("layer.3.weight")
        on_disk |= {"layer.7.weight": tensor} if damage == "renamed" else {}
    save_file(on_disk, tmp_path / "new" / WEIGHTS_FILE)
    message = {
        "bit": r"corrupted on the way to the engine: layer\.3\.weight; the bytes are not those of the trainer",
        "dropped": r"lacks layer\.3\.weight: the engine would go on with the old values",
        "renamed": r"lacks layer\.3\.weight",
        "added": r"holds layer\.9\.weight, which the model does not have",
    }[damage]
    with pytest.raises(SyncError, match=message):
        read_weights(tmp_path / "new")


def test_read_weights_says_that_a_folder_cannot_be_seen(tmp_path):
    with pytest.raises(SyncError, match=r"cannot read the new weights in .*gone.*set transfer_dir to one that all"):
        read_weights(tmp_path / "gone")
    write_weights(tmp_path / "torn", {"a": torch.zeros(64)})
    file = tmp_path / "torn" / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SyncError, match="cannot read the new weights"):
        read_weights(tmp_path / "torn")


@pytest.mark.vllm
def test_vllm_update_names_a_tensor_corrupted_on_the_way(synced_vllm, stories_model, monkeypatch):
    """A bit flips, or a tensor is lost, in the file after the trainer has written it."""
    from llmrl.rollout import vllm_engine

    moved, version = weights(disturbed(stories_model)), synced_vllm.version
    for damage, words in [("flip", "corrupted on the way to the engine"), ("drop", "lacks")]:

        def damaged(folder, tensors, damage=damage):
            name = write_weights(folder, tensors)
            on_disk = load_file(folder / WEIGHTS_FILE)
            if damage == "flip":
                on_disk["model.layers.1.mlp.up_proj.weight"].view(torch.int32)[5, 5] ^= 1 << 20
            else:
                del on_disk["model.layers.1.mlp.up_proj.weight"]
            save_file(on_disk, folder / WEIGHTS_FILE)
            return name

        monkeypatch.setattr(vllm_engine, "write_weights", damaged)
        before = synced_vllm.score([1, 300, 310])
        with pytest.raises(SyncError, match=rf"{words}.*model\.layers\.1\.mlp\.up_proj\.weight"):
            synced_vllm.update(moved)
        assert synced_vllm.version == version
        assert synced_vllm.score([1, 300, 310]) == before
    monkeypatch.undo()
    assert synced_vllm.update(moved).number == version.number + 1


def test_transfer_folder_is_private_and_removed(tmp_path):
    transfer = TransferFolder(tmp_path)
    assert list(tmp_path.iterdir()) == []  # made when first needed
    first = transfer.folder(1, 1000)
    assert not first.exists()
    assert first.parent.parent == tmp_path
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    first.mkdir()
    second = transfer.folder(2, 1000)
    second.mkdir()
    (second / "file").write_text("x")
    assert not transfer.folder(2, 1000).exists()  # of an update that failed
    second.mkdir()
    transfer.keep_only(second)
    assert (first.exists(), second.exists()) == (False, True)
    transfer.remove()
    assert list(tmp_path.iterdir()) == []
    transfer.remove()


def test_transfer_folder_says_that_there_is_no_room(tmp_path):
    with pytest.raises(OutputError, match=r"MiB free, the weights take \d+: set transfer_dir"):
        TransferFolder(tmp_path).folder(1, 1 << 60)
    with pytest.raises(OutputError, match=r"no folder can be made in .*nowhere: set transfer_dir"):
        TransferFolder(tmp_path / "nowhere").folder(1, 10)


@pytest.mark.vllm
def test_vllm_engine_keeps_one_version_and_removes_it_at_the_end(tmp_path, stories_model):
    from engine_support import SMALL

    from llmrl.rollout.vllm_engine import VllmEngine

    with VllmEngine(str(STORIES), transfer_dir=tmp_path, **SMALL) as engine:
        for _ in range(3):
            engine.update(weights(stories_model))
        (root,) = tmp_path.iterdir()
        assert [folder.name for folder in root.iterdir()] == ["version-3"]
    assert list(tmp_path.iterdir()) == []


def test_read_facts_of_a_model(tmp_path):
    facts = read_facts(str(STORIES))
    assert (facts.max_model_len, facts.vocab_size, facts.end_ids) == (512, 512, {1, 2})
    assert facts.architecture == "LlamaForCausalLM"
    assert read_facts(str(STORIES), max_model_len=100).max_model_len == 100
    with pytest.raises(ModelError, match="max_model_len 600 is more than the 512 positions"):
        read_facts(str(STORIES), max_model_len=600)


def test_a_thousand_syncs_of_a_bfloat16_lora_leave_no_trace_where_merging_in_place_does():
    """What is sent comes from a clean base each time: equal bits after any number of syncs, and the trainer untouched."""
    model = lora(trainer(STORIES).to(torch.bfloat16), r=2)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_base_model().get_submodule(name)
    base = layer.get_base_layer().weight.detach().clone()
    exact = base.double() + layer.get_delta_weight("default").double()
    start, first = layer.lora_B["default"].weight.detach().clone(), disk_weights(model)[f"{name}.weight"]
    assert (first.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()  # one rounding
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):  # a trainer that moves on between updates
        layer.lora_B["default"].weight.data = start * torch.rand(1, generator=generator).to(torch.bfloat16)
        weights_module._merged_layers(model)
    layer.lora_B["default"].weight.data = start
    assert torch.equal(weights_module._merged_layers(model)[f"{name}.weight"], first)
    assert torch.equal(layer.get_base_layer().weight, base)
    # how trl does it: merge into the weights, send them, take the adapter out again
    for _ in range(1000):
        layer.lora_B["default"].weight.data = start * torch.rand(1, generator=generator).to(torch.bfloat16)
        layer.merge()
        layer.unmerge()
    moved = layer.get_base_layer().weight.double() - base.double()
    assert moved.norm() / base.double().norm() > 1e-3


def test_an_adapter_on_a_tied_output_layer_is_refused():
    """Its weight is the embedding's, which has no adapter: what would be sent is the base."""
    model = lora(trainer(STORIES), target_modules=["lm_head", "q_proj"])
    with pytest.raises(ModelError, match=r"lm_head.weight has an adapter and shares its weight"):
        disk_weights(model)


def test_adapters_side_by_side_and_other_ranks_are_merged_by_one_launch(monkeypatch):
    from peft import LoraConfig

    model = lora(trainer(STORIES), r=4, rank_pattern={"q_proj": 7}, alpha_pattern={"up_proj": 3}, use_rslora=True)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B.other" in key:
                parameter.normal_(0, 0.2)
    model.base_model.set_adapter(["default", "other"])
    launches, plain = [], weights_module.MergePlan.merge
    monkeypatch.setattr(
        weights_module.MergePlan, "merge", lambda self, *route: launches.append(len(self.items)) or plain(self, *route)
    )
    found = disk_weights(model)
    expected = weights(copy.deepcopy(model).merge_and_unload(adapter_names=["default", "other"]))
    assert launches == [35]
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6)


def test_an_adapted_embedding_is_merged_too():
    model = lora(trainer(STORIES), target_modules=["embed_tokens", "q_proj"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_embedding_B" in key:
                parameter.normal_(0, 0.2)
    found = disk_weights(model)
    expected = weights(copy.deepcopy(model).merge_and_unload())
    torch.testing.assert_close(
        found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"], rtol=0, atol=1e-6
    )

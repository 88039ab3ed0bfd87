"""Routed experts in an engine: the trainer's experts and router arrive in vLLM, and the canary sees that they did."""

import pytest
import torch
from engine_support import STORIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrl.errors import ModelError, SyncError
from llmrl.lora_switch import SwitchConfig, get_switch_model
from llmrl.rollout.sync import WeightSync
from llmrl.rollout.weights import disk_weights
from llmrl.types import SamplingConfig
from llmrl.vllm_compat import vllm_build, why_no_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(vllm_build() is None, reason=f"no vLLM: {why_no_vllm()}"),
]


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    """A switch model on the real pretrained model, and its folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    model = get_switch_model(model, SwitchConfig(num_experts=4, r=3, router_input="layer0_mlp"))
    with torch.no_grad():
        for layer in model.switch_layers().values():
            layer.switch_B.normal_(0, 0.05)
    folder = tmp_path_factory.mktemp("switch")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(STORIES).save_pretrained(folder)
    return model, folder


def test_trained_experts_arrive_in_vllm(switch):
    from llmrl.rollout.vllm_engine import VllmEngine

    model, folder = switch
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    sampling = SamplingConfig(temperature=0, max_tokens=12)
    with VllmEngine(str(folder), dtype="float32", kv_cache_memory_bytes=64 << 20, max_model_len=256) as engine:
        sync = WeightSync(engine, model, probe_ids=list(range(3, 203)))
        before = engine.score(range(3, 40))
        for number in (1, 2):
            ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(number))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert sync.update().number == number
        after = engine.score(range(3, 40))
        assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.05
        model.eval()
        logits = model(torch.tensor([list(range(3, 40))])).logits[0].log_softmax(-1)
        expected = [float(logits[i, t]) for i, t in enumerate(range(4, 40))]
        assert max(abs(a - b) for a, b in zip(after, expected, strict=True)) < 1e-3
        assert len(engine.generate([[1, 5, 9]], sampling)[0][0].token_ids) == 12
        tensors = disk_weights(model)
        del tensors["switch_router.weight"]
        with pytest.raises(SyncError, match=r"lacks switch_router\.weight"):
            engine.update(tensors)


def test_an_update_may_come_in_whole_layers_but_not_in_less():
    """What other senders do, on the class itself: the first load is whole, a later one need not be."""
    from types import SimpleNamespace

    from llmrl.serving.switch_models import SwitchExperts, _load

    layer = SimpleNamespace(tp_rank=0, tp_size=1, output_sizes=[4, 2], output_size=6, input_size=5)
    described = SimpleNamespace(switch=SwitchConfig(num_experts=2, r=3))
    experts = SwitchExperts(layer, ["l.gate_proj", "l.up_proj"], [True, True], described, torch.float32)
    own = torch.nn.ModuleDict({"l": experts, "router": torch.nn.Linear(5, 2, bias=False)})
    torch.manual_seed(0)
    sizes = {"l.gate_proj": 4, "l.up_proj": 2}
    tensors = {f"{name}.switch_A": torch.randn(2, 3, 5) for name in sizes}
    tensors |= {f"{name}.switch_B": torch.randn(out, 6) for name, out in sizes.items()}
    with pytest.raises(ModelError, match=r"switch_router\.weight is missing: the folder is damaged"):
        _load(own, tensors)
    with pytest.raises(ModelError, match=r"l\.gate_proj\.switch_A is missing: save the folder again"):
        _load(own, {"switch_router.weight": torch.zeros(2, 5)})
    _load(own, tensors | {"switch_router.weight": torch.ones(2, 5)})
    assert torch.equal(experts.A, torch.cat([tensors["l.gate_proj.switch_A"], tensors["l.up_proj.switch_A"]]))
    assert _load(own, {"switch_router.weight": torch.zeros(2, 5)}) == {"llmrl_switch.router.weight"}
    assert float(own["router"].weight.abs().max()) == 0
    _load(own, {name: tensor * 2 for name, tensor in tensors.items()})
    assert torch.equal(experts.B[:4, :6], 2 * tensors["l.gate_proj.switch_B"])
    with pytest.raises(ModelError, match=r"switch_B is missing: send the experts of q, k and v"):
        _load(
            own,
            {"l.up_proj.switch_A": tensors["l.up_proj.switch_A"], **{k: v for k, v in tensors.items() if "gate" in k}},
        )
    with pytest.raises(ModelError, match="belongs to no layer of the base"):
        _load(own, {"m.q_proj.switch_A": torch.zeros(1)})


def test_what_a_switch_model_sends_is_what_its_folder_holds(switch):
    from safetensors import safe_open

    model, folder = switch
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert disk_weights(model).keys() == set(file.keys())


def test_a_fixed_mixture_is_an_adapter_that_vllm_serves(switch, tmp_path):
    from llmrl.lora_switch import export_mixture, fix_route, load_switch_model
    from llmrl.rollout.vllm_engine import VllmEngine

    _, folder = switch
    model = load_switch_model(folder)
    adapter = export_mixture(model, {0: 0.3, 2: 0.7}, tmp_path / "mixture")
    ids = list(range(3, 40))
    options = {"dtype": "float32", "kv_cache_memory_bytes": 64 << 20, "max_model_len": 256, "max_lora_rank": 8}
    with VllmEngine(str(STORIES), **options) as engine:
        alone = engine.score(ids)
        engine.update(adapter)
        found = engine.score(ids)
    fix_route(model, {0: 0.3, 2: 0.7})
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-3
    assert max(abs(a - b) for a, b in zip(found, alone, strict=True)) > 0.05

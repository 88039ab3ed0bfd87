"""peft adapters in, peft adapters out: the same numbers on both sides."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from switch_models import base_model, prompt, stir
from transformers import AutoModelForCausalLM

from llmrl.errors import ConfigError, ModelError, UsageError
from llmrl.lora_switch import SwitchConfig, export_mixture, fix_route, get_switch_model, import_experts


def adapter(folder, seed, base=None, **options):
    """Write a peft adapter with a B that is not zero."""
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 4 + seed, "target_modules": ["q_proj", "down_proj"], **options}
    model = get_peft_model(base or base_model(), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(tmp_path):
    return [adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2), adapter(tmp_path / "c", 3, use_rslora=True)]


def test_each_imported_expert_is_its_adapter(adapters):
    model = import_experts(base_model(), adapters).eval()
    assert model.switch_config.num_experts == 3
    assert model.switch_config.scale == 1.0
    for expert, folder in enumerate(adapters):
        expected = PeftModel.from_pretrained(base_model(), folder).eval()(prompt()).logits
        fix_route(model, {expert: 1.0})
        torch.testing.assert_close(model(prompt()).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_router_of_imported_experts_is_trained(adapters):
    model = import_experts(base_model(), adapters, router_input="layer_k", router_layer=0, top_k=1, gate="hard")
    model.train()(input_ids=prompt(), labels=prompt()).loss.backward()
    assert float(model.switch_router.weight.grad.abs().max()) > 0


def test_import_refuses_adapters_that_do_not_go_together(adapters, tmp_path):
    other_rank = adapter(tmp_path / "r", 4, r=5)
    with pytest.raises(ModelError, match=r"experts of different ranks: .*a has r = 3, .*r r = 5"):
        import_experts(base_model(), [adapters[0], other_rank])
    other_layers = adapter(tmp_path / "l", 4, target_modules=["q_proj"])
    with pytest.raises(ModelError, match="experts on different layers"):
        import_experts(base_model(), [adapters[0], other_layers])
    with pytest.raises(ModelError, match="found other tensors"):  # the whole lm_head comes along
        import_experts(base_model(), [adapter(tmp_path / "x", 4, target_modules=["lm_head"])])


def test_import_refuses_what_is_no_plain_lora(adapters, tmp_path):
    with pytest.raises(UsageError, match="not found"):
        import_experts(base_model(), [tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="at least one folder"):
        import_experts(base_model(), [])
    with pytest.raises(ModelError, match="this adapter has use_dora"):
        import_experts(base_model(), [adapter(tmp_path / "d", 4, use_dora=True)])
    with pytest.raises(ModelError, match="this adapter has rank_pattern"):
        import_experts(base_model(), [adapter(tmp_path / "p", 4, rank_pattern={"q_proj": 2})])
    with pytest.raises(ConfigError, match="num_experts is what the adapters say"):
        import_experts(base_model(), adapters, num_experts=3)
    with pytest.raises(ModelError, match="so its experts would be lost"):
        import_experts(base_model(), adapters, router_input="layer0_mlp")


def test_import_refuses_another_base(adapters):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    )
    with pytest.raises(ModelError, match="belongs to another base"):
        import_experts(small, adapters)


def test_import_refuses_adapters_that_need_another_base(adapters, tmp_path):
    changed = adapter(tmp_path / "p", 4, init_lora_weights="pissa")
    with pytest.raises(ModelError, match="init_lora_weights=pissa, which changes the base"):
        import_experts(base_model(), [changed])
    for seed, name in ((0, "one"), (5, "two")):
        base_model(seed=seed).save_pretrained(tmp_path / name)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    named = adapter(tmp_path / "n", 4, base=one)
    with pytest.raises(ModelError, match="whose weights are not those of this model"):
        import_experts(two, [named])


def test_import_that_is_refused_leaves_the_model_as_it_was(adapters):
    model = base_model()
    with pytest.raises(ModelError, match="so its experts would be lost"):
        import_experts(model, adapters, router_input="layer0_mlp")
    assert import_experts(model, adapters).switch_config.num_experts == 3


def switch_on_disk(tmp_path, **options):
    base_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_switch_model(model, SwitchConfig(**{"num_experts": 4, "r": 3, **options})).eval()
    stir(model)
    return model


@pytest.mark.parametrize("weights", [[0.25, 0.0, 0.75, 0.0], {2: 1.0}, [0.1, 0.2, 0.3, 0.4]])
@pytest.mark.parametrize(
    "options", [{}, {"router_input": "layer_k", "router_layer": 1}, {"target_modules": ("o_proj",)}]
)
def test_an_exported_mixture_is_one_peft_adapter(weights, options, tmp_path):
    model = switch_on_disk(tmp_path, **options)
    folder = export_mixture(model, weights, tmp_path / "mixture")
    fix_route(model, weights)
    expected = model(prompt()).logits
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    torch.testing.assert_close(opened(prompt()).logits, expected, rtol=1e-4, atol=1e-4)
    used = len([w for w in (weights.values() if isinstance(weights, dict) else weights) if w])
    assert opened.peft_config["default"].r == 3 * used
    # vLLM serves it: the check of our own engine says so
    from llmrl.rollout.adapters import check_adapter

    assert check_adapter(folder, tmp_path / "base").rank == 3 * used


def test_mixtures_out_of_range_are_refused(tmp_path):
    model = switch_on_disk(tmp_path)
    with pytest.raises(ConfigError, match="a route out of range: expert 4, the model has 0 to 3"):
        export_mixture(model, {4: 1.0}, tmp_path / "m")
    with pytest.raises(ConfigError, match="expected 4 weights, one an expert, got 2"):
        fix_route(model, [1.0, 0.0])
    with pytest.raises(ConfigError, match="expected finite weights"):
        fix_route(model, [float("nan"), 0.0, 0.0, 0.0])
    with pytest.raises(ConfigError, match="a weight that is not 0"):
        export_mixture(model, [0.0] * 4, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_mixture_needs_a_base_on_disk(tmp_path):
    model = get_switch_model(base_model(), SwitchConfig(num_experts=2, r=2))
    with pytest.raises(ModelError, match="the base came from no folder"):
        export_mixture(model, [1.0, 0.0], tmp_path / "m")

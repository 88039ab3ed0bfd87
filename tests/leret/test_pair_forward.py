"""Both completions of a pair after one pass over their prompt: the same as whole rows, gradients too."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stage_rows import END
from stage_run import nll
from transformers import AutoModelForCausalLM

from llmrl.leret.collate import PairCollator
from llmrl.leret.pair_forward import completion_logps, shares_prompt
from llmrl.leret.preference_data import PairRow

PAIRS = [
    PairRow((1, 7, 8, 9), (20, 21), (30, 31, END), "a"),
    PairRow((1, 5), (40, 41, 42, 43), (50,), "b"),
    PairRow((1, 300, 301, 302, 303, 304), (60, END), (61, 62, 63), "c"),
]
SHARING = {"llama": True, "qwen3": True, "cohere": True, "gpt2": True, "gemma2": False, "mistral": True}


@pytest.fixture
def batch():
    return PairCollator()([{"row": row} for row in PAIRS])


@pytest.mark.parametrize("name", SHARING)
def test_completion_logps_equals_unpadded_rows_and_makes_no_logits_of_prompts(tiny_model, batch, name):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(name), attn_implementation="eager")
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    with torch.no_grad():
        chosen, rejected = completion_logps(model, batch)
    size = model.config.vocab_size  # prompts have up to 6 tokens, completions up to 4
    assert shapes == ([(3, 1, size), (6, 4, size)] if SHARING[name] else [(6, 5, size)])
    assert chosen.length.tolist() == [2, 4, 2]
    assert rejected.length.tolist() == [3, 1, 3]
    for i, row in enumerate(PAIRS):
        assert chosen.total[i].item() == pytest.approx(-nll(model, row.prompt_ids, row.chosen_ids), rel=1e-5)
        assert rejected.total[i].item() == pytest.approx(-nll(model, row.prompt_ids, row.rejected_ids), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradients_are_those_of_whole_rows(tiny_model, batch, monkeypatch, lora):
    found = []
    for shared in (True, False):
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM"))
        model.train()
        if not shared:
            monkeypatch.setattr("llmrl.leret.pair_forward.shares_prompt", lambda model: False)
        assert shares_prompt(model)
        chosen, rejected = completion_logps(model, batch)
        (chosen.total - 2 * rejected.total).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.isfinite(gradient).all()
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5 * float(found[1][name].abs().max()))


def test_prompt_is_not_shared_where_nothing_is_kept_of_it(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).train()
    assert shares_prompt(model)
    model.gradient_checkpointing_enable()
    assert not shares_prompt(model)
    assert not shares_prompt(model.eval())  # the reference is computed as the policy is


def test_prompt_is_not_shared_by_layers_that_are_wrapped_to_be_computed_again(tiny_model):
    """As FSDP's activation checkpointing does: the second computation would find a longer cache."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).train()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    assert not shares_prompt(model)
    assert not shares_prompt(model.eval())  # the reference is computed as the policy is

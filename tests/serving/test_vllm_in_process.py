"""In one vLLM process: what vLLM says about llmrl's folders is what transformers says."""

import re

import pytest
import torch
from serving_folders import NEW_TOKENS, PARITY, STORIES, assert_agrees, expected, largest_difference, token_logprobs

pytestmark = pytest.mark.vllm


def answer_of(in_process, name):
    assert "answer" in in_process[name], in_process[name].get("traceback") or in_process[name]
    return in_process[name]["answer"]


@pytest.mark.parametrize("name", PARITY)
def test_llm_agrees_with_transformers(name, in_process, parity_folders, prompts):
    folder, base = parity_folders[name]
    assert_agrees(answer_of(in_process, name)["answers"], expected(folder, base, prompts))


@pytest.mark.parametrize("name", [name for name in PARITY if name.endswith("-transformer")])
def test_attention_of_a_head_comes_after_the_bases_layers(name, in_process):
    """vLLM orders its caches by the one number in a layer's name."""
    layers = {int(re.search(r"\.(\d+)\.", path)[1]): path for path in answer_of(in_process, name)["attention"]}
    assert sorted(layers) == [0, 1, 2]
    assert [number for number, path in layers.items() if "llmrl_heads" in path] == [2]


def test_classify_gives_the_reward_heads_numbers(in_process, reward_folder, prompts):
    from safetensors.torch import load_file
    from transformers import AutoModel

    tensors = load_file(reward_folder / "llmrl_heads.safetensors")
    weight, bias = tensors["llmrl_heads.reward.weight"], tensors["llmrl_heads.reward.bias"]
    decoder = AutoModel.from_pretrained(STORIES).eval()  # its last hidden state has gone through the final norm
    scores = answer_of(in_process, "reward")
    assert len(scores) == len(prompts)
    for ids, found in zip(prompts, scores, strict=True):
        with torch.inference_mode():
            state = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        wanted = weight @ state + bias
        assert wanted.std() > 0.1  # five different numbers
        assert len(found) == 5
        assert (torch.tensor(found) - wanted).abs().max() < 1e-4


def test_speculative_decoding_is_refused(in_process):
    error = in_process["speculative"].get("error", "it started")
    assert "llmrl heads do not work with speculative decoding" in error
    assert "Remove --speculative-config" in error


def test_reload_weights_updates_and_keeps_the_head(in_process, served, other_head, prompts):
    answers = answer_of(in_process, "reload")
    first, second = expected(served, STORIES, prompts), expected(other_head, STORIES, prompts)
    assert largest_difference(first["logprobs"], second["logprobs"]) > 0.3
    assert_agrees(answers["start"], first)
    assert_agrees(answers["new_head"], second)
    assert_agrees(answers["base_alone"], second)  # no head tensor came: the one before stays
    assert_agrees(answers["from_disk"], first)


def test_model_class_on_ranks_without_logits(in_process):
    answer = answer_of(in_process, "classes")
    assert answer["no_logits"] is None
    assert (answer["base"], answer["name"]) == ("LlamaForCausalLM", "LlmrlLlamaForCausalLM")
    assert answer["same_class"]


def test_model_class_overrides_sharded_sampling(in_process):
    answer = answer_of(in_process, "classes")
    assert answer["compute_logits"] == pytest.approx(torch.tensor(0.5).exp().item())
    assert answer["compute_logits_local"] == answer["compute_logits"]
    assert "LlamaForCausalLM" in answer["with_local"]
    assert answer["without_local_override"] == []


def test_tau_travels_in_columns_of_16_bits_and_arrives_in_float32(in_process):
    answer = answer_of(in_process, "classes")
    assert answer["pack_error"] < 3e-7
    assert answer["pack_columns"]["torch.bfloat16"] == ["torch.bfloat16", [1001, 3]]


def test_heads_that_need_one_rank_refuse_several(in_process):
    answer = answer_of(in_process, "classes")
    assert "a transformer temperature head is not sharded" in answer["two_gpus"]
    assert "vector scaling needs the whole vocabulary on one rank" in answer["part_of_the_vocabulary"]


def test_expected_differs_from_the_base(parity_folders, prompts):
    """The comparison above would notice a head that is not applied."""
    folder, base = parity_folders["llama"]
    wanted = expected(folder, base, prompts)
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(base).eval()
    answers = []
    for ids, new in zip(prompts, wanted["greedy"], strict=True):
        logprobs = token_logprobs(bare, ids + new)
        answers.append({"ids": new, "prompt_logprobs": logprobs[:-NEW_TOKENS], "logprobs": logprobs[-NEW_TOKENS:]})
    with pytest.raises(AssertionError):
        assert_agrees(answers, wanted)

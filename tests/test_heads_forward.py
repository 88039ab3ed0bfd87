"""Heads on causal LMs that are not built like Llama, on packed rows, and under PEFT: right numbers, or a refusal."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from small_models import config_fields, random_model, with_head

from llmrl.errors import ModelError
from llmrl.head_cache import attention_layers, cached_tokens, same_sequence, sequence_tau
from llmrl.heads_forward import check_cache, decoder_of, states_of

IDS = torch.randint(3, 250, (2, 14), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
GREEDY |= {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
ALMOST = {"rtol": 1e-4, "atol": 1e-4}


# --- where the hidden states and the cache are ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama4ForCausalLM", "MiniMaxForCausalLM", "FalconH1ForCausalLM"])
def test_generate_with_cache_is_the_whole_text_without(name):
    model, head = with_head(name)
    with torch.inference_mode():
        cached = model.generate(IDS, **GREEDY)
        whole = model(input_ids=cached.sequences, use_cache=False).logits[:, 13:-1]
        states = decoder_of(model)(input_ids=cached.sequences, use_cache=False).last_hidden_state
        model.attach_heads(torch.nn.ModuleDict())
        bare = model(input_ids=cached.sequences, use_cache=False).logits[:, 13:-1]
    tau = head(states)[:, 13:-1]
    assert tau.std() > 0.1
    torch.testing.assert_close(whole, bare * tau.exp(), **ALMOST)
    torch.testing.assert_close(torch.stack(cached.logits, 1), whole, **ALMOST)


@pytest.mark.parametrize("name", ["RecurrentGemmaForCausalLM", "MambaForCausalLM"])
def test_state_outside_the_kv_cache_is_refused_and_without_it_the_head_is_right(name):
    model, head = with_head(name)
    with torch.inference_mode():
        with pytest.raises(ModelError, match=r"keeps its state outside past_key_values.*use_cache=False.*ats-mlp"):
            model.generate(IDS, **GREEDY)
        with pytest.raises(ModelError, match="keeps its state outside past_key_values"):
            model(input_ids=IDS)  # the configuration asks for a cache
        found = model(input_ids=IDS, use_cache=False).logits
        model.attach_heads(torch.nn.ModuleDict())
        hidden = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
        bare = model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(found, bare * head(hidden).exp(), **ALMOST)


def test_states_that_are_cast_on_their_way_are_read_as_they_arrive():
    """The last norm of a Mamba in bfloat16 gives float32."""
    model, head = with_head("MambaForCausalLM", dtype=torch.bfloat16)
    with torch.inference_mode():
        found = model(input_ids=IDS, use_cache=False).logits
        model.attach_heads(torch.nn.ModuleDict())
        states = decoder_of(model)(input_ids=IDS, use_cache=False).last_hidden_state
        bare = model(input_ids=IDS, use_cache=False).logits
    assert (states.dtype, found.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found, bare * head(states.bfloat16()).exp(), **ALMOST)


def test_head_of_one_token_needs_no_cache_of_the_base():
    model, _ = with_head("MambaForCausalLM", "mlp")
    with torch.inference_mode():
        cached = model.generate(IDS, **GREEDY)
        whole = model(input_ids=cached.sequences, use_cache=False).logits[:, 13:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1), whole, **ALMOST)


def test_states_changed_before_the_output_embedding_are_refused_by_sequence_heads_only():
    model, _ = with_head("ModernBertDecoderForCausalLM")
    with torch.inference_mode(), pytest.raises(ModelError, match=r"changes its hidden states .* --method ats-mlp"):
        model(input_ids=IDS)
    model, head = with_head("ModernBertDecoderForCausalLM", "mlp")
    with torch.inference_mode():
        found = model(input_ids=IDS).logits
        model.attach_heads(torch.nn.ModuleDict())
        entering = model.lm_head(model.model(input_ids=IDS).last_hidden_state)
        torch.testing.assert_close(found, model(input_ids=IDS).logits * head(entering).exp(), **ALMOST)


def test_cache_without_attention_layers_is_refused():
    _, head = with_head("LlamaForCausalLM")
    linear = SimpleNamespace(layers=[transformers.cache_utils.LinearAttentionLayer()])
    assert attention_layers(linear) == []
    assert cached_tokens(linear) == cached_tokens(None) == 0
    with pytest.raises(ModelError, match=r"SimpleNamespace without attention layers: .*use_cache=False"):
        sequence_tau("temperature", head, torch.randn(1, 3, 32), None, linear, 0)


def test_check_cache_follows_the_argument_then_the_configuration_outside_of_training():
    model = random_model("LlamaForCausalLM")
    for use_cache in (True, None):
        with pytest.raises(ModelError, match="outside past_key_values"):
            check_cache(model, None, use_cache)
    check_cache(model, None, False)
    check_cache(model, object(), True)
    check_cache(model.train(), None, None)
    model.eval().config.use_cache = False
    check_cache(model, None, None)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Llama4ForCausalLM", "ModernBertDecoderForCausalLM"])
def test_decoder_of_is_the_part_that_gives_hidden_states(name):
    from peft import LoraConfig, get_peft_model

    model = random_model(name)
    assert decoder_of(model) is model.model
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    assert decoder_of(get_peft_model(model, lora)) is model.model


def test_decoder_of_a_multimodal_model_is_its_language_model():
    text = {**config_fields("LlamaForCausalLM"), "model_type": "llama"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision)
    model = transformers.LlavaForConditionalGeneration(config)
    assert decoder_of(model) is model.model.language_model


def test_decoder_of_a_model_without_one_is_refused():
    class Bare(torch.nn.Module):
        def get_output_embeddings(self):
            return self

    with pytest.raises(ModelError, match="Bare has no decoder apart from its output embedding"):
        decoder_of(Bare())


def test_states_of_takes_tuples_and_outputs_and_refuses_the_rest():
    states = torch.zeros(1, 2, 3)
    assert states_of(None, (states, None)) is states
    assert states_of(None, SimpleNamespace(last_hidden_state=states)) is states
    with pytest.raises(ModelError, match="NoneType returned a SimpleNamespace without last_hidden_state"):
        states_of(None, SimpleNamespace(logits=states))


# --- packed rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_packed_rows_are_their_sequences_alone(name):
    """Two sequences in each of two rows, cut at different places, without padding."""
    model, _ = with_head(name)
    cuts = (6, 9)
    positions = torch.stack([torch.cat([torch.arange(cut), torch.arange(14 - cut)]) for cut in cuts])
    with torch.inference_mode():
        packed = model(input_ids=IDS, position_ids=positions, use_cache=False).logits
        mixed = model(input_ids=IDS, use_cache=False).logits
        for row, cut in enumerate(cuts):
            for part in (slice(0, cut), slice(cut, 14)):
                alone = model(input_ids=IDS[row : row + 1, part], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, part], alone, **ALMOST)
    assert (packed - mixed).abs().max() > 1


def test_packed_rows_with_a_cache_or_without_positions_are_refused():
    model, _ = with_head("LlamaForCausalLM")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    with torch.inference_mode():
        with pytest.raises(ModelError, match=r"packed rows .* need use_cache=False"):
            model(input_ids=IDS, position_ids=positions)
        lengths = torch.tensor([0, 3, 14])
        with pytest.raises(ModelError, match=r"packed rows .* need position_ids that start again"):
            model(input_ids=IDS[:1], cu_seq_lens_q=lengths, use_cache=False)


def test_positions_of_left_padding_are_no_packed_row():
    """They start again where the padding ends; the mask says so."""
    model, _ = with_head("LlamaForCausalLM")
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.inference_mode():
        padded = model(input_ids=IDS[:1], attention_mask=mask, position_ids=positions).logits[0, 5:]
        alone = model(input_ids=IDS[:1, 5:]).logits[0]
    torch.testing.assert_close(padded, alone, **ALMOST)


def test_same_sequence():
    rows = same_sequence(torch.tensor([[0, 1, 2, 0, 1], [4, 5, 6, 7, 8]]))
    assert rows.shape == (2, 1, 5, 5)
    first = [[1, 1, 1, 0, 0]] * 3 + [[0, 0, 0, 1, 1]] * 2
    assert rows[0, 0].int().tolist() == first
    assert rows[1].all()
    assert same_sequence(torch.tensor([[0], [0]])) is None
    assert same_sequence(torch.arange(7)[None] + 3) is None
    text = torch.tensor([[0, 1, 0, 1]])
    images = torch.tensor([[0, 0, 0, 1]])
    assert same_sequence(torch.stack([text, images, images, images]))[0, 0].int().tolist()[0] == [1, 1, 0, 0]
    assert same_sequence(torch.stack([images, images, images])) is None


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
@pytest.mark.parametrize("architecture", ["mlp", "transformer"])
def test_lora_goes_into_the_base_and_not_into_the_head(architecture, targets):
    from peft import LoraConfig, get_peft_model

    model, head = with_head("LlamaForCausalLM", architecture)
    before = dict(head.named_parameters())
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    adapted = [name for name, _ in tuned.named_parameters() if "lora_" in name]
    assert adapted
    assert not [name for name in adapted if "llmrl_heads" in name]
    assert dict(head.named_parameters()).keys() == before.keys()
    with torch.inference_mode():
        found = tuned(input_ids=IDS).logits
        states = model.model(input_ids=IDS).last_hidden_state
        model.attach_heads(torch.nn.ModuleDict())
        torch.testing.assert_close(found, tuned(input_ids=IDS).logits * head(states).exp(), **ALMOST)

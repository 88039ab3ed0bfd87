"""A head that reads earlier positions: the same numbers with and without a KV cache, however the tokens come in."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

from llmrl.errors import ModelError
from llmrl.head_cache import visible
from llmrl.heads_forward import LogitsHeadsMixin, forward_with_heads

IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(1))
ALMOST = {"rtol": 1e-4, "atol": 1e-4}


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@pytest.fixture(scope="module")
def folder(tiny_model, save_head, tmp_path_factory):
    folder = tmp_path_factory.mktemp("block")
    save_head(tiny_model("llama"), folder, architecture="transformer", merged=True)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def whole(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


@torch.inference_mode()
def in_pieces(model, cache, sizes, ids=IDS, **kwargs):
    """Logits of the ids read in pieces of these sizes through one cache."""
    found, start = [], 0
    for size in sizes:
        out = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True, **kwargs)
        found.append(out.logits)
        cache, start = out.past_key_values, start + size
    return torch.cat(found, 1)


def tau_of(logits, base_logits):
    return (logits / base_logits).median(-1).values.log()


def test_logits_are_the_bases_times_exp_tau_of_the_head(any_model, save_head, tmp_path):
    """Every architecture; the hidden states of all positions come from the base's own output."""
    heads = save_head(any_model, tmp_path, architecture="transformer")
    capped = "gemma2" in str(any_model)
    base, model = load(any_model, **({"attn_implementation": "eager"} if capped else {})), load(tmp_path)
    with torch.inference_mode():
        out = base(input_ids=IDS, output_hidden_states=True)
        tau = heads["temperature"](out.hidden_states[-1])
        found = model(input_ids=IDS).logits
    assert tau.std() > 0.05
    torch.testing.assert_close(found, out.logits.float() * tau.exp(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(14,), (1,) * 14, (5, 1, 1, 7)])
def test_pieces_through_a_cache_are_the_whole(model, whole, sizes):
    torch.testing.assert_close(in_pieces(model, None, sizes), whole, **ALMOST)


def test_pieces_through_a_static_cache_are_the_whole(model, whole):
    cache = StaticCache(config=model.config, max_cache_len=20)
    torch.testing.assert_close(in_pieces(model, cache, (6, 1, 7)), whole, **ALMOST)


def test_generate_with_cache_is_without_in_every_architecture(any_model, save_head, tmp_path):
    save_head(any_model, tmp_path, architecture="transformer")
    model = load(tmp_path)
    settings = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        cached = model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, **settings)
        plain = model.generate(IDS, attention_mask=torch.ones_like(IDS), pad_token_id=0, use_cache=False, **settings)
    assert cached.sequences.equal(plain.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **ALMOST)


def test_generate_greedy_is_the_bases(model, tiny_model):
    base = load(tiny_model("llama"))
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    assert model.generate(IDS, attention_mask=mask, **settings).equal(
        base.generate(IDS, attention_mask=mask, **settings)
    )


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padded_rows_are_rows_alone(model, whole, cache):
    """Rows of 14 and 9 tokens in one batch, then four more tokens each, against each row by itself."""
    lengths, ids = (14, 9), torch.zeros(2, 14, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, 14 - length :], mask[row, 14 - length :] = IDS[row, :length], 1
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.inference_mode():
        batch = model.generate(ids, attention_mask=mask, pad_token_id=0, cache_implementation=cache, **settings)
        for row, length in enumerate(lengths):
            alone = model.generate(
                IDS[row : row + 1, :length], attention_mask=torch.ones(1, length), pad_token_id=0, **settings
            )
            assert batch.sequences[row, 14:].equal(alone.sequences[0, length:])
            ours, theirs = (torch.stack(out.logits)[:, i] for out, i in ((batch, row), (alone, 0)))
            torch.testing.assert_close(ours, theirs, **ALMOST)


@pytest.mark.parametrize("cache", [None, "static"])
def test_beam_search_moves_the_heads_state_with_the_beams(model, cache):
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "early_stopping": True}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    mask = torch.ones_like(IDS)
    with torch.inference_mode():
        cached = model.generate(IDS, attention_mask=mask, cache_implementation=cache, **settings)
        plain = model.generate(IDS, attention_mask=mask, use_cache=False, **settings)
    assert cached.sequences.equal(plain.sequences)
    torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, **ALMOST)


def test_static_cache_that_is_reset_forgets_in_the_head_too(model, whole):
    cache = StaticCache(config=model.config, max_cache_len=20)
    in_pieces(model, cache, (6, 8), ids=IDS.flip(0, 1))
    with torch.inference_mode():
        cache.reset()
    torch.testing.assert_close(in_pieces(model, cache, (5, 9)), whole, **ALMOST)


def test_static_cache_of_a_base_with_sliding_windows_is_long_enough_for_the_head(tiny_model, save_head, tmp_path):
    """Half of the layers see six tokens; the head sees all."""
    save_head(tiny_model("gemma2"), tmp_path, architecture="transformer", merged=True)
    model = load(tmp_path, sliding_window=6)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    with torch.inference_mode():
        static = model.generate(IDS, cache_implementation="static", **settings)
        plain = model.generate(IDS, use_cache=False, **settings)
    assert [layer.max_cache_len for layer in static.past_key_values.layers] == [6, 17, 17]
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(plain.logits), **ALMOST)


def test_two_heads_have_a_place_in_the_cache_each(folder, save_head, tiny_model, tmp_path):
    model = load(folder)
    first = model.llmrl_heads["temperature"]
    second = save_head(tiny_model("llama"), tmp_path, architecture="transformer")["temperature"]
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.7)
    model.attach_heads(torch.nn.ModuleDict({"first": first, "second": second}))
    with torch.inference_mode():
        whole = model(input_ids=IDS, use_cache=False).logits
        cache = model(input_ids=IDS[:, :1], use_cache=True).past_key_values
    assert [layer.head for layer in cache.layers if hasattr(layer, "head")] == ["first", "second"]
    torch.testing.assert_close(in_pieces(model, None, (5, 1, 8)), whole, **ALMOST)


def test_cropped_cache_forgets_in_the_head_too(model, whole):
    with torch.inference_mode():
        out = model(input_ids=IDS, use_cache=True)
        cache = out.past_key_values
        assert [type(layer).__name__ for layer in cache.layers][-1] == "GrowingHeadLayer"
        cache.crop(-6)
        again = model(input_ids=IDS[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole[:, 8:], **ALMOST)


@pytest.mark.parametrize(
    "keep", [1, 3, torch.tensor([2, 9]), torch.arange(14).flip(0)], ids=["1", "3", "rows", "another order"]
)
def test_logits_to_keep_are_rows_of_the_whole(model, whole, keep):
    rows = keep if torch.is_tensor(keep) else slice(-keep, None)
    with torch.inference_mode():
        model(input_ids=IDS)  # the first call is checked against the decoder's states, later ones are not
        torch.testing.assert_close(model(input_ids=IDS, logits_to_keep=keep).logits, whole[:, rows], **ALMOST)


def test_base_that_computes_all_rows_whatever_is_asked_for(folder, model, whole):
    class AllRows(LlamaForCausalLM):
        def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
            return super().forward(input_ids, **kwargs)

    class WithHeads(LogitsHeadsMixin, AllRows):
        forward = forward_with_heads(AllRows.forward)

    other = WithHeads(model.config).eval()
    other.attach_heads(copy.deepcopy(model.llmrl_heads))
    other.load_state_dict(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(other(input_ids=IDS, logits_to_keep=3).logits, whole, **ALMOST)


def test_base_that_changes_its_states_before_the_output_embedding_is_refused(folder):
    model = load(folder)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,), prepend=True)
    with torch.inference_mode(), pytest.raises(ModelError, match="changes its hidden states"):
        model(input_ids=IDS)


def test_heads_that_are_replaced_leave_nothing_behind(folder):
    model = load(folder)
    for _ in range(2):
        model.attach_heads(model.llmrl_heads)
    with torch.inference_mode():
        model(input_ids=IDS)
    assert [name for name, value in vars(model).items() if torch.is_tensor(value)] == []  # no states after the call
    assert len(model.get_output_embeddings()._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    model.attach_heads(torch.nn.ModuleDict())
    assert not model.model._forward_hooks


def test_bfloat16_pieces_stay_near_the_whole(folder):
    model = load(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        whole = model(input_ids=IDS, use_cache=False).logits
        pieces = in_pieces(model, None, (5, 1, 8))
        cache = model(input_ids=IDS, use_cache=True).past_key_values
    assert whole.dtype == torch.float32
    assert cache.layers[-1].keys.dtype == torch.bfloat16  # as in vLLM, where a cache has one dtype
    assert (pieces - whole).abs().mean() < 0.02 * whole.abs().mean()


def test_cache_filled_by_another_model_is_refused(model, tiny_model):
    base = load(tiny_model("llama"))
    with torch.inference_mode():
        cache = base(input_ids=IDS, use_cache=True).past_key_values
        with pytest.raises(ModelError, match="holds 14 tokens and the temperature head has seen 0"):
            model(input_ids=IDS[:, :1], past_key_values=cache)


def test_cache_of_an_unknown_kind_is_refused(model):
    class Other(DynamicCache):
        @property
        def layers(self):
            return []

        @layers.setter
        def layers(self, value):
            pass

        def update(self, key, value, layer_idx, *args, **kwargs):
            return key, value

        def get_seq_length(self, layer_idx=0):
            return 0

    with torch.inference_mode(), pytest.raises(ModelError, match="cannot keep its state in a Other"):
        model(input_ids=IDS, past_key_values=Other())


def test_visible_masks():
    positions = torch.tensor([2, 3])
    rows = visible(None, positions, 5)[0, 0].int().tolist()
    assert rows == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    padded = visible(torch.tensor([[0, 1, 1, 1]]), positions, 5)[0, 0].int().tolist()
    assert padded == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]]
    itself = visible(torch.tensor([[0, 0, 0, 1]]), positions, 5)[0, 0].int().tolist()
    assert itself == [[0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    added = torch.tensor([[[[float("-inf"), 0.0, 0.0, float("-inf")], [float("-inf"), 0.0, 0.0, 0.0]]]])
    assert visible(added, positions, 4)[0, 0].int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    assert visible({"full_attention": added}, positions, 4).equal(visible(added, positions, 4))
    with pytest.raises(ModelError, match="sliding windows only"):
        visible({"sliding_attention": added}, positions, 4)


def test_sliding_windows_with_a_static_cache_are_refused(tiny_model, save_head, tmp_path):
    save_head(tiny_model("mistral"), tmp_path, architecture="transformer")
    model = load(tmp_path)
    model.config.sliding_window = 4
    mask = torch.ones(1, 1, 14, 14).tril().bool()
    with torch.inference_mode(), pytest.raises(ModelError, match="sliding windows"):
        model(input_ids=IDS[:1], attention_mask=mask)

"""Policy and values in training: packed and padded rows alike, losses against loops written out, what each loss reaches."""

import pytest
import torch
from hindsight_models import DIALOGUES, TINY, batch_of, small_llama
from transformers import AutoTokenizer, GraniteConfig, GraniteForCausalLM, OPTConfig, OPTForCausalLM

from llmrl.errors import CheckpointError, ModelError, UsageError
from llmrl.heads import HeadSpec
from llmrl.hindsight.batches import check_packing, examples_of
from llmrl.hindsight.encode import Encoded
from llmrl.hindsight.model import DialogueModel, make_trainable
from llmrl.hindsight.objective import Objective, sums_of
from llmrl.hindsight.small_model import word_tokenizer
from llmrl.hindsight.targets import NO_STATE, Span
from llmrl.value_heads import ValueHead

WORDS = word_tokenizer(m.content for one in DIALOGUES for m in one.messages)


def model_of(trunk="shared", kind="linear", seed=0, tuning="full"):
    head = ValueHead(HeadSpec("value", kind, 16, len(WORDS), 0 if kind == "linear" else 5))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(0, 0.3, generator=draw)
    model = DialogueModel(make_trainable(small_llama(len(WORDS)), tuning, 4, 0), head, trunk)
    with torch.no_grad():
        for parameter in model.target.parameters():  # else the slow copies are the heads
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def sums(model, batch, **options):
    return sums_of(model, model, batch, Objective(**options))


@pytest.mark.parametrize("method", ["ilql", "mc", "awr", "bc"])
@pytest.mark.parametrize("kind", ["turn", "token"])
def test_packed_and_padded_rows_have_the_same_losses(method, kind):
    model = model_of()
    padded, packed = (batch_of(WORDS, kind=kind, packing=packing)[0] for packing in (False, True))
    assert padded["input_ids"].shape[0] == 3
    assert packed["input_ids"].shape[0] == 1
    one, other = (sums(model, batch, method=method, cql=0.1 if method == "ilql" else 0.0) for batch in (padded, packed))
    for name in ("policy", "q", "v", "cql"):
        assert getattr(one, name).item() == pytest.approx(getattr(other, name).item(), rel=1e-4, abs=1e-5), name
    alone = [sums(model, batch_of(WORDS, [d], kind=kind)[0], method=method) for d in DIALOGUES]
    assert sum(s.policy.item() for s in alone) == pytest.approx(one.policy.item(), rel=1e-4)
    assert sum(s.v.item() for s in alone) == pytest.approx(one.v.item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("trunk", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["turn", "token"])
def test_ilql_is_its_formula_token_by_token(trunk, kind):
    """Written out with loops over one dialogue at a time, from hidden states that transformers returns."""
    model, tau, cql = model_of(trunk), 0.8, 0.3
    if trunk == "separate":
        with torch.no_grad():
            for parameter in model.values.parameters():
                parameter.add_(0.05)
    batch, rows = batch_of(WORDS, kind=kind, discount=0.9)
    found = sums(model, batch, method="ilql", expectile=tau, cql=cql, low=-1.2, high=0.9)
    nll = q_sum = v_sum = cql_sum = 0.0
    for row in rows:
        ids, back = torch.tensor([row.input_ids]), row.backup(kind, 0.9, "turn")
        with torch.no_grad():
            out = model.policy(ids, output_hidden_states=True)
            values = out if trunk == "shared" else model.values(ids, output_hidden_states=True)
            h, logits = values.hidden_states[-1][0], out.logits[0].log_softmax(-1)
            for i, position in enumerate(back.position):
                token = row.input_ids[position + 1]
                nll -= logits[position, token].item()
                after = back.next_position[i]
                later = 0.0 if after == NO_STATE else model.head.v(h[after]).item()
                y = min(max(back.reward[i] + back.discount[i] * later, -1.2), 0.9)
                for q in model.head.q(h[position]):
                    q_sum += (q[token].item() - y) ** 2
                    cql_sum += (torch.logsumexp(q, 0) - q[token]).item()
            for position, i in zip(back.value_position, back.value_action, strict=True):
                state, token = h[back.position[i]], row.input_ids[back.position[i] + 1]
                u = model.target.q(state)[:, token].min().item() - model.head.v(h[position]).item()
                v_sum += (tau if u >= 0 else 1 - tau) * u * u
    assert found.policy.item() == pytest.approx(nll, rel=1e-4)
    assert found.q.item() == pytest.approx(q_sum, rel=1e-4)
    assert found.v.item() == pytest.approx(v_sum, rel=1e-4)
    assert found.cql.item() == pytest.approx(cql_sum, rel=1e-4)


def test_mc_and_awr_are_their_formulas():
    model = model_of()
    batch, rows = batch_of(WORDS)
    mc, awr = sums(model, batch, method="mc"), sums(model, batch, method="awr", awr_temperature=0.7)
    q_sum = v_sum = weighted = 0.0
    for row in rows:
        back = row.backup("turn", 1.0, "turn")
        with torch.no_grad():
            out = model.policy(torch.tensor([row.input_ids]), output_hidden_states=True)
        h, logits = out.hidden_states[-1][0], out.logits[0].log_softmax(-1)
        v = [model.head.v(h[p]).item() for p in back.value_position]
        for i, position in enumerate(back.position):
            token = row.input_ids[position + 1]
            q_sum += ((model.head.q(h[position])[:, token] - back.to_go[i]) ** 2).sum().item()
            weight = min(torch.tensor((back.to_go[i] - v[back.turn[i]]) / 0.7).exp().item(), 20.0)
            weighted -= weight * logits[position, token].item()
        v_sum += sum((a - back.to_go[i]) ** 2 for a, i in zip(v, back.value_action, strict=True))
    assert (mc.q.item(), mc.v.item()) == (pytest.approx(q_sum, rel=1e-4), pytest.approx(v_sum, rel=1e-4))
    assert (awr.policy.item(), awr.v.item()) == (pytest.approx(weighted, rel=1e-4), pytest.approx(v_sum, rel=1e-4))
    assert awr.q.item() == 0


def test_what_each_loss_reaches():
    """Targets, slow copies and bootstrapped states get no gradient; a separate trunk keeps values away from the policy."""
    for trunk in ("shared", "separate"):
        model = model_of(trunk)
        found = sums(model, batch_of(WORDS)[0], method="ilql")
        (found.q + found.v).backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert not any(name.startswith("target.") for name in touched)
        assert {"head.q_weight", "head.v_weight"} <= touched
        assert any(name.startswith("policy.") for name in touched) == (trunk == "shared")
        assert any(name.startswith("values.") for name in touched) == (trunk == "separate")


def test_a_frozen_base_is_shared_by_both_trunks():
    model = model_of("separate", tuning="lora")
    frozen = [
        (p, q) for p, q in zip(model.policy.parameters(), model.values.parameters(), strict=True) if not p.requires_grad
    ]
    trained = [
        (p, q) for p, q in zip(model.policy.parameters(), model.values.parameters(), strict=True) if p.requires_grad
    ]
    assert frozen
    assert trained
    assert all(p is q for p, q in frozen)
    assert all(p is not q and torch.equal(p, q) for p, q in trained)


def test_slow_copies_move_by_the_rate_and_v_has_none():
    model = model_of()
    before = [p.clone() for p in model.target.q_parameters()]
    v_before = model.target.v_weight.clone()
    model.move_target(0.25)
    for old, slow, fast in zip(before, model.target.q_parameters(), model.head.q_parameters(), strict=True):
        assert torch.allclose(slow, old + 0.25 * (fast - old), atol=1e-6)
    assert torch.equal(model.target.v_weight, v_before)


def test_a_checkpoint_holds_what_training_changes():
    model, other = model_of(tuning="lora", seed=0), model_of(tuning="lora", seed=1)
    state = model.trained_state()
    assert all("lora_" in name or name.startswith(("head.", "target.")) for name in state)
    other.load_trained_state(state)
    batch = batch_of(WORDS)[0]
    assert sums(other, batch).v.item() == sums(model, batch).v.item()
    with pytest.raises(CheckpointError, match="another model or method"):
        model_of(tuning="lora", kind="low_rank").load_trained_state(state)


def test_soft_capped_logits_are_the_models_own():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8,
        )
    ).eval()  # fmt: skip
    model = DialogueModel(gemma, None)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    batch, _ = batch_of(tokenizer)
    batch["input_ids"] %= 40
    with torch.no_grad():
        wanted = gemma(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)[
            batch["position"]
        ]
        assert torch.allclose(model.logits(model(**batch).policy), wanted, atol=1e-5)


def test_logits_are_the_models_own_whatever_it_does_to_them(monkeypatch):
    """Granite divides its logits by a constant; a loss on other logits would train another model."""
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=4.0,
    )  # fmt: skip
    model, ids = DialogueModel(GraniteForCausalLM(config).eval(), None), [1, 5, 9, 2]
    batch = {"input_ids": torch.tensor([ids])} | dict.fromkeys(
        ("position", "next_position", "value_position"), torch.arange(4)
    )
    torch.testing.assert_close(model.logits(model.states(batch).policy), model.policy(batch["input_ids"]).logits[0])
    model.check_logits(ids)
    monkeypatch.setattr("llmrl.hindsight.model.scale_and_cap", lambda config: (1.0, None))
    with pytest.raises(ModelError, match="in a way llmrl does not know"):
        model.check_logits(ids)


def test_packing_is_refused_where_dialogues_would_read_each_other():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        word_embed_proj_dim=16,
    )  # fmt: skip
    rows = [Encoded(name, tuple(range(3, 13)), (Span(4, 8, 1.0),), True, 1.0) for name in "ab"]
    examples = examples_of(rows, "turn", 1.0, "turn")
    check_packing(DialogueModel(small_llama(), None), examples)
    with pytest.raises(UsageError, match="reads from one dialogue into the next"):
        check_packing(DialogueModel(OPTForCausalLM(config), None), examples)


def test_what_no_loss_reaches_is_not_trained():
    head = ValueHead(HeadSpec("value", "linear", 16, 40))
    model = DialogueModel(small_llama(), head, "separate")
    assert not model.values.lm_head.weight.requires_grad
    assert model.policy.lm_head.weight.requires_grad
    assert model.values.model.embed_tokens.weight.requires_grad
